"""How far the requests of a run kept a service level: shares, goodput, and which limit binds.

Knows the latencies of requests and a `specs.slo.Slo`; must not know instances or policies. Counts are exact whatever
the size of the run; see specs.slo for what a limit means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError
from megalith.report.percentiles import rank
from megalith.sim.histogram import Histogram, IntArray
from megalith.sim.samples import EXACT_LIMIT, Samples
from megalith.specs.slo import Bound, Slo

MILLION = 1_000_000
_LARGEST_RATIO = 1 << 60


class Latencies(NamedTuple):
    """Columns of requests that finished, in nanoseconds; `tpot_ns` is -1 for an answer of one token."""

    ttft_ns: IntArray
    tpot_ns: IntArray
    e2e_ns: IntArray


class Reference(Protocol):
    """What a request alone on the reference machine takes; columns in, columns out."""

    def __call__(self, prompt_tokens: IntArray, output_tokens: IntArray) -> Latencies:
        """Above zero each."""
        ...


def each_request(timing: Callable[[int, int], tuple[int, int, int]]) -> Reference:
    """A Reference from a function of one request: (prompt_tokens, output_tokens) -> (ttft_ns, tpot_ns, e2e_ns)."""

    def times(prompt_tokens: IntArray, output_tokens: IntArray) -> Latencies:
        rows = [timing(p, o) for p, o in zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True)]
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return Latencies(columns[:, 0], columns[:, 1], columns[:, 2])

    return times


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one bound, or of the joint promise (`bound` is then `attain=...`)."""

    bound: str
    kept: bool
    wanted_share: float
    share: float
    """Of all requests that ended (of all gaps for itl), those within the limit."""
    observed: float | None
    """The figure at the wanted share as a multiple of its limit; None: so many were refused that there is none."""
    margin: float | None
    """1 - observed: what is left, as a share of the limit; negative when it is broken."""


class AttainmentFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A service level against a run."""

    slo: str
    kept: bool
    good: int
    """Requests within every limit on requests."""
    attainment: float
    """`good` as a share of all that ended, whatever the outcome."""
    binding: str | None
    """The bound with the least margin; None when nothing ended."""
    margin: float | None
    """Of the binding bound, as a share of its limit: negative when it is broken. None: beyond every number."""
    shares: dict[str, float]
    """Of each bound on requests by itself, the share within it: which limit fails first."""
    verdicts: list[Verdict]


class Attainment:
    """Counts requests against one service level as they end."""

    def __init__(self, slo: Slo, reference: Reference | None = None, exact_limit: int = EXACT_LIMIT) -> None:
        if slo.needs_reference and reference is None:
            raise ConfigError(f"The service level {slo} has slowdowns and there is nothing to compare with.",
                              "Name the reference device, or give times: ttft=400ms.")  # fmt: skip
        self.slo = slo
        self.ended = 0
        self.good = 0
        self._reference = reference if slo.needs_reference else None
        self._own = [bound for bound in slo.bounds if bound.metric != "itl"]
        # Latencies as millionths of their limit, one set a bound; and of each request the worst of the joint ones.
        self._ratios = [Samples(exact_limit) for _ in self._own]
        self._worst = Samples(exact_limit) if slo.joint else None
        self._within = [0] * len(self._own)
        self._without = [0] * len(self._own)
        self._jointly = 0

    def refused(self, count: int) -> None:
        """That many requests ended without an answer."""
        self.ended += count

    def add(self, times: Latencies, prompt_tokens: IntArray, output_tokens: IntArray) -> NDArray[np.bool_]:
        """Take requests that finished; which of them are good."""
        count = len(prompt_tokens)
        reference = self._reference(prompt_tokens, output_tokens) if self._reference is not None else None
        good, jointly = np.ones(count, dtype=np.bool_), np.ones(count, dtype=np.bool_)
        worst = np.zeros(count, dtype=np.int64)
        for i, bound in enumerate(self._own):
            ratio = _ratio(bound, times, reference)
            has = ratio >= 0
            within = ratio <= MILLION
            self._ratios[i].add(ratio if has.all() else ratio[has])
            self._within[i] += int((within & has).sum())
            self._without[i] += count - int(has.sum())
            good &= within
            if bound.percent is None:
                jointly &= within
                worst = np.maximum(worst, ratio)
        if self._worst is not None:
            self._worst.add(worst)
        self.ended += count
        self.good += int(good.sum())
        self._jointly += int(jointly.sum())
        return good

    def lost(self, total: int) -> bool:
        """Whether a run of `total` requests can no longer keep the service level, however the rest fares.

        For a search that stops early. Exact; bounds on itl are left out.
        """
        broken = [
            self.ended - without - within > total - rank(total, bound.percent)
            for bound, within, without in zip(self._own, self._within, self._without, strict=True)
            if bound.percent is not None
        ]
        joint = self._worst is not None and self.ended - self._jointly > total - rank(total, self.slo.attain_percent)
        return joint or any(broken)

    def figures(self, gaps: Histogram | None = None, gaps_per_ns: int = 1) -> AttainmentFigures:
        """The verdicts. `gaps` are the times between tokens for bounds on itl, `gaps_per_ns` of its unit a ns."""
        verdicts = [
            _verdict(str(bound), bound.percent, self.ended - without, samples, within)
            for bound, samples, within, without in zip(
                self._own, self._ratios, self._within, self._without, strict=True
            )
            if bound.percent is not None
        ]
        if self._worst is not None:
            name = ",".join((*map(str, self.slo.joint), f"attain={self.slo.attain:g}"))
            verdicts.append(_verdict(name, self.slo.attain_percent, self.ended, self._worst, self._jointly))
        verdicts += [_gap_verdict(b, gaps or Histogram(), gaps_per_ns) for b in self.slo.bounds if b.metric == "itl"]
        known = self.ended > 0
        tightest = min(verdicts, key=lambda verdict: float("-inf") if verdict.margin is None else verdict.margin)
        return AttainmentFigures(
            slo=str(self.slo),
            kept=known and all(verdict.kept for verdict in verdicts),
            good=self.good,
            attainment=self.good / max(self.ended, 1),
            binding=tightest.bound if known else None,
            margin=tightest.margin if known else None,
            shares={
                str(bound): within / max(self.ended - without, 1)
                for bound, within, without in zip(self._own, self._within, self._without, strict=True)
            },
            verdicts=verdicts,
        )


def _verdict(name: str, percent: float, ended: int, samples: Samples, within: int) -> Verdict:
    """Those without an answer stand behind all others: the percentile over everybody may not exist."""
    if ended == 0:
        return Verdict(bound=name, kept=True, wanted_share=percent / 100, share=1.0, observed=0.0, margin=1.0)
    position = rank(ended, percent)
    observed = samples.at_rank(position) / MILLION if position <= samples.count else None
    return Verdict(
        bound=name,
        kept=within >= position,
        wanted_share=percent / 100,
        share=within / ended,
        observed=observed,
        margin=None if observed is None else 1 - observed,
    )


def _ratio(bound: Bound, times: Latencies, reference: Latencies | None) -> IntArray:
    """Millionths of the limit, rounded up, so that at most a million means within; -1 where the figure is none."""
    figure = _column(bound, times)
    if bound.limit_ns is not None:
        limit = np.full(len(figure), float(bound.limit_ns))
    else:
        if reference is None or bound.slowdown is None:
            raise ValueError(f"{bound} without a reference")
        limit = bound.slowdown * _column(bound, reference).astype(np.float64)
    ratio = np.ceil(figure.astype(np.float64) / limit * MILLION)
    # The ceiling of a rounded quotient may step over the line; the line itself is drawn by comparing.
    within = figure <= limit
    ratio = np.where(within, np.minimum(ratio, MILLION), np.maximum(ratio, MILLION + 1))
    return np.where(figure < 0, -1, np.minimum(ratio, _LARGEST_RATIO)).astype(np.int64)


def _column(bound: Bound, times: Latencies) -> IntArray:
    match bound.metric:
        case "ttft":
            return times.ttft_ns
        case "tpot":
            return times.tpot_ns
        case "e2e":
            return times.e2e_ns
        case _:
            raise ValueError(f"{bound} is not on requests")


def _gap_verdict(bound: Bound, gaps: Histogram, per_ns: int) -> Verdict:
    """Of a bound on all gaps between tokens; within the histogram's error."""
    percent, limit = bound.percent or 100.0, (bound.limit_ns or 1) * per_ns
    observed = gaps.percentile(percent) / limit if gaps.count else 0.0
    return Verdict(
        bound=str(bound),
        kept=observed <= 1,
        wanted_share=percent / 100,
        share=gaps.at_or_below(limit) / gaps.count if gaps.count else 1.0,
        observed=observed,
        margin=1 - observed,
    )
