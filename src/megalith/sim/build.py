"""From a scenario to the parts of a cluster: step timers, KV capacity, schedulers, instances.

Knows names (models, devices, policies) and turns them into objects; must not run anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import format_bytes
from megalith.cost.borrow import BorrowingTimer, layer_bytes, loans, resident
from megalith.cost.compute import CostModel
from megalith.cost.kernel_table import KernelTable
from megalith.cost.memory import (
    RESIDENCY,
    MemoryRequest,
    WeightBytes,
    Workspace,
    activation_bytes,
    device_block_bytes,
    per_device_weights,
    weight_bytes,
)
from megalith.cost.padding import pad
from megalith.cost.profile import Profile, from_device
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_choice import KINDS, choose_timer
from megalith.cost.timer_distserve import distserve_for
from megalith.cost.timer_instant import INSTANT, instant
from megalith.cost.timer_operators import OperatorTimer
from megalith.cost.timer_overlap import OverlapTimer
from megalith.cost.timer_phases import DeviceTimer, PhasePower
from megalith.cost.timer_published import published, published_timers
from megalith.cost.timer_splitwise import TOKEN_QUERIES, SplitwiseTable, TokenQuery, splitwise_tables
from megalith.cost.timer_stages import VALUE_BYTES, LinkedTimer, SendingTimer
from megalith.cost.timer_vidur import StagedTimer, vidur_for
from megalith.policy.batching import by_name
from megalith.policy.expert_turns import ExpertScheduler
from megalith.policy.kv import KvAccount
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.pooled_memory import PooledAccount, PooledScheduler
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.combinations import check_together
from megalith.sim.expert_memory import check_experts, divide
from megalith.sim.expert_weights import ExpertShape
from megalith.sim.record import Recorder, Sink
from megalith.sim.reference import alone
from megalith.sim.scenario import Scenario
from megalith.specs import catalog
from megalith.specs.fleet import FleetSpec, PoolSpec
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
    experts: ExpertShape | None = None
    """Where its instances have many models."""


class Builder:
    """Makes timers and schedulers for the pools of one scenario.

    `spec` stands in for a model that the catalogue does not have, `profiles` for devices that it does not, by name, and
    `weights` for how large the weights are there.
    """

    def __init__(
        self,
        scenario: Scenario,
        spec: ModelSpec | None = None,
        profiles: dict[str, Profile] | None = None,
        weights: WeightBytes | None = None,
    ) -> None:
        _check_roles(scenario.fleet)
        check_experts(scenario.fleet, scenario.workload)
        self.scenario = scenario
        self.spec = catalog.model(scenario.model) if spec is None else spec
        self._profiles = profiles or {}
        self._weights = weights
        for pool in scenario.fleet.pools:
            if pool.pipeline_parallel > self.spec.num_layers:
                raise ConfigError(
                    f"{self.spec.name} has {self.spec.num_layers} layers, which cannot be cut into "
                    f"{pool.pipeline_parallel} stages (pool {pool.name!r}).",
                    f"Use at most pp{self.spec.num_layers}.",
                )
        self.kinds = {pool.name: self._kind(pool) for pool in scenario.fleet.pools}
        self._lent_share: float | None = None

    def lend_kv(self, share: float) -> None:
        """Instances lend each other KV memory while at most this share of theirs is in use."""
        self._lent_share = share
        for pool in self.scenario.fleet.pools:
            check_together(pool, lends=True)

    @property
    def max_context(self) -> int:
        """Most tokens that every instance can hold for one request, with what others lend to it."""
        asked = self.scenario.max_context
        least = min(kind.max_context for kind in self.kinds.values())
        if self._lent_share is not None:
            least = min(self.spec.max_context, *[self._pooled_tokens(pool) for pool in self.scenario.fleet.pools])
        return least if asked is None else min(least, asked)

    def scheduler(self, pool: PoolSpec) -> Scheduler:
        """A fresh scheduler with an empty KV cache."""
        blocks = self.kinds[pool.name].kv_blocks
        limits = Limits(max_sequences=pool.max_sequences, max_waiting=pool.max_waiting, preempt=pool.preempt)
        policy = by_name(pool.policy, pool.token_budget)
        watermark = int(pool.watermark * blocks)
        if self._lent_share is not None:
            lendable = int(self._lent_share * blocks)
            account = PooledAccount(blocks, pool.block_tokens, pool.prefix_cache, watermark, lendable)
            return PooledScheduler(policy, account, limits, self._pooled_tokens(pool))
        kv = KvAccount(blocks, pool.block_tokens, pool.host_blocks, pool.prefix_cache, watermark)
        if pool.pipeline_parallel > 1:
            most = pool.steps_under_way or pool.pipeline_parallel * (2 if pool.pipeline == "non-blocking" else 1)
            return PipelinedScheduler(policy, kv, limits, pool.pipeline_parallel, most_flights=most)
        if pool.experts is not None:
            return ExpertScheduler(policy, kv, limits, pool.experts.order == "grouped")
        return Scheduler(policy, kv, limits)

    def _pooled_tokens(self, pool: PoolSpec) -> int:
        """What one instance has and all others may lend it while nothing else is there."""
        share, kinds = self._lent_share or 0.0, self.kinds
        lent = sum([other.count * int(share * kinds[other.name].kv_blocks) for other in self.scenario.fleet.pools])
        blocks = kinds[pool.name].kv_blocks
        # Two blocks stay free where it runs, for its next token.
        return (blocks + lent - int(share * blocks) - 2) * pool.block_tokens

    def recorder(self, sink: Sink | None = None) -> Recorder:
        """A recorder for the scenario, with the reference of its slowdowns where it has some."""
        scenario = self.scenario
        if scenario.slo is None or not scenario.slo.needs_reference:
            return Recorder(scenario.slo, sink=sink)
        first = scenario.fleet.pools[0]
        pool = msgspec.structs.replace(first, name="reference", device=scenario.reference, power_cap=None)
        timer, _, _ = self._timer(pool, first.timer or scenario.timer)
        return Recorder(scenario.slo, alone(timer), sink=sink)

    def _kind(self, pool: PoolSpec) -> Kind:
        check_together(pool)
        name = pool.timer or self.scenario.timer
        if pool.attention is not None:
            from megalith.sim.elsewhere import elsewhere

            one = elsewhere(pool, name, self.spec, self._profile(pool), self._weight_bytes(pool), self.scenario)
            context = min(self.spec.max_context, one.kv_blocks * pool.block_tokens)
            return Kind(
                one.timer, one.kv_blocks, pool.block_tokens, context, one.timing, one.price_per_hour_usd,
                _power(one.timer),
            )  # fmt: skip
        timer, timing, capacity = self._timer(pool, name)
        if pool.overlap != "none":
            timer, timing = _overlapped(pool, timer), f"{timing}, nano-batches overlapped (shares of a device assumed)"
        profile = self._profile(pool)
        timer, timing = self._engine(pool, profile, timer, timing)
        experts = None
        if pool.experts is None:
            blocks = pool.kv_blocks or capacity or self._fitting_blocks(pool, profile, name)
        else:
            room = self._fitting_blocks(pool, profile, name)
            block_bytes = self._device_block_bytes(pool) * pool.tensor_parallel
            blocks, experts = divide(pool, self._weight_bytes(pool), block_bytes, room)
        context = min(self.spec.max_context, blocks * pool.block_tokens)
        price = None if profile is None else profile.price_per_hour_usd
        cost = None if price is None else price * pool.tensor_parallel * pool.pipeline_parallel
        return Kind(timer, blocks, pool.block_tokens, context, timing, cost, _power(timer), experts)

    def _engine(
        self, pool: PoolSpec, profile: Profile | None, timer: DeviceTimer, timing: str
    ) -> tuple[DeviceTimer, str]:
        """What an engine does with the device: layers that it borrows, stages that it joins, batches that it pads."""
        borrowed = pool.peer_layers + pool.host_layers
        joined = pool.pipeline != "queue" and not isinstance(timer, SendingTimer)
        if (borrowed or joined) and profile is None:
            what = f"The catalogue has no device {pool.device!r}, so the links of pool {pool.name!r} are not known."
            raise ConfigError(what, "Name a catalogue device, or leave out pipeline, peer_layers and host_layers.")
        if borrowed and profile is not None:
            if isinstance(timer, StagedTimer) and pool.pipeline_parallel > 1:
                what = f"Pool {pool.name!r} borrows {borrowed} layers, which a timer that knows its stages does not do."
                raise ConfigError(what, "Use the timer `analytic` or `operators`, or no pipeline.")
            if pool.peer_layers % pool.pipeline_parallel or pool.host_layers % pool.pipeline_parallel:
                what = (
                    f"The borrowed layers of pool {pool.name!r} cannot be spread over {pool.pipeline_parallel} stages."
                )
                raise ConfigError(what, f"Borrow a multiple of {pool.pipeline_parallel}.")
            layers = self.spec.num_layers
            lent = loans(
                self._weight_bytes(pool), layers, pool.tensor_parallel, profile, pool.peer_layers, pool.host_layers,
                pool.host_bytes_per_s,
            )  # fmt: skip
            timer = BorrowingTimer(timer, layers, lent)
            size = format_bytes(layer_bytes(self._weight_bytes(pool), layers, pool.tensor_parallel) * borrowed)
            timing += f"; {borrowed} of {layers} layers borrowed, {size} a device"
        if joined and profile is not None:
            rate = profile.peer_bytes_per_s
            if rate <= 0.0:
                raise ConfigError(f"No link between devices is known for {pool.device!r}.", "Leave out pipeline.")
            row = self.spec.hidden * VALUE_BYTES
            timer = LinkedTimer(timer, pool.pipeline_parallel, row, rate, profile.peer_latency_ns)
        return (pad(timer), f"{timing}; padded") if pool.padding else (timer, timing)

    def _weight_bytes(self, pool: PoolSpec) -> WeightBytes:
        if self._weights is not None and pool.device in self._profiles:
            return self._weights
        return weight_bytes(self.spec, self.scenario.weight_format)

    def _profile(self, pool: PoolSpec) -> Profile | None:
        if pool.device in self._profiles:
            return self._profiles[pool.device]
        known = catalog.find_device(pool.device)
        return None if known is None else from_device(known, self.scenario.weight_format)

    def _timer(self, pool: PoolSpec, name: str) -> tuple[DeviceTimer, str, int | None]:
        """(timer, how it times and whence, KV blocks where they were published with it)."""
        scenario, spec = self.scenario, self.spec
        kind, _, option = name.partition(":")
        if kind == "splitwise":
            table = _splitwise_table(scenario.model, pool)
            query = _token_query(option)
            return table.timer(query), f"splitwise-sim's medians, {query} decode times", None
        if kind == "distserve":
            degrees = pool.tensor_parallel, pool.pipeline_parallel
            timer, timing, tokens = distserve_for(spec.name, catalog.device(pool.device).name, *degrees, option)
            return timer, timing, None if tokens is None else tokens // pool.block_tokens
        if name == INSTANT:
            return instant(), "no time at all: left out of the measurement", None
        if kind == "vidur":
            entry = vidur_for(spec.name, catalog.device(pool.device).name, pool.tensor_parallel, option)
            return entry.timer(pool.pipeline_parallel), f"Vidur's fit of measured operators, {entry.network}", None
        if kind == "tables":
            directory, _, host_us = option.partition(":host_us=")
            host_ns = _host_ns(host_us)
            kernels = KernelTable.load(Path(directory), spec, pool.tensor_parallel, host_ns)
            return kernels, f"kernel tables in {directory}, {host_ns / 1e6:g} ms host time a step", None
        if name in published_timers():
            known = published(name)
            blocks = None if known.kv_tokens is None else known.kv_tokens // pool.block_tokens
            return known.timer(), f"published model {name}: {known.source}", blocks
        own = pool.device in self._profiles or catalog.find_model(scenario.model) is None
        if name in KINDS and own:
            profile = self._profile(pool)
            if profile is None:
                raise ConfigError(f"There is no device {pool.device!r}.", "`megalith simulate --list` names them.")
            weights = self._weight_bytes(pool)
            cost = CostModel(spec, profile, weights, scenario.kv_format, pool.tensor_parallel)
            return AnalyticTimer(cost), f"rates of {profile.name} ({profile.source})", None
        timer = choose_timer(
            name, scenario.model, pool.device, pool.tensor_parallel, scenario.weight_format, scenario.kv_format
        )
        source = "operator tables" if isinstance(timer, OperatorTimer) else "rates of the data sheet"
        return timer, f"{source} of {pool.device}", None

    def _fitting_blocks(self, pool: PoolSpec, profile: Profile | None, name: str) -> int:
        if profile is None:
            raise ConfigError(
                f"The timer {name!r} says nothing of KV capacity, and the catalogue has no device {pool.device!r}.",
                f"Give pool {pool.name!r} its kv_blocks.",
            )
        spec, scenario = self.spec, self.scenario
        devices = pool.tensor_parallel * pool.pipeline_parallel
        weights = self._weight_bytes(pool)
        work = Workspace(pool.token_budget, pool.max_sequences, min(spec.max_context, pool.token_budget))
        activations = activation_bytes(spec, profile.kind, work)[0] // pool.tensor_parallel
        weights = resident(weights, spec.num_layers, pool.peer_layers + pool.host_layers)
        fixed = per_device_weights(weights, devices) + activations + RESIDENCY[profile.kind].base_bytes
        room = int(profile.memory_bytes * scenario.memory_share) - fixed
        blocks = room // (self._device_block_bytes(pool) // pool.pipeline_parallel)
        if blocks < MIN_BLOCKS:
            raise DoesNotFit(
                f"{spec.name} in {scenario.weight_format} needs {format_bytes(fixed)} on each {pool.device} of pool "
                f"{pool.name!r} (tensor parallel {pool.tensor_parallel}), which has "
                f"{format_bytes(int(profile.memory_bytes * scenario.memory_share))} to give.",
                "Raise tensor_parallel, take a smaller format or a larger device.",
            )
        return blocks

    def _device_block_bytes(self, pool: PoolSpec) -> int:
        """Of one KV block on one device that has all layers."""
        request = MemoryRequest(
            kind="cuda", num_blocks=1, block_tokens=pool.block_tokens, kv_format=self.scenario.kv_format,
            work=Workspace(1, 1, 1), devices=pool.tensor_parallel,
        )  # fmt: skip
        return device_block_bytes(self.spec, request)


def _overlapped(pool: PoolSpec, timer: DeviceTimer) -> OverlapTimer:
    if pool.pipeline_parallel > 1:
        raise ConfigError(
            f"Pool {pool.name!r} has {pool.pipeline_parallel} stages, whose batches nano-batches would cut again.",
            "Use overlap with pp1, or leave it away.",
        )
    return OverlapTimer(timer)


def _power(timer: DeviceTimer) -> PhasePower | None:
    try:
        return timer.power_w()
    except ConfigError:
        return None


def _check_roles(fleet: FleetSpec) -> None:
    roles = {pool.role for pool in fleet.pools}
    for role, lacks in (("prefill", "computes prompts"), ("decode", "decodes")):
        if "mixed" not in roles and role not in roles:
            raise ConfigError(
                f"Nobody {lacks} in this fleet, whose pools are all of the role {', '.join(sorted(roles))}.",
                f"Add a pool of the role {role} or mixed.",
            )


def _splitwise_table(model: str, pool: PoolSpec) -> SplitwiseTable:
    tables = splitwise_tables()
    spec, device = catalog.find_model(model), catalog.find_device(pool.device)
    capped = pool.power_cap is not None
    for table in tables.values():
        same = catalog.find_model(table.model) is spec and catalog.find_device(table.device) is device
        if same and (table.tensor_parallel, table.capped) == (pool.tensor_parallel, capped):
            return table
    raise ConfigError(
        f"splitwise-sim has no measurements of {model} on {pool.device} with tensor parallel {pool.tensor_parallel}"
        f"{' and a power cap' if pool.power_cap is not None else ''}.",
        f"It has: {', '.join(sorted(tables))}.",
    )


def _host_ns(text: str) -> int:
    try:
        return round(float(text or 0) * 1000)
    except (ValueError, OverflowError):
        what = f"{text!r} is no host time in microseconds."
        raise ConfigError(what, "Write tables:FOLDER:host_us=650.") from None


def _token_query(text: str) -> TokenQuery:
    for query in TOKEN_QUERIES:
        if text == query:
            return query
    if text:
        raise ConfigError(f"splitwise timers know no {text!r}.", f"Known: {', '.join(TOKEN_QUERIES)}.")
    return TOKEN_QUERIES[0]
