"""What policies see of the simulated cluster: live facts of each instance, or copies of them taken at a heartbeat.

Live facts are counters that the cluster keeps as things happen, so a router that compares sixty instances reads sixty
attributes. What depends on the tokens of a leap under way is computed for now, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan

from megalith.policy.cluster import InstanceFacts, InstanceId, RequestFacts, Role
from megalith.policy.facts import Request
from megalith.sim.instance import Instance
from megalith.specs.fleet import PoolSpec

_FIELDS = (
    "_instance", "accepting", "block_tokens", "clock", "device", "headroom_blocks", "home", "id", "kv_blocks",
    "outstanding", "pending_tokens", "pool", "promised_tokens", "role",
)  # fmt: skip


class Facts:
    """InstanceFacts of one simulated instance, exact now."""

    __slots__ = _FIELDS

    def __init__(self, instance: Instance, pool: PoolSpec) -> None:
        self._instance = instance
        self.id = instance.id
        self.pool = pool.name
        self.device = pool.device
        self.home: Role = pool.role
        self.role: Role = pool.role
        self.accepting = True
        self.outstanding = self.pending_tokens = self.promised_tokens = 0
        self.kv_blocks = instance.scheduler.kv.num_blocks
        self.block_tokens = instance.scheduler.kv.block_tokens
        self.clock = 1.0
        self.headroom_blocks = 0.0

    def count(self, request: Request, sign: int) -> None:
        """A request that decodes here comes (1) or goes (-1): what it may come to need counts from its routing on."""
        self.outstanding += sign
        self.promised_tokens += sign * (request.prompt_tokens + request.max_new_tokens)

    def running(self) -> int:
        """See InstanceFacts."""
        return self._instance.scheduler.num_running

    def waiting(self) -> int:
        """See InstanceFacts."""
        scheduler = self._instance.scheduler
        return scheduler.num_waiting + scheduler.num_swapped

    def waiting_blocks(self) -> int:
        """See InstanceFacts. O(waiting)."""
        scheduler = self._instance.scheduler
        return sum([scheduler.kv.blocks_for(sequence.known) for sequence in scheduler.waiting()])

    def head_blocks(self) -> int:
        """See InstanceFacts."""
        scheduler = self._instance.scheduler
        head = scheduler.head()
        return 0 if head is None else scheduler.kv.blocks_for(head.known)

    def first_waiting(self) -> RequestFacts | None:
        """See InstanceFacts."""
        head = self._instance.scheduler.head()
        if head is None:
            return None
        request = head.request
        moving, away = self._instance.lives[request.id].moving, self._instance.scheduler.kv.away_blocks(request.id)
        return RequestFacts(
            request.id, request.priority, request.prompt_tokens, head.known, 0, False, moving, away
        )  # fmt: skip

    def free_blocks(self) -> int:
        """See InstanceFacts."""
        return self._instance.free_blocks()

    def preempted(self) -> int:
        """See InstanceFacts."""
        return sum([sequence.cached is not None for sequence in self._instance.scheduler.waiting()])

    def requests(self) -> Sequence[RequestFacts]:
        """See InstanceFacts."""
        instance = self._instance
        instance.sync(instance.kernel.now_ns)
        return [
            RequestFacts(
                sequence.request.id, sequence.request.priority, sequence.request.prompt_tokens, sequence.known,
                sequence.table.held - sequence.table.away, sequence.cohort is not None,
                instance.lives[sequence.request.id].moving, sequence.table.away,
            )
            for sequence in instance.scheduler.running()
        ]  # fmt: skip

    def cached_tokens(self, request: Request) -> int:
        """See InstanceFacts."""
        kv = self._instance.scheduler.kv
        return kv.match_blocks(request.prompt_tokens, request.prefix_hashes) * kv.block_tokens


class OldFacts(Facts):
    """The same at one moment; nothing in it changes."""

    __slots__ = ("_values",)

    def __init__(self, live: Facts) -> None:
        for name in _FIELDS:
            setattr(self, name, getattr(live, name))
        self._values = (live.running(), live.waiting(), live.waiting_blocks(), live.head_blocks(), live.free_blocks(),
                        live.preempted(), tuple(live.requests()), live.first_waiting())  # fmt: skip

    def running(self) -> int:
        """See InstanceFacts."""
        return self._values[0]

    def waiting(self) -> int:
        """See InstanceFacts."""
        return self._values[1]

    def waiting_blocks(self) -> int:
        """See InstanceFacts."""
        return self._values[2]

    def head_blocks(self) -> int:
        """See InstanceFacts."""
        return self._values[3]

    def free_blocks(self) -> int:
        """See InstanceFacts."""
        return self._values[4]

    def preempted(self) -> int:
        """See InstanceFacts."""
        return self._values[5]

    def requests(self) -> Sequence[RequestFacts]:
        """See InstanceFacts."""
        return self._values[6]

    def first_waiting(self) -> RequestFacts | None:
        """See InstanceFacts."""
        return self._values[7]


class ClusterView:
    """The View of a simulated cluster. `take()` makes it old: it then shows what was true when it was last called."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._facts: dict[InstanceId, Facts] = {}
        self._old: dict[InstanceId, OldFacts] | None = None
        self._by_role: dict[Role, list[InstanceFacts]] = {}
        self._as_of_ns = 0
        self.powers_w: dict[str, float] = {}
        """Last telemetry sample of each power domain."""

    @property
    def now_ns(self) -> int:
        """See View."""
        return self._now_ns()

    @property
    def as_of_ns(self) -> int:
        """See View."""
        return self._now_ns() if self._old is None else self._as_of_ns

    @property
    def instances(self) -> Sequence[InstanceFacts]:
        """See View."""
        return list(self._facts.values() if self._old is None else self._old.values())

    def by_role(self, role: Role) -> Sequence[InstanceFacts]:
        """See View."""
        found = self._by_role.get(role)
        if found is None:
            found = [facts for facts in self.instances if facts.accepting and facts.role == role]
            self._by_role[role] = found
        return found

    def by_id(self, instance: InstanceId) -> InstanceFacts:
        """See View."""
        return self._facts[instance] if self._old is None else self._old[instance]

    def power_w(self, domain: str) -> float:
        """See View."""
        return self.powers_w.get(domain, nan)

    # For the cluster

    def add(self, facts: Facts) -> None:
        """An instance exists from now on."""
        self._facts[facts.id] = facts
        self.changed()

    def remove(self, instance: InstanceId) -> None:
        """An instance is gone."""
        del self._facts[instance]
        self.changed()

    def changed(self) -> None:
        """A role or `accepting` changed."""
        if self._old is None:
            self._by_role.clear()

    def take(self) -> None:
        """Copy all facts now: policies see these until the next call."""
        self._old = {facts.id: OldFacts(facts) for facts in self._facts.values()}
        self._as_of_ns = self._now_ns()
        self._by_role.clear()
