"""The power of rows over days: means as lines, the highest samples as their upper edge, the budget as a line.

Knows samples and a budget; must not know who drew the power.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalith.report.plot import check_plot_path
from megalith.report.plot_frame import Caption, framed, save

_POINTS = 700


def plot_power(
    path: Path,
    caption: Caption,
    shares: Mapping[str, NDArray[np.float32]],
    sample_s: float,
    lines: Mapping[str, float],
    mark: Sequence[str] = (),
) -> None:
    """Draw shares of the budget by label; `lines` are levels by label, and those in `mark` stand out."""
    check_plot_path(path)
    figure, (panel,) = framed(caption)
    hours = 0.0
    for label, samples in shares.items():
        width = max(1, len(samples) // _POINTS)
        table = samples[: len(samples) // width * width].reshape(-1, width)
        at_h = (np.arange(len(table)) + 0.5) * width * sample_s / 3600.0
        (line,) = panel.plot(at_h, table.mean(axis=1), linewidth=1, label=label)
        panel.fill_between(at_h, table.min(axis=1), table.max(axis=1), color=line.get_color(), alpha=0.2, linewidth=0)
        hours = max(hours, float(at_h[-1]))
    for label, level in lines.items():
        style = ("-", "tab:red", 1.5) if label in mark else ("--", "0.4", 1.0)
        panel.axhline(level, linestyle=style[0], color=style[1], linewidth=style[2])
        panel.text(hours, level, f" {label}", va="center", fontsize="x-small", color=style[1])
    panel.set(xlabel="hours", ylabel="share of the power budget (mean; least to most)")
    panel.legend(fontsize="small", loc="lower left")
    save(figure, path)
