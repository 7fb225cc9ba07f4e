"""Multi-turn use: some drawn requests go on where an earlier one ended, so their prompts have a beginning in common.

The lengths of all requests are drawn first and stay as drawn; this only decides which earlier prompt each one extends,
and names the blocks of its prompt. Knows lengths, times and ids; knows nothing of caches.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.base.units import NS_PER_S
from megalith.specs import draws
from megalith.specs.lengths import Lengths, draw_lengths

_CONTINUE, _TURN, _PAUSE = 7, 8, 9
_MAX_SESSIONS = 20_000
"""Sessions that wait to be continued; the oldest ends when there are more."""


class Conversations(Config, kw_only=True):
    """How requests continue earlier ones.

    A request that continues leaves room for a `turn` of new tokens in its prompt and takes the waiting session with the
    longest history that fits before them: an earlier prompt and its answer. Nothing fits: it starts a new session.
    """

    continue_share: float
    """Share of the requests that would continue a session."""
    turn: Lengths
    """Least new tokens of a prompt that continues."""
    pause_s: float
    """Median time from one request of a session until the next may come (lognormal)."""
    pause_sigma: float = 0.8
    idle_s: float = 600.0
    """A session ends when nobody continued it this long after its pause."""
    shared_tokens: int = 0
    """Tokens at the start of every prompt that are the same: a system prompt."""

    def __post_init__(self) -> None:
        if not 0 <= self.continue_share <= 1:
            raise ConfigError(f"continue_share is {self.continue_share:g}.", "Give a share from 0 to 1, such as 0.4.")
        if not (0 < self.pause_s < 1e7 and 0 <= self.pause_sigma <= 5 and 0 < self.idle_s < 1e7):
            times = f"A pause of {self.pause_s:g} s (sigma {self.pause_sigma:g}) and {self.idle_s:g} s of idling"
            raise ConfigError(f"{times} cannot be drawn.", "Give times above 0 s and a sigma from 0 to 5.")
        if self.shared_tokens < 0:
            raise ConfigError(f"shared_tokens is {self.shared_tokens}.", "Give 0 or more.")


class Sessions:
    """The sessions of one run. Ids are numbered as they appear; equal id means equal tokens up to there."""

    def __init__(self, spec: Conversations, block_tokens: int, seed: int) -> None:
        self._spec, self._block_tokens, self._seed = spec, block_tokens, seed
        self._shared = tuple(range(spec.shared_tokens // block_tokens))
        self._next_id = len(self._shared)
        self._resting: list[tuple[int, int, int]] = []  # heap of (ready_ns, session, history tokens)
        self._ready: list[tuple[int, int]] = []  # sorted (history tokens, session)
        self._ends: deque[tuple[int, int, int]] = deque()  # (end_ns, history tokens, session), in order of end_ns
        self._prompts: dict[int, tuple[int, ...]] = {}  # ids of the full blocks of the last prompt

    def prefix_ids(
        self, first: int, at_ns: Sequence[int | None], inputs: Sequence[int], outputs: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Ids for requests number `first`, `first` + 1, ..., which come in order of time."""
        spec, seed, count = self._spec, self._seed, len(at_ns)
        goes_on = (draws.shares(splitmix64(seed, _CONTINUE), first, count) < spec.continue_share).tolist()
        turns = draw_lengths(spec.turn, splitmix64(seed, _TURN), first, count).tolist()
        scale = draws.exp(spec.pause_sigma * draws.normals(splitmix64(seed, _PAUSE), first, count))
        pauses = np.rint(scale * (spec.pause_s * NS_PER_S)).astype(np.int64).tolist()
        result = []
        for i, due_ns in enumerate(at_ns):
            now_ns = due_ns or 0
            self._advance(now_ns)
            kept = self._take(inputs[i] - turns[i]) if goes_on[i] else ()
            # What is continued may have been shorter than the system prompt.
            ids = self._named(inputs[i], max(kept, self._shared, key=len))
            self._prompts[first + i] = ids[: inputs[i] // self._block_tokens]
            heappush(self._resting, (now_ns + pauses[i], first + i, inputs[i] + outputs[i]))
            result.append(ids)
        return result

    def _advance(self, now_ns: int) -> None:
        """Sessions whose pause is over become ready; those that nobody continued end."""
        idle_ns = round(self._spec.idle_s * NS_PER_S)
        while self._resting and self._resting[0][0] <= now_ns:
            ready_ns, session, history = heappop(self._resting)
            insort(self._ready, (history, session))
            self._ends.append((ready_ns + idle_ns, history, session))
        ends = self._ends
        while ends and (ends[0][0] <= now_ns or len(self._ready) > _MAX_SESSIONS):
            _, history, session = ends.popleft()
            if session in self._prompts:
                del self._ready[bisect_left(self._ready, (history, session))]
                del self._prompts[session]

    def _take(self, most_tokens: int) -> tuple[int, ...]:
        """The last prompt of the ready session with the longest history of at most `most_tokens`; else none."""
        place = bisect_right(self._ready, (most_tokens, math.inf)) - 1
        if place < 0:
            return ()
        _, session = self._ready.pop(place)
        return self._prompts.pop(session)

    def _named(self, tokens: int, kept: tuple[int, ...]) -> tuple[int, ...]:
        """Ids of all blocks of a prompt, the last of which may be partial: those kept, then new ones."""
        # A block that the prompt only begins is not the whole block that others have.
        kept = kept[: tokens // self._block_tokens]
        first = self._next_id
        self._next_id = first + -(-tokens // self._block_tokens) - len(kept)
        return kept + tuple(range(first, self._next_id))
