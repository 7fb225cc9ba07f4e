"""Distributions of token counts: how long prompts and answers are.

Each draws from uniform shares by its inverse, so that any way of making shares (a counter, a stratified design) works.
Knows numbers; knows nothing of requests or traces.
"""

from __future__ import annotations

import difflib
import re
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs import draws
from megalith.specs.draws import Floats, Ints

FORMS = "128, 64-256, normal:128:32 (mean, deviation), lognormal:128:0.5 (median, sigma) or power:16:6144:1.1"
_NUMBER = r"(\d+(?:\.\d+)?(?:e\d+)?)"


class FixedLength(Config, tag_field="kind", tag="fixed"):
    """Always the same."""

    tokens: int

    def __post_init__(self) -> None:
        _require(self.tokens >= 1, f"A length of {self.tokens} tokens", "Give at least 1.")

    def of_shares(self, shares: Floats) -> Ints:
        """One length for each share."""
        return np.full(len(shares), self.tokens, dtype=np.int64)


class UniformLength(Config, tag_field="kind", tag="uniform"):
    """Every count from `low` to `high`, both included, equally often."""

    low: int
    high: int

    def __post_init__(self) -> None:
        fine = 1 <= self.low <= self.high
        _require(
            fine, f"A uniform length from {self.low} to {self.high}", "Write the smaller number first, at least 1."
        )

    def of_shares(self, shares: Floats) -> Ints:
        """One length for each share."""
        return self.low + np.floor(shares * float(self.high - self.low + 1)).astype(np.int64)


class NormalLength(Config, tag_field="kind", tag="normal"):
    """A normal distribution, rounded, and no less than 1."""

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        fine = 1 <= self.mean < 1e9 and 0 <= self.deviation < 1e9
        _require(fine, f"A normal length of mean {self.mean:g} and deviation {self.deviation:g}", "Give a mean from 1.")

    def of_shares(self, shares: Floats) -> Ints:
        """One length for each share."""
        return _whole(self.mean + self.deviation * draws.normal_quantile(shares))


class LognormalLength(Config, tag_field="kind", tag="lognormal"):
    """A lognormal distribution: the logarithm has mean log(median) and deviation `sigma`. The mean length is median *
    exp(sigma**2 / 2)."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        fine = 1 <= self.median < 1e9 and 0 <= self.sigma <= 5
        _require(
            fine, f"A lognormal length of median {self.median:g}, sigma {self.sigma:g}", "Sigma is usually 0.3 to 2."
        )

    def of_shares(self, shares: Floats) -> Ints:
        """One length for each share."""
        return _whole(self.median * draws.exp(self.sigma * draws.normal_quantile(shares)))


class PowerLength(Config, tag_field="kind", tag="power"):
    """A power law between `low` and `high` (bounded Pareto): density proportional to tokens**-(exponent + 1)."""

    low: float
    high: float
    exponent: float

    def __post_init__(self) -> None:
        fine = 1 <= self.low < self.high < 1e9 and 0 < self.exponent <= 20
        what = f"A power law from {self.low:g} to {self.high:g} with exponent {self.exponent:g}"
        _require(fine, what, "Give 1 <= low < high and an exponent above 0, such as 16, 6144, 1.1.")

    def of_shares(self, shares: Floats) -> Ints:
        """One length for each share. Inverse of F(x) = (1 - (low/x)^a) / (1 - (low/high)^a)."""
        ends = draws.power(np.array([self.low / self.high]), self.exponent)
        kept = 1.0 - float(ends[0])
        return _whole(self.low * draws.power(1.0 - shares * kept, -1.0 / self.exponent))


class QuantileLength(Config, tag_field="kind", tag="quantiles"):
    """A table of quantiles: `points` are (share, tokens), straight lines between them, from share 0 to share 1."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        tokens = [value for _, value in self.points]
        rising = all(a < b for a, b in pairwise(shares)) and tokens == sorted(tokens)
        fine = len(shares) >= 2 and shares[0] == 0 and shares[-1] == 1 and rising and 1 <= tokens[0] <= tokens[-1] < 1e9
        what = f"A table of {len(shares)} quantiles that does not rise from share 0 to share 1 and from 1 token"
        _require(fine, what, "Give points such as [[0, 1], [0.5, 129], [1, 1000]].")

    def of_shares(self, shares: Floats) -> Ints:
        """One length for each share."""
        at = np.array([share for share, _ in self.points])
        tokens = np.array([float(value) for _, value in self.points])
        left = np.minimum(np.searchsorted(at, shares, side="right") - 1, len(at) - 2)
        slope = (tokens[1:] - tokens[:-1]) / (at[1:] - at[:-1])
        # Not np.interp, whose multiply-and-add is one rounding on some machines and two on others.
        return _whole(tokens[left] + (shares - at[left]) * slope[left])


Lengths: TypeAlias = FixedLength | UniformLength | NormalLength | LognormalLength | PowerLength | QuantileLength


def _require(fine: bool, what: str, hint: str) -> None:
    if not fine:
        raise ConfigError(f"{what} cannot be drawn.", hint)


def _whole(values: Floats) -> Ints:
    return np.rint(np.minimum(np.maximum(values, 1.0), 1e9)).astype(np.int64)


def draw_lengths(lengths: Lengths, stream: int, first: int, count: int) -> Ints:
    """Lengths number `first` to `first` + `count` - 1 of a random stream; all are at least 1."""
    return lengths.of_shares(draws.shares(stream, first, count))


def parse_lengths(text: str) -> Lengths:
    """`128`, `64-256`, `normal:128:32`, `lognormal:128:0.5` or `power:16:6144:1.1`. Raises ConfigError."""
    if match := re.fullmatch(r"(?:fixed:)?(\d+)", text):
        return FixedLength(tokens=int(match[1]))
    if match := re.fullmatch(r"(?:uniform:)?(\d+)[-:](\d+)", text):
        return UniformLength(low=int(match[1]), high=int(match[2]))
    if match := re.fullmatch(rf"normal:{_NUMBER}:{_NUMBER}", text):
        return NormalLength(mean=float(match[1]), deviation=float(match[2]))
    if match := re.fullmatch(rf"lognormal:{_NUMBER}:{_NUMBER}", text):
        return LognormalLength(median=float(match[1]), sigma=float(match[2]))
    if match := re.fullmatch(rf"power:{_NUMBER}:{_NUMBER}:{_NUMBER}", text):
        return PowerLength(low=float(match[1]), high=float(match[2]), exponent=float(match[3]))
    kinds = ("fixed", "uniform", "normal", "lognormal", "power")
    near = difflib.get_close_matches(text.partition(":")[0].lower(), kinds, n=1)
    meant = f"Did you mean {near[0]}? " if near and near[0] != text.partition(":")[0] else ""
    raise ConfigError(f"{text!r} is not a distribution of token counts.", f"{meant}Write {FORMS}.")
