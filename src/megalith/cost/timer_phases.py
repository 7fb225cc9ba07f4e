"""What a device timer can do beside timing steps: run slower, run at a lower clock, say what it draws.

Holds the two published models of a lowered clock. Knows no cluster and no controller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from megalith.base.errors import ConfigError
from megalith.cost.timer import Line, StepTimer

NO_END: Final = 1 << 60
"""`Line.steps` of a line that holds for ever."""

quick_line: Final[Callable[[tuple[int, int, int]], Line]] = partial(tuple.__new__, Line)
"""`Line(*fields)` without the Python call that a NamedTuple's constructor is: it is made a million times."""

MEMORY_CLOCK_SHARE = 0.15
"""How much of a slower clock memory-bound work feels: time x (1 + share * (1 / f - 1)); compute feels all of it.

POLCA (ASPLOS 2024) measured at most 3 % end to end for 1,275 of 1,410 MHz and at most 7 % for 1,110 MHz on A100. With
4 % of the time in prompts, as BLOOM-176B has with 2,048 tokens in and 256 out, 0.15 gives 2.0 % and 5.0 %. The bounds
are published, the value inside them is an assumption.
"""

POWER_EXPONENT = 2.2
"""P(f) = idle + (P(1) - idle) * f**alpha. Assumption for POLCA's set-up (20 % less peak power at 1,110 MHz asks for
1.0, cubic theory for 3); sweep 1.5 to 3."""


class PhasePower(NamedTuple):
    """Watts of one device: idle, while it computes prompts, while it decodes."""

    idle_w: float
    prompt_w: float
    decode_w: float


class DeviceTimer(StepTimer, Protocol):
    """A StepTimer of a device that can be slowed down and that draws power."""

    def scaled(self, factor: float) -> DeviceTimer:
        """The same device taking `factor` times as long for everything: a straggler."""
        ...

    def at_clock(self, fraction: float) -> DeviceTimer:
        """The same device at this fraction of its full clock, whatever its clock was."""
        ...

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """What one device draws at its clock."""
        ...


def memory_slowdown(fraction: float) -> float:
    """Factor on the time of memory-bound work at a fraction of the clock."""
    return 1.0 + MEMORY_CLOCK_SHARE * (1.0 / fraction - 1.0)


def check_factor(factor: float) -> float:
    """A factor on durations. Raises ConfigError unless it is above 0."""
    if not factor > 0.0:
        raise ConfigError(f"A step cannot take {factor:g} times as long.", "Use a factor above 0.")
    return factor


def check_clock(fraction: float) -> float:
    """A fraction of the full clock. Raises ConfigError unless it is above 0 and at most 1."""
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"{fraction:g} is not a fraction of a clock.", "Use a number above 0, at most 1.")
    return fraction


def at_lower_clock(power: PhasePower, fraction: float, exponent: float) -> PhasePower:
    """Power at a fraction of the clock: what is above idle falls with fraction**exponent."""
    factor = fraction**exponent
    idle = power.idle_w
    return PhasePower(idle, idle + (power.prompt_w - idle) * factor, idle + (power.decode_w - idle) * factor)
