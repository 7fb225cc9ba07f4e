"""Files that appear whole or not at all: what becomes of one that cannot be written."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megalith.base.errors import MachineError
from megalith.base.units import format_bytes


class WholeFile(ABC):
    """A writer whose file appears when it is closed. The end of a with block closes it, a failed one discards it."""

    @abstractmethod
    def close(self) -> object:
        """Complete the file and put it in its place."""

    @abstractmethod
    def discard(self) -> None:
        """Give up and leave no file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


@contextmanager
def guarded(
    path: Path,
    written: Callable[[], str],
    discard: Callable[[], object],
    failures: tuple[type[Exception], ...] = (OSError,),
) -> Iterator[None]:
    """Discard the file when the block fails, and turn one of `failures` into a MachineError that says how far it came.

    `written`: such as "12,000 rows".
    """
    try:
        yield
    except BaseException as error:
        so_far = written()
        with suppress(OSError):
            discard()
        if not isinstance(error, failures):
            raise
        free = format_bytes(shutil.disk_usage(path.parent).free)
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise MachineError(
            f"{path.name} could not be written after {so_far}: {reason[:300]}.",
            f"{free} are free in {path.parent}; make room, or name a file elsewhere.",
        ) from None
