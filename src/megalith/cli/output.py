"""What all verbs agree on when they write: results on stdout, everything else on stderr, `--json` beside tables.

Progress and status lines appear only on a terminal; piped, a verb says nothing but its result. Rich is imported when
something has to be drawn.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from megalith.base.errors import MegalithError

if TYPE_CHECKING:
    from rich.console import Console

    from megalith.report.table import Table

JsonFlag = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document instead of tables.")]
"""Type of the `json` parameter of every verb."""

# Tables take only the width they need; piped, this is the most they may take.
_PIPED_WIDTH = 200


def result_console() -> Console:
    """A console on stdout, for results."""
    return _console(sys.stdout.isatty(), stderr=False)


def message_console() -> Console:
    """A console on stderr, for messages and progress."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(is_terminal: bool, *, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, width=None if is_terminal else _PIPED_WIDTH)


def say(message: str) -> None:
    """One status line on stderr; nothing when stderr is not a terminal."""
    if sys.stderr.isatty():
        print(_styled(message, "2"), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One warning on stderr, terminal or not."""
    print(f"{_styled('warning:', '33')} {message}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """`value` (plain data or msgspec structs) as one indented JSON document on stdout."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")
    sys.stdout.flush()


def print_tables(tables: Mapping[str, Table], *, json: bool, facts: Mapping[str, Any] | None = None) -> None:
    """Print tables for a person, or with `json` one document: `facts` and, by name, each table."""
    if json:
        print_json({**(facts or {}), **{name: table.to_json() for name, table in tables.items()}})
        return
    console = result_console()
    for table in tables.values():
        console.print(table.to_rich())


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs; yields `advance(by)`. `total` None: a spinner with a count.

    Gone when done, and never drawn where stderr is not a terminal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns,
        TextColumn(unit),
        TimeElapsedColumn(),
        console=message_console(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda by: bar.advance(task, by)


@contextmanager
def working(description: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while the block runs; yields `update(what is being done)`. Nothing without a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with message_console().status(description) as status:
        yield lambda part: status.update(f"{description}: {part}")


def route_logging() -> None:
    """Let warnings of the engine come out like ours: one line each on stderr, above a spinner where one turns."""
    import logging

    class Warnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warn(record.getMessage())

    logging.basicConfig(level=logging.WARNING, handlers=[Warnings()])


def print_error(error: MegalithError, *, json: bool) -> None:
    """An expected failure: one paragraph on stderr, or with `json` one JSON object on stdout."""
    if json:
        body = {"kind": type(error).__name__, "what": error.what, "hint": error.hint, "exit_code": error.exit_code}
        print_json({"error": body})
        return
    paragraph = f"error: {error}"
    if sys.stderr.isatty():
        width = max(40, min(120, shutil.get_terminal_size().columns))
        paragraph = textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
    print(paragraph.replace("error:", _styled("error:", "1;31"), 1), file=sys.stderr, flush=True)


def _styled(text: str, code: str) -> str:
    """`text` in an ANSI style where stderr is a terminal that wants colour (NO_COLOR is respected)."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
