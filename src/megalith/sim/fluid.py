"""Servers at the fidelity `fluid`: whole telemetry intervals at a time, and many servers in one vector.

A server computes prompts first, one after the other and whole, and decodes everything that is here in what time is
left: the batch policy `prefill-first` with one prompt a step. In one interval a decode step takes what it takes at the
interval's beginning; between intervals the clock may change. Requests stay requests: each has a time of arrival, a
prompt that waits for those before it, a number of decode steps to take, and a time at which the last one ends. What is
averaged is inside an interval only. Decodes are counted by a virtual clock of each server, which stands still under
prompts; a request ends when that clock has moved by its tokens, so those of one kind end in the order in which they
came.

Knows no policy, no budget and no row. Not modelled: memory that runs out (`peak_tokens` says what was needed), and two
prompts that share a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from megalith.base.errors import ConfigError
from megalith.cost.timer import Prompt
from megalith.cost.timer_phases import POWER_EXPONENT, DeviceTimer
from megalith.specs.draws import Floats, Ints
from megalith.specs.row_load import RequestKind

_PS_PER_S = 1e12
_GRID = (1, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288)
"""Tokens in the cache at which a decode step is timed; straight lines between them."""
_FIRST_SLOTS = 64


class Ends(Protocol):
    """Takes requests that end."""

    def add(self, server: Ints, kind: Ints, e2e_s: Floats) -> None:
        """So many seconds after they came."""
        ...


class Machine:
    """Times and watts of one server: kinds of requests on a device timer, at any clock.

    `other_w` is what a server draws beside its devices. A decode step is timed by the tokens in the cache, spread over
    as many requests of the mean length as that makes.
    """

    def __init__(
        self, timer: DeviceTimer, devices: int, other_w: float, kinds: Sequence[RequestKind],
        exponent: float = POWER_EXPONENT,
    ) -> None:  # fmt: skip
        self.timer, self.devices, self.other_w, self.kinds = timer, devices, other_w, tuple(kinds)
        self._exponent = exponent
        weight = sum(kind.share * kind.output_tokens for kind in kinds)
        self._mean = sum(k.share * k.output_tokens * (k.input_tokens + k.output_tokens / 2) for k in kinds) / weight
        self.grid = np.array(_GRID, dtype=np.float64)
        self.decode_s = np.array([self._decode_s(timer, tokens) for tokens in _GRID])
        self._at: dict[float, tuple[Floats, float, tuple[float, float, float]]] = {}

    def at_clock(self, fraction: float) -> tuple[Floats, float, tuple[float, float, float]]:
        """(seconds of each kind's prompt, factor on decode steps, watts idle, in prompts and in decodes)."""
        found = self._at.get(fraction)
        if found is None:
            timer = self.timer if fraction == 1.0 else self.timer.at_clock(fraction)
            prompts = np.array([_prompt_s(timer, kind.input_tokens) for kind in self.kinds])
            tokens = round(4 * self._mean)
            slower = self._decode_s(timer, tokens) / self._decode_s(self.timer, tokens)
            idle, prompt, decode = (self.other_w + self.devices * each for each in timer.power_w(self._exponent))
            found = self._at[fraction] = (prompts, slower, (idle, prompt, decode))
        return found

    def alone_s(self, kind: RequestKind) -> float:
        """A request with nobody beside it, at the full clock."""
        contexts = kind.input_tokens + np.arange(1, kind.output_tokens)
        return _prompt_s(self.timer, kind.input_tokens) + float(np.interp(contexts, self.grid, self.decode_s).sum())

    def _decode_s(self, timer: DeviceTimer, tokens: int) -> float:
        decodes = max(1, round(tokens / self._mean))
        return timer.step_ps((), decodes, tokens, -(-tokens // decodes)) / _PS_PER_S


class FluidServers:
    """So many servers, all of the same machine. Each has a clock of its own."""

    def __init__(self, machine: Machine, servers: int, step_s: float, ends: Ends) -> None:
        if servers < 1 or not step_s > 0:
            raise ConfigError(f"{servers} servers in steps of {step_s:g} s cannot be.", "Give 1 or more, above 0 s.")
        self._machine, self._step_s, self._ends = machine, step_s, ends
        kinds = machine.kinds
        self._tokens = np.array([kind.input_tokens for kind in kinds], dtype=np.float64)
        self._turns = np.array([kind.output_tokens - 1 for kind in kinds], dtype=np.float64)
        self._kinds = len(kinds)
        prompts, _, watts = machine.at_clock(1.0)
        self._prompt_s = np.tile(prompts, (servers, 1))
        self._slower = np.ones(servers)
        self._idle_w, self._prompt_w, self._decode_w = (np.full(servers, each) for each in watts)
        self.active = np.zeros(servers, dtype=np.int64)
        """Requests here."""
        self._virtual = np.zeros(servers)
        """Decode steps taken."""
        self._base = np.zeros(servers)
        """Sum over the active of prompt tokens less the virtual clock at which they joined."""
        self._until_s = np.full(servers, -1.0)
        """When the last prompt that came will be done."""
        self.power_w = np.full(servers, watts[0])
        """Mean over the last step."""
        self.prompt_s, self.idle_s = np.zeros(servers), np.zeros(servers)
        """Since the beginning."""
        self.peak_tokens = np.zeros(servers)
        """Most in the cache of each, at any step's beginning."""
        self._slots = _FIRST_SLOTS
        cells = servers * self._kinds
        self._ring_end = np.zeros((cells, self._slots))
        self._ring_came = np.zeros((cells, self._slots))
        self._head, self._tail = np.zeros(cells, dtype=np.int64), np.zeros(cells, dtype=np.int64)
        self._next_end = np.full(cells, np.inf)
        """Virtual clock at which the next of each (server, kind) ends."""

    def set_clock(self, first: int, last: int, fraction: float, now_s: float) -> None:
        """The servers from `first` to before `last` run at this fraction of their clock from now on."""
        prompts, slower, watts = self._machine.at_clock(fraction)
        here = slice(first, last)
        left = np.maximum(self._until_s[here] - now_s, 0.0)
        ratio = prompts[0] / self._prompt_s[here, 0]
        self._until_s[here] = np.where(left > 0, now_s + left * ratio, self._until_s[here])
        self._prompt_s[here] = prompts
        self._slower[here] = slower
        self._idle_w[here], self._prompt_w[here], self._decode_w[here] = watts

    def step(self, now_s: float, at_s: Floats, server: Ints, kind: Ints, bounds: Sequence[int]) -> None:
        """One interval from `now_s` on, with the arrivals in it by rank (see fluid_load.Arrivals)."""
        step_s = self._step_s
        tokens = self._base + self.active * self._virtual
        np.maximum(self.peak_tokens, tokens, out=self.peak_tokens)
        decode_s = np.interp(tokens, self._machine.grid, self._machine.decode_s) * self._slower
        carried = np.maximum(self._until_s - now_s, 0.0)
        prompt_s = carried.copy()
        idle_s = np.where(self.active == 0, step_s, 0.0)
        for first, last in pairwise(bounds):
            here = slice(first, last)
            self._join(now_s, at_s[here], server[here], kind[here], decode_s, prompt_s, idle_s)
        prompt_s -= np.maximum(self._until_s - (now_s + step_s), 0.0)
        np.maximum(prompt_s, 0.0, out=prompt_s)
        np.minimum(prompt_s, step_s, out=prompt_s)
        virtual = self._virtual + (step_s - prompt_s) / decode_s
        self._end(now_s + step_s, virtual, decode_s, idle_s)
        self._virtual = virtual
        np.minimum(idle_s, step_s - prompt_s, out=idle_s)
        self.prompt_s += prompt_s
        self.idle_s += idle_s
        decoding = step_s - prompt_s - idle_s
        self.power_w = (self._idle_w * idle_s + self._prompt_w * prompt_s + self._decode_w * decoding) / step_s

    def _join(
        self, now_s: float, at_s: Floats, server: Ints, kind: Ints, decode_s: Floats, prompt_s: Floats, idle_s: Floats
    ) -> None:
        """Requests come, one to a server: their prompts wait for those before, and for half a step under way."""
        busy, pace = self.active[server] > 0, decode_s[server]
        start = np.maximum(np.where(busy, at_s + pace / 2, at_s), self._until_s[server])
        takes = self._prompt_s[server, kind]
        done = start + takes
        idle_s[server] = np.where(busy, idle_s[server], start - now_s)
        self._until_s[server] = done
        prompt_s[server] += takes
        joined = self._virtual[server] + np.maximum(done - now_s - prompt_s[server], 0.0) / pace
        self._base[server] += self._tokens[kind] - joined
        self.active[server] += 1
        cell = server * self._kinds + kind
        while (self._tail[cell] - self._head[cell]).max() >= self._slots:
            self._grow()
        tail = self._tail[cell]
        ends = joined + self._turns[kind]
        slot = tail % self._slots
        self._ring_end[cell, slot], self._ring_came[cell, slot] = ends, at_s
        self._next_end[cell] = np.minimum(self._next_end[cell], ends)
        self._tail[cell] = tail + 1

    def _end(self, end_s: float, virtual: Floats, decode_s: Floats, idle_s: Floats) -> None:
        """Take out what ends before `end_s`, when the virtual clocks stand at `virtual`."""
        by_kind = self._next_end.reshape(-1, self._kinds)
        cells = np.flatnonzero(by_kind <= virtual[:, None])
        while len(cells):
            server, kind = cells // self._kinds, cells % self._kinds
            head = self._head[cells] + 1
            ends = self._next_end[cells]
            over_s = np.minimum((virtual[server] - ends) * decode_s[server], self._step_s)
            came_s = self._ring_came[cells, (head - 1) % self._slots]
            self._ends.add(server, kind, end_s - over_s - came_s)
            left = ends - self._turns[kind]
            np.subtract.at(self._base, server, self._tokens[kind] - left)
            np.subtract.at(self.active, server, 1)
            self._head[cells] = head
            more = head < self._tail[cells]
            self._next_end[cells] = np.where(more, self._ring_end[cells, head % self._slots], np.inf)
            empty = self.active[server] == 0
            if empty.any():
                gone = server[empty]
                self._base[gone] = 0.0
                idle_s[gone] = self._step_s
                np.minimum.at(idle_s, gone, over_s[empty])
            cells = cells[self._next_end[cells] <= virtual[server]]

    def _grow(self) -> None:
        """Twice the room; everything keeps its order."""
        cells = np.arange(len(self._head))[:, None]
        slots = (self._head[:, None] + np.arange(self._slots)) % self._slots
        more = np.zeros_like(self._ring_end)
        self._ring_end = np.hstack([self._ring_end[cells, slots], more])
        self._ring_came = np.hstack([self._ring_came[cells, slots], more])
        self._tail -= self._head
        self._head[:] = 0
        self._slots *= 2


def _prompt_s(timer: DeviceTimer, tokens: int) -> float:
    return timer.step_ps((Prompt(tokens, 0, True),), 0, 0, 0) / _PS_PER_S
