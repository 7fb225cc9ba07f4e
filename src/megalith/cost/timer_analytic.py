"""AnalyticTimer: steps of a CostModel as exact integer lines, fast enough to be asked a million times.

All that depends only on a number of rows, of outputs or of decodes is computed by the CostModel once and kept in whole
nanoseconds; what is left of a step is a few integer products. Decodes read `context_ps` per token of context, so their
steps lie on a line until a sliding window fills.

Sliding windows: a timer sees the sum of the contexts, not each one. Local layers are taken to read
min(sum, decodes * window) keys, which is exact while all requests are on one side of the window and otherwise too much
by at most what the contexts below and above it could trade; so never too fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from megalith.base.errors import ConfigError
from megalith.cost import energy
from megalith.cost import parameters as counting
from megalith.cost.compute import CostModel, StepShape
from megalith.cost.memory import per_device_kv_heads
from megalith.cost.profile import Profile
from megalith.cost.timer import PS_PER_NS, Line, Prompt
from megalith.cost.timer_phases import (
    NO_END,
    POWER_EXPONENT,
    PhasePower,
    at_lower_clock,
    check_clock,
    check_factor,
    memory_slowdown,
    quick_line,
)
from megalith.specs.model import ModelSpec

MAX_MEMO = 1 << 16
"""Entries of one memory; a fuller one is emptied."""
POWER_ROWS, POWER_DECODES, POWER_CONTEXT = 4_096, 32, 1_024
"""The step of each phase that `power_w` looks at."""


def check_tensor_parallel(spec: ModelSpec, devices: int, max_group: int) -> None:
    """Raise ConfigError unless `spec` can be cut over `devices` devices, of which `max_group` share fast links."""
    if devices < 1 or spec.num_heads % devices:
        works = [n for n in range(1, max(max_group, 1) + 1) if spec.num_heads % n == 0]
        raise ConfigError(
            f"{spec.name} has {spec.num_heads} attention heads, which cannot be cut over {devices} devices.",
            f"Tensor parallel degrees that work: {', '.join(map(str, works))}.",
        )
    if devices > max(max_group, 1):
        raise ConfigError(
            f"Tensor parallel over {devices} devices, but {max(max_group, 1)} share fast links.",
            f"Use at most {max(max_group, 1)}.",
        )


def clocked(profile: Profile, fraction: float) -> Profile:
    """The profile at a fraction of the clock: compute takes 1 / fraction, memory hardly longer, host the same."""
    if fraction == 1.0:
        return profile
    rates, compute, memory = profile.rates, 1.0 / fraction, memory_slowdown(fraction)
    slower = msgspec.structs.replace(
        rates,
        mac_ns=rates.mac_ns * compute,
        logit_mac_ns=rates.logit_mac_ns * compute,
        pair_mac_ns=rates.pair_mac_ns * compute,
        weight_byte_ns=rates.weight_byte_ns * memory,
        kv_byte_ns=rates.kv_byte_ns * memory,
        row_value_ns=rates.row_value_ns * memory,
    )
    return msgspec.structs.replace(profile, rates=slower)


class AnalyticTimer:
    """The StepTimer and DeviceTimer of a CostModel (any model, profile and tensor parallel degree)."""

    def __init__(self, cost: CostModel, factor: float = 1.0, clock: float = 1.0) -> None:
        """`factor` multiplies every duration; `clock` is a fraction. Raises ConfigError when heads cannot be cut."""
        check_tensor_parallel(cost.spec, cost.devices, cost.profile.max_group)
        self.cost, self.factor, self.clock = cost, check_factor(factor), check_clock(clock)
        profile = clocked(cost.profile, clock)
        self._cost = CostModel(cost.spec, profile, cost.weights, cost.kv_format, cost.devices)
        spec, rates = cost.spec, profile.rates
        ps = PS_PER_NS * factor
        layer_token_ps = cost.kv_layer_token_bytes * rates.kv_byte_ns * ps
        layer_token_ps *= per_device_kv_heads(spec, cost.devices) / spec.num_kv_heads
        local = sum(spec.layer_window(layer) is not None for layer in range(spec.num_layers))
        self._window = spec.sliding_window or 0
        self._local_ps = round(layer_token_ps * local)
        self._global_ps = round(layer_token_ps * (spec.num_layers - local))
        self._half_pair_ps = cost.pair_macs * rates.pair_mac_ns * ps / cost.devices / 2.0
        self._layers = spec.num_layers
        self._sequence_ps = round(rates.sequence_ns * ps)
        self._row_ps: dict[int, int] = {}
        self._head_ps: dict[int, int] = {0: 0}
        self._decode_ps: dict[int, int] = {}

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:  # noqa: ARG002
        """See StepTimer. Lines end only where the mean context reaches a sliding window."""
        base = self._decode_ps.get(decodes)
        if base is None:
            base = self._decode_base(decodes)
        slope = self._global_ps
        if not self._local_ps:
            return quick_line((base + slope * context_sum, slope * decodes, NO_END))
        seen, most = context_sum + decodes, decodes * self._window
        if seen < most:
            steps = (most - seen) // decodes + 1
            return quick_line(
                (base + slope * context_sum + self._local_ps * seen, (slope + self._local_ps) * decodes, steps)
            )
        return quick_line((base + slope * context_sum + self._local_ps * most, slope * decodes, NO_END))

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:  # noqa: ARG002
        """See StepTimer."""
        if prompts:
            return self._mixed_ps(prompts, decodes, context_sum)
        base = self._decode_ps.get(decodes)
        if base is None:
            base = self._decode_base(decodes)
        if not self._local_ps:
            return base + self._global_ps * context_sum
        return (
            base + self._global_ps * context_sum + self._local_ps * min(context_sum + decodes, decodes * self._window)
        )

    def _mixed_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int) -> int:
        """A step with prompt chunks."""
        if self._local_ps:
            return self._mixed_windowed_ps(prompts, decodes, context_sum)
        rows = outputs = decodes
        seen = context_sum + decodes
        chunk_seen = double_pairs = 0
        for new, context, samples in prompts:
            rows += new
            outputs += samples
            if new == 1:
                seen += context + 1
            else:
                chunk_seen += context + new
                double_pairs += new * (context + context + new + 1)
        slope = self._global_ps
        chunk = slope * chunk_seen
        compute = int(self._half_pair_ps * (double_pairs * self._layers))
        return (
            self._rows_and_outputs(rows, outputs)
            + self._sequence_ps * (decodes + len(prompts))
            + slope * seen
            + (chunk if chunk > compute else compute)
        )

    def _mixed_windowed_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int) -> int:
        spec, window = self.cost.spec, self._window
        rows = outputs = decodes
        seen = context_sum + decodes
        seen_local = min(seen, decodes * window)
        chunk_seen = chunk_local = pairs = 0
        for new, context, samples in prompts:
            rows += new
            outputs += samples
            if new == 1:
                seen += context + 1
                seen_local += min(context + 1, window)
            else:
                chunk_seen += context + new
                chunk_local += min(context + new, window)
                pairs += counting.chunk_pairs(spec, new, context)
        memory = self._global_ps * chunk_seen + self._local_ps * chunk_local
        return (
            self._rows_and_outputs(rows, outputs)
            + self._sequence_ps * (decodes + len(prompts))
            + self._global_ps * seen
            + self._local_ps * seen_local
            + max(memory, int(2.0 * self._half_pair_ps * pairs))
        )

    def _rows_and_outputs(self, rows: int, outputs: int) -> int:
        row_ps = self._row_ps.get(rows)
        if row_ps is None:
            row_ps = _remember(self._row_ps, rows, self._whole_ns(StepShape(rows, 0, 0, 0, 0, 0)))
        head_ps = self._head_ps.get(outputs)
        if head_ps is None:
            both = self._whole_ns(StepShape(1, outputs, 0, 0, 0, 0)) - self._whole_ns(StepShape(1, 0, 0, 0, 0, 0))
            head_ps = _remember(self._head_ps, outputs, both)
        return row_ps + head_ps

    def _decode_base(self, decodes: int) -> int:
        """All of a step of decodes but its context; the token that each adds is here, save for local layers."""
        if decodes < 1:
            raise ValueError(f"a step of {decodes} decodes and no prompt")
        base = self._rows_and_outputs(decodes, decodes) + (self._sequence_ps + self._global_ps) * decodes
        return _remember(self._decode_ps, decodes, base)

    def _whole_ns(self, shape: StepShape) -> int:
        return max(1, round(self._cost.step(shape).duration_ns * self.factor)) * PS_PER_NS

    def scaled(self, factor: float) -> AnalyticTimer:
        """See DeviceTimer."""
        return AnalyticTimer(self.cost, self.factor * check_factor(factor), self.clock)

    def at_clock(self, fraction: float) -> AnalyticTimer:
        """See DeviceTimer."""
        return AnalyticTimer(self.cost, self.factor, fraction)

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer: from `cost.energy`, for a prompt step of 4,096 rows and a step of 32 decodes at 1,024."""
        return phase_power(self.cost, self.clock, exponent)


def phase_power(cost: CostModel, clock: float, exponent: float) -> PhasePower:
    """Watts of a device of `cost` by phase, at a fraction of its clock. Raises ConfigError without power figures."""
    power = cost.profile.power
    if power is None:
        raise ConfigError(
            f"The profile {cost.profile.name} has no power figures.", "Use a catalogue device, or add [power] to it."
        )
    prompt = cost.step(cost.shape([(POWER_ROWS, 0)], outputs=1))
    full = PhasePower(
        power.idle_w,
        energy.power_w(power, prompt).value,
        energy.power_w(power, cost.decode_step(POWER_DECODES, POWER_CONTEXT)).value,
    )
    return at_lower_clock(full, clock, exponent)


def _remember(memory: dict[int, int], key: int, value: int) -> int:
    if len(memory) >= MAX_MEMO:
        memory.clear()
    memory[key] = value
    return value
