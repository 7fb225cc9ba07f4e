"""HARMONY's forecasts: what is trained on which series, kept in files so that every point finds it, and how good it is.

Series are Fisher's containers, where a folder with them is given, or a load that Megalith makes itself. Training and
sampling happen once for each (series, head, seed) and machine, under a lock; whoever comes later reads the file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from megalith import __version__
from megalith.base.errors import ConfigError
from megalith.base.home import home_dir
from megalith.specs.load_series import LoadSeries, Values, read_load_series
from megalith.specs.load_synthetic import LEVELS, SyntheticLoad, synthesize

if TYPE_CHECKING:
    from megalith.train.forecast import Forecaster, ForecastOptions

WINDOW, HORIZON, SAMPLES = 144, 4, 200
FISHER_ROOT = "MEGALITH_FISHER"
"""Environment: a folder with container1.csv ... container10.csv of the Fisher set. It has no licence, so it is not
shipped; the published repository of HARMONY has the files."""
FISHER_LEVELS = {
    "blkio.throttle.io_service_bytes_Async": 1, "blkio.throttle.io_service_bytes_Read": 3,
    "container_cpu_usage_seconds_total": 3, "container_memory_active_file": 2,
    "container_memory_hierarchical_memory_limit": 2, "container_memory_rss": 2, "container_network_tcp_TimeWait": 2,
    "cpu.busy": 3, "mem.memused": 2, "net.if.in.bytes": 2, "load": 3,
}  # fmt: skip
"""Those of the released level.npy, which has 15 entries: ten indicators, the load, four calendar columns at 1."""
MONTH_STEPS, HISTORY_STEPS = 1440, 3360
"""Half hours: 30 days that report, after 60 days to train on and 10 to stop by."""
_TRAINED = 0.6
FAST_MONTH_STEPS, FAST_HISTORY_STEPS = 240, 1008
BASELINES = {"last": (1, False), "last-errors": (1, True), "season": (0, False), "season-errors": (0, True)}
"""Head: (lag in steps, 0 is a day; with the errors of the training rows around it)."""


def fisher_folder() -> Path | None:
    """The folder of the Fisher set; None without one. Raises ConfigError for one that has no containers."""
    given = os.environ.get(FISHER_ROOT)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not (folder / "container1.csv").is_file():
        raise ConfigError(f"{FISHER_ROOT} names {folder}, which has no container1.csv.", "Name the folder of the CSVs.")
    return folder


def series_of(source: str, fast: bool) -> LoadSeries:
    """`fisher:3`, `seasonal:0` or `white:0`: container, or seed."""
    kind, _, number = source.partition(":")
    if kind == "fisher":
        folder = fisher_folder()
        if folder is None:
            raise ConfigError("There is no folder of the Fisher set.", f"Set {FISHER_ROOT} to it.")
        return read_load_series(folder / f"container{number}.csv")
    return synthesize(_made(kind, fast), int(number))


def _made(kind: str, fast: bool) -> SyntheticLoad:
    steps = FAST_MONTH_STEPS + FAST_HISTORY_STEPS if fast else MONTH_STEPS + HISTORY_STEPS
    return SyntheticLoad(kind="white" if kind == "white" else "seasonal", steps=steps)


def options_of(source: str, head: str, seed: int, fast: bool) -> ForecastOptions:
    """The sizes: width 128 on Fisher as the published checks ask for, 64 where every seed trains anew."""
    from megalith.train.forecast import ForecastOptions
    from megalith.train.forecast_net import NetOptions
    from megalith.train.forecast_windows import SplitOptions

    real = source.startswith("fisher")
    flows = 0 if head == "gaussian" else 2
    net = NetOptions(flows=flows) if real else NetOptions(flows=flows, width=64, inner=128, flow_width=32)
    split = SplitOptions(window=WINDOW, horizon=HORIZON)
    if not real:
        split = SplitOptions(
            window=48 if fast else WINDOW, horizon=HORIZON, train_share=_TRAINED, valid_share=_valid(fast)
        )
    return ForecastOptions(
        split=split, net=net, levels=FISHER_LEVELS if real else LEVELS, rate=3e-4 if real else 1e-3,
        stride=2 if real else 1, most_epochs=4 if fast else 12, patience=3, seed=seed,
    )  # fmt: skip


def _valid(fast: bool) -> float:
    month, history = (FAST_MONTH_STEPS, FAST_HISTORY_STEPS) if fast else (MONTH_STEPS, HISTORY_STEPS)
    return history / (month + history) - _TRAINED


def trained(source: str, head: str, seed: int, fast: bool) -> Forecaster:
    """The forecaster of these, trained now or before."""
    from megalith.train.forecast import fit, load_forecaster

    options = options_of(source, head, seed, fast)
    path = kept("forecaster", identity(source, fast), msgspec.json.encode(options))
    with lock(path):
        if not path.exists():
            fit(series_of(source, fast), options).save(path)
    return load_forecaster(path)


def drawn(source: str, head: str, seed: int, fast: bool) -> tuple[LoadSeries, range, Values]:
    """Series, reporting rows and samples (rows, samples, horizon) of any head, baselines included."""
    from megalith.train.forecast_score import naive, naive_spread
    from megalith.train.forecast_windows import parts

    series = series_of(source, fast)
    split = parts(len(series), options_of(source, head, seed, fast).split, source)
    if head not in BASELINES:
        return series, split.test, trained(source, head, seed, fast).samples(series, split.test, SAMPLES, seed)
    lag, with_errors = BASELINES[head]
    lag = lag or round(86_400 / series.step_s)
    if not with_errors:
        return series, split.test, naive(series.load, split.test, lag, HORIZON)
    fitted = range(max(lag, split.train.start), split.train.stop)
    return series, split.test, naive_spread(series.load, split.test, fitted, lag, HORIZON, SAMPLES, seed)


def forecast(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Scores of one head on the reporting rows, the load scaled to 0..1 over the training rows; the first step alone,
    as published, and the CRPS of the last step."""
    from megalith.train.forecast_score import score
    from megalith.train.forecast_windows import parts, scale_of

    source, head, seed, fast = (options[name] for name in ("source", "head", "seed", "fast"))
    series, rows, samples = drawn(str(source), str(head), int(seed), bool(fast))
    begin = parts(len(series), options_of(str(source), str(head), 0, bool(fast)).split).valid.start
    scale = scale_of(series.values, begin)
    low, span = scale.low[series.target], scale.span[series.target]
    came = (series.load - low) / span
    first, last = (score((samples[:, :, step] - low) / span, came[[row + step for row in rows]])
                   for step in (0, HORIZON - 1))  # fmt: skip
    return {
        "crps": first.crps, "coverage": first.coverage, "width": first.width, "mse": first.mse, "above": first.late,
        "crps_last": last.crps, "rows": float(len(rows)),
    }  # fmt: skip


def identity(source: str, fast: bool) -> str:
    """All that decides a series."""
    kind = source.partition(":")[0]
    return source if kind == "fisher" else f"{source} {_made(kind, fast)!r}"


def kept(kind: str, *parts_of_name: object) -> Path:
    """Where a thing that these decide is kept on this machine."""
    name = blake2b(repr((__version__, parts_of_name)).encode(), digest_size=10).hexdigest()
    return home_dir() / "studies" / "harmony" / f"{kind}-{name}"


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process at a time makes the file; the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
