"""Experts of a mixture that come from disk when a row is sent to them; those not used for longest make room.

A window (engine/layer_window.py) over experts instead of layers, under the LRU policy. All experts of a layer that a
step wants are asked for before the first of them runs, so reads overlap with computing. Results are the same bits as
with all experts in memory: what runs, and in which order, does not depend on what is near.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megalith.base.errors import ConfigError
from megalith.base.units import format_bytes, parse_bytes
from megalith.cost.memory import weight_bytes
from megalith.engine.layer_stow import LayerStow
from megalith.engine.layer_window import ModuleWindow
from megalith.model.mixture import Mixture
from megalith.model.transformer import Transformer
from megalith.policy.residency import LruParts
from megalith.specs.model import ModelSpec


def parse_cache(text: str, spec: ModelSpec, weight_format: str) -> int:
    """`N` experts, or as many as a size such as 2GiB holds, of all layers together. Raises ConfigError."""
    if not spec.num_experts:
        raise ConfigError(f"{spec.name} has no experts to keep.", "Leave --expert-cache away.")
    count = spec.num_layers * spec.num_experts
    one = weight_bytes(spec, weight_format, weight_format).experts // count
    near = int(text) if text.strip().isdigit() else parse_bytes(text) // one
    if near < 1:
        raise ConfigError(
            f"An expert cache of {text} holds none: an expert takes {format_bytes(one)}.",
            f"Take 1 to {count} experts; a token runs {spec.experts_per_token} in each of {spec.num_layers} layers.",
        )
    return min(near, count)


class _Lru(LruParts):
    """Experts are of one size, so the cap is a number of them."""

    def __init__(self, count: int, cap: int, turns: bool) -> None:
        super().__init__([1] * count, cap)
        self.cap, self.turns = cap, turns


class ExpertCache:
    """At most `near` experts of `model` in memory, the others where `stow` has put them. close() closes that, too."""

    def __init__(self, model: Transformer, near: int, stow: LayerStow) -> None:
        mixtures = [layer.ffn for layer in model.layers if isinstance(layer.ffn, Mixture)]
        experts = [expert for mixture in mixtures for expert in mixture.experts]
        self.needed = 0
        """Experts that steps ran, each counted once a step."""
        self.window = ModuleWindow(
            model, experts, 1, stowed=stow, policy=lambda count, turns: _Lru(count, min(near, count), turns)
        )
        for mixture in mixtures:
            mixture.wanted = self._wanted

    def _wanted(self, experts: Sequence[nn.Module]) -> None:
        self.needed += len(experts)
        self.window.expect(experts)

    @property
    def hit_rate(self) -> float:
        """The share of the experts that steps ran which were in memory."""
        return 1.0 - self.window.moves / max(1, self.needed)

    def summary(self) -> str:
        """Hits, in a few words."""
        return f"experts in memory when they were wanted: {self.hit_rate:.1%} of {self.needed:,}"
