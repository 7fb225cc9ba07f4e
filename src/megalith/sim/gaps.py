"""The time between two tokens of a request, where steps without decodes lie between them.

Knows the steps of one instance and how many requests decode on it; must not know requests. A policy that runs prompts
by themselves stalls everybody who decodes, and a user sees the stall in one gap: all prompt steps since the last token
and the step that brought the next. Requests that joined between two prompt steps have waited less, so they are counted
in groups by how long they have waited; groups are few, and without stalls there is none.
"""

from __future__ import annotations

from typing import Protocol


class StepSink(Protocol):
    """Where steps are recorded (sim/record.py)."""

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        """Steps of decodes, each token one step after the last."""
        ...

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        """A step with prompt chunks, each token one step after the last."""
        ...

    def late_step(self, duration_ps: int, prompt_tokens: int, decodes: int, waits: list[tuple[int, int]]) -> None:
        """A step some of whose decodes had waited: (wait_ps, how many)."""
        ...


class GapMeter:
    """Passes the steps of one instance on to a sink, with the waits that came before them."""

    __slots__ = ("_groups", "_sink")

    def __init__(self, sink: StepSink) -> None:
        self._sink = sink
        self._groups: list[list[int]] = []
        """[waited_ps, how many], the longest wait first."""

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int, stalled: int) -> None:
        """A step with prompt chunks. `stalled`: requests that had a token here before it and get none from it."""
        if decodes:
            if self._groups:
                self._sink.late_step(duration_ps, prompt_tokens, decodes, self._take(decodes))
            else:
                self._sink.prompt_step(duration_ps, prompt_tokens, decodes)
            return
        self._sink.prompt_step(duration_ps, prompt_tokens, 0)
        if not stalled:
            self._groups.clear()
            return
        groups = self._groups
        known = sum([group[1] for group in groups])
        if stalled > known:
            groups.append([0, stalled - known])
        else:
            _drop(groups, known - stalled)
        for group in groups:
            group[0] += duration_ps

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        """Consecutive steps of decodes alone."""
        if self._groups and decodes and steps:
            self._sink.late_step(first_ps, 0, decodes, self._take(decodes))
            first_ps, steps = first_ps + slope_ps, steps - 1
        if steps:
            self._sink.steps(first_ps, slope_ps, steps, decodes)

    def _take(self, decodes: int) -> list[tuple[int, int]]:
        """Everybody gets a token: the waits of `decodes` of them at most, and nobody waits any more."""
        groups, self._groups = self._groups, []
        _drop(groups, sum([group[1] for group in groups]) - decodes)
        return [(waited_ps, count) for waited_ps, count in groups]


def _drop(groups: list[list[int]], gone: int) -> None:
    """That many have left; those that came last are preempted first."""
    while gone > 0 and groups:
        leaving = min(gone, groups[-1][1])
        groups[-1][1] -= leaving
        gone -= leaving
        if not groups[-1][1]:
            groups.pop()
