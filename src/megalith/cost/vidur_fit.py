"""Vidur's polynomials from its measured operators: its linear-regression predictor, as numbers.

For each operator Vidur tries polynomials of degree 1 to 5 in its one or two features, with and without a constant, full
or in products of different features only, each solved by least squares with and without centring. It keeps the one with
the smallest mean absolute percentage error over ten folds of neighbouring rows, and fits that to all rows. Singular
values below 1e-6 of the largest count as 0 (scikit-learn 1.9). Knows arrays and Vidur's columns; knows no timer.

After vidur/execution_time_predictor at commit 7d47513 (MIT), with its default options.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError
from megalith.cost.timer_vidur import TOKEN_OPERATORS, Polynomial

Floats: TypeAlias = NDArray[np.float64]
Row: TypeAlias = Mapping[str, str]

MAX_DEGREE, FOLDS, CUT = 5, 10, 1e-6


class Form(NamedTuple):
    """Which powers of the features a polynomial has, and whether features and times are centred first."""

    powers: tuple[tuple[int, int], ...]
    centred: bool


def forms(features: int) -> list[Form]:
    """Every different form for one or two features, in Vidur's order of trial; equal ones once."""
    found: dict[Form, None] = {}
    for centred, degree, constant, crossed in product((True, False), range(1, MAX_DEGREE + 1), (True, False), (1, 0)):
        powers = [
            (x, y)
            for total in range(0 if constant and not centred else 1, degree + 1)
            for x in range(total, -1, -1)
            for y in (total - x,)
            if (features == 2 or y == 0) and (not crossed or max(x, y) <= 1)
        ]
        found[Form(tuple(powers), centred)] = None
    return list(found)


def fit(features: Floats, times: Floats) -> Polynomial:
    """The polynomial that Vidur would use for these rows of one or two features and times. O(rows x forms)."""
    rows, width = features.shape
    if rows < FOLDS or width not in (1, 2) or times.shape != (rows,):
        raise ConfigError(f"{rows} rows of {width} features and {times.shape} times cannot be fitted.")
    if not times.any():
        return ()
    best = min(forms(width), key=lambda form: _error_over_folds(form, features, times))
    return _terms(best, *_solve(best, features, times))


def _error_over_folds(form: Form, features: Floats, times: Floats) -> float:
    """Mean over the folds of the mean absolute percentage error; rows whose time is 0 count 100 % unless met."""
    sizes = np.full(FOLDS, len(times) // FOLDS)
    sizes[: len(times) % FOLDS] += 1
    ends = np.cumsum(sizes)
    errors = []
    for start, end in zip(ends - sizes, ends, strict=True):
        held = np.zeros(len(times), dtype=bool)
        held[start:end] = True
        factors, offset = _solve(form, features[~held], times[~held])
        expected, wanted = _columns(form, features[held]) @ factors + offset, times[held]
        scale = np.where(wanted == 0.0, 1.0, wanted)
        wrong = np.where(wanted == 0.0, np.where(expected == 0.0, 0.0, 100.0), abs((wanted - expected) / scale) * 100)
        errors.append(float(wrong.mean()))
    return sum(errors) / FOLDS


def _columns(form: Form, features: Floats) -> Floats:
    x, y = features[:, 0], features[:, -1]
    return np.stack([x**x_power * y**y_power for x_power, y_power in form.powers], axis=1)


def _solve(form: Form, features: Floats, times: Floats) -> tuple[Floats, float]:
    columns = _columns(form, features)
    means, mean = (columns.mean(axis=0), float(times.mean())) if form.centred else (np.zeros(columns.shape[1]), 0.0)
    factors = np.asarray(np.linalg.lstsq(columns - means, times - mean, rcond=CUT)[0], dtype=np.float64)
    return factors, mean - float(means @ factors)


def _terms(form: Form, factors: Floats, offset: float) -> Polynomial:
    constant = [(0, 0, offset)] if form.centred else []
    return (*constant, *[(x, y, float(factor)) for (x, y), factor in zip(form.powers, factors, strict=True)])


# Vidur's tables


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, packed or not. Raises ConfigError when it cannot be read."""
    try:
        with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None


def fit_operators(
    layer: Iterable[Row], attention: Iterable[Row], network: Iterable[Row], width: int, tensor_parallel: int
) -> dict[str, Polynomial]:
    """Polynomials of all operators, in milliseconds; `width` is the model's hidden size.

    `layer` and `attention`: rows of Vidur's mlp.csv and attention.csv of one device, model and tensor parallel.
    `network`: rows of its all_reduce.csv and send_recv.csv of one kind of network; the median may be `median_ms`. Rows
    that are equal in all columns count once, so a copy with fewer columns gives slightly other polynomials. An operator
    without a column takes no time. Raises ConfigError without usable rows.
    """
    layer, attention, network = _distinct(layer), _distinct(attention), _distinct(network)
    found = {name: _fit(layer, name, (_column("num_tokens"),)) for name in TOKEN_OPERATORS if "cache" not in name}
    decodes = [row for row in attention if row["prefill_chunk_size"] == "0"]
    prompts = [row for row in attention if row["prefill_chunk_size"] != "0"]
    context = _column("kv_cache_size")
    found["attn_kv_cache_save"] = _fit(
        attention, "attn_kv_cache_save", (lambda row: max(float(row["prefill_chunk_size"]), float(row["batch_size"])),)
    )
    found["attn_decode"] = _fit(decodes, "attn_decode", (_column("batch_size"), context))
    found["attn_prefill"] = _fit(prompts, "attn_prefill", (context, lambda row: float(row["prefill_chunk_size"]) ** 2))
    for name, workers in (("all_reduce", tensor_parallel), ("send_recv", 2)):
        if workers > 1:
            wanted = (name, str(workers), str(workers))
            rows = [
                row for row in network if (row["collective"], row["num_workers"], row["devices_per_node"]) == wanted
            ]
            found[name] = _fit(rows, name, (lambda row: float(row["size"]) / width / 2,))
    return found


def _column(name: str) -> Callable[[Row], float]:
    return lambda row: float(row[name])


def _distinct(rows: Iterable[Row]) -> list[Row]:
    return list({tuple(row.values()): row for row in rows}.values())


def _fit(rows: Sequence[Row], name: str, features: Sequence[Callable[[Row], float]]) -> Polynomial:
    if not rows:
        raise ConfigError(f"There are no measured rows of {name}.")
    columns = [column for column in (f"time_stats.{name}.median", "median_ms") if column in rows[0]]
    if not columns:
        return ()
    times = np.array([float(row[columns[0]] or 0.0) for row in rows])
    return fit(np.array([[feature(row) for feature in features] for row in rows]), times)
