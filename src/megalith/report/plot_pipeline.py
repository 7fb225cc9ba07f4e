"""A picture of a pipeline: what each stream runs when, and how busy each resource is over time.

Knows bars and levels; must not know models. Matplotlib is imported when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megalith.report.plot_frame import Caption, framed, save

_COLOURS = {"first": "tab:blue", "second": "tab:orange"}


class Bar(NamedTuple):
    """One operator. Times in microseconds."""

    stream: str
    name: str
    start_us: float
    end_us: float
    half: str
    """`first` or `second` nano-batch."""


def plot_pipeline(
    caption: Caption,
    bars: Sequence[Bar],
    levels: Mapping[str, Sequence[tuple[float, float]]],
    span_us: tuple[float, float],
    path: Path,
) -> None:
    """Two panels into `path`: bars by stream, and levels (time, busy from then on) by resource. Raises as `save`."""
    figure, (gantt, busy) = framed(caption, 2)
    streams = list(dict.fromkeys(bar.stream for bar in bars))
    for bar in bars:
        at = streams.index(bar.stream)
        width = bar.end_us - bar.start_us
        gantt.barh(at, width, left=bar.start_us, color=_COLOURS[bar.half], edgecolor="white", height=0.7)
        middle = (bar.start_us + bar.end_us) / 2
        if span_us[0] <= middle <= span_us[1] and width > 0.03 * (span_us[1] - span_us[0]):
            gantt.text(middle, at, bar.name, ha="center", va="center", fontsize="x-small", rotation=90)
    gantt.set_yticks(range(len(streams)), streams)
    gantt.set(xlabel="µs", xlim=span_us, title="Operators; colours are nano-batches")
    for name, points in levels.items():
        busy.step([at for at, _ in points], [level for _, level in points], where="post", label=name)
    busy.set(xlabel="µs", xlim=span_us, ylim=(0, 1.05), title="Busy, of what kernels reach alone")
    if levels:
        busy.legend(loc="lower right")
    save(figure, path)
