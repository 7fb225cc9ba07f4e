"""Which of many models each request of a workload asks for: drawn, and the same for a seed on every machine.

Knows requests and shares; must not know who serves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

import numpy as np

from megalith.base.config import Config
from megalith.base.random import splitmix64
from megalith.specs import draws
from megalith.specs.bounds import bound
from megalith.specs.experts import MOST_EXPERTS
from megalith.specs.shape import RequestShape

_EXPERT: Final = 15
"""Number of the random stream under a seed; see workload.py."""
_CHUNK: Final = 2048


class ExpertMix(Config, kw_only=True):
    """Which of many models each request asks for: independent draws; model 0 is the most popular."""

    count: int
    zipf: float = 0.0
    """Popularity falls as rank**-zipf; 0 is uniform."""

    def __post_init__(self) -> None:
        bound("count", self.count, 1, MOST_EXPERTS, where=" in experts")
        bound("zipf", self.zipf, 0, 10, where=" in experts")


def with_experts(shapes: Iterator[RequestShape], mix: ExpertMix, seed: int) -> Iterator[RequestShape]:
    """The same requests, each with the model it asks for: a pure function of (mix, seed, index).

    A prefix belongs to its model: the same text has other KV in another one, so prefix ids are told apart.
    """
    weights = draws.power(np.arange(1, mix.count + 1, dtype=np.float64), -mix.zipf)
    bounds = np.cumsum(weights)
    bounds /= bounds[-1]
    stream, first = splitmix64(seed, _EXPERT), 0
    while chunk := list(islice(shapes, _CHUNK)):
        models = np.minimum(np.searchsorted(bounds, draws.shares(stream, first, len(chunk))), mix.count - 1).tolist()
        first += len(chunk)
        for shape, model in zip(chunk, models, strict=True):
            ids = tuple([prefix * mix.count + model for prefix in shape.prefix_ids])
            yield RequestShape(
                shape.index, shape.at_ns, shape.input_tokens, shape.output_tokens, ids, shape.priority, model
            )
