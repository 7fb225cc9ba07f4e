"""Recorded traces: CSV or JSON-lines files, gzipped or not, streamed in the order of the file.

Knows files; `trace_rows.py` knows what is in them, and `replay.py` makes requests of it.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megalith.base.errors import ConfigError
from megalith.specs.trace import TraceColumns, TraceFormat
from megalith.specs.trace_rows import Place, TraceRow, csv_rows, in_order, json_rows

_BUFFER_BYTES = 1 << 16


def read_rows(path: Path, columns: TraceColumns | None = None, form: TraceFormat | None = None) -> Iterator[TraceRow]:
    """The rows of a trace, at least one, none earlier than the one before it; counts below 1 token become 1.

    `columns` None: recognised by their names. `form` None: by the name of the file. Never more than some kilobytes of
    the file are in memory. Raises ConfigError, naming the line, for anything that cannot be understood.
    """
    if not path.is_file():
        raise ConfigError(f"There is no trace at {path}.", "Give a .csv or .jsonl file, gzipped or not.")
    at = Place()
    try:
        with _opened(path) as stream:
            if (form or trace_format(path)) == "csv":
                with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                    yield from in_order(csv_rows(text, path, columns), path, at)
            else:
                yield from in_order(json_rows(stream, path, columns), path, at)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        where = f" after line {at.line}" if at.line else ""
        what = f"The trace {path} cannot be read{where} ({error})."
        raise ConfigError(what, "Give UTF-8 text, gzipped or not, and fetch it again if it was cut off.") from None
    if not at.line:
        raise ConfigError(f"The trace {path} has no requests.", "Give a file with at least one row.")


def trace_format(path: Path) -> TraceFormat:
    """By the name: .csv is CSV, anything else JSON lines."""
    return "csv" if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")) else "jsonl"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if path.name.lower().endswith(".gz"):
            # GzipFile splits lines in Python; the buffer above it does so in C.
            yield io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER_BYTES)
        else:
            yield file
