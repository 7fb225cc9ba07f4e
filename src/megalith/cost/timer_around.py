"""A device timer around another one: what it changes is steps, not clocks or watts.

Knows timers; must not know what the change is.
"""

from __future__ import annotations

from typing import TypeVar

from megalith.cost.timer_phases import POWER_EXPONENT, DeviceTimer, PhasePower

T = TypeVar("T", bound="AroundTimer")


class AroundTimer:
    """Slows down and draws power as its inner timer does; step_ps and decode_line are the subclass's."""

    inner: DeviceTimer

    def around(self: T, inner: DeviceTimer) -> T:
        """The same change around another timer."""
        raise NotImplementedError

    def scaled(self: T, factor: float) -> T:
        """See DeviceTimer."""
        return self.around(self.inner.scaled(factor))

    def at_clock(self: T, fraction: float) -> T:
        """See DeviceTimer."""
        return self.around(self.inner.at_clock(fraction))

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer."""
        return self.inner.power_w(exponent)
