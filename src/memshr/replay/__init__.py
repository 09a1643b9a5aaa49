"""Xen's calls by hand and from recordings: the language of the traces, its operations, and their replay.

A recording says, step by step, what a real Xen answered; ``replay`` runs the same operations on the embedded
hypervisor and compares every answer and the state after it. The same language, typed or read from a script, drives
any mechanism (``memshr ctl``).
"""

from memshr.replay.language import Line, parse_line
from memshr.replay.operations import OPERATIONS, Answer, Operations, ScriptError
from memshr.replay.trace import DIFFERENCES, ReplayResult, StepDifference, replay

__all__ = [
    "DIFFERENCES",
    "OPERATIONS",
    "Answer",
    "Line",
    "Operations",
    "ReplayResult",
    "ScriptError",
    "StepDifference",
    "parse_line",
    "replay",
]
