"""A StepTimer over measured kernels: one step is the sum of the kernels that it runs.

    step = host + embedding(n) + layers x (layer kernels(n) + attention + experts(n) + 2 all-reduces(n))
           + final norm(n) + head(r) + sampler(r)

n = tokens of the step, r = requests in it, each of which gets a row of logits, also when its prompt is not done yet (as
in vLLM). Each table gives one call in one layer; two norms run in a layer. n is rounded up to the sizes for which vLLM
keeps CUDA graphs (1, 2, 4, then multiples of 8, from 256 on of 16; kernels work on tiles of that size anyway), and
times lie on straight lines between the measured sizes.

Attention was measured with one prompt chunk beside decodes of equal context. Several chunks count as one with the same
tokens and the same number of (query, key) pairs. Unequal contexts: see kernel_attention.py. Experts: a balanced router;
with tensor parallelism the experts lie whole on the ranks. All-reduce: a ring.

`host_ns` is what a step takes beside its kernels: launches, gaps between kernels, scheduling that does not hide behind
the device. It is no part of the tables and is to be calibrated on other runs than those one wants to predict.

At a lower clock decodes alone feel what memory-bound work feels, steps with prompts all of it, and all other kernels a
share of each: compute-bound is what the largest measured batch takes a token. Durations are whole picoseconds. Knows no
cluster and no policy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

from megalith.base.errors import ConfigError
from megalith.cost.kernel_attention import Attention, between
from megalith.cost.kernel_profile import KernelProfile, read_profile
from megalith.cost.timer import PS_PER_NS, Line, Prompt
from megalith.cost.timer_phases import (
    POWER_EXPONENT,
    PhasePower,
    at_lower_clock,
    check_clock,
    check_factor,
    memory_slowdown,
    quick_line,
)
from megalith.specs.fleet import LinkSpec
from megalith.specs.model import ModelSpec

_ONCE = frozenset({"embedding", "final_layernorm"})
"""Dense layers that run once in a step; all others run in each layer of the model."""
_CALLS = {"layernorm": 2, "qk_norm": 2}
"""Calls in one layer, where there is more than one: before attention and before the FFN; of q and of k."""
_ACTIVATION_BYTES = 2
_PS_PER_S = 1_000_000_000_000


class KernelTable:
    """See the module, StepTimer and DeviceTimer. What was computed once is kept: a run meets few sizes."""

    def __init__(
        self,
        profile: KernelProfile,
        model: ModelSpec,
        tensor_parallel: int = 1,
        host_ns: int = 0,
        link: LinkSpec | None = None,
        power: PhasePower | None = None,
    ) -> None:
        """`link` joins the devices of an instance; `power` is of one of them. Raises ConfigError on what is lacking."""
        if tensor_parallel > 1 and link is None:
            raise ConfigError(
                f"{model.name} on {tensor_parallel} devices adds up activations in every layer, and no link is given.",
                "Give the bandwidth and latency of the link between the devices of an instance.",
            )
        if model.num_experts and not profile.experts:
            raise ConfigError(f"{model.name} has experts, and there is no table tp1_moe.csv.")
        self._profile = profile
        self._model = model
        self._ranks = tensor_parallel
        self._link = link
        self._host_ns = host_ns
        self._power = power
        self._run_at(1.0, 1.0)

    def _run_at(self, factor: float, clock: float) -> None:
        """Forget what was computed; from now on with this factor on everything and at this clock."""
        self._factor, self._clock = factor, clock
        self._slow = factor * memory_slowdown(clock), factor / clock
        """Factors of memory-bound and of compute-bound work."""
        self._host_ps = round(self._host_ns * PS_PER_NS * factor)
        self._attention = Attention(self._profile, self._model.num_layers, self._slow)
        self._tokens: dict[int, int] = {}
        self._requests: dict[int, int] = {}
        self._decodes: dict[int, int] = {}
        largest = max(sizes[-1] for sizes, _ in self._profile.dense.values())
        self._compute_ps = self._kernels_ps(largest) / largest

    @classmethod
    def load(
        cls,
        directory: str | Path,
        model: ModelSpec,
        tensor_parallel: int = 1,
        host_ns: int = 0,
        link: LinkSpec | None = None,
        power: PhasePower | None = None,
    ) -> KernelTable:
        """The timer over the tables in `directory` (layout: kernel_profile.py). Raises ConfigError."""
        return cls(read_profile(Path(directory), tensor_parallel), model, tensor_parallel, host_ns, link, power)

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """Duration of one step, in picoseconds. A listed row of one token behind a context counts as a decode."""
        tokens = pairs = history = chunks = 0
        for new, context, _ in prompts:
            if new == 1 and context:
                decodes, context_sum, context_max = decodes + 1, context_sum + context, max(context_max, context)
            else:
                chunks += 1
                tokens += new
                history += context
                pairs += new * (2 * context + new)
        if not chunks:
            return self._steady_ps(decodes) + self._attention.decode_piece(decodes, context_sum, context_max)[0]
        if chunks > 1:
            history = max(0, pairs - tokens * tokens) // (2 * tokens)
        fixed = self._host_ps + self._tokens_ps(tokens + decodes) + self._requests_ps(chunks + decodes)
        return fixed + self._attention.mixed_ps(tokens, history, decodes, context_sum, context_max)

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """Durations of the step of these decodes and of those that follow it."""
        first, slope, steps = self._attention.decode_piece(decodes, context_sum, context_max)
        return quick_line((self._steady_ps(decodes) + first, slope, steps))

    def scaled(self, factor: float) -> KernelTable:
        """See DeviceTimer."""
        return self._other(self._factor * check_factor(factor), self._clock)

    def at_clock(self, fraction: float) -> KernelTable:
        """See DeviceTimer."""
        return self._other(self._factor, check_clock(fraction))

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer. Tables hold no watts: nan where none were given."""
        power = PhasePower(math.nan, math.nan, math.nan) if self._power is None else self._power
        return at_lower_clock(power, self._clock, exponent)

    def _other(self, factor: float, clock: float) -> KernelTable:
        other = copy.copy(self)
        other._run_at(factor, clock)
        return other

    def _steady_ps(self, decodes: int) -> int:
        """All but attention of a step of decodes."""
        known = self._decodes.get(decodes)
        if known is None:
            known = self._host_ps + self._tokens_ps(decodes) + self._requests_ps(decodes)
            self._decodes[decodes] = known
        return known

    def _tokens_ps(self, tokens: int) -> int:
        known = self._tokens.get(tokens)
        if known is None:
            padded = _padded(tokens)
            time = self._kernels_ps(padded)
            busy = min(1.0, padded * self._compute_ps / time) if time else 0.0
            reduced = 2 * self._model.num_layers * self._all_reduce_ps(padded) * self._factor
            known = round(time * (busy * self._slow[1] + (1.0 - busy) * self._slow[0]) + reduced)
            self._tokens[tokens] = known
        return known

    def _kernels_ps(self, tokens: int) -> int:
        """All that runs once for every token, at full clock and without all-reduces."""
        once = layer = 0
        for name, curve in self._profile.dense.items():
            if name in _ONCE:
                once += between(curve, tokens)
            else:
                layer += between(curve, tokens) * _CALLS.get(name, 1)
        return once + (layer + self._experts_ps(tokens)) * self._model.num_layers

    def _requests_ps(self, requests: int) -> int:
        known = self._requests.get(requests)
        if known is None:
            time = sum([between(curve, requests) for curve in self._profile.sequences.values()])
            known = self._requests[requests] = round(time * self._slow[0])
        return known

    def _experts_ps(self, tokens: int) -> int:
        """The experts of one layer on one rank, when the router spreads tokens evenly.

        All experts of a token were on the one rank that was measured, so a share of the (token, expert) pairs counts as
        that share of the tokens. Each expert of a rank is awake as soon as the rank has as many pairs.
        """
        experts, chosen, ranks = self._model.num_experts, self._model.experts_per_token, self._ranks
        if not experts:
            return 0
        awake = max(1, min(tokens * chosen, experts) // ranks)
        table = self._profile.experts
        sizes = sorted(table)
        return between((sizes, [between(table[size], max(1, tokens // ranks)) for size in sizes]), awake)

    def _all_reduce_ps(self, tokens: int) -> int:
        """A ring: 2 (ranks - 1) messages one after the other, each the tensor divided by the ranks."""
        if self._ranks == 1 or self._link is None:
            return 0
        message_s = tokens * self._model.hidden * _ACTIVATION_BYTES / self._ranks / self._link.bytes_per_s
        return round(2 * (self._ranks - 1) * (self._link.latency_s + message_s) * _PS_PER_S)


def _padded(tokens: int) -> int:
    """The next size for which vLLM keeps a CUDA graph, and beyond those the next multiple of 16."""
    if tokens <= 2:
        return tokens
    if tokens <= 4:
        return 4
    step = 8 if tokens <= 256 else 16
    return -(-tokens // step) * step
