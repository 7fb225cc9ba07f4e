"""The words between cluster policies and whoever runs a cluster: facts in, commands out.

The simulator and a live cluster speak exactly these types. A policy is a pure, seeded, synchronous object: it reads a
dated view, returns commands, never sleeps, never reads a clock. A view may be old (`as_of_ns`), so whoever carries a
command out reserves first and commits then; a refusal comes back as an event. The true output length of a request is
nowhere in here. After the interfaces of the serving brief: Router, Controller, Estimator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec

from megalith.policy.facts import Request, RequestId

InstanceId: TypeAlias = int
Role: TypeAlias = Literal["mixed", "prefill", "decode"]
SHORTEST_PERIOD_S = 0.001
"""Between two ticks of a controller."""
ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")
TransferMode: TypeAlias = Literal["push", "pull", "layerwise"]
"""push: sent when the prompt is done. pull: fetched when the decode side has room. layerwise: sent under the prompt."""
MigrationMode: TypeAlias = Literal["live", "blocking", "recompute"]


class RequestFacts(NamedTuple):
    """One request on one instance, as of the last step boundary."""

    id: RequestId
    priority: int
    prompt_tokens: int
    known_tokens: int
    """Prompt and generated tokens so far."""
    blocks: int
    decoding: bool
    moving: bool
    """A migration of it is under way."""
    away_blocks: int = 0
    """Blocks of it on other instances, or kept there for it; not among `blocks`."""


class InstanceFacts(Protocol):
    """One instance as a policy may see it. Attributes are exact as of the view; methods cost O(batch) at most."""

    id: InstanceId
    pool: str
    device: str
    home: Role
    role: Role
    accepting: bool
    """False while it starts, drains or is down."""
    outstanding: int
    """Requests routed here that have not finished or left. One whose decode is to run here counts from its routing, not
    from the moment when its KV comes."""
    pending_tokens: int
    """Prompt tokens routed here whose prompt is not done. They count where the prompt runs, not where it decodes."""
    promised_tokens: int
    """Prompt tokens and most new tokens of everything routed here: the memory that it may come to need. Where only the
    prompt runs it is the prompt and one token, until the KV has left."""
    kv_blocks: int
    block_tokens: int
    clock: float
    """Fraction of the highest clock."""
    headroom_blocks: float
    """What a controller set aside here; infinite while draining."""

    def running(self) -> int:
        """Requests that hold device blocks."""
        ...

    def waiting(self) -> int:
        """Requests that are here and hold none, preempted ones included."""
        ...

    def waiting_blocks(self) -> int:
        """Blocks that the waiting ones need for the tokens that they have."""
        ...

    def head_blocks(self) -> int:
        """Blocks that the first of the waiting ones needs; 0 when nobody waits."""
        ...

    def first_waiting(self) -> RequestFacts | None:
        """The first of the waiting ones; it holds no blocks here."""
        ...

    def free_blocks(self) -> int:
        """Blocks that can be had at once, as of the last step boundary."""
        ...

    def preempted(self) -> int:
        """Requests that were preempted and are not back."""
        ...

    def requests(self) -> Sequence[RequestFacts]:
        """Those that run, in rank order. O(batch)."""
        ...

    def cached_tokens(self, request: Request) -> int:
        """Prompt tokens of the request that the prefix cache here has. O(blocks of the prompt)."""
        ...


class View(Protocol):
    """What a policy sees of the cluster."""

    @property
    def now_ns(self) -> int:
        """The time."""
        ...

    @property
    def as_of_ns(self) -> int:
        """When the facts were taken; now_ns minus this is their age."""
        ...

    @property
    def instances(self) -> Sequence[InstanceFacts]:
        """All that exist, in the order of their ids."""
        ...

    def by_role(self, role: Role) -> Sequence[InstanceFacts]:
        """Those that accept requests and have this role now."""
        ...

    def by_id(self, instance: InstanceId) -> InstanceFacts:
        """KeyError when it is gone."""
        ...

    def power_w(self, domain: str) -> float:
        """Power of a domain at the last telemetry sample; nan without telemetry."""
        ...


# Commands


class Route(msgspec.Struct, frozen=True, gc=False):
    """The prompt runs on `instance`; so do the decodes, unless `decode_instance` says where."""

    request_id: RequestId
    instance: InstanceId
    decode_instance: InstanceId | None = None
    transfer: TransferMode = "push"


@dataclass(frozen=True, slots=True)
class Defer:
    """Ask the router again at `until_ns`."""

    request_id: RequestId
    until_ns: int


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the request; it counts as rejected, never as lost."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a running request. live: copy while it decodes, then a short stop. blocking: stop, copy, go on.
    recompute: drop its KV and compute it again there."""

    request_id: RequestId
    source: InstanceId
    target: InstanceId
    mode: MigrationMode = "live"
    max_stages: int = 3
    last_blocks: int = 16


@dataclass(frozen=True, slots=True)
class MoveKv:
    """Let `target` hold the first `blocks` blocks that `source` still has of a request, which goes on running on
    `source`. Of one that waits there, whose KV is to come: keep these blocks for it, so that it can be admitted."""

    request_id: RequestId
    source: InstanceId
    target: InstanceId
    blocks: int


@dataclass(frozen=True, slots=True)
class SetRole:
    """The instance takes another role for requests routed from now on."""

    instance: InstanceId
    role: Role


@dataclass(frozen=True, slots=True)
class Scale:
    """Start (delta above 0) or drain and stop (below 0) instances of a pool. Below 0 it takes those first that drain
    already (infinite headroom), then those with the fewest outstanding requests, then the highest id."""

    pool: str
    delta: int


@dataclass(frozen=True, slots=True)
class Headroom:
    """Set blocks aside on an instance, as the load of a request that is not there. Infinity drains it: it accepts no
    more requests, what runs goes on or is migrated away. A finite number after that ends the draining."""

    instance: InstanceId
    blocks: float


@dataclass(frozen=True, slots=True)
class SetClock:
    """Run a power domain or pool at a fraction of its highest clock; it takes effect after the actuation delay."""

    scope: str
    fraction: float
    brake: bool = False
    """An emergency that acts at once and ends by itself (5 s in hardware); the clock is then what was set last."""


Placement: TypeAlias = Route | Defer | Reject
Command: TypeAlias = Migrate | SetRole | Scale | Headroom | SetClock | MoveKv


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a controller may listen to.

    | kind | subject | data |
    |---|---|---|
    | tick | -1: one for each controller with a period | |
    | arrival, first_token, preempt | request | instance |
    | finish | request | instance, prompt_tokens, new_tokens (generated), outcome ("finished", "rejected", "failed") |
    | idle (it has nothing left to run), up, down | instance | |
    | telemetry | -1 | domain, power_w, budget_w |
    | command (one for each command, when it is over) | -1 | command, outcome ("done", "refused", "aborted"), reason |
    """

    kind: str
    at_ns: int
    subject: int = -1
    data: Mapping[str, Any] = field(default_factory=dict)


# Policies


class Router(Protocol):
    """Says where a request goes, at its arrival.

    A router that has to act on instances when it routes (Splitwise borrows one of another pool) also has the method
    of Commanding. A router that is a Controller too takes part as one; it is not named among the controllers again.
    """

    name: str

    def route(self, request: Request, view: View) -> Placement:
        """Must be deterministic; randomness comes from its own seeded counter."""
        ...


@runtime_checkable
class Commanding(Protocol):
    """A router whose placements come with commands."""

    def commands(self) -> Sequence[Command]:
        """What the last route() wants done, in order; asked once after it and carried out before its placement is."""
        ...


class Controller(Protocol):
    """Acts on events: rebalancing, scaling, pools, power."""

    name: str
    listens: frozenset[str]
    period_ns: int | None
    """Ask for a `tick` this often; None for never."""

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """Commands to carry out, in order. Whatever is refused comes back as a `command` event."""
        ...


class Estimator(Protocol):
    """Anything that learns, such as a guess of output lengths."""

    def observe(self, features: Mapping[str, float], outcome: Mapping[str, float]) -> None:
        """Take note of what happened."""
        ...

    def predict(self, features: Mapping[str, float]) -> Mapping[str, float]:
        """The expected outcome."""
        ...
