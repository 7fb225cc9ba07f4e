"""Puts a cluster together whose instances lend each other KV memory, or says why that cannot be.

Knows the parts of it; decides nothing while the cluster runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from megalith.base.errors import ConfigError
from megalith.cost.timer import StepTimer
from megalith.policy.cluster import Controller, InstanceId, Migrate, MoveKv, Router, Scale
from megalith.policy.pooled_kv import Lending, StepLine
from megalith.sim.cluster import Cluster
from megalith.sim.network import Network
from megalith.sim.pooled import Guarded, Pooled
from megalith.sim.pooled_instance import PooledInstance
from megalith.sim.pooled_steps import CoupledSteps, QueryShape
from megalith.specs.fleet import FleetSpec
from megalith.specs.model import ModelSpec

SCALING = ("freeness-scaling", "threshold-scaling", "target-scaling", "posterior-scaling")
PROBE_DECODES, PROBE_TOKENS = 65, 65_536
"""Where a timer is asked for the slopes of its steps."""


def find(router: Router, controllers: Sequence[Controller]) -> Any:
    """The policy that moves KV, which has an attribute `lending`; None without one. ConfigError for two of them."""
    found = [policy for policy in (router, *controllers) if getattr(policy, "lending", None) is not None]
    if len(found) > 1:
        names = ", ".join([str(getattr(policy, "name", policy)) for policy in found])
        raise ConfigError(f"Two policies place the KV of the same requests: {names}.", "Name one of them.")
    return found[0] if found else None


def check(fleet: FleetSpec, spec: ModelSpec, lending: Lending) -> None:
    """Raise ConfigError for what does not go together with KV that instances lend each other."""
    what = "Instances that lend each other KV memory"
    if sum([pool.count for pool in fleet.pools]) < 2:
        raise ConfigError(f"{what} need another one, and this fleet has one.", "Give it at least two instances.")
    for pool in fleet.pools:
        where = f" (pool {pool.name!r})"
        if pool.role != "mixed":
            raise ConfigError(f"{what} must be mixed ones{where}: a hand-off takes whole KV.", "Leave out the roles.")
        if pool.pipeline_parallel > 1:
            raise ConfigError(f"{what} cannot be pipelines{where}.", "Use tensor parallelism.")
        if pool.preempt == "swap" or pool.host_blocks:
            raise ConfigError(f"{what} cannot swap{where}: a part of it may be elsewhere.", "Use preempt=recompute.")
        if pool.watermark > lending.least_free_share:
            raise ConfigError(
                f"With a watermark of {pool.watermark:g}{where} nobody comes in for whom "
                f"{lending.least_free_share:g} of the blocks are left free.",
                f"Raise short_share and room_share to {pool.watermark:g}.",
            )
        if pool.block_tokens != fleet.pools[0].block_tokens:
            raise ConfigError(f"{what} need blocks of one size{where}.", "Give all pools the same block_tokens.")
    if spec.sliding_window is not None:
        raise ConfigError(
            f"{spec.name} has sliding windows; which of its KV is read depends on the layer, and {what.lower()} are "
            "timed as if all of it was.",
            "Use a model without sliding windows.",
        )
    scaling = [policy.name for policy in fleet.controllers if policy.name in SCALING]
    if scaling:
        raise ConfigError(
            f"{what} cannot be stopped by {scaling[0]} while they hold KV of others.", "Leave one of the two out."
        )


def connect(
    policy: Any, cluster: Cluster, network: Network, shape: QueryShape, timers: Mapping[str, StepTimer]
) -> Pooled:
    """Let the instances of a cluster lend; `timers` by pool, at full speed, are what the policy reckons with."""
    instances = cast("dict[InstanceId, PooledInstance]", cluster.instances)
    steps = CoupledSteps(network, shape, next(iter(instances.values())).memory.kv.block_tokens, instances)
    for instance in instances.values():
        instance.stretch = steps.stretch_ps
    pooled = Pooled(cluster, steps, policy.lending.hold_s)
    executors = cluster.control.executors
    executors[MoveKv] = pooled
    executors[Migrate] = Guarded(executors[Migrate], pooled)
    executors.pop(Scale, None)
    if hasattr(policy, "learn"):
        policy.learn({name: step_line(timer) for name, timer in timers.items()})
    return pooled


def step_line(timer: StepTimer) -> StepLine:
    """A step of decodes as a straight line in their number and in the tokens that they attend to."""
    one, many = timer.step_ps((), 1, 0, 0), timer.step_ps((), PROBE_DECODES, 0, 0)
    long = timer.step_ps((), 1, PROBE_TOKENS, PROBE_TOKENS)
    each = max(0.0, (many - one) / (PROBE_DECODES - 1))
    return StepLine(max(1.0, one - each), each, max(0.0, (long - one) / PROBE_TOKENS))
