"""What happens to a cluster from outside the requests: power, failures, scaling, put together for one run.

Knows the cluster and the parts; decides nothing itself. It is the host that power.py, faults.py and scaling.py ask
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from megalith.cost.timer_phases import DeviceTimer
from megalith.policy.cluster import Event, InstanceFacts, InstanceId, Scale, SetClock
from megalith.policy.facts import RequestId
from megalith.policy.scheduler import Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.faults import Faults
from megalith.sim.kernel import Kernel
from megalith.sim.migration import Migrations
from megalith.sim.power import PowerDomain
from megalith.sim.scaling import Scaling
from megalith.sim.tempo import Tempos
from megalith.sim.transfer import Handoffs
from megalith.specs.fleet import FleetSpec, PoolSpec


class Operations:
    """See the module. Make it when the first instances exist, then start()."""

    def __init__(
        self,
        cluster: Cluster,
        fleet: FleetSpec,
        seed: int,
        tempos: Tempos,
        moves: tuple[Handoffs, Migrations],
        make: tuple[Callable[[PoolSpec], DeviceTimer], Callable[[PoolSpec], Scheduler]],
    ) -> None:
        """`make`: the timer of a pool at full speed, and a fresh scheduler for it."""
        self.cluster = cluster
        self.tempos = tempos
        self._pools = {pool.name: pool for pool in fleet.pools}
        self._migrations = moves[1]
        self._timer, self._scheduler = make
        self.power = PowerDomain(self, tempos, fleet.power) if fleet.power is not None else None
        self.scaling = Scaling(self, self._pools)
        self.faults = Faults(self, moves, fleet.faults, seed, self._straggle)
        self._served = set(cluster.instances)
        cluster.control.executors[Scale] = self.scaling
        if self.power is not None:
            cluster.control.executors[SetClock] = self.power
            self.faults.before_failure = self.power.switch_off
            self.faults.after_repair = self.power.switch_on
        for instance, pool in cluster.pools.items():
            self._switched_on(instance, pool)
            self.scaling.exists(instance, pool.name)

    def start(self) -> None:
        """Begin telemetry, and draw who fails when."""
        if self.power is not None:
            self.power.start()
        self.faults.start()

    # For all of them

    @property
    def kernel(self) -> Kernel:
        """Time."""
        return self.cluster.kernel

    def going_on(self) -> bool:
        """Whether requests are live or to come."""
        return self.cluster.busy

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen."""
        if event.kind == "up" and event.subject not in self._served:
            self._served.add(event.subject)
            self.faults.serves(event.subject)
        self.cluster.emit(event)

    # For power

    def sampled(self, domain: str, power_w: float) -> None:
        """What policies see from now on."""
        self.cluster.view.powers_w[domain] = power_w

    # For failures

    def up(self) -> Sequence[InstanceId]:
        """Instances that serve, ascending."""
        instances = self.cluster.instances
        return [number for number, one in instances.items() if not one.down and not self.scaling.is_starting(number)]

    def fail(self, instance: InstanceId) -> Sequence[RequestId]:
        """The instance stops; its KV is gone."""
        one = self.cluster.instances[instance]
        lost = sorted(live.request.id for live in one.fail())
        one.restart(self._scheduler(self.cluster.pools[instance]))
        one.down = True
        self._accept(instance)
        return lost

    def requeue(self, request_id: RequestId) -> None:
        """Ask the router again."""
        self.cluster.lost(self.cluster.live[request_id])

    def restore(self, instance: InstanceId) -> bool:
        """It is up again; False when it is gone."""
        one = self.cluster.instances.get(instance)
        if one is None:
            return False
        one.down = False
        self._accept(instance)
        return True

    def _straggle(self, instance: InstanceId, factor: float) -> None:
        self.tempos.slow(instance, factor, "straggler")

    # For scaling

    def facts_of(self, pool: str) -> Sequence[InstanceFacts]:
        """All instances of a pool that exist, ascending."""
        return [facts for facts in self.cluster.facts.values() if facts.pool == pool]

    def switch_on(self, pool: str) -> InstanceId:
        """One more instance exists, and accepts nothing yet."""
        instance = self.cluster.add_instance(self._pools[pool])
        self._switched_on(instance.id, self._pools[pool])
        self.set_accepting(instance.id, False)
        return instance.id

    def set_accepting(self, instance: InstanceId, accepting: bool) -> None:
        """Requests may, or may not, be routed to it; one that is down or drained by a controller accepts later."""
        facts, one = self.cluster.facts[instance], self.cluster.instances[instance]
        facts.accepting = accepting and not one.down and facts.headroom_blocks != inf
        self.cluster.view.changed()

    def unused(self, instance: InstanceId) -> bool:
        """No request is there, on its way there or about to leave."""
        lives, outstanding = self.cluster.instances[instance].lives, self.cluster.facts[instance].outstanding
        return not lives and not outstanding and not self._migrations.busy(instance)

    def switch_off(self, instance: InstanceId) -> None:
        """It is gone."""
        if self.power is not None:
            self.power.remove(instance)
        self.tempos.remove(instance)
        self.cluster.remove_instance(instance)

    # Inside

    def _switched_on(self, instance: InstanceId, pool: PoolSpec) -> None:
        one = self.cluster.instances[instance]
        self.tempos.add(one, self._timer(pool))
        if self.power is not None:
            self.power.add(one, pool.tensor_parallel * pool.pipeline_parallel)

    def _accept(self, instance: InstanceId) -> None:
        scaling = self.scaling
        self.set_accepting(instance, not scaling.is_starting(instance) and not scaling.is_stopping(instance))
