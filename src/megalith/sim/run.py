"""simulate(): run a scenario and say what came of it.

Puts the cluster together from its parts, feeds it the workload and gathers the figures. Reads no wall clock; whoever
wants progress or processor time passes a callback and measures around it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import nan

import msgspec
from mypy_extensions import mypyc_attr

from megalith.base.errors import ConfigError
from megalith.base.interrupts import held_interrupts
from megalith.base.units import NS_PER_S
from megalith.cost.memory import kv_bytes_per_token
from megalith.cost.profile import Profile
from megalith.cost.timer import PS_PER_NS
from megalith.cost.timer_phases import PhasePower
from megalith.policy import registry
from megalith.policy.cluster import InstanceId, Migrate
from megalith.policy.expert_turns import ExpertScheduler
from megalith.policy.facts import Request
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.pooled_memory import PooledScheduler
from megalith.sim import pooled_setup
from megalith.sim.build import Builder
from megalith.sim.cluster import Cluster
from megalith.sim.expert_instance import ExpertInstance
from megalith.sim.expert_weights import ExpertCounters, ExpertWeights
from megalith.sim.faults import FaultCounters
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.migration import MigrationCounters, Migrations
from megalith.sim.network import Network
from megalith.sim.operations import Operations
from megalith.sim.parties import KvShape
from megalith.sim.pipelined import PipelinedInstance
from megalith.sim.pooled import Pooled, PooledCounters
from megalith.sim.pooled_instance import PooledInstance
from megalith.sim.pooled_steps import QueryShape
from megalith.sim.power import PowerCounters
from megalith.sim.record import Recorder
from megalith.sim.record_figures import RecordFigures
from megalith.sim.samples import Samples
from megalith.sim.scaling import ScalingCounters
from megalith.sim.scenario import Scenario
from megalith.sim.series import InstanceSample, Series
from megalith.sim.tempo import Tempos
from megalith.sim.tracing import RunTrace
from megalith.sim.transfer import HandoffCounters, Handoffs
from megalith.specs.arrivals import ClosedLoop
from megalith.specs.fleet import PoolSpec
from megalith.specs.model import ModelSpec
from megalith.specs.replay import told_max_new_tokens
from megalith.specs.shape import RequestShape, prefix_hashes
from megalith.specs.workload import open_workload

EVENTS_A_SLICE = 20_000
"""Events between two calls of `progress`."""
MOST_SAMPLE_S = 60.0
"""Between two samples of all instances, however many there are, where a scenario does not say."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    ended: int
    live: int
    now_ns: int
    events: int


@dataclass(slots=True)
class SimResult:
    """What came of a run. Every figure in it is simulated."""

    scenario: Scenario
    figures: RecordFigures
    series: Series
    samples: dict[str, Samples]
    """Latencies of the requests that finished, by name (ttft_ns, ...)."""
    digest: str
    """Hash of all decisions, token times included; the same for the same scenario on every machine."""
    events: int
    end_ns: int
    """When the last request ended, or the run was stopped."""
    requests: int
    stopped_early: bool
    prefix_hit_share: float
    """Of the prompt tokens that were admitted; nan without a prefix cache."""
    timing: dict[str, str]
    """By pool: how its steps were timed."""
    instances: dict[str, int]
    """By pool: instances at the end."""
    price_per_hour_usd: float | None
    instance_hours: float
    """Up to `end_ns`."""
    handoffs: HandoffCounters
    migrations: MigrationCounters
    faults: FaultCounters
    scaling: ScalingCounters
    power: PowerCounters | None = None
    """None without a power domain."""
    experts: ExpertCounters | None = None
    """None where every instance has one model."""
    pooled: PooledCounters | None = None
    """None where no instance lends KV memory to another."""
    notes: list[str] = field(default_factory=list)


@mypyc_attr(allow_interpreted_subclasses=True)
class Run:
    """One run, step by step: make it, call `advance()` until it says False, then `result()`."""

    def __init__(
        self,
        scenario: Scenario,
        builder: Builder | None = None,
        recorder: Recorder | None = None,
        stop: Callable[[Recorder, int], bool] | None = None,
    ) -> None:
        """`stop(recorder, ended)` may end the run early. Raises ConfigError or DoesNotFit on what cannot be run."""
        self.scenario = scenario
        self.builder = Builder(scenario) if builder is None else builder
        self.recorder = self.builder.recorder() if recorder is None else recorder
        self.kernel = Kernel()
        self._stop = stop
        self.pooled: Pooled | None = None
        self._stopped = False
        self.experts = ExpertCounters()
        self._too_long = self._cut = 0
        """Prompts that fill the context, and answers that were longer than the scheduler was told they may be."""
        fleet = scenario.fleet
        router = registry.router(fleet.router, scenario.seed)
        controllers = [registry.controller(spec, scenario.seed + 1 + i) for i, spec in enumerate(fleet.controllers)]
        self._pooling = pooled_setup.find(router, controllers)
        if self._pooling is not None:
            pooled_setup.check(fleet, self.builder.spec, self._pooling.lending)
            self.builder.lend_kv(self._pooling.lending.share)
        self.cluster = Cluster(self.kernel, router, controllers, self.recorder, self._instance)
        if fleet.power is None and "telemetry" in self.cluster.control.listeners:
            raise ConfigError(
                f"{self.cluster.control.listeners['telemetry'][0].name} waits for power telemetry, and the fleet has "
                "no power domain.",
                "Write the fleet as a TOML file with a table [power] and its budget_w.",
            )
        self._spent: dict[InstanceId, tuple[int, int, int, int]] = {}
        unknown = PhasePower(nan, nan, nan)
        self._powers = {name: kind.power or unknown for name, kind in self.builder.kinds.items()}
        count = sum([pool.count for pool in fleet.pools])
        sample_s = min(max(5.0, count), MOST_SAMPLE_S) if scenario.sample_s is None else scenario.sample_s
        self._sample_ns = round(sample_s * NS_PER_S)
        for pool in fleet.pools:
            for _ in range(pool.count):
                self.cluster.add_instance(pool)
        self._connect()
        self._feed()
        self.cluster.control.start()
        self.operations.start()
        if fleet.heartbeat_s > 0:
            self._beat(None)
        if self._sample_ns:
            self.kernel.at(self._sample_ns, self._sample)

    def advance(self, events: int = EVENTS_A_SLICE) -> bool:
        """Run some events; False when the run is over. Ctrl-C takes effect after them."""
        enabled = gc.isenabled()
        gc.disable()  # nothing in a run makes cycles, and looking for them takes a fifth of its time
        try:
            with held_interrupts():
                more = self.kernel.run(events)
        finally:
            if enabled:
                gc.enable()
        if more and self._stop is not None and self._stop(self.recorder, self.cluster.ended):
            self._stopped = True
        return more and not self._stopped

    def interrupt(self) -> None:
        """End the run here; the result is of what has ended."""
        self._stopped = True

    def draw(self, trace: RunTrace) -> None:
        """Draw everything that happens from now on."""
        for instance_id, pool in self.cluster.pools.items():
            trace.instance(instance_id, f"{pool.name} {instance_id} ({pool.device})")
        self.cluster.draw(trace)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.cluster.ended, len(self.cluster.live), self.kernel.now_ns, self.kernel.events)

    def result(self) -> SimResult:
        """What came of it."""
        self.recorder.flush()
        if self.cluster.live and not self._stopped:
            raise RuntimeError(f"{len(self.cluster.live)} requests never ended")
        cluster, kinds, operations = self.cluster, self.builder.kinds, self.operations
        counters = [instance.scheduler.counters for instance in cluster.instances.values()]
        queried = sum([counter.prefix_queried_tokens for counter in counters])
        hit = sum([counter.prefix_hit_tokens for counter in counters])
        pools = list(cluster.pools.values())
        end_ns = self.kernel.now_ns if self._stopped else cluster.last_end_ns
        prices = [kinds[pool.name].price_per_hour_usd for pool in pools]
        return SimResult(
            scenario=self.scenario,
            figures=self.recorder.figures(),
            series=self.recorder.series,
            samples=self.recorder.samples,
            digest=self.kernel.digest(),
            events=self.kernel.events,
            end_ns=end_ns,
            requests=cluster.ended,
            stopped_early=self._stopped,
            prefix_hit_share=hit / queried if queried else float("nan"),
            timing={name: kind.timing for name, kind in kinds.items()},
            instances={pool.name: pools.count(pool) for pool in self.scenario.fleet.pools},
            price_per_hour_usd=sum(price for price in prices if price is not None) if None not in prices else None,
            handoffs=self.handoffs.counters,
            migrations=self.migrations.counters,
            instance_hours=operations.scaling.instance_hours(until_ns=end_ns),
            faults=operations.faults.counters,
            scaling=operations.scaling.counters,
            power=None if operations.power is None else operations.power.counters,
            experts=self.experts if any(kind.experts for kind in kinds.values()) else None,
            pooled=None if self.pooled is None else self.pooled.counters,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        most, notes = self.builder.max_context, []
        if self._too_long:
            notes.append(f"{self._too_long:,} prompts fill the context of {most:,} tokens and were rejected.")
        if self._cut:
            notes.append(f"{self._cut:,} answers were cut at the context of {most:,} tokens or at what --max-new says.")
        if self.scenario.workload.oracle:
            notes.append("Oracle: the schedulers were told the true length of every answer.")
        notes += [kind.experts.words(name) for name, kind in self.builder.kinds.items() if kind.experts is not None]
        if self.experts.requests:
            notes.append(self.experts.words())
        return notes

    # Parts

    def _instance(self, instance_id: InstanceId, pool: PoolSpec, cluster: Cluster) -> Instance:
        kind = self.builder.kinds[pool.name]
        scheduler = self.builder.scheduler(pool)
        instance: Instance
        if isinstance(scheduler, PooledScheduler):
            instance = PooledInstance(instance_id, cluster.kernel, scheduler, kind.timer, cluster, self.scenario.leap)
        elif isinstance(scheduler, PipelinedScheduler):
            instance = PipelinedInstance(instance_id, cluster.kernel, scheduler, kind.timer, cluster, pool.pipeline)
        elif isinstance(scheduler, ExpertScheduler) and kind.experts is not None:
            weights = ExpertWeights(kind.experts, self.experts)
            instance = ExpertInstance(
                instance_id, cluster.kernel, scheduler, kind.timer, cluster, weights, self.scenario.leap
            )
        else:
            instance = Instance(instance_id, cluster.kernel, scheduler, kind.timer, cluster, self.scenario.leap)
        # Each device copies its own share, over its own link.
        shares = pool.tensor_parallel * pool.pipeline_parallel
        block_bytes = kv_bytes_per_token(self.builder.spec, self.scenario.kv_format) * pool.block_tokens
        instance.swap_block_ps = round(block_bytes * NS_PER_S * PS_PER_NS / (shares * pool.host_bytes_per_s))
        return instance

    def _connect(self) -> None:
        fleet, spec = self.scenario.fleet, self.builder.spec
        cluster = self.cluster
        self.network = Network(self.kernel, fleet.link, lambda instance: cluster.pools[instance].name)
        shape = KvShape(kv_bytes_per_token(spec, self.scenario.kv_format), spec.num_layers)
        self.handoffs = Handoffs(cluster, self.network, fleet.handoff, shape)
        cluster.handoffs = self.handoffs
        tempos = Tempos(self.kernel)
        self.migrations = cluster.migrations = Migrations(cluster, self.handoffs, fleet.migration, tempos.slow)
        cluster.control.executors[Migrate] = self.migrations
        kinds, moves = self.builder.kinds, (self.handoffs, self.migrations)
        make = (lambda pool: kinds[pool.name].timer, self.builder.scheduler)
        self.operations = Operations(cluster, fleet, self.scenario.seed, tempos, moves, make)
        if self._pooling is not None:
            timers = {name: kind.timer for name, kind in kinds.items()}
            query = QueryShape.of(spec, shape.bytes_per_token)
            self.pooled = pooled_setup.connect(self._pooling, cluster, self.network, query, timers)
            self.operations.faults.moves.append(self.pooled)

    # Load

    def _feed(self) -> None:
        arrivals = self.scenario.workload.arrivals
        shapes = open_workload(self.scenario.workload, self.scenario.seed)
        if isinstance(arrivals, ClosedLoop):
            lives = self._lives(shapes, closed=True)
            think_ns = round(arrivals.think_s * NS_PER_S)
            cluster = self.cluster

            def again(_ended: Live | None) -> None:
                live = next(lives, None)
                if live is not None:
                    at_ns = self.kernel.now_ns + (think_ns if _ended is not None else 0)
                    due = Live(msgspec.structs.replace(live.request, arrival_ns=at_ns), live.output_tokens)
                    self.kernel.at(at_ns, cluster.arrive, due)

            cluster.on_end = again
            for _ in range(arrivals.clients):
                again(None)
        else:
            self.cluster.feed(self._lives(shapes, closed=False))

    def _lives(self, shapes: Iterator[RequestShape], closed: bool) -> Iterator[Live]:
        workload, most = self.scenario.workload, self.builder.max_context
        sizes = {pool.block_tokens for pool in self.scenario.fleet.pools if pool.prefix_cache}
        if len(sizes) > 1:
            raise ConfigError(f"Pools with a prefix cache have blocks of {sorted(sizes)} tokens.", "Give all the same.")
        block_tokens = sizes.pop() if sizes else 0
        for shape in shapes:
            hashes: tuple[int, ...] = ()
            if block_tokens and shape.prefix_ids:
                hashes = prefix_hashes(shape, block_tokens, workload.prefix_block_tokens)
            told, output = told_max_new_tokens(workload, shape, most), shape.output_tokens
            if shape.input_tokens >= most:
                self._too_long += 1
                output = 0
            elif output > told:
                self._cut += 1
            at_ns = 0 if closed else shape.at_ns or 0
            request = Request(shape.index, at_ns, shape.input_tokens, told, shape.priority, hashes, shape.model)
            yield Live(request, output if output < told else told)

    # Clocks

    def _beat(self, _argument: object) -> None:
        cluster = self.cluster
        cluster.view.take()
        if cluster.busy or not self.kernel.now_ns:  # the first clients of a closed loop come after this
            self.kernel.at(self.kernel.now_ns + round(self.scenario.fleet.heartbeat_s * NS_PER_S), self._beat)

    def _sample(self, _argument: object) -> None:
        now_ns, period_ns = self.kernel.now_ns, self._sample_ns
        rows = [self._row(instance, period_ns) for instance in self.cluster.instances.values()]
        self.recorder.sample(now_ns, rows)
        if self.cluster.busy:
            self.kernel.at(now_ns + period_ns, self._sample)

    def _row(self, instance: Instance, period_ns: int) -> InstanceSample:
        prompt_ps, decode_ps, prompt_tokens, decode_tokens = instance.spent()
        before = self._spent.get(instance.id, (0, 0, 0, 0))
        self._spent[instance.id] = (prompt_ps, decode_ps, prompt_tokens, decode_tokens)
        period_ps = period_ns * PS_PER_NS
        prompt_share, decode_share = (prompt_ps - before[0]) / period_ps, (decode_ps - before[1]) / period_ps
        scheduler = instance.scheduler
        pool = self.cluster.pools[instance.id]
        idle_w, prompt_w, decode_w = self._powers[pool.name]
        power_w = idle_w + prompt_share * (prompt_w - idle_w) + decode_share * (decode_w - idle_w)
        return InstanceSample(
            instance.id,
            scheduler.num_running,
            scheduler.num_waiting + scheduler.num_swapped,
            1.0 - instance.free_blocks() / scheduler.kv.num_blocks,
            (prompt_tokens - before[2]) * 1e9 / period_ns,
            (decode_tokens - before[3]) * 1e9 / period_ns,
            prompt_share + decode_share,
            power_w * pool.tensor_parallel * pool.pipeline_parallel,
        )


def simulate(
    scenario: Scenario,
    spec: ModelSpec | None = None,
    profiles: dict[str, Profile] | None = None,
    recorder: Recorder | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> SimResult:
    """Run a scenario to its end. `progress` is called every 20,000 events. Raises ConfigError and DoesNotFit."""
    run = Run(scenario, Builder(scenario, spec, profiles), recorder)
    while run.advance():
        if progress is not None:
            progress(run.progress)
    return run.result()
