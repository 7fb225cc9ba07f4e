"""A row that trains: one synchronous job over all servers, whose compute and communication phases everybody shares.

Nothing averages out: when one server computes, all do. Under a lower clock the compute phase takes longer and the
communication phase as long as before. Profile of POLCA (ASPLOS 2024, as accounts of it give it): 97 % of the
provisioned power at the peak, swings of 37.5 % within two seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.timer_phases import POWER_EXPONENT
from megalith.policy import registry
from megalith.sim.fluid_power import RowPower
from megalith.specs.fleet import PolicySpec, PowerSpec


class TrainingProfile(Config, kw_only=True):
    """One server while it trains."""

    rated_w: float = 6500.0
    """What is provisioned for it."""
    peak: float = 0.97
    """Share of that in the compute phase."""
    swing: float = 0.375
    """How much less in the communication phase."""
    idle_w: float = 3609.0
    """With idle devices: what no clock takes away."""
    compute_s: float = 16.0
    communicate_s: float = 4.0
    """Of one training step; the lengths are assumptions, only that both hold for a whole telemetry sample matters."""

    def __post_init__(self) -> None:
        if not (0 < self.swing < self.peak <= 1 and self.compute_s > 0 and self.communicate_s > 0):
            raise ConfigError(f"{self} trains nothing.", "Give a swing below the peak, and phases above 0 s.")


class TrainingResult(NamedTuple):
    """What came of it."""

    power_w: NDArray[np.float32]
    brakes: int
    slowdown: float
    """Time of a training step over that at the full clock, less 1."""


def train_row(
    servers: int, power: PowerSpec, policy: PolicySpec | None, duration_s: float,
    profile: TrainingProfile | None = None, exponent: float = POWER_EXPONENT,
) -> TrainingResult:  # fmt: skip
    """Run a job on so many servers for so long, in steps of the telemetry; the whole row is one scope."""
    profile = profile or TrainingProfile()
    control = RowPower(power, (), None if policy is None else registry.controller(policy, 0))
    step_s = power.telemetry_s
    compute_w, rest_w = profile.rated_w * profile.peak, profile.rated_w * (profile.peak - profile.swing)
    whole_s = profile.compute_s + profile.communicate_s
    samples, at_s, done = [], 0.0, 0.0
    for step in range(round(duration_s / step_s)):
        clock = control.clock
        factor = clock**exponent
        left, energy_j = step_s, 0.0
        while left > 1e-9:
            computing = at_s < profile.compute_s
            speed = clock if computing else 1.0
            end = profile.compute_s if computing else whole_s
            took = min(left, (end - at_s) / speed)
            watts = compute_w if computing else rest_w
            energy_j += took * (profile.idle_w + (watts - profile.idle_w) * factor)
            at_s, left = at_s + took * speed, left - took
            done += took * speed
            if at_s >= whole_s - 1e-9:
                at_s = 0.0
        watts = servers * energy_j / step_s
        samples.append(watts)
        control.sample(round((step + 1) * step_s * NS_PER_S), watts)
    return TrainingResult(np.array(samples, dtype=np.float32), control.counters.brakes, duration_s / done - 1.0)
