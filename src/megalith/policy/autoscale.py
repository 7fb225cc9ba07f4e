"""How many instances a pool has: scaling on Llumnix's freeness, or on a plain threshold.

Knows dated facts; must not know what an instance costs or how long it takes to start. An instance that is to go is
drained first (infinite headroom: it accepts nothing, and a rebalancer moves away what runs) and stopped when it has
nothing left, so that a turn of the load can call it back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from math import ceil, inf
from typing import Literal, NamedTuple

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import (
    SHORTEST_PERIOD_S,
    Command,
    Event,
    Headroom,
    InstanceFacts,
    InstanceId,
    Scale,
    View,
)
from megalith.policy.router_options import require


class ScalingOptions(Config):
    """What every scaler has. Counts are for each pool."""

    pool: str | None = None
    """The pool to scale; None: every pool, each by itself."""
    period_s: float = 10.0
    min_count: int = 1
    max_count: int = 16
    """Most instances that serve or start. The pool's own max_count holds beside it."""
    up_cooldown_s: float = 0.0
    """From one start to the next."""
    down_cooldown_s: float = 0.0
    """From any change to the next stop."""
    victim: Literal["fewest", "last"] = "fewest"
    """Who goes: the one with the fewest outstanding requests, as in the paper, or the highest id (its artifact)."""

    def __post_init__(self) -> None:
        require(self.period_s >= SHORTEST_PERIOD_S, f"period_s must be at least {SHORTEST_PERIOD_S}")
        require(0 <= self.min_count <= self.max_count, "min_count must be at least 0 and at most max_count")


class Pool(NamedTuple):
    """One pool at one moment."""

    serving: Sequence[InstanceFacts]
    starting: int
    """Instances that were asked for and do not serve yet."""
    draining: InstanceFacts | None


class Scaler(ABC):
    """What scalers have in common. The subclass says how many more are needed.

    State: what was asked for and is not over, when a pool last changed, and who drains: one of a pool at a time.
    """

    name = "scaler"
    listens = frozenset({"tick", "command", "idle"})

    def __init__(self, options: ScalingOptions, seed: int = 0) -> None:  # noqa: ARG002
        self.options = options
        self.period_ns: int | None = max(1, round(options.period_s * NS_PER_S))
        self._starting: dict[str, int] = {}
        self._draining: dict[str, InstanceId] = {}
        self._stopping: dict[str, InstanceId] = {}
        self._last_start_ns: dict[str, int] = {}
        self._last_change_ns: dict[str, int] = {}

    @abstractmethod
    def need(self, pool: Pool) -> int:
        """Above 0: so many more. Below 0: one fewer. Those that start are not to be asked for again."""

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """Decides on ticks; on idle it stops who has drained."""
        if event.kind == "command":
            return self._outcome(event)
        if event.kind == "idle":
            return [command for name in self._pools_of(event.subject) for command in self._stop_drained(name, view)]
        names = {instance.pool for instance in view.instances} if self.options.pool is None else {self.options.pool}
        return [command for name in sorted(names) for command in self._scale(name, view, event.at_ns)]

    def _scale(self, name: str, view: View, now_ns: int) -> list[Command]:
        options = self.options
        commands = self._stop_drained(name, view)
        serving = [one for one in view.instances if one.pool == name and one.accepting and one.headroom_blocks < inf]
        draining = _find(view, self._draining.get(name))
        pool = Pool(serving, self._starting.get(name, 0), draining)
        count = len(serving) + pool.starting
        more = self.need(pool)
        if more > 0 and now_ns < self._last_start_ns.get(name, -inf) + options.up_cooldown_s * NS_PER_S:
            more = 0
        more = max(options.min_count - count, min(more, options.max_count - count))
        if more > 0:
            return commands + self._start(name, more, draining, now_ns)
        quiet = now_ns >= self._last_change_ns.get(name, -inf) + options.down_cooldown_s * NS_PER_S
        busy = pool.starting or draining or name in self._stopping
        if more < 0 and quiet and not busy and len(serving) > options.min_count:
            commands += self._drain(name, self._victim(serving), now_ns)
        return commands

    def _victim(self, serving: Sequence[InstanceFacts]) -> InstanceFacts:
        if self.options.victim == "last":
            return max(serving, key=lambda one: one.id)
        return min(serving, key=lambda one: (one.outstanding, -one.id))

    def _start(self, name: str, more: int, draining: InstanceFacts | None, now_ns: int) -> list[Command]:
        """Calls back the one that drains before it starts others."""
        commands: list[Command] = []
        if draining is not None:
            del self._draining[name]
            commands.append(Headroom(draining.id, 0.0))
            more -= 1
        self._starting[name] = self._starting.get(name, 0) + more
        self._last_start_ns[name] = self._last_change_ns[name] = now_ns
        return commands + [Scale(name, 1)] * more

    def _drain(self, name: str, victim: InstanceFacts, now_ns: int) -> list[Command]:
        self._last_change_ns[name] = now_ns
        if victim.outstanding == 0:
            self._stopping[name] = victim.id
            return [Headroom(victim.id, inf), Scale(name, -1)]
        self._draining[name] = victim.id
        return [Headroom(victim.id, inf)]

    def _stop_drained(self, name: str, view: View) -> list[Command]:
        if name not in self._draining:
            return []
        victim = _find(view, self._draining[name])
        # Old facts may show it before the draining: then what they say of its requests does not count yet.
        if victim is not None and (victim.outstanding > 0 or victim.headroom_blocks < inf):
            return []
        victim_id = self._draining.pop(name)
        if victim is None:
            return []
        self._stopping[name] = victim_id
        return [Scale(name, -1)]

    def _pools_of(self, instance: InstanceId) -> list[str]:
        return [name for name, victim in self._draining.items() if victim == instance]

    def _outcome(self, event: Event) -> Iterable[Command]:
        command = event.data["command"]
        if isinstance(command, Headroom) and event.data["outcome"] != "done":
            # It cannot drain, so it is not waited for.
            for name in self._pools_of(command.instance):
                del self._draining[name]
        if not isinstance(command, Scale):
            return ()
        if command.delta > 0 and self._starting.get(command.pool, 0) > 0:
            self._starting[command.pool] -= 1
        elif command.delta < 0 and command.pool in self._stopping:
            victim = self._stopping.pop(command.pool)
            if event.data["outcome"] != "done":
                return (Headroom(victim, 0.0),)
        return ()


def _find(view: View, instance: InstanceId | None) -> InstanceFacts | None:
    if instance is None:
        return None
    try:
        return view.by_id(instance)
    except KeyError:
        return None


class FreenessScalingOptions(ScalingOptions):
    """Thresholds of mean freeness. The artifact took T and T + 50 (T 5 to 85, mostly 10), the main branch 10 and 60."""

    up_below: float = 10.0
    down_above: float = 60.0
    watermark: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.up_below < self.down_above, "up_below must be below down_above")


class FreenessScaling(Scaler):
    """As many instances as keep the mean freeness above T; one fewer while it would stay above T + 50 without it.

    Mean freeness is that of all blocks and all requests together, waiting ones included, as in the artifact
    (_get_avg_load). Instances that start count as empty. What still runs on one that drains counts as load.
    """

    name = "freeness-scaling"

    def __init__(self, options: FreenessScalingOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._rule = options

    def need(self, pool: Pool) -> int:
        """The number of empty instances that lift the mean to the threshold, at least one when it is below."""
        if not pool.serving:
            return 0
        size = max(instance.kv_blocks for instance in pool.serving) * (1 - self._rule.watermark)
        room, requests = pool.starting * size, 0
        for instance in pool.serving:
            room += instance.free_blocks() - instance.waiting_blocks() - self._rule.watermark * instance.kv_blocks
            requests += instance.running() + instance.waiting()
        if pool.draining is not None:
            room -= pool.draining.kv_blocks - pool.draining.free_blocks() + pool.draining.waiting_blocks()
            requests += pool.draining.running() + pool.draining.waiting()
        if requests == 0:
            return -1
        if room / requests < self._rule.up_below:
            return ceil((self._rule.up_below * requests - room) / size)
        victim = self._victim(pool.serving)
        room_without = room - victim.kv_blocks * (1 - self._rule.watermark)
        return -1 if room_without / requests > self._rule.down_above else 0


class ThresholdScalingOptions(ScalingOptions):
    """A plain rule: one more above, one fewer below."""

    by: Literal["kv", "outstanding", "waiting", "pending_tokens"] = "kv"
    """kv: share of the blocks that are held or waited for. The others: mean of an instance."""
    up_above: float = 0.8
    down_below: float = 0.4
    up_cooldown_s: float = 60.0
    down_cooldown_s: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.down_below < self.up_above, "down_below must be below up_above")


class ThresholdScaling(Scaler):
    """Reacts to utilisation or queues, with cool-downs: what a horizontal autoscaler does. A baseline."""

    name = "threshold-scaling"

    def __init__(self, options: ThresholdScalingOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._rule = options

    def load(self, serving: Sequence[InstanceFacts]) -> float:
        """What the thresholds are compared with."""
        if self._rule.by == "kv":
            blocks = sum(one.kv_blocks for one in serving)
            return 1 - sum(one.free_blocks() - one.waiting_blocks() for one in serving) / blocks
        if self._rule.by == "outstanding":
            total = sum(one.outstanding for one in serving)
        elif self._rule.by == "waiting":
            total = sum(one.waiting() for one in serving)
        else:
            total = sum(one.pending_tokens for one in serving)
        return total / len(serving)

    def need(self, pool: Pool) -> int:
        """One at a time, and none while another starts."""
        if not pool.serving:
            return 0
        load = self.load(pool.serving)
        if load > self._rule.up_above:
            return 0 if pool.starting else 1
        return -1 if load < self._rule.down_below else 0
