"""Watts, joules and money from how busy a device is.

P = idle + (peak - idle) * min(1, c * u_compute + m * u_memory + n * u_link), with the shares of the profile. The
default shares (1, 0.555, 0.1) reproduce what POLCA (ASPLOS 2024) measured on A100: 400 W in the prompt phase, 250 W in
the token phase, 63 W idle. GenZ (arXiv:2406.01698) uses static 30, compute 40, memory 20, network 10 % of TDP:
`genz_power`.
"""

from __future__ import annotations

from megalith.base.units import NS_PER_S
from megalith.cost.compute import StepCost
from megalith.cost.profile import Power
from megalith.specs.plan import Estimate


def power_w(power: Power, step: StepCost, busy_fraction: float = 1.0) -> Estimate:
    """Average power of one device over a step, with its band; `busy_fraction` < 1 spreads it with idle time.

    The band never leaves the range from idle to peak by more than the model's error.
    """
    duration = max(step.duration_ns, 1)
    use = (
        power.compute_share * step.compute_ns / duration
        + power.memory_share * step.memory_ns / duration
        + power.link_share * step.link_ns / duration
    )
    value = power.idle_w + (power.peak_w - power.idle_w) * min(1.0, use) * busy_fraction
    return Estimate(value=value, low=value * (1.0 - power.error), high=value * (1.0 + power.error))


def genz_power(tdp_w: float) -> Power:
    """GenZ's shares for a device of `tdp_w`: 30 % static, 40 compute, 20 memory, 10 network."""
    scale = 1.0 / 0.7
    return Power(
        idle_w=0.3 * tdp_w, peak_w=tdp_w, compute_share=0.4 * scale, memory_share=0.2 * scale, link_share=0.1 * scale,
        source="GenZ (arXiv:2406.01698): 30 / 40 / 20 / 10",
    )  # fmt: skip


def joules_per_token(power: Estimate, duration: Estimate, tokens: int, devices: int = 1) -> Estimate:
    """Energy of one token: power x time of the step / tokens of the step. `duration` is in nanoseconds."""
    scale = devices / NS_PER_S / tokens
    return Estimate(
        value=power.value * duration.value * scale,
        low=power.low * duration.low * scale,
        high=power.high * duration.high * scale,
    )


def usd_per_million_tokens(price_per_hour_usd: float, tokens_per_s: Estimate, devices: int = 1) -> Estimate:
    """Price of a million output tokens at full load."""
    return tokens_per_s.inverse(price_per_hour_usd * devices / 3600.0 * 1e6)
