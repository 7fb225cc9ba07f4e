"""The load forecaster: trained by the likelihood of what came, through the inverse of its flow; then it only samples.

Knows series, the network and files of its own; must not know what is decided by its samples. Training is a pure
function of (series, options) on one machine: order and dropout come from the seed and the number of the epoch, one
thread adds up. So an interrupted training goes on to the same bits from what it stored after its last epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError, ModelFormatError
from megalith.base.random import splitmix64
from megalith.specs.load_series import LoadSeries, Values
from megalith.train.forecast_file import read_arrays, write_arrays
from megalith.train.forecast_net import ForecastNet, NetOptions
from megalith.train.forecast_windows import Scale, SplitOptions, Windows, parts, scale_of

_ROWS_AT_ONCE = 256
_LARGEST_GRADIENT = 1.0


class ForecastOptions(Config):
    """All that decides a forecaster but the series."""

    split: SplitOptions = SplitOptions()
    net: NetOptions = NetOptions()
    levels: dict[str, int] = {}
    """Level of an indicator, 1 the top. Those that are not named are at 2, the load at 3."""
    batch: int = 64
    rate: float = 5e-4
    """Of AdamW, falling by half a cosine to the last epoch."""
    most_epochs: int = 20
    patience: int = 4
    """Epochs without a better likelihood on the validation rows before it stops."""
    stride: int = 1
    """Train on every so-manieth window."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.most_epochs, self.patience, self.stride) < 1 or not 0 < self.rate < 1:
            raise ConfigError("Batch, epochs, patience and stride are at least 1, the rate lies between 0 and 1.",
                              "Leave them as they are.")  # fmt: skip
        for name, level in self.levels.items():
            if not 1 <= level <= 16:
                raise ConfigError(f"The level {level} of {name} cannot be.", "Give 1 (top) to 16.")


@dataclass(slots=True)
class Course:
    """How training went."""

    train_nats: list[float] = field(default_factory=list)
    """Negative log-likelihood for each step of the horizon, after each epoch."""
    valid_nats: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The one whose weights were kept, from 1."""
        return int(np.argmin(self.valid_nats)) + 1


@dataclass(slots=True)
class Forecaster:
    """A trained forecaster: `samples` is all that others need."""

    options: ForecastOptions
    names: tuple[str, ...]
    target: int
    scale: Scale
    net: ForecastNet
    course: Course
    step_s: float

    def samples(self, series: LoadSeries, rows: range, count: int = 200, seed: int = 0) -> Values:
        """Joint samples of the load from each of `rows` on, knowing all rows before it: (rows, count, horizon), in the
        units of the series. Never below 0 where the training load was not. Raises ConfigError for another series'
        columns or step, and for rows without a window before them."""
        self._check(series, rows)
        dice = torch.Generator().manual_seed(splitmix64(seed, 0) >> 1)
        windows, found = Windows.of(series, self.scale, self.options.split), []
        self.net.eval()
        with _one_thread(), torch.no_grad():
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                seen, mean, std = windows.seen(np.array(rows[first : first + _ROWS_AT_ONCE], dtype=np.float64))
                drawn = self.net.sample(torch.from_numpy(seen).float(), count, dice).double().numpy()
                found.append(drawn * std[:, None] + mean[:, None])
        loads: Values = np.concatenate(found) * self.scale.span[self.target] + self.scale.low[self.target]
        if self.scale.low[self.target] >= 0:
            loads = np.maximum(loads, 0.0)
        return loads

    def _check(self, series: LoadSeries, rows: range) -> None:
        if series.names != self.names or series.target != self.target:
            what = f"The forecaster was trained on {', '.join(self.names)}, the series has {', '.join(series.names)}."
            raise ConfigError(what, "Give a series with the same columns in the same order, or train anew.")
        if abs(series.step_s - self.step_s) > 0.01 * self.step_s:
            what = f"The forecaster was trained on steps of {self.step_s:g} s, the series has {series.step_s:g} s."
            raise ConfigError(what, "Give a series with the same step, or train anew.")
        window = self.options.split.window
        if len(rows) and (min(rows) < window or max(rows) > len(series)):
            what = f"Rows {min(rows)} to {max(rows)} of {len(series)} cannot be forecast from windows of {window}."
            raise ConfigError(what, f"Ask for rows from {window} to {len(series)}.")

    def save(self, path: Path) -> None:
        """Write weights, scale and options, with a checksum."""
        meta = _meta(self.options, self.names, self.target, self.step_s, self.course)
        write_arrays(path, "forecaster", meta, {**_weights(self.net), **_scale_arrays(self.scale)})


class _Meta(Config):
    """What stands beside the arrays in a file."""

    options: ForecastOptions
    names: tuple[str, ...]
    target: int
    step_s: float
    train_nats: list[float]
    valid_nats: list[float]


def load_forecaster(path: Path) -> Forecaster:
    """What `save` wrote. Raises ModelFormatError for a damaged file or one of another kind."""
    meta_data, arrays = read_arrays(path, "forecaster")
    meta = convert(meta_data, _Meta, str(path))
    net = _net(meta.options, meta.names, meta.target)
    _put(net, arrays, path)
    scale = Scale(arrays["scale.low"], arrays["scale.span"])
    course = Course(list(meta.train_nats), list(meta.valid_nats))
    return Forecaster(meta.options, meta.names, meta.target, scale, net, course, meta.step_s)


def fit(
    series: LoadSeries,
    options: ForecastOptions,
    checkpoint: Path | None = None,
    done: Callable[[int, float], object] = lambda _epoch, _nats: None,
) -> Forecaster:
    """Train on the series' training rows, stop on its validation rows; the reporting rows are never looked at.

    `checkpoint`: a file that is written after every epoch and gone on from; one of another series or other options is
    an error. `done(epoch, validation nats)` after each. Raises ConfigError for a short series or an unknown level.
    """
    unknown = set(options.levels) - set(series.names)
    if unknown:
        raise ConfigError(f"Levels name {', '.join(sorted(unknown))}, which the series has not.",
                          f"It has {', '.join(series.names)}.")  # fmt: skip
    split = parts(len(series), options.split)
    scale = scale_of(series.values, split.valid.start)
    windows = Windows.of(series, scale, options.split)
    with _one_thread():
        run = _Training(windows, split.train, split.valid, options, _net(options, series.names, series.target))
        identity = f"{msgspec.json.encode(options).decode()} {float(series.values.sum())!r} {len(series)}"
        run.resume(checkpoint, identity)
        while not run.over:
            nats = run.epoch()
            run.store(checkpoint, identity)
            done(len(run.course.valid_nats), nats)
        run.keep_best()
    return Forecaster(options, series.names, series.target, scale, run.net, run.course, series.step_s)


class _Training:
    """Weights, optimiser and the best so far."""

    def __init__(
        self, windows: Windows, train: range, valid: range, options: ForecastOptions, net: ForecastNet
    ) -> None:
        self.windows, self.options, self.net = windows, options, net
        self.train = np.array(train[:: options.stride], dtype=np.float64)
        self.valid = np.array(valid, dtype=np.float64)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=options.rate)
        self.course = Course()
        self._best = _weights(net)

    @property
    def over(self) -> bool:
        """All epochs, or `patience` of them without a better one."""
        nats = self.course.valid_nats
        return bool(nats) and (
            len(nats) >= self.options.most_epochs or len(nats) - self.course.best_epoch >= self.options.patience
        )

    def epoch(self) -> float:
        """One pass over the training rows; the nats of the validation rows after it."""
        number = len(self.course.valid_nats)
        torch.manual_seed(splitmix64(self.options.seed, number) >> 1)
        order = self.train[torch.randperm(len(self.train)).numpy()]
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * 0.5 * (1 + np.cos(np.pi * number / self.options.most_epochs))
        self.net.train()
        total = 0.0
        for first in range(0, len(order), self.options.batch):
            rows = order[first : first + self.options.batch]
            loss = self._nats(rows).mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), _LARGEST_GRADIENT)
            self.optimizer.step()
            total += float(loss.detach()) * len(rows)
        valid = self._validate()
        self.course.train_nats.append(total / len(order))
        self.course.valid_nats.append(valid)
        if self.course.best_epoch == len(self.course.valid_nats):
            self._best = _weights(self.net)
        return valid

    def _validate(self) -> float:
        self.net.eval()
        with torch.no_grad():
            cuts = range(0, len(self.valid), _ROWS_AT_ONCE)
            nats = torch.cat([self._nats(self.valid[first : first + _ROWS_AT_ONCE]) for first in cuts])
        return float(nats.mean())

    def _nats(self, rows: Values) -> torch.Tensor:
        seen, mean, std = self.windows.seen(rows)
        coming = (self.windows.coming(rows) - mean) / std
        nats = self.net.negative_log_likelihood(torch.from_numpy(seen).float(), torch.from_numpy(coming).float())
        return nats / self.net.horizon

    def keep_best(self) -> None:
        """The weights of the best epoch."""
        _put(self.net, self._best, Path("memory"))

    def store(self, path: Path | None, identity: str) -> None:
        """All that the next epoch needs."""
        if path is None:
            return
        arrays = {**_weights(self.net), **{f"best.{name}": value for name, value in self._best.items()}}
        for number, state in self.optimizer.state_dict()["state"].items():
            arrays |= {f"adam.{number}.{name}": value.numpy().copy() for name, value in state.items()}
        meta = {"identity": identity, "train_nats": self.course.train_nats, "valid_nats": self.course.valid_nats}
        write_arrays(path, "training", meta, arrays)

    def resume(self, path: Path | None, identity: str) -> None:
        """Go on from what `store` wrote, if it is there."""
        if path is None or not path.exists():
            return
        meta, arrays = read_arrays(path, "training")
        if meta["identity"] != identity:
            raise ConfigError(f"The training in {path} is of another series or has other options.",
                              "Name another file, or delete this one to begin anew.")  # fmt: skip
        _put(self.net, arrays, path)
        self._best = {name[5:]: value for name, value in arrays.items() if name.startswith("best.")}
        self.course = Course(list(meta["train_nats"]), list(meta["valid_nats"]))
        whole = self.optimizer.state_dict()
        for name, value in arrays.items():
            kind, _, rest = name.partition(".")
            if kind == "adam":
                number, _, key = rest.partition(".")
                whole["state"].setdefault(int(number), {})[key] = torch.from_numpy(value.copy())
        self.optimizer.load_state_dict(whole)


def _net(options: ForecastOptions, names: tuple[str, ...], target: int) -> ForecastNet:
    torch.manual_seed(splitmix64(options.seed, 1 << 32) >> 1)
    levels = [options.levels.get(name, 3 if place == target else 2) for place, name in enumerate(names)]
    return ForecastNet(options.net, options.split.window, levels, target, options.split.horizon)


def _weights(net: ForecastNet) -> dict[str, Values]:
    return {f"net.{name}": value.detach().numpy().copy() for name, value in net.state_dict().items()}


def _scale_arrays(scale: Scale) -> dict[str, Values]:
    return {"scale.low": scale.low, "scale.span": scale.span}


def _meta(
    options: ForecastOptions, names: tuple[str, ...], target: int, step_s: float, course: Course
) -> dict[str, object]:
    meta = _Meta(options=options, names=names, target=target, step_s=step_s,
                 train_nats=course.train_nats, valid_nats=course.valid_nats)  # fmt: skip
    plain: dict[str, object] = msgspec.to_builtins(meta)
    return plain


def _put(net: ForecastNet, arrays: dict[str, Values], path: Path) -> None:
    wanted = net.state_dict()
    found = {name: arrays.get(f"net.{name}") for name in wanted}
    for name, value in found.items():
        if value is None or value.shape != tuple(wanted[name].shape):
            raise ModelFormatError(f"{path} has no weights {name} of the shape that its options say.", "Train anew.")
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in found.items() if value is not None})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine has; and other work keeps its cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
