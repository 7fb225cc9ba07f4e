"""Outlet: who is told what happens on a simulated instance.

Knows the words between an instance and its cluster; must not know what either does with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from megalith.sim.live import Live

if TYPE_CHECKING:
    from megalith.sim.instance import Instance


class Outlet(Protocol):
    """Who is told what happens on an instance, in the nanosecond when it happens."""

    def first_token(self, instance: Instance, live: Live) -> None:
        """The prompt is done and the first token is there; the request decodes on here unless it is held now."""
        ...

    def recomputed(self, instance: Instance, live: Live) -> None:
        """A prompt that had its first token before it lost its KV is done again, and is to decode elsewhere."""
        ...

    def finished(self, instance: Instance, live: Live) -> None:
        """The last token is there; the request has left the instance."""
        ...

    def preempted(self, instance: Instance, live: Live) -> None:
        """It was taken off the device and waits."""
        ...

    def idle(self, instance: Instance) -> None:
        """Nothing is left to run."""
        ...

    def prompt_begins(self, instance: Instance, live: Live, new_tokens: int, end_ns: int) -> None:
        """A step with a chunk of a prompt that decodes elsewhere begins now, and ends at `end_ns`."""
        ...

    def stepped(self, instance: Instance, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        """Steps of decodes alone were run."""
        ...

    def prompt_stepped(self, instance: Instance, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        """A step with prompt chunks was run."""
        ...
