"""The rows of a recorded trace, from the lines of an open file.

Knows clocks and what a broken row looks like; must not open or close files: what is compiled does not clean up after
itself when nobody reads to the end (trace_file.py does). Times stay whole nanoseconds from the text to the request, so
nothing is lost to floating point where the file is exact.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from megalith.base.errors import ConfigError
from megalith.specs.trace import TraceColumns, check_columns, recognise, row_decoder
from megalith.specs.trace_values import chained, clock, json_clock, parse_count, parse_ids

_MAX_TOKENS: Final = 10**9
_MAX_NS: Final = 9 * 10**18
"""Times fit into 64 bits, 292 years."""


class TraceRow(NamedTuple):
    """One row. `at_ns` is as the file has it (since the epoch, the start, ...), 0 where the trace has no times."""

    line: int
    at_ns: int
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...]
    priority: int


_quick_row: Final[Callable[[tuple[int, int, int, int, tuple[int, ...], int]], TraceRow]] = partial(
    tuple.__new__, TraceRow
)
"""`TraceRow(*fields)` without the Python call that a NamedTuple's constructor is."""


class Place:
    """How far a file was read: the last line that was a row, 0 before the first."""

    def __init__(self) -> None:
        self.line = 0


def csv_rows(text: Iterable[str], path: Path, columns: TraceColumns | None) -> Iterator[TraceRow]:
    """The rows of a CSV file."""
    rows = csv.reader(text, delimiter="\t" if ".tsv" in path.suffixes else ",")
    header = next(rows, None)
    if not header:
        return
    columns = check_columns(columns or recognise(header, path), header, path)
    to_ns = clock(columns.unit)
    prompt, answer = header.index(columns.input), header.index(columns.output)
    at, hashes, priority = (
        None if name is None else header.index(name) for name in (columns.arrival, columns.hashes, columns.priority)
    )
    content = columns.hash_kind == "content"
    for row in rows:
        if not row:
            continue
        try:
            at_ns = 0 if at is None else to_ns(row[at])
            ids = () if hashes is None else parse_ids(row[hashes])
            level = 0 if priority is None else int(row[priority])
            counts = parse_count(row[prompt]), parse_count(row[answer])
        except IndexError:
            refuse(path, rows.line_num, f"it has {len(row)} of {len(header)} columns")
        except (ValueError, TypeError, OverflowError) as error:
            refuse(path, rows.line_num, str(error))
        yield _row(path, rows.line_num, at_ns, counts, chained(ids) if content else ids, level)


def _row(path: Path, line: int, at_ns: int, counts: tuple[int, int], ids: tuple[int, ...], priority: int) -> TraceRow:
    prompt, answer = counts
    if not 1 <= prompt <= _MAX_TOKENS or not 1 <= answer <= _MAX_TOKENS or not 0 <= at_ns <= _MAX_NS:
        if at_ns < 0:
            refuse(path, line, f"it arrives at {at_ns / 1e9:g} s, before zero")
        if at_ns > _MAX_NS:
            refuse(path, line, f"it arrives {at_ns / 1e9:g} s after zero, more than {_MAX_NS / 1e9:g} s")
        if not (0 <= prompt <= _MAX_TOKENS and 0 <= answer <= _MAX_TOKENS):
            refuse(path, line, f"it has {prompt} prompt tokens and {answer} output tokens")
        return TraceRow(line, at_ns, max(1, prompt), max(1, answer), ids, priority)
    return _quick_row((line, at_ns, prompt, answer, ids, priority))


def json_rows(stream: Iterable[bytes], path: Path, columns: TraceColumns | None) -> Iterator[TraceRow]:
    """The rows of a file of JSON lines."""
    decode: Callable[[bytes], Any] | None = None
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            if decode is None:
                columns = columns or recognise(list(msgspec.json.decode(line, type=dict[str, Any])), path, number)
                decode, to_ns = row_decoder(columns), json_clock(columns.unit)
                has_times, has_ids, has_level = (
                    columns.arrival is not None,
                    columns.hashes is not None,
                    columns.priority is not None,
                )
                content = columns.hash_kind == "content"
            row = decode(line)
            at_ns = to_ns(row.at) if has_times else 0
            level = row.level if has_level else 0
            ids = parse_ids(row.hashes) if has_ids and row.hashes else ()
            counts = parse_count(row.prompt), parse_count(row.answer)
        except (ValueError, TypeError, OverflowError) as error:  # msgspec's errors are ValueErrors
            refuse(path, number, str(error))
        yield _row(path, number, at_ns, counts, chained(ids) if content else ids, level)


def in_order(rows: Iterator[TraceRow], path: Path, at: Place) -> Iterator[TraceRow]:
    """The same rows, none of which may come earlier than the one before it; `at` says how far they are."""
    last_ns = -1
    for row in rows:
        line, at_ns = row[0], row[1]
        if at_ns < last_ns:
            what = f"Line {line} of {path} arrives {(last_ns - at_ns) / 1e9:g} s before line {at.line}."
            raise ConfigError(what, "Sort the file by arrival: a trace is read as a stream, in the order of time.")
        at.line, last_ns = line, at_ns
        yield row


def refuse(path: Path, line: int, why: str) -> NoReturn:
    """Raise ConfigError for a line."""
    what = f"Line {line} of {path} cannot be read: {why.rstrip('.')}."
    raise ConfigError(what, "Correct that line or leave it out; counts are whole numbers from 0, times run forward.")
