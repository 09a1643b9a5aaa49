"""QEMU's monitor: a thin QMP client that can hand over file descriptors.

QMP is JSON, one object a line, over a Unix socket. QEMU serves one client of a socket at a time, others wait
unanswered, so memshr connects for a few commands and hangs up.

What makes this hard: whoever answers may be hostile, since a guest may have broken out into its QEMU. So this is the
one door for what QEMU says, and behind it nothing is doubtful any more:

1. An answer belongs to the request whose ``id`` it has. Others are answers to somebody who gave up, and are dropped:
   QEMU gives the answer to a command of a client that has hung up to the next client.
2. Every wait has an end: for one answer, and for all answers of one connection together. A connection on which a wait
   was in vain is closed and stays closed.
3. A line, the number of things in it, and every word that is shown are limited.
4. What is read is asked for by its type (``Answer``). Words come out as one printable line each.
5. What breaks these rules is a ConnectionLostError, whatever it is.

``Monitor`` is what the rest of memshr asks. Two ways lead there: ``SocketMonitor``, the guest's own socket, and
``libvirt_monitor``, where libvirt holds that socket.

Errors: ConnectionLostError (no answer, no right answer, or QEMU went away), PermissionDeniedError, UnsupportedError (a
QEMU that is not known to do what is asked), MonitorError (QEMU refused).
Source: QEMU's ``docs/interop/qmp-spec``, ``qapi/misc.json``, ``monitor/qmp.c``; observed on QEMU 7.2.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from memshr.errors import BackendError, ConnectionLostError, PermissionDeniedError, UnsupportedError, printable

GREETING_DEADLINE_S = 3.0
ANSWER_DEADLINE_S = 60.0
PATIENCE_S = 180.0
"""How long the answers of one connection may take together."""

MOST_BYTES = 16 << 20
"""Longest line. A layout of a large guest (``info mtree -f``) takes megabytes."""
MOST_THINGS = 1 << 20
"""Most values in a line: each costs up to a hundred bytes in Python."""
LONGEST_WORD = 1024
"""Longest string that is shown or compared: a name, a state, a message."""

_DESCRIPTOR_NAME = "memshr"
