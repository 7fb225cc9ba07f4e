"""From a scenario to the parts of a cluster: step timers, KV capacity, schedulers, instances.

Knows names (models, devices, policies) and turns them into objects; must not run anything.
"""

from __future__ import annotations

from typing import NamedTuple

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import format_bytes
from megalith.cost.compute import CostModel
from megalith.cost.memory import (
    RESIDENCY,
    MemoryRequest,
    Workspace,
    activation_bytes,
    device_block_bytes,
    per_device_weights,
    weight_bytes,
)
from megalith.cost.operators import find_tables
from megalith.cost.profile import Profile, from_device
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_operators import OperatorTimer
from megalith.cost.timer_phases import DeviceTimer, PhasePower
from megalith.cost.timer_published import published
from megalith.policy.batching import by_name
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.scenario import Scenario
from megalith.specs import catalog
from megalith.specs.fleet import PoolSpec
from megalith.specs.model import ModelSpec

MIN_BLOCKS = 2


class Kind(NamedTuple):
    """What all instances of a pool have in common."""

    timer: DeviceTimer
    kv_blocks: int
    block_tokens: int
    max_context: int
    timing: str
    """How its steps are timed, with source, for the report."""
    price_per_hour_usd: float | None
    """Of one instance."""
    power: PhasePower | None
    """Of one device; None where nobody published it."""


class Builder:
    """Makes timers and schedulers for the pools of one scenario.

    `spec` stands in for a model that the catalogue does not have, `profiles` for devices that it does not, by name.
    """

    def __init__(
        self, scenario: Scenario, spec: ModelSpec | None = None, profiles: dict[str, Profile] | None = None
    ) -> None:
        self.scenario = scenario
        self.spec = catalog.model(scenario.model) if spec is None else spec
        self._profiles = profiles or {}
        self.kinds = {pool.name: self._kind(pool) for pool in scenario.fleet.pools}

    @property
    def max_context(self) -> int:
        """Most tokens that every instance can hold for one request."""
        asked = self.scenario.max_context
        least = min(kind.max_context for kind in self.kinds.values())
        return least if asked is None else min(least, asked)

    def scheduler(self, pool: PoolSpec) -> Scheduler:
        """A fresh scheduler with an empty KV cache."""
        blocks = self.kinds[pool.name].kv_blocks
        kv = KvAccount(blocks, pool.block_tokens, pool.host_blocks, pool.prefix_cache, int(pool.watermark * blocks))
        limits = Limits(max_sequences=pool.max_sequences, max_waiting=pool.max_waiting, preempt=pool.preempt)
        return Scheduler(by_name(pool.policy, pool.token_budget), kv, limits)

    def _kind(self, pool: PoolSpec) -> Kind:
        scenario = self.scenario
        named = scenario.timer not in ("auto", "operators", "analytic")
        profile = None if named else self._profile(pool)
        if profile is None:
            entry = published(scenario.timer)
            timer: DeviceTimer = entry.timer()
            timing = f"published model {scenario.timer}: {entry.source}"
            capacity = None if entry.kv_tokens is None else entry.kv_tokens // pool.block_tokens
            price = None
        else:
            timer, timing = self._timer(pool, profile)
            capacity, price = None, profile.price_per_hour_usd
        blocks = pool.kv_blocks or capacity or self._fitting_blocks(pool, profile)
        context = min(self.spec.max_context, blocks * pool.block_tokens)
        devices = pool.tensor_parallel * pool.pipeline_parallel
        cost = None if price is None else price * devices
        return Kind(timer, blocks, pool.block_tokens, context, timing, cost, _power(timer))

    def _profile(self, pool: PoolSpec) -> Profile:
        if pool.device in self._profiles:
            return self._profiles[pool.device]
        return from_device(catalog.device(pool.device), self.scenario.weight_format)

    def _timer(self, pool: PoolSpec, profile: Profile) -> tuple[DeviceTimer, str]:
        scenario, spec = self.scenario, self.spec
        if scenario.timer != "analytic" and pool.device not in self._profiles:
            tables = find_tables(catalog.device(pool.device).name, spec.name)
            try:
                if tables is not None:
                    measured = OperatorTimer(tables, pool.tensor_parallel, scenario.weight_format, scenario.kv_format)
                    return measured, f"operator tables of {profile.name} for {spec.name}"
                if scenario.timer == "operators":
                    raise ConfigError(
                        f"There are no operator tables for {spec.name} on {pool.device}.",
                        "Use --timer analytic, which needs none.",
                    )
            except ConfigError:
                if scenario.timer == "operators":
                    raise
        weights = weight_bytes(spec, scenario.weight_format)
        cost = CostModel(spec, profile, weights, scenario.kv_format, pool.tensor_parallel)
        return AnalyticTimer(cost), f"rates of {profile.name} ({profile.source})"

    def _fitting_blocks(self, pool: PoolSpec, profile: Profile | None) -> int:
        if profile is None:
            raise ConfigError(
                f"The published timer {self.scenario.timer!r} says nothing of KV capacity.",
                f"Give pool {pool.name!r} its kv_blocks.",
            )
        spec, scenario = self.spec, self.scenario
        devices = pool.tensor_parallel * pool.pipeline_parallel
        weights = weight_bytes(spec, scenario.weight_format)
        work = Workspace(pool.token_budget, pool.max_sequences, min(spec.max_context, pool.token_budget))
        request = MemoryRequest(
            kind=profile.kind, num_blocks=1, block_tokens=pool.block_tokens, kv_format=scenario.kv_format, work=work,
            devices=pool.tensor_parallel,
        )  # fmt: skip
        activations = activation_bytes(spec, profile.kind, work)[0] // pool.tensor_parallel
        fixed = per_device_weights(weights, devices) + activations + RESIDENCY[profile.kind].base_bytes
        room = int(profile.memory_bytes * scenario.memory_share) - fixed
        block = device_block_bytes(spec, request) // pool.pipeline_parallel
        blocks = room // block
        if blocks < MIN_BLOCKS:
            raise DoesNotFit(
                f"{spec.name} in {scenario.weight_format} needs {format_bytes(fixed)} on each {pool.device} of pool "
                f"{pool.name!r} (tensor parallel {pool.tensor_parallel}), which has "
                f"{format_bytes(int(profile.memory_bytes * scenario.memory_share))} to give.",
                "Raise tensor_parallel, take a smaller format or a larger device.",
            )
        return blocks


def _power(timer: DeviceTimer) -> PhasePower | None:
    try:
        return timer.power_w()
    except ConfigError:
        return None
