"""Plain facts of a made-up cluster, to ask policies about: what a view is, without a simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from megalith.policy.cluster import Event, InstanceId, RequestFacts, Role
from megalith.policy.facts import Request


@dataclass(frozen=True)
class Facts:
    """InstanceFacts with every figure given."""

    id: InstanceId = 0
    pool: str = "pool"
    device: str = "h100"
    home: Role = "mixed"
    role: Role = "mixed"
    accepting: bool = True
    outstanding: int = 0
    pending_tokens: int = 0
    promised_tokens: int = 0
    kv_blocks: int = 851
    block_tokens: int = 16
    clock: float = 1.0
    headroom_blocks: float = 0.0
    batch: tuple[RequestFacts, ...] = ()
    num_waiting: int = 0
    num_waiting_blocks: int = 0
    num_head_blocks: int = 0
    num_free_blocks: int | None = None
    num_preempted: int = 0
    head: RequestFacts | None = None
    cache: Mapping[tuple[int, ...], int] = field(default_factory=dict)

    def running(self) -> int:
        return len(self.batch)

    def waiting(self) -> int:
        return self.num_waiting

    def waiting_blocks(self) -> int:
        return self.num_waiting_blocks

    def head_blocks(self) -> int:
        return self.num_head_blocks

    def first_waiting(self) -> RequestFacts | None:
        return self.head

    def free_blocks(self) -> int:
        if self.num_free_blocks is not None:
            return self.num_free_blocks
        return self.kv_blocks - sum(request.blocks for request in self.batch)

    def preempted(self) -> int:
        return self.num_preempted

    def requests(self) -> Sequence[RequestFacts]:
        return self.batch

    def cached_tokens(self, request: Request) -> int:
        return self.cache.get(request.prefix_hashes, 0)


@dataclass(frozen=True)
class Seen:
    """A view."""

    instances: Sequence[Facts] = ()
    now_ns: int = 0
    as_of_ns: int = 0
    watts: float = float("nan")

    def by_role(self, role: Role) -> Sequence[Facts]:
        return [instance for instance in self.instances if instance.accepting and instance.role == role]

    def by_id(self, instance: InstanceId) -> Facts:
        return {facts.id: facts for facts in self.instances}[instance]

    def power_w(self, domain: str) -> float:
        return self.watts


def running(request_id: int, blocks: int = 1, **facts: Any) -> RequestFacts:
    """A request that decodes."""
    values: dict[str, Any] = {
        "priority": 0, "prompt_tokens": 8, "known_tokens": 16 * blocks, "decoding": True, "moving": False,
    }  # fmt: skip
    return RequestFacts(id=request_id, blocks=blocks, **(values | facts))


def many(*instances: Facts) -> list[Facts]:
    """Instances with ids in their order."""
    return [replace(instance, id=index) for index, instance in enumerate(instances)]


def request(request_id: int = 0, prompt_tokens: int = 100, max_new_tokens: int = 100, **facts: Any) -> Request:
    return Request(request_id, facts.pop("arrival_ns", 0), prompt_tokens, max_new_tokens, **facts)


def tick(at_ns: int = 0) -> Event:
    return Event("tick", at_ns)


def instances_of(roles: Sequence[Role] = ("mixed", "prefill", "decode"), max_size: int = 7) -> st.SearchStrategy[Any]:
    """Any cluster, also one where figures contradict each other, as they do when facts are old."""
    requests = st.builds(
        running,
        st.integers(0, 10**6),
        st.integers(1, 200),
        priority=st.integers(-1, 2),
        decoding=st.booleans(),
        moving=st.booleans(),
    )
    batches = st.lists(requests, max_size=4, unique_by=lambda one: one.id).map(tuple)
    small = st.integers(0, 50)
    instance = st.builds(
        Facts,
        pool=st.sampled_from(["one", "two"]),
        home=st.sampled_from(roles),
        role=st.sampled_from(roles),
        accepting=st.booleans(),
        outstanding=small,
        pending_tokens=st.integers(0, 50_000),
        promised_tokens=st.integers(0, 50_000),
        kv_blocks=st.integers(1, 1000),
        headroom_blocks=st.sampled_from([0.0, 5.0, float("inf")]),
        batch=batches,
        num_waiting=small,
        num_waiting_blocks=st.integers(0, 500),
        num_head_blocks=st.integers(0, 100),
        num_free_blocks=st.integers(-5, 1000),
        num_preempted=st.integers(0, 2),
    )
    return st.lists(instance, max_size=max_size).map(lambda found: many(*found))
