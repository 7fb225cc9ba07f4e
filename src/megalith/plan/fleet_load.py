"""The load that a fleet is planned for, as columns: when requests come, how long prompts and answers are.

Knows requests; must not know devices or policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import islice
from math import ceil

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.report.percentiles import rank
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec, open_workload
from megalith.specs.workload_rate import mean_rate

Column = NDArray[np.int64]

LEAST_SPAN_S = 120.0
MOST_REQUESTS = 100_000
_CV_SQUARED_MOST = 20.0


class Load:
    """Requests of a workload, in the order of arrival."""

    def __init__(self, shapes: Sequence[RequestShape], prefix_block_tokens: int) -> None:
        """Raises ConfigError when there are too few for a rate."""
        if len(shapes) < 2:
            raise ConfigError(f"{len(shapes)} requests are no load to plan for.", "Give a longer trace.")
        self.requests = len(shapes)
        self.prompts = _column([shape.input_tokens for shape in shapes])
        self.outputs = _column([shape.output_tokens for shape in shapes])
        self.fresh = _fresh(shapes, prefix_block_tokens, self.prompts)
        """Prompt tokens that even an endless prefix cache would not have."""
        at_ns = _column([shape.at_ns or 0 for shape in shapes])
        self.span_s = float(at_ns[-1] - at_ns[0]) / NS_PER_S
        if self.span_s <= 0:
            raise ConfigError("All requests come at once: there is no rate to plan for.", "Give arrivals=poisson.")
        self.rate_per_s = (self.requests - 1) / self.span_s
        self._after_ns: Column = at_ns - at_ns[0]
        gaps = np.diff(at_ns)
        self.cv_squared = min(float(gaps.var() / gaps.mean() ** 2), _CV_SQUARED_MOST)
        """Of the gaps between arrivals: 1 is Poisson."""
        self.decoded = int((self.outputs - 1).sum())
        weights = self.outputs - 1
        contexts = self.prompts + self.outputs // 2
        self.mean_context = float((contexts * weights).sum() / max(self.decoded, 1)) or float(contexts.mean())
        """Tokens in the KV cache of a request, averaged over its decode steps."""

    def times(self, factor: float) -> Load:
        """The same requests at so many times the rate."""
        faster = copy(self)
        faster.rate_per_s, faster.span_s = self.rate_per_s * factor, self.span_s / factor
        return faster

    def at_percent(self, column: Column, percent: float) -> int:
        """The nearest-rank percentile of a column."""
        return int(np.sort(column)[rank(self.requests, percent) - 1])

    def peak_over_mean(self, window_s: float) -> float:
        """Requests of the busiest stretch of that length over the mean of all such; stretches follow one another."""
        counts = np.bincount((self._after_ns // round(window_s * NS_PER_S)).astype(np.int64))
        whole = counts[:-1] if len(counts) > 1 else counts
        return float(whole.max() / whole.mean())

    def smallest_sum(self, column: Column, percent: float) -> int:
        """The sum of a column over the `percent` of the requests for which it is smallest."""
        return int(np.sort(column)[: rank(self.requests, percent)].sum())


def cut(workload: WorkloadSpec, seed: int, most_requests: int) -> tuple[WorkloadSpec, Load, int | None]:
    """The part of the workload that is planned with, as columns, and how many requests the whole has (None: endless).

    The part is its first `most_requests`, or as many as come within two minutes where that is more.
    """
    rate = mean_rate(workload)
    most = min(max(most_requests, ceil(rate * LEAST_SPAN_S)), max(MOST_REQUESTS, most_requests))
    stream = open_workload(workload, seed)
    shapes = list(islice(stream, most))
    load = Load(shapes, workload.prefix_block_tokens)
    rest = 0 if workload.endless else sum(1 for _ in stream)
    part = msgspec.structs.replace(workload, requests=load.requests)
    return part, load, None if workload.endless else load.requests + rest


def _column(values: Sequence[int]) -> Column:
    return np.array(values, dtype=np.int64)


def _fresh(shapes: Sequence[RequestShape], block_tokens: int, prompts: Column) -> Column:
    seen: set[int] = set()
    cached = []
    for shape in shapes:
        hits = 0
        for block in shape.prefix_ids:
            if block not in seen:
                break
            hits += 1
        seen.update(shape.prefix_ids)
        cached.append(hits * block_tokens)
    fresh: Column = np.maximum(prompts - _column(cached), 1)
    return fresh
