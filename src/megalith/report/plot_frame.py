"""The frame that every picture of a run has: a title that says what it is (`simulated`), the settings, a safe file.

Knows figures and files; must not know what is drawn. Matplotlib is imported when a picture is asked for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalith.base.errors import MachineError
from megalith.report.plot import check_plot_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megalith.report.table import Nature

_WIDTH_IN, _HEIGHT_IN = 6.0, 4.2
_SETTINGS_CHARACTERS_PER_IN = 15
_COLOURS = 64


@dataclass(frozen=True, slots=True)
class Caption:
    """What stands above a picture. `settings`: what one must know to make it again, such as fleet, trace, seed."""

    title: str
    settings: Mapping[str, str] = field(default_factory=dict)
    nature: Nature = "simulated"


def framed(caption: Caption, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure with `columns` panels side by side; its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = _WIDTH_IN * columns
    figure = Figure(figsize=(width, _HEIGHT_IN + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    settings = ", ".join(f"{name} {value}" for name, value in caption.settings.items())
    lines = textwrap.wrap(settings, round(width * _SETTINGS_CHARACTERS_PER_IN))
    axes: Any = figure.subplots(1, columns, squeeze=False)
    # Text from outside is shown as it is: `$` would be read as a formula.
    figure.suptitle(f"{caption.title} ({caption.nature})".replace("$", r"\$"), fontsize="large")
    if lines:
        figure.supxlabel("\n".join(lines).replace("$", r"\$"), fontsize="x-small", color="0.35")
    for panel in axes[0]:
        panel.grid(alpha=0.3)
    return figure, list(axes[0])


def save(figure: Figure, path: Path) -> None:
    """Write the picture. Raises as check_plot_path does, and MachineError when the disk is full; no half picture."""
    check_plot_path(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        if path.suffix == ".png":
            _shrink(partial)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise MachineError(f"{path.name} could not be written: {error.strerror}.", "Make room.") from None


def _shrink(path: Path) -> None:
    """A few lines on white need no millions of colours: a quarter of the bytes, for pictures that a project keeps."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(_COLOURS)
    small.save(path, optimize=True)
