"""Index spaces as types: numbers that are all int64 and must not be mixed up.

A page has a number in its domain (its gfn), in its guest, over all guests, in a page source, in a batch, in a pool.
Arrays of such numbers look alike. So each kind has a scalar type of its own, which exists for mypy only: an
``NDArray[PageId]`` keeps its kind when it is indexed or sliced, and is refused where another kind is wanted. Arithmetic
gives plain integers; ``of_kind`` says what they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:

    class Row(np.int64):
        """The number of a page in a page source, or in all sources of an estimate side by side."""

    class GuestPage(np.int64):
        """The number of a page in one QEMU guest, along its RAM ranges."""

    class PageId(np.int64):
        """The number of a page over all guests that a memshr has in hand."""

else:
    Row = GuestPage = PageId = np.int64

_Kind = TypeVar("_Kind", bound=np.int64)


def of_kind(kind: type[_Kind], numbers: NDArray[np.integer]) -> NDArray[_Kind]:
    """The same numbers, said to be of a kind. They are copied only if they are not int64."""
    return np.asarray(numbers, kind)
