"""Which whole models are in which tier: residency under a cap in bytes, and what a switch has to copy.

A composition of experts has many models and one device memory. A model that a step needs and that is not there is
copied from the next tier that has it; models that make room for it are forgotten, not written back, for weights are
only ever read (SN40L, arXiv:2405.07518). Bytes are exact. Pure: the simulator asks how many bytes go where and takes
the time of it, an engine copies them. Knows model numbers and sizes; must not know bandwidths, clocks or requests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, Literal, NamedTuple, TypeAlias

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import format_bytes

ModelId: TypeAlias = int
CacheRule: TypeAlias = Literal["lru", "lfu", "size"]
CACHE_RULES: Final[tuple[CacheRule, ...]] = ("lru", "lfu", "size")
_NOBODY: Final[frozenset[ModelId]] = frozenset()


class _Resident:
    """One model in a tier."""

    __slots__ = ("credit", "last", "size_bytes", "uses")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.uses = 0
        self.last = 0
        self.credit = 0.0


class Residency:
    """The models in one tier of at most `cap_bytes`. Its calls are O(1), but for evictions, which are O(models).

    Who goes first: `lru` the one not used for longest; `lfu` the one used least often since it came; `size` the one
    with the least uses for each byte, where age counts too (Greedy-Dual-Size-Frequency, Cherkasova 1998).
    """

    def __init__(self, cap_bytes: int, rule: CacheRule = "lru") -> None:
        if cap_bytes < 0 or rule not in CACHE_RULES:
            raise ConfigError(f"A tier of {cap_bytes} bytes with the rule {rule!r} cannot be.",
                              f"Give it 0 bytes or more and one of {', '.join(CACHE_RULES)}.")  # fmt: skip
        self.cap_bytes = cap_bytes
        self.rule: CacheRule = rule
        self.used_bytes = 0
        self.hits = self.misses = self.evictions = 0
        """Answers of use(), and models that had to go."""
        self._models: dict[ModelId, _Resident] = {}
        self._tick = 0
        self._age = 0.0
        """Of `size`: the credit of the last one that went. Whoever comes later starts from there."""

    def __contains__(self, model: ModelId) -> bool:
        return model in self._models

    def __len__(self) -> int:
        return len(self._models)

    def models(self) -> list[ModelId]:
        """Who is here, the next to go first. O(n log n)."""
        return sorted(self._models, key=self._worth)

    def use(self, model: ModelId) -> bool:
        """A model is needed now: True when it is here, which counts as a hit and as a use; else a miss."""
        resident = self._models.get(model)
        if resident is None:
            self.misses += 1
            return False
        self.hits += 1
        self._touch(resident)
        return True

    def room_for(self, size_bytes: int, keep: Collection[ModelId] = _NOBODY) -> bool:
        """Whether a model of that size could be put in without touching those of `keep`."""
        kept = sum([self._models[model].size_bytes for model in keep if model in self._models])
        return kept + size_bytes <= self.cap_bytes

    def put(self, model: ModelId, size_bytes: int, keep: Collection[ModelId] = _NOBODY) -> tuple[ModelId, ...]:
        """Take a model in, which is a use of it. Returns who had to go, in order; nobody where it was here already.

        Raises DoesNotFit, with nothing changed, when it is larger than what the cap leaves beside those of `keep`.
        """
        if model in self._models:
            self._touch(self._models[model])
            return ()
        if size_bytes < 0 or not self.room_for(size_bytes, keep):
            raise DoesNotFit(
                f"Model {model} needs {format_bytes(size_bytes)} of a tier of {format_bytes(self.cap_bytes)}"
                f"{f', in which {len(keep)} others must stay' if keep else ''}.",
                "Give the tier more bytes, or take a smaller format.",
            )
        gone = []
        while self.used_bytes + size_bytes > self.cap_bytes:
            victim = min([other for other in self._models if other not in keep], key=self._worth)
            self._age = max(self._age, self._models[victim].credit)
            self.drop(victim)
            self.evictions += 1
            gone.append(victim)
        self._models[model] = resident = _Resident(size_bytes)
        self.used_bytes += size_bytes
        self._touch(resident)
        return tuple(gone)

    def drop(self, model: ModelId) -> None:
        """Forget a model. Read-only weights are not written back, so this is all. KeyError when it is not here."""
        self.used_bytes -= self._models.pop(model).size_bytes

    def _touch(self, resident: _Resident) -> None:
        self._tick += 1
        resident.last = self._tick
        resident.uses += 1
        resident.credit = self._age + resident.uses / max(1, resident.size_bytes)

    def _worth(self, model: ModelId) -> tuple[float, int]:
        """Who is worth least goes first; the longest unused of equals."""
        resident = self._models[model]
        if self.rule == "lru":
            return 0.0, resident.last
        return (float(resident.uses) if self.rule == "lfu" else resident.credit), resident.last


class Fetch(NamedTuple):
    """What one use of a model has to copy. Nothing is copied the other way."""

    model: ModelId
    host_bytes: int = 0
    """From host memory to the device."""
    disk_bytes: int = 0
    """From disk to host memory, before that."""
    evicted: tuple[ModelId, ...] = ()
    """Gone from the device."""
    evicted_host: tuple[ModelId, ...] = ()
    """Gone from host memory, to be read from disk when needed again."""

    @property
    def hit(self) -> bool:
        """It was on the device: nothing is copied."""
        return not self.host_bytes


class WeightTiers:
    """Whole models in three tiers: device, host, and disk, which has them all. Host memory keeps its copy of what is on
    the device."""

    def __init__(self, sizes_bytes: Collection[int], device: Residency, host: Residency | None = None) -> None:
        """`sizes_bytes[model]` is the size of each; no `host` tier: host memory has them all. Raises DoesNotFit where a
        model is larger than a tier."""
        self.sizes_bytes = tuple(sizes_bytes)
        self.device, self.host = device, host
        for tier in (device, host):
            most = max(self.sizes_bytes, default=0)
            if tier is not None and most > tier.cap_bytes:
                raise DoesNotFit(
                    f"A model of {format_bytes(most)} does not fit a tier of {format_bytes(tier.cap_bytes)}.",
                    "Give the tier more bytes, cut the model over more devices, or take a smaller format.",
                )

    def fill(self, models: Iterable[ModelId]) -> None:
        """Put models in before anything is asked for, the most wanted first, as far as each tier has room."""
        for tier in (self.device, self.host):
            if tier is None:
                continue
            left, taken = tier.cap_bytes - tier.used_bytes, []
            for model in models:
                if self.sizes_bytes[model] > left:
                    break
                left -= self.sizes_bytes[model]
                taken.append(model)
            for model in reversed(taken):
                tier.put(model, self.sizes_bytes[model])

    def need(self, model: ModelId, keep: Collection[ModelId] = _NOBODY) -> Fetch:
        """A step needs a model now. Says what to copy first, and takes it as copied."""
        if self.device.use(model):
            if self.host is not None and model in self.host:
                self.host.put(model, self.sizes_bytes[model])
            return Fetch(model)
        return self._fetch(model, keep)

    def prefetch(self, model: ModelId, keep: Collection[ModelId] = _NOBODY) -> Fetch | None:
        """The router has named a model that will be needed: bring it unless it is here or would displace `keep`.

        Neither a hit nor a miss; need() counts when its turn comes.
        """
        if model in self.device or not self.device.room_for(self.sizes_bytes[model], keep):
            return None
        return self._fetch(model, keep)

    def _fetch(self, model: ModelId, keep: Collection[ModelId]) -> Fetch:
        size_bytes, disk_bytes = self.sizes_bytes[model], 0
        evicted_host: tuple[ModelId, ...] = ()
        evicted = self.device.put(model, size_bytes, keep)
        if self.host is not None:
            if not self.host.use(model):
                disk_bytes = size_bytes
            evicted_host = self.host.put(model, size_bytes)
        return Fetch(model, size_bytes, disk_bytes, evicted, evicted_host)
