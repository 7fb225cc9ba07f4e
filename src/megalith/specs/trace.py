"""The columns of recorded traces: which column of a file is what, said or recognised by name.

Knows names of columns; `trace_rows.py` reads the rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs.trace_values import TimeUnit

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


def recognise(names: Sequence[str], path: Path, line: int = 1) -> TraceColumns:
    """The known format that has these columns. Raises ConfigError."""
    for columns in KNOWN.values():
        if {columns.arrival, columns.input, columns.output} <= set(names):
            return columns
    shown = ", ".join(str(name) for name in names[:8])
    what = f"Line {line} of {path} has the columns {shown or '(none)'}, which is no format that is known."
    hint = "Say which they are, as in `TRACE:at=COLUMN,unit=ms,input=COLUMN,output=COLUMN`. Known: "
    raise ConfigError(what, hint + "; ".join(f"{c.arrival}, {c.input}, {c.output}" for c in KNOWN.values()) + ".")


def check_columns(columns: TraceColumns, header: Iterable[str], path: Path) -> TraceColumns:
    """The columns, all in this header. Raises ConfigError with the nearest name for one that it lacks."""
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


def row_decoder(columns: TraceColumns) -> Callable[[bytes], Any]:
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
