"""Columns of numbers to a Parquet file in bounded memory, through DuckDB, which is imported when a file is asked for.

Knows columns; must not know what they mean. Rows go into a DuckDB table on disk beside the target and from there into
the file in one pass, so neither the rows nor the file are ever in memory. The target appears when it is complete: until
then, and after a failure, there is none of that name (or still the old one).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError, MachineError
from megalith.report.guarded import WholeFile, guarded

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Array = NDArray[Any]

ROW_GROUP = 100_000
_BATCH_ROWS = 50_000
_MEMORY = "256MB"
_TYPES = {"int": ("BIGINT", np.int64), "float": ("DOUBLE", np.float64)}


@dataclass(frozen=True, slots=True)
class ParquetColumn:
    """One column of a file. `name` ends in its unit."""

    name: str
    kind: Literal["int", "float"] = "int"
    never: int | None = None
    """This value stands for nothing and becomes NULL."""
    labels: Sequence[str] = ()
    """Not empty: the column holds indices into these texts, and the file the texts."""


def check_parquet_path(path: Path) -> None:
    """Raise before the work, not after it: ConfigError for the name, MachineError without DuckDB."""
    if path.suffix != ".parquet":
        raise ConfigError(f"{path.name!r} is no Parquet file.", "End the name in .parquet.")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}.", "Make it, or name another file.")
    try:
        import duckdb
    except ImportError:
        hint = "Install it with `pip install 'megalith[analysis]'`, or leave the Parquet file away."
        raise MachineError("duckdb is not installed, so no Parquet file can be written.", hint) from None
    del duckdb


class ParquetWriter(WholeFile):
    """Writes one file. Use as a context manager: the file appears at the end, and not at all after an exception.

    `facts` are stored in the file's metadata as text. Raises as `check_parquet_path` does, and MachineError when the
    disk is full or cannot be written; nothing is left behind then.
    """

    def __init__(self, path: Path, columns: Sequence[ParquetColumn], facts: Mapping[str, str] | None = None) -> None:
        check_parquet_path(path)
        self.rows = 0
        self._path = path
        self._columns = tuple(columns)
        self._facts = dict(facts or {})
        self._held: list[Mapping[str, Array]] = []
        self._held_rows = 0
        self._database = path.with_name(f".{path.name}.{os.getpid()}.rows")
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._connection: DuckDBPyConnection | None = None
        declared = ", ".join(f"{_name(column.name)} {_TYPES[column.kind][0]}" for column in self._columns)
        with self._guarded():
            self._connection = _connect(self._database)
            self._connection.execute(f"CREATE TABLE held ({declared})")

    def append(self, columns: Mapping[str, Array]) -> None:
        """Take rows: an array of the same length for each column of the file; others are left out."""
        missing = [column.name for column in self._columns if column.name not in columns]
        sizes = {len(columns[column.name]) for column in self._columns if not missing}
        if missing or len(sizes) > 1:
            raise ValueError(f"columns {missing} are missing" if missing else f"columns of {sorted(sizes)} rows")
        self._held.append({column.name: columns[column.name] for column in self._columns})
        self._held_rows += sizes.pop()
        if self._held_rows >= _BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Complete the file and put it in its place."""
        if self._connection is None:
            return
        self._flush()
        with self._guarded():
            selected = ", ".join(_expression(column) for column in self._columns)
            facts = ", ".join(f"{_name(key)}: {_text(value)}" for key, value in self._facts.items())
            options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP}"
            options += f", KV_METADATA {{{facts}}}" if facts else ""
            self._connection.execute(f"COPY (SELECT {selected} FROM held) TO {_text(str(self._partial))} ({options})")
            self._disconnect()
            self._partial.replace(self._path)
            self.discard()

    def discard(self) -> None:
        """Give up; nothing is left behind but an older file of that name. After `close` it does nothing."""
        self._disconnect()
        self._held, self._held_rows = [], 0
        for leftover in (self._partial, self._database, self._database.with_name(self._database.name + ".wal")):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self._spill, ignore_errors=True)

    def _guarded(self) -> AbstractContextManager[None]:
        import duckdb

        return guarded(self._path, lambda: f"{self.rows:,} rows", self.discard, (duckdb.Error, OSError))

    @property
    def _spill(self) -> Path:
        return self._database.with_name(self._database.name + ".tmp")

    def _flush(self) -> None:
        if not self._held_rows or self._connection is None:
            return
        batch = {
            column.name: np.ascontiguousarray(
                np.concatenate([held[column.name] for held in self._held]), dtype=_TYPES[column.kind][1]
            )
            for column in self._columns
        }
        with self._guarded():
            self._connection.register("batch", batch)
            self._connection.execute("INSERT INTO held SELECT * FROM batch")
            self._connection.unregister("batch")
        self.rows += self._held_rows
        self._held, self._held_rows = [], 0

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        import duckdb

        # Closing writes the held rows once more, which a full disk refuses; nobody needs them now.
        with suppress(duckdb.Error):
            connection.close()


def read_parquet(path: Path) -> dict[str, Array]:
    """All columns of a file; numbers with NULLs come as masked arrays. Raises MachineError when it cannot be read."""
    check_parquet_path(path)
    import duckdb

    try:
        with duckdb.connect() as connection:
            found: dict[str, Array] = connection.execute(f"SELECT * FROM read_parquet({_text(str(path))})").fetchnumpy()
            return found
    except duckdb.Error as error:
        raise MachineError(f"{path} could not be read: {error}.", "Write it again.") from None


def _connect(database: Path) -> DuckDBPyConnection:
    import duckdb

    return duckdb.connect(str(database), config={"threads": 1, "memory_limit": _MEMORY})


def _expression(column: ParquetColumn) -> str:
    name = _name(column.name)
    if column.labels:
        return f"[{', '.join(map(_text, column.labels))}][{name} + 1] AS {name}"
    return name if column.never is None else f"NULLIF({name}, {column.never}) AS {name}"


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
