"""Recorded traces: rows of a CSV or JSON-lines file, gzipped or not, streamed in the order of the file.

Knows column names, clocks and what a broken row looks like; the rows become requests in `workload.py`. Times stay whole
nanoseconds from the text to the request, so nothing is lost to floating point where the file is exact.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, TypeAlias

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs.trace_values import TimeUnit, chained, clock, json_clock, parse_count, parse_ids

_MAX_TOKENS = 10**9
_MAX_NS = 9 * 10**18
"""Times fit into 64 bits, 292 years."""
_BUFFER_BYTES = 1 << 16

TraceFormat: TypeAlias = Literal["csv", "jsonl"]


class TraceColumns(Config):
    """Which column of a trace is what."""

    arrival: str | None
    """None: the trace has lengths only."""
    input: str
    output: str
    unit: TimeUnit = "s"
    """Of the arrivals; `iso` is a timestamp such as 2023-11-16 18:15:46.6805900."""
    hashes: str | None = None
    """Prefix ids, one for each block of the prompt."""
    priority: str | None = None
    hash_kind: Literal["prefix", "content"] = "prefix"
    """prefix: an id names everything up to the end of its block. content: only its own block; they are chained here."""


KNOWN: dict[str, TraceColumns] = {
    "Azure": TraceColumns(arrival="TIMESTAMP", unit="iso", input="ContextTokens", output="GeneratedTokens"),
    "Mooncake": TraceColumns(
        arrival="timestamp", unit="ms", input="input_length", output="output_length", hashes="hash_ids"
    ),
    "Vidur": TraceColumns(arrival="arrived_at", input="num_prefill_tokens", output="num_decode_tokens"),
    "splitwise-sim": TraceColumns(arrival="arrival_timestamp", input="prompt_size", output="token_size"),
    "BurstGPT": TraceColumns(arrival="Timestamp", input="Request tokens", output="Response tokens"),
    "megalith": TraceColumns(arrival="at_s", input="input_tokens", output="output_tokens"),
    "megalith, ms": TraceColumns(arrival="timestamp_ms", unit="ms", input="input_tokens", output="output_tokens"),
    "LLMServingSim": TraceColumns(arrival="arrival_s", input="input_tokens", output="output_tokens"),
}
"""Formats that are recognised by their columns, the first that fits."""


class TraceRow(NamedTuple):
    """One row. `at_ns` is as the file has it (since the epoch, the start, ...), 0 where the trace has no times."""

    line: int
    at_ns: int
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...]
    priority: int


_quick_row: Callable[[tuple[int, int, int, int, tuple[int, ...], int]], TraceRow] = partial(tuple.__new__, TraceRow)
"""`TraceRow(*fields)` without the Python call that a NamedTuple's constructor is."""


def read_rows(path: Path, columns: TraceColumns | None = None, form: TraceFormat | None = None) -> Iterator[TraceRow]:
    """The rows of a trace, at least one, none earlier than the one before it; counts below 1 token become 1.

    `columns` None: recognised by their names. `form` None: by the name of the file. Never more than some kilobytes of
    the file are in memory. Raises ConfigError, naming the line, for anything that cannot be understood.
    """
    if not path.is_file():
        raise ConfigError(f"There is no trace at {path}.", "Give a .csv or .jsonl file, gzipped or not.")
    rows = _csv_rows if (form or trace_format(path)) == "csv" else _json_rows
    last_line, last_ns = 0, -1
    try:
        with _opened(path) as stream:
            for row in rows(stream, path, columns):
                if row[1] < last_ns:
                    _refuse_order(path, row, last_line, last_ns)
                last_line, last_ns = row[0], row[1]
                yield row
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        where = f" after line {last_line}" if last_line else ""
        what = f"The trace {path} cannot be read{where} ({error})."
        raise ConfigError(what, "Give UTF-8 text, gzipped or not, and fetch it again if it was cut off.") from None
    if not last_line:
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


def _csv_rows(stream: BinaryIO, path: Path, columns: TraceColumns | None) -> Iterator[TraceRow]:
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t" if ".tsv" in path.suffixes else ",")
        header = next(rows, None)
        if not header:
            return
        columns = _check_columns(columns or recognise(header, path), header, path)
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
                _refuse(path, rows.line_num, f"it has {len(row)} of {len(header)} columns")
            except (ValueError, TypeError, OverflowError) as error:
                _refuse(path, rows.line_num, str(error))
            yield _row(path, rows.line_num, at_ns, counts, chained(ids) if content else ids, level)


def _row(path: Path, line: int, at_ns: int, counts: tuple[int, int], ids: tuple[int, ...], priority: int) -> TraceRow:
    prompt, answer = counts
    if not 1 <= prompt <= _MAX_TOKENS or not 1 <= answer <= _MAX_TOKENS or not 0 <= at_ns <= _MAX_NS:
        if at_ns < 0:
            _refuse(path, line, f"it arrives at {at_ns / 1e9:g} s, before zero")
        if at_ns > _MAX_NS:
            _refuse(path, line, f"it arrives {at_ns / 1e9:g} s after zero, more than {_MAX_NS / 1e9:g} s")
        if not (0 <= prompt <= _MAX_TOKENS and 0 <= answer <= _MAX_TOKENS):
            _refuse(path, line, f"it has {prompt} prompt tokens and {answer} output tokens")
        return TraceRow(line, at_ns, max(1, prompt), max(1, answer), ids, priority)
    return _quick_row((line, at_ns, prompt, answer, ids, priority))


def _json_rows(stream: BinaryIO, path: Path, columns: TraceColumns | None) -> Iterator[TraceRow]:
    decode: Callable[[bytes], Any] | None = None
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            if decode is None:
                columns = columns or recognise(list(msgspec.json.decode(line, type=dict[str, Any])), path, number)
                decode, to_ns = _row_decoder(columns), json_clock(columns.unit)
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
            _refuse(path, number, str(error))
        yield _row(path, number, at_ns, counts, chained(ids) if content else ids, level)


def _row_decoder(columns: TraceColumns) -> Callable[[bytes], Any]:
    """A decoder that reads the mapped fields and skips all others."""
    number = int | float | str
    fields: list[Any] = [("prompt", number), ("answer", number)]
    names = {"prompt": columns.input, "answer": columns.output}
    if columns.arrival is not None:
        fields.append(("at", number))
        names["at"] = columns.arrival
    if columns.priority is not None:
        fields.append(("level", int))
        names["level"] = columns.priority
    if columns.hashes is not None:
        fields.append(("hashes", list[int | str] | None, None))
        names["hashes"] = columns.hashes
    row = msgspec.defstruct("row", fields, rename=names, frozen=True, gc=False)
    return msgspec.json.Decoder(row).decode


def recognise(names: Sequence[str], path: Path, line: int = 1) -> TraceColumns:
    """The known format that has these columns. Raises ConfigError."""
    for columns in KNOWN.values():
        if {columns.arrival, columns.input, columns.output} <= set(names):
            return columns
    shown = ", ".join(str(name) for name in names[:8])
    what = f"Line {line} of {path} has the columns {shown or '(none)'}, which is no format that is known."
    hint = "Say which they are, as in `TRACE:at=COLUMN,unit=ms,input=COLUMN,output=COLUMN`. Known: "
    raise ConfigError(what, hint + "; ".join(f"{c.arrival}, {c.input}, {c.output}" for c in KNOWN.values()) + ".")


def _check_columns(columns: TraceColumns, header: Iterable[str], path: Path) -> TraceColumns:
    known = list(header)
    for name in (columns.arrival, columns.input, columns.output, columns.hashes, columns.priority):
        if name is None or name in known:
            continue
        if name == columns.hashes and columns in KNOWN.values():
            return msgspec.structs.replace(columns, hashes=None)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"Line 1 of {path} has no column {name!r}.", f"Did you mean {near[0]!r}? It has {', '.join(known)}."
        )
    return columns


def _refuse(path: Path, line: int, why: str) -> NoReturn:
    what = f"Line {line} of {path} cannot be read: {why.rstrip('.')}."
    raise ConfigError(what, "Correct that line or leave it out; counts are whole numbers from 0, times run forward.")


def _refuse_order(path: Path, row: TraceRow, last_line: int, last_ns: int) -> NoReturn:
    what = f"Line {row.line} of {path} arrives {(last_ns - row.at_ns) / 1e9:g} s before line {last_line}."
    raise ConfigError(what, "Sort the file by arrival: a trace is read as a stream, in the order of time.")
