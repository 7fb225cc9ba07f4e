"""What is kept near: before a part of a step runs, which parts to load and which to drop. One interface, small objects.

A model is cut into parts (layers, halves of layers, neurons, experts) that are too big to be near all at once. `need`
is told what runs next and answers with the change to make: first drop, then load, in the order of need;
what is loaded ahead overlaps with compute. Pure: an engine makes the change with a mover, a simulator takes the time of
it. Knows numbers of parts; must not know bytes of real memory, links or clocks. LRU is that of `policy/experts.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.policy.experts import CacheRule, Residency

Part: TypeAlias = int


class Change(NamedTuple):
    """What to do before the parts that were asked for run."""

    drop: tuple[Part, ...] = ()
    """Out of near memory, before anything is loaded."""
    load: tuple[Part, ...] = ()
    """Into near memory; those that are needed now come first, the rest may still be on its way."""
    stage: tuple[Part, ...] = ()
    """From the far tier to the middle one, where there are three."""
    unstage: tuple[Part, ...] = ()
    """Out of the middle tier, before anything is staged."""


class ResidencyPolicy(Protocol):
    """Parts that are needed are there after the change is made, and never more than the cap at any moment of it."""

    @property
    def resident(self) -> Collection[Part]:
        """What is near once all changes so far were made."""
        ...

    def need(self, *parts: Part) -> Change:
        """These run next. Raises DoesNotFit where they are more than the cap."""
        ...


class LayerWindow:
    """A window of `k` of `count` layers; when `k_prime` of them have run, those go and as many come.

    Superpipeline (arXiv:2410.08791). After the last layer comes the first of the next step; where the walk `turns`, as
    forward and backward do, the last again and then down. Layers in `keep` never leave and are not counted in k: the
    window slides over the others. A layer out of turn begins the window anew.
    """

    def __init__(self, count: int, k: int, k_prime: int = 1, keep: Iterable[Part] = (), *, turns: bool = False) -> None:
        self.keep = frozenset(keep)
        self._moving = [part for part in range(count) if part not in self.keep]
        if not 1 <= k_prime <= k or count < 1 or not self.keep <= set(range(count)):
            raise ConfigError(
                f"A window of k={k}, k'={k_prime} over {count} layers, {len(self.keep)} of them kept, cannot be.",
                "Take 1 <= k' <= k, and keep layers that there are.",
            )
        self._place = {part: place for place, part in enumerate(self._moving)}
        self.k, self.k_prime, self.turns = min(k, len(self._moving)), k_prime, turns
        self.cap = self.k + len(self.keep)
        """The most layers that are near at any moment."""
        self._window: tuple[Part, ...] = ()
        """In the order in which they run next."""
        self._at, self._step = 0, 1
        """Place of the layer that runs, and the direction of the walk."""
        self._kept = False

    @property
    def resident(self) -> frozenset[Part]:
        """What is near."""
        return frozenset(self._window) | (self.keep if self._kept else frozenset())

    def need(self, *parts: Part) -> Change:
        """One layer runs next."""
        (part,) = parts
        first = () if self._kept else tuple(sorted(self.keep, key=lambda kept: (kept != part, kept)))
        self._kept = True
        if part in self.keep:
            return Change(load=first)
        at, before, window = self._place[part], self._at, self._window
        self._at = at
        if len(window) == len(self._moving):
            return Change(load=first)  # All of them fit.
        if self.turns and window and at == before - self._step:
            self._step = -self._step
            window = self._ahead(before)
        elif part not in window and abs(at - before) > 1:
            self._step = 1
        if part not in window[: self.k_prime]:
            window = self._ahead(at)
        near, self._window = self._window, window
        load = tuple([other for other in window if other not in near])
        return Change(tuple([other for other in near if other not in window]), load + first)

    def _ahead(self, begin: int) -> tuple[Part, ...]:
        """The k layers that run next from place `begin` on, each once."""
        count, step = len(self._moving), self._step
        if not self.turns:
            return tuple([self._moving[(begin + n) % count] for n in range(self.k)])
        rest = range(begin, count if step > 0 else -1, step)
        back = range(begin - step, -1 if step > 0 else count, -step)
        return tuple([self._moving[place] for place in (*rest, *back)][: self.k])


class SlidingWindow(LayerWindow):
    """The part that runs and the next `size - 1`: what has run goes at once.

    The memory scheduler of TPI-LLM (arXiv:2410.00531), whose parts are attention and feed-forward blocks, and which may
    keep some of them: `keep`. It is a layer window with k' = 1.
    """

    def __init__(self, count: int, size: int, keep: Iterable[Part] = ()) -> None:
        super().__init__(count, size, 1, keep)


class TracedPrefetch:
    """Prefetch in the order of the step before: `far` parts ahead to the middle tier, `near` to the near one.

    The overlap-centric prefetcher of ZeRO-Infinity (arXiv:2104.07857, section 6.2): the first step is traced, loading
    on demand; after it, the part `far` ahead is read while the one `near` ahead is copied to the device. A step
    in another order is traced anew. Call begin() before every step.
    """

    def __init__(self, near: int = 2, far: int = 3) -> None:
        if not 0 <= near <= far:
            raise ConfigError(f"Prefetching {near} parts near and {far} far cannot be.", "Take 0 <= near <= far.")
        self.near, self.far = near, far
        self.cap, self.cap_staged = near + 1, far + 1
        """The most parts near, and staged, at any moment."""
        self._trace: list[Part] = []
        self._traced = False
        self._at = 0
        self._near: tuple[Part, ...] = ()
        self._staged: tuple[Part, ...] = ()

    @property
    def resident(self) -> frozenset[Part]:
        """What is near."""
        return frozenset(self._near)

    @property
    def staged(self) -> frozenset[Part]:
        """What is in the middle tier."""
        return frozenset(self._staged)

    def begin(self) -> None:
        """A step begins. One that was shorter than the trace makes it invalid."""
        if self._at:
            self._traced = self._at == len(self._trace)
            del self._trace[self._at :]
        self._at = 0

    def need(self, *parts: Part) -> Change:
        """One part runs next."""
        (part,) = parts
        if self._traced and (self._at >= len(self._trace) or self._trace[self._at] != part):
            self._traced = False
            del self._trace[self._at :]
        if not self._traced:
            self._trace.append(part)
        near, staged = self._ahead(part, self.near), self._ahead(part, self.far)
        self._at += 1
        change = Change(
            tuple([other for other in self._near if other not in near]),
            tuple([other for other in near if other not in self._near]),
            tuple([other for other in staged if other not in self._staged]),
            tuple([other for other in self._staged if other not in staged]),
        )
        self._near, self._staged = near, staged
        return change

    def _ahead(self, part: Part, count: int) -> tuple[Part, ...]:
        """The part and the next `count` of the trace, each once, into the next step."""
        if not self._traced:
            return (part,)
        order = [self._trace[(self._at + n) % len(self._trace)] for n in range(count + 1)]
        return tuple(dict.fromkeys(order))


class NeuronWindow:
    """The neurons that were active in the last `tokens` tokens, at most `cap` of them.

    Windowing of LLM in a flash (arXiv:2312.11514, section 3.1): consecutive tokens use mostly the same neurons, so only
    those that are new are read. Where the cap is too small for the window, the longest unused go early.
    """

    def __init__(self, tokens: int, cap: int) -> None:
        if tokens < 1 or cap < 1:
            raise ConfigError(f"A window of {tokens} tokens and {cap} neurons cannot be.", "Take at least 1 of each.")
        self.tokens, self.cap = tokens, cap
        self._last: dict[Part, int] = {}
        """Token of the last use, the longest unused first."""
        self._token = 0

    @property
    def resident(self) -> frozenset[Part]:
        """What is near."""
        return frozenset(self._last)

    def need(self, *parts: Part) -> Change:
        """The neurons that are active for the next token."""
        active = dict.fromkeys(parts)
        if len(active) > self.cap:
            raise DoesNotFit(f"{len(active)} neurons are active, and {self.cap} fit.", "Give the window more memory.")
        self._token += 1
        load = tuple([part for part in active if part not in self._last])
        for part in active:
            self._last.pop(part, None)
            self._last[part] = self._token
        drop: list[Part] = []
        for part, token in self._last.items():
            if token > self._token - self.tokens and len(self._last) - len(drop) <= self.cap:
                break
            drop.append(part)
        for part in drop:
            del self._last[part]
        return Change(tuple(drop), load)


class LruParts:
    """Parts of any sizes under a cap in bytes; who was not used for longest goes first, or as `rule` says.

    For experts and adapters, whose order nobody knows: `policy/experts.py` behind this interface.
    """

    def __init__(self, sizes_bytes: Sequence[int], cap_bytes: int, rule: CacheRule = "lru") -> None:
        self.sizes_bytes = tuple(sizes_bytes)
        self.cache = Residency(cap_bytes, rule)

    @property
    def resident(self) -> frozenset[Part]:
        """What is near."""
        return frozenset(self.cache.models())

    def need(self, *parts: Part) -> Change:
        """Parts that run together. Raises DoesNotFit, with nothing changed, where they do not fit together."""
        wanted = dict.fromkeys(parts)
        if sum([self.sizes_bytes[part] for part in wanted]) > self.cache.cap_bytes:
            raise DoesNotFit(
                f"{len(wanted)} parts that run together take {sum([self.sizes_bytes[part] for part in wanted])} bytes "
                f"of {self.cache.cap_bytes}.",
                "Give them more bytes.",
            )
        load = [part for part in wanted if not self.cache.use(part)]
        drop = [gone for part in load for gone in self.cache.put(part, self.sizes_bytes[part], wanted)]
        return Change(tuple(drop), tuple(load))
