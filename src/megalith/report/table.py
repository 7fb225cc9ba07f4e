"""One small typed table, rendered to the terminal, to JSON, to Markdown and to HTML.

A column says what its figures are (`measured`, `predicted`, `simulated`, or `given` for names and inputs); every
rendering shows it, so that a predicted and a measured figure can never be mistaken for one another. Cells hold plain
integers, floats, text or None; how they look is decided here and only here. Rich is imported when a terminal
rendering is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from megalith.base.errors import ConfigError
from megalith.base.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Nature = Literal["given", "measured", "predicted", "simulated"]
Kind = Literal["text", "count", "number", "bytes", "duration_ns", "share"]
Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `key` is its name in JSON and ends in its unit, `title` is what a person reads.

    `kind` chooses the rendering: count 12,345; number 3.14 (`digits` significant ones); bytes 1.50 GiB; duration_ns
    2.81 ms; share 0.125 as 12.5 %. JSON always carries the raw value.
    """

    key: str
    title: str
    kind: Kind = "text"
    nature: Nature = "given"
    digits: int = 3


@dataclass(slots=True)
class Table:
    """Columns and rows. `title` may be empty; `notes` are printed below, one a line."""

    columns: Sequence[Column]
    title: str = ""
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        """Append a row; as many cells as columns, else ConfigError."""
        if len(cells) != len(self.columns):
            raise ConfigError(f"Table {self.title!r} has {len(self.columns)} columns, the row has {len(cells)} cells.")
        self.rows.append(cells)

    def to_json(self) -> dict[str, Any]:
        """Plain data: title, columns (key, title, kind, nature), rows as objects by key, notes."""
        return {
            "title": self.title,
            "columns": [{"key": c.key, "title": c.title, "kind": c.kind, "nature": c.nature} for c in self.columns],
            "rows": [{c.key: cell for c, cell in zip(self.columns, row, strict=True)} for row in self.rows],
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """A Markdown table; the title becomes a bold line above it and the notes a list below."""
        heads = [_markdown_text(_heading(column, " ")) for column in self.columns]
        rules = [":---" if column.kind == "text" else "---:" for column in self.columns]
        body = [
            [_markdown_text(render_cell(cell, column)) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]
        lines = ["| " + " | ".join(cells) + " |" for cells in (heads, rules, *body)]
        if self.title:
            lines = [f"**{self.title}**", "", *lines]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """An HTML table with a caption; the notes become a list below."""
        heads = "".join(f"<th>{escape(_heading(column, ' '))}</th>" for column in self.columns)
        rows = "".join(
            "<tr>"
            + "".join(
                f'<td class="{"text" if column.kind == "text" else "number"}">{escape(render_cell(cell, column))}</td>'
                for cell, column in zip(row, self.columns, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        table = f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<div class="wide">{table}</div>' + (f"<ul>{notes}</ul>" if notes else "")

    def to_rich(self) -> RichTable:
        """A rich table for the terminal. Notes become its caption."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, style="bold") if self.title else None,
            caption=Text("\n".join(self.notes), style="dim") if self.notes else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
            pad_edge=False,
        )
        for column in self.columns:
            head = Text(column.title)
            if column.nature != "given":
                head.append(f"\n{column.nature}", style="dim italic")
            table.add_column(head, justify="left" if column.kind == "text" else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(render_cell(c, column)) for c, column in zip(row, self.columns, strict=True)))
        return table


def render_cell(cell: Cell, column: Column) -> str:
    """One cell as a person reads it; None is a dash."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    match column.kind:
        case "bytes":
            return format_bytes(cell)
        case "duration_ns":
            return format_duration(cell)
        case "share":
            return f"{100 * cell:.1f} %"
        case "count":
            return f"{cell:,.0f}"
        case _:
            return render_number(cell, column.digits)


def render_number(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, thousands separated: 0.00123, 3.14, 12,300."""
    if value == 0 or value != value or value in (float("inf"), float("-inf")):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".rpartition("e")[2])
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def tables_json(tables: Mapping[str, Table]) -> dict[str, Any]:
    """Several tables as one JSON object by name."""
    return {name: table.to_json() for name, table in tables.items()}


def _heading(column: Column, separator: str) -> str:
    return column.title if column.nature == "given" else f"{column.title}{separator}({column.nature})"


def _markdown_text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
