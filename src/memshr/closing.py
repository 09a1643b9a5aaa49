"""What is closed at the end of a ``with``."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """Base of the classes whose objects are context managers that close themselves."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give up what the object has open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
