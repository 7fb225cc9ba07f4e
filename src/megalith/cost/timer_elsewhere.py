"""ElsewhereTimer: steps of an instance whose attention runs on other devices, as exact integer lines between knots.

A step gives one token to every request: one turn of the rotation in its steady state (`attention_elsewhere`), with
batches as large as the largest of them, or one batch where that is faster. For a number of decodes it is scheduled at a
few mean contexts (the knots) and straight in between. Prompts, of those that were preempted or come to a mixed pool,
are computed on the model devices: KV of what came before them crosses the link to these, theirs goes back, and the
longer of computing and crossing counts; decodes of the same step go before them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost import energy
from megalith.cost.attention_devices import AttentionDevices, at_lower_clock, slice_times
from megalith.cost.attention_elsewhere import SliceTimes, Way, period_ps
from megalith.cost.compute import CostModel, StepCost, StepShape
from megalith.cost.memory import kv_bytes_per_token
from megalith.cost.timer import PS_PER_NS, Line, Prompt
from megalith.cost.timer_analytic import POWER_CONTEXT, POWER_DECODES, clocked, phase_power
from megalith.cost.timer_phases import (
    NO_END,
    POWER_EXPONENT,
    PhasePower,
    check_clock,
    check_factor,
    quick_line,
)
from megalith.cost.timer_phases import at_lower_clock as power_at_clock

KNOTS = (0, *(tokens for power in range(7, 24) for tokens in (1 << power, 3 << (power - 1))))
"""Mean contexts at which steps are scheduled: 0, 128, 192, 256, 384 and so on; the last piece goes on for ever."""
MAX_MEMO = 1 << 16


class ElsewhereTimer:
    """The StepTimer and DeviceTimer of a model on one instance with devices for attention."""

    def __init__(self, cost: CostModel, devices: AttentionDevices, factor: float = 1.0, clock: float = 1.0) -> None:
        """`cost` is that of one model replica. Raises ConfigError when SparF was asked for unmeasured."""
        devices.spec.check_quality()
        self.cost, self.devices = cost, devices
        self.factor, self.clock = check_factor(factor), check_clock(clock)
        profile = clocked(cost.profile, clock)
        self._cost = CostModel(cost.spec, profile, cost.weights, cost.kv_format, cost.devices)
        self._devices = at_lower_clock(devices, clock)
        self._kv_bytes = kv_bytes_per_token(cost.spec, cost.kv_format)
        self._values: dict[tuple[int, int, int], int] = {}
        self._pieces: dict[tuple[int, int], tuple[int, int]] = {}

    def times(self, decodes: int, mean_context: int, number: int) -> tuple[list[SliceTimes], Way]:
        """What is scheduled for a step in so many batches."""
        rows, spec = -(-decodes // number), self.devices.spec
        one = slice_times(self._cost, self._devices, rows, mean_context, self.factor)
        return [one] * number, Way(spec.early, spec.at == "home", min(spec.replicas, max(1, number - 1)))

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:  # noqa: ARG002
        """See StepTimer. A line ends where the mean context reaches a knot."""
        place = bisect_right(KNOTS, context_sum // decodes) - 1
        first_ps, slope = self._piece(decodes, place)
        first_ps += slope * (context_sum - KNOTS[place] * decodes)
        if place == len(KNOTS) - 1:
            return quick_line((first_ps, slope * decodes, NO_END))
        steps = -(-(KNOTS[place + 1] * decodes - context_sum) // decodes)
        return quick_line((first_ps, slope * decodes, steps))

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """See StepTimer."""
        rows = outputs = sequences = before = pairs = 0
        for new, context, samples in prompts:
            if new == 1:
                decodes += 1
                context_sum += context
            else:
                rows, outputs, sequences = rows + new, outputs + samples, sequences + 1
                before += context
                pairs += new * context + new * (new + 1) // 2
        total = self.decode_line(decodes, context_sum, context_max).first_ps if decodes else 0
        return total + self._prompt_ps((rows, outputs, sequences), before, pairs, bool(decodes)) if rows else total

    def _prompt_ps(self, shape: tuple[int, int, int], before: int, pairs: int, beside: bool) -> int:
        """Prompt chunks on the model devices; the host's time of a step was counted where there are decodes."""
        rows, outputs, sequences = shape
        layers = self.cost.spec.num_layers
        work = StepShape(rows, outputs, sequences, 0, layers * (rows + before), layers * pairs)
        compute_ns = self._cost.step(work).duration_ns - beside * self._cost.profile.rates.step_ns
        crossing = max(rows, before) * self._kv_bytes
        link_ns = crossing * NS_PER_S / self._devices.link_bytes_per_s + self._devices.trip_ns
        return max(1, round(max(compute_ns, link_ns) * self.factor)) * PS_PER_NS

    def _piece(self, decodes: int, place: int) -> tuple[int, int]:
        """(value at the knot, slope a token of context)."""
        found = self._pieces.get((decodes, place))
        if found is None:
            if decodes < 1:
                raise ValueError(f"a step of {decodes} decodes and no prompt")
            low = place if place < len(KNOTS) - 1 else place - 1
            values = [self._value(decodes, at) for at in (low, low + 1)]
            slope = (values[1] - values[0]) // ((KNOTS[low + 1] - KNOTS[low]) * decodes)
            if len(self._pieces) >= MAX_MEMO:
                self._pieces.clear()
            found = self._pieces[decodes, place] = (values[place - low], max(slope, 0))
        return found

    def _value(self, decodes: int, place: int) -> int:
        """A step at a knot, scheduled: in rotation where that is faster than one batch, which reads weights once."""
        rotation = min(self.devices.spec.batches, decodes)
        alone = self._period(1, decodes, place)
        return alone if rotation == 1 else min(alone, self._period(rotation, -(-decodes // rotation), place))

    def _period(self, number: int, rows: int, place: int) -> int:
        found = self._values.get((number, rows, place))
        if found is None:
            batches, way = self.times(number * rows, KNOTS[place], number)
            if len(self._values) >= MAX_MEMO:
                self._values.clear()
            found = self._values[number, rows, place] = period_ps(batches, self.cost.spec.num_layers, way)
        return found

    def scaled(self, factor: float) -> ElsewhereTimer:
        """See DeviceTimer."""
        return ElsewhereTimer(self.cost, self.devices, self.factor * check_factor(factor), self.clock)

    def at_clock(self, fraction: float) -> ElsewhereTimer:
        """See DeviceTimer. Drives keep their rate."""
        return ElsewhereTimer(self.cost, self.devices, self.factor, fraction)

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer: of one device of the pool's tensor parallel group with its part of all others.

        Decodes: by how busy each side is in a step of 32 for each batch at 1,024 tokens.
        """
        spec, power = self.devices.spec, self.cost.profile.power
        decodes = POWER_DECODES * spec.batches
        plain = phase_power(self.cost, 1.0, exponent)
        if power is None:
            raise ConfigError(f"The profile {self.cost.profile.name} has no power figures.")
        batches, way = ElsewhereTimer(self.cost, self.devices).times(decodes, POWER_CONTEXT, spec.batches)
        layers, one = self.cost.spec.num_layers, batches[0]
        period = period_ps(batches, layers, way)
        step = self.cost.step(StepShape(POWER_DECODES, POWER_DECODES, POWER_DECODES, 0, 0, 0))
        round_ns = period / PS_PER_NS * spec.replicas / spec.batches
        busy = StepCost(round(round_ns), step.compute_ns, step.memory_ns, step.link_ns, step.fixed_ns)
        model_w = energy.power_w(power, busy).value
        share = min(1.0, spec.batches * layers * one.attend_ps / period) if spec.at == "there" else 1.0
        there = self.devices.idle_w + share * (self.devices.busy_w - self.devices.idle_w)
        others, part = self.devices.spec.count / self.cost.devices, spec.replicas
        idle = part * plain.idle_w + others * self.devices.idle_w
        prompt = plain.prompt_w + (part - 1) * plain.idle_w + others * self.devices.idle_w
        return power_at_clock(PhasePower(idle, prompt, part * model_w + others * there), self.clock, exponent)
