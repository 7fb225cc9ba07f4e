"""The table renders the same cells to JSON, Markdown and the terminal, and always says what a figure is."""

import io

import msgspec
import pytest
from rich.console import Console

from megalith.base.errors import ConfigError
from megalith.report.table import Column, Table, render_cell, render_number


def example() -> Table:
    table = Table(
        columns=[
            Column("name", "model"),
            Column("kv_bytes", "KV", "bytes", "predicted"),
            Column("ttft_ns", "TTFT", "duration_ns", "measured"),
            Column("hit_share", "hits", "share", "simulated"),
        ],
        title="a | b",
        notes=["one note"],
    )
    table.add("x|y", 3 << 30, 2_810_000, 0.125)
    table.add("empty", None, None, None)
    return table


def test_json_keeps_raw_values_and_natures() -> None:
    data = msgspec.json.decode(msgspec.json.encode(example().to_json()))
    assert data["rows"][0] == {"name": "x|y", "kv_bytes": 3 << 30, "ttft_ns": 2_810_000, "hit_share": 0.125}
    assert [c["nature"] for c in data["columns"]] == ["given", "predicted", "measured", "simulated"]


def test_markdown_escapes_and_labels() -> None:
    lines = example().to_markdown().splitlines()
    assert lines[2] == "| model | KV (predicted) | TTFT (measured) | hits (simulated) |"
    assert lines[4] == "| x\\|y | 3.00 GiB | 2.81 ms | 12.5 % |"
    assert lines[5] == "| empty | - | - | - |"
    assert lines[-1] == "- one note"


def test_terminal_shows_every_label_and_takes_markup_literally() -> None:
    table = example()
    table.add("[red]not markup[/]", 1, 1, 1.0)
    out = io.StringIO()
    Console(file=out, width=100).print(table.to_rich())
    text = out.getvalue()
    for expected in ("predicted", "measured", "simulated", "3.00 GiB", "2.81 ms", "[red]not markup[/]", "one note"):
        assert expected in text


def test_wrong_row_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 columns, the row has 1"):
        example().add("x")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.14159, "3.14"), (12345.6, "12,300"), (0.0012345, "0.00123"), (9.999, "10.0"), (-5.5, "-5.50")],
)
def test_numbers(value: float, text: str) -> None:
    assert render_number(value) == text


def test_cells() -> None:
    assert render_cell(1234567, Column("n", "n", "count")) == "1,234,567"
    assert render_cell(True, Column("n", "n")) == "yes"
