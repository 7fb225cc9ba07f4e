"""A picture of one figure of several things: a bar each.

Knows names and numbers; must not know what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalith.report.plot import check_plot_path
from megalith.report.plot_frame import Caption, framed, save
from megalith.report.table import render_number

_PLAIN, _CHOSEN = "tab:gray", "tab:blue"


def plot_bars(path: Path, caption: Caption, bars: Mapping[str, float], xlabel: str, chosen: str = "") -> None:
    """Bars from the top in the order given, each with its number; the chosen one in colour."""
    check_plot_path(path)
    figure, (panel,) = framed(caption)
    names = [name.replace("$", r"\$") for name in bars]
    colours = [_CHOSEN if name == chosen else _PLAIN for name in bars]
    drawn = panel.barh(range(len(bars)), list(bars.values()), color=colours)
    panel.bar_label(drawn, [render_number(value) for value in bars.values()], padding=3, fontsize="small")
    panel.set_yticks(range(len(bars)), names, fontsize="small")
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set(xlabel=xlabel.replace("$", r"\$"))
    save(figure, path)
