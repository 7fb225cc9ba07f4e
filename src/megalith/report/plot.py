"""Pictures of measured latencies and throughput. Matplotlib is imported when a picture is asked for, never before.

Knows samples and axes; knows nothing of requests or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalith.base.errors import ConfigError, MachineError
from megalith.base.units import NS_PER_S

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megalith.report.table import Nature

_FORMATS = (".png", ".svg", ".pdf")
_MS = 1e6
# Two pieces in one segment have a gap of zero, which a logarithmic axis cannot show: they stand at this, in ms.
_LOG_FLOOR_MS = 0.01


@dataclass(frozen=True, slots=True)
class LoadPicture:
    """What the picture of a load run shows. Latencies and times are integer nanoseconds.

    `latencies_ns` are samples by name (TTFT, ITL, ...); `finished` are (time of a piece of output, its tokens).
    """

    title: str
    nature: Nature
    latencies_ns: Mapping[str, Sequence[int]]
    finished: Sequence[tuple[int, float]]
    limits_ns: Mapping[str, int]
    """Service level by name, drawn as a line."""


def check_plot_path(path: Path) -> None:
    """Raise before the work, not after it: ConfigError for the name, MachineError without matplotlib."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"{path.name!r} is no picture format.", f"End the name in {', '.join(_FORMATS)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}.", "Make it, or name another file.")
    try:
        import matplotlib
    except ImportError:
        hint = "Install it with `pip install 'megalith[analysis]'`, or leave --plot away."
        raise MachineError("matplotlib is not installed, so nothing can be drawn.", hint) from None
    del matplotlib


def plot_load(picture: LoadPicture, path: Path) -> None:
    """Draw four panels into `path`: latency CDFs, output over time, and the TTFT and ITL histograms."""
    check_plot_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 2)
    figure.suptitle(f"{picture.title} ({picture.nature})")
    _draw_cdfs(axes[0][0], picture)
    _draw_rate(axes[0][1], picture.finished)
    _draw_histogram(axes[1][0], "TTFT", picture)
    _draw_histogram(axes[1][1], "ITL", picture)
    figure.savefig(path, dpi=130)


def _draw_cdfs(axes: Axes, picture: LoadPicture) -> None:
    """Step functions: the share of samples at or below a latency, on a logarithmic axis."""
    for name, samples in picture.latencies_ns.items():
        ordered = [max(sample / _MS, _LOG_FLOOR_MS) for sample in sorted(samples)]
        if not ordered:
            continue
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=f"{name} (n = {len(ordered):,})")
    if axes.lines:
        axes.set_xscale("log")
        axes.legend(loc="upper left")
    axes.set(xlabel="ms", ylabel="share at or below", title="Latency", ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _draw_rate(axes: Axes, finished: Sequence[tuple[int, float]]) -> None:
    """Tokens a second in equal bins, about sixty of them and none below 0.1 s."""
    axes.set(xlabel="s since the start", ylabel="output tokens/s", title="Throughput")
    axes.grid(alpha=0.3)
    if not finished:
        return
    end_s = max(at_ns for at_ns, _ in finished) / NS_PER_S
    width_s = max(0.1, end_s / 60)
    bins = [0.0] * (int(end_s / width_s) + 1)
    for at_ns, tokens in finished:
        bins[int(at_ns / NS_PER_S / width_s)] += tokens
    axes.step([i * width_s for i in range(len(bins))], [tokens / width_s for tokens in bins], where="post")
    axes.set_ylim(bottom=0)


def _draw_histogram(axes: Axes, name: str, picture: LoadPicture) -> None:
    samples = [sample / _MS for sample in picture.latencies_ns.get(name, ())]
    axes.set(xlabel="ms", ylabel="count", title=name)
    axes.grid(alpha=0.3)
    if samples:
        axes.hist(samples, bins=min(60, max(5, round(len(samples) ** 0.5) * 2)))
    limit_ns = picture.limits_ns.get(name)
    if limit_ns is not None:
        axes.axvline(limit_ns / _MS, color="tab:red", linestyle="--", label="service level")
        axes.legend()
