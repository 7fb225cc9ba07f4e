"""What a forecaster is worth on the rows that it never saw, beside forecasts without training; and what it hands on.

Knows forecasters, scores and files for the simulator; must not know who prints.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import msgspec
import numpy as np

from megalith.base.errors import ConfigError, MachineError
from megalith.report.table import Column, Table
from megalith.specs.lengths import Lengths
from megalith.specs.load_series import LoadSeries, Values
from megalith.specs.posterior import Posterior, write_posterior
from megalith.train.forecast import Forecaster
from megalith.train.forecast_score import Score, naive, naive_spread, score
from megalith.train.forecast_windows import parts

_DAY_S = 86_400.0


def scores(forecaster: Forecaster, series: LoadSeries, samples: Values, rows: range, seed: int) -> dict[str, Score]:
    """Of the first step, by name, the load scaled to 0..1 over the training rows. samples (rows, count, horizon)."""
    split = parts(len(series), forecaster.options.split)
    low, span = (float(part[series.target]) for part in (forecaster.scale.low, forecaster.scale.span))
    came = (series.load[rows.start : rows.stop] - low) / span
    found = {"flow" if forecaster.options.net.flows else "Gaussian head": samples}
    horizon, day = forecaster.options.split.horizon, round(_DAY_S / series.step_s)
    for name, lag in (("last value", 1), ("a day ago", day)):
        fitted = range(max(lag, split.train.start), split.train.stop)
        if lag >= 1 and fitted and rows.start >= lag:
            found[name] = naive(series.load, rows, lag, horizon)
            found[f"{name} with its errors"] = naive_spread(
                series.load, rows, fitted, lag, horizon, samples.shape[1], seed
            )
    return {name: score((one[:, :, 0] - low) / span, came) for name, one in found.items()}


def score_table(found: dict[str, Score], rows: int) -> Table:
    """For a person: the trained one first."""
    columns = [
        Column("forecast", "forecast"), Column("crps", "CRPS", "number", "measured"),
        Column("coverage", "in the 90 % interval", "share", "measured"),
        Column("width", "its width", "number", "measured"), Column("mse", "MSE of the mean", "number", "measured"),
        Column("above", "above the 95 % quantile", "share", "measured"),
    ]  # fmt: skip
    table = Table(columns, f"one step ahead, {rows:,} rows that took no part in training, load from 0 to 1")
    for name, one in found.items():
        table.add(name, *one)
    return table


def hand_on(path: Path, series: LoadSeries, rows: range, samples: Values, source: str) -> None:
    """Write the samples as a posterior whose time 0 is the first of the rows."""
    values = array("f", np.ascontiguousarray(samples, dtype=np.float32).tobytes())
    write_posterior(path, Posterior(series.step_s, len(rows), samples.shape[1], samples.shape[2], values, source))


def write_workload(path: Path, series: LoadSeries, rows: range, scale: float, lengths: tuple[Lengths, Lengths]) -> int:
    """Write the rows' load as a workload (TOML): load * scale requests a second, in whole requests for each step.
    Returns how many. Raises ConfigError when there are none, or the load is negative."""
    loads = series.load[rows.start : rows.stop] * (series.step_s * scale)
    ends = np.rint(np.cumsum(np.concatenate([[0.0], loads])))
    counts = [int(count) for count in np.diff(ends)]
    if min(counts) < 0 or not sum(counts):
        what = f"The load times {scale:g} is {float(loads.min()):g} to {float(loads.max()):g} requests a step."
        raise ConfigError(what, "Give a scale with which some steps have whole requests and none has fewer than 0.")
    prompt, answer = (_inline(msgspec.to_builtins(one)) for one in lengths)
    text = (
        f'name = "load of {path.stem}"\n'
        f"input = {prompt}\noutput = {answer}\n\n"
        f'[arrivals]\nkind = "counted"\nstep_s = {series.step_s}\ncounts = {counts}\n'
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another file.") from None
    return sum(counts)


def _inline(fields: dict[str, object]) -> str:
    """An inline TOML table of plain values."""
    cells = (
        f"{key} = {value!r}" if not isinstance(value, str) else f'{key} = "{value}"' for key, value in fields.items()
    )
    return "{ " + ", ".join(cells) + " }"
