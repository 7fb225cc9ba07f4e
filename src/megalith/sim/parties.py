"""What moving KV asks of an instance and of the cluster, as protocols, and how many bytes there are to move.

Knows no mechanism. The cluster implements these; tests stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeAlias

from megalith.policy.cluster import Command, Event, InstanceFacts, InstanceId
from megalith.policy.facts import Request, RequestId
from megalith.policy.scheduler import Scheduler
from megalith.sim.kernel import Kernel

MoveKind: TypeAlias = Literal["handoff", "migration", "recompute"]
"""recompute: a migration that left the KV behind; the target has the request through resubmit()."""


class KvShape(NamedTuple):
    """The KV of one model."""

    bytes_per_token: int
    """Over all layers (cost.memory.kv_bytes_per_token)."""
    layers: int

    def size(self, tokens: int, block_tokens: int) -> int:
        """Bytes of `tokens` tokens, up to whole blocks of `block_tokens`; 1 counts the tokens alone."""
        return -(-tokens // block_tokens) * block_tokens * self.bytes_per_token


class Executor(Protocol):
    """Carries out commands of some kinds; it tells itself how they end."""

    def carry_out(self, command: Command) -> str | None:
        """Begin. Returns why it refuses, or None."""
        ...


class Party(Protocol):
    """One instance, as one end of a move. It may be in the middle of a step, or of a leap over many."""

    @property
    def id(self) -> InstanceId:
        """Its number; never used again for another one."""
        ...

    @property
    def scheduler(self) -> Scheduler:
        """Read and changed only after interrupt()."""
        ...

    @property
    def facts(self) -> InstanceFacts:
        """What policies see of it."""
        ...

    def interrupt(self, now_ns: int) -> None:
        """Bring the scheduler to the last step boundary before now; a leap is cut, the step under way goes on.

        Does nothing at a boundary and when it is idle.
        """
        ...

    def wake(self, now_ns: int) -> None:
        """The scheduler was changed: plan again, at once if no step is under way, else when that step ends.

        Does nothing at a boundary, for it plans there anyway. Blocks may have come free, see Handoffs.room.
        """
        ...

    def at_boundary(self, call: Callable[[], None]) -> None:
        """Run `call` when the step under way has been completed and before the next is planned; at once without one.

        Dropped when the instance fails.
        """
        ...


class Host(Protocol):
    """The cluster around the parties."""

    @property
    def kernel(self) -> Kernel:
        """Time."""
        ...

    def find(self, instance: InstanceId) -> Party | None:
        """An instance that is up, draining ones included; None when it is down or gone."""
        ...

    def request(self, request_id: RequestId) -> Request | None:
        """A request that has not ended."""
        ...

    def moved(self, request_id: RequestId, source: InstanceId, target: InstanceId, kind: MoveKind) -> None:
        """The request runs on `target` from now on; both schedulers know."""
        ...

    def kept(self, request_id: RequestId, instance: InstanceId) -> None:
        """The hand-off of this request is off: it decodes where its prompt runs or ran, and its scheduler knows. If it
        was held there, resumed() follows."""
        ...

    def held(self, request_id: RequestId, instance: InstanceId) -> None:
        """A migration took the request out of the batch of this instance, at a step boundary; its blocks are there."""
        ...

    def resumed(self, request_id: RequestId, instance: InstanceId) -> None:
        """A migration or hand-off was given up: the request that was held decodes on, and its scheduler knows."""
        ...

    def retarget(self, request_id: RequestId, lost: InstanceId) -> InstanceId | None:
        """Another instance to decode it, for one that was lost; None to decode where its prompt ran."""
        ...

    def resubmit(self, request_id: RequestId, target: InstanceId) -> None:
        """Add the request to the scheduler of `target`, with its known tokens and no KV, and wake that.

        Raises CapacityError or RequestError, with nothing changed, when it is refused. moved() follows.
        """
        ...

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen."""
        ...
