"""What `plan placement` is asked, and the fleets that may answer: degrees of each phase, how many instances, how near.

Knows how a candidate becomes a FleetSpec; must not know how well it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Literal, TypeAlias

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.plan.goodput import LEAST_REQUESTS, RESIDENCES, STEP, GoodputQuestion
from megalith.sim.scenario import Scenario
from megalith.sim.setups import apply
from megalith.specs import catalog
from megalith.specs.fleet import FleetSpec, LinkSpec, PoolSpec
from megalith.specs.slo import Slo
from megalith.specs.workload import WorkloadSpec

Affinity: TypeAlias = Literal["high", "low"]
AFFINITIES: tuple[Affinity, ...] = ("high", "low")
PROMPT_TOKENS, MOST_SEQUENCES = 8192, 1024
"""Of a prompt batch, and requests of a decode batch. Source: DistServe, context-max-tokens and max batch size."""
SPLITFUSE_TOKENS = 512
"""Of a step of the chunked control."""
COLOCATED = (("prefill-first", PROMPT_TOKENS), ("splitfuse", SPLITFUSE_TOKENS))
"""What a split has to beat: (batch policy, token budget) of instances that do both."""


class Degrees(Config, kw_only=True):
    """How one instance is cut over devices."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def devices(self) -> int:
        """Of an instance."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def options(self) -> str:
        """As `--fleet` wants them."""
        pairs = (("tp", self.tensor_parallel), ("pp", self.pipeline_parallel))
        return "".join(f":{short}{value}" for short, value in pairs if value > 1)

    def __str__(self) -> str:
        return f"tp{self.tensor_parallel} pp{self.pipeline_parallel}"


class Unit(Config, kw_only=True):
    """Prefill and decode instances that work together: what is replicated."""

    prefill: Degrees
    prefills: int
    decode: Degrees
    decodes: int
    nodes: int = 1
    """Nodes that its pipelines go over; on each are the same stages of both phases."""

    @property
    def devices(self) -> int:
        """Of all its instances."""
        return self.prefills * self.prefill.devices + self.decodes * self.decode.devices

    def __str__(self) -> str:
        return f"{self.prefills} x prefill {self.prefill} + {self.decodes} x decode {self.decode}"


class PlacementQuestion(Config, kw_only=True):
    """All that decides the answer."""

    model: str
    workload: WorkloadSpec
    slo: Slo
    device: str
    rate_per_s: float | None = None
    """What the whole fleet must serve; None: the smallest balanced one is sought."""
    affinity: Affinity = "high"
    """high: KV may go between nodes, so each phase is placed for itself. low: only inside a node."""
    node_devices: int = 8
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    pipeline_parallel: tuple[int, ...] = (1, 2, 4)
    most_devices: int = 8
    """Of one instance; with low affinity of the part of a unit that is in one node, at most `node_devices`."""
    most_nodes: int = 1
    """Low affinity: nodes that a pipeline may go over."""
    link_bytes_per_s: float | None = None
    """None: of the catalogue's device, its network (high) or its peer link (low)."""
    timer: str = "auto"
    seed: int = 0
    weight_format: str = "bf16"
    kv_format: str = "bf16"
    max_context: int | None = None
    step: float = STEP
    least_requests: int = LEAST_REQUESTS
    residences: float = RESIDENCES
    exhaustive: bool = False
    """Low affinity: simulate every candidate, also those that arithmetic on the phases alone rules out."""

    def __post_init__(self) -> None:
        """ConfigError for a question without an answer."""
        metrics = {bound.metric for bound in self.slo.bounds}
        if not {"ttft", "tpot"} <= metrics or metrics - {"ttft", "tpot"} or self.slo.needs_reference:
            raise ConfigError(
                f"A placement is chosen by TTFT and TPOT, and the service level is {self.slo}.",
                "Give times for both and for nothing else, such as ttft=400ms,tpot=40ms.",
            )
        numbers = (self.node_devices, self.most_devices, self.most_nodes)
        if (
            min(*numbers, *self.tensor_parallel, *self.pipeline_parallel) < 1
            or not self.tensor_parallel
            or not self.pipeline_parallel
        ):
            raise ConfigError("Degrees, devices and nodes are at least 1.", "Give numbers above 0.")
        if self.affinity not in AFFINITIES:
            raise ConfigError(f"There is no node affinity {self.affinity!r}.", "Choose high or low.")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < 1e6:
            raise ConfigError(f"A rate of {self.rate_per_s:g} requests a second cannot be.", "Give one above 0.")
        if self.affinity == "low" and self.node_devices < 2:
            raise ConfigError("One device a node cannot hold both phases.", "Raise --node, or take --affinity high.")

    @property
    def link(self) -> LinkSpec:
        """What KV goes over from prefill to decode. Raises ConfigError where the catalogue does not know it."""
        if self.link_bytes_per_s is not None:
            return LinkSpec(bytes_per_s=self.link_bytes_per_s, latency_s=10e-6)
        known, kind = catalog.device(self.device), "network" if self.affinity == "high" else "peer"
        if kind not in known.link_bytes_per_s:
            raise ConfigError(
                f"The catalogue has no {kind} link of {known.name}.", "Give its bytes a second: --link 25e9."
            )
        return LinkSpec(bytes_per_s=float(known.link_bytes_per_s[kind]), latency_s=10e-6)

    def degrees(self) -> list[Degrees]:
        """What an instance may be, small ones first; those with the same devices by tensor parallel."""
        found = {
            (tp, pp * nodes)
            for tp, pp in product(self.tensor_parallel, self.pipeline_parallel)
            for nodes in range(1, self.most_nodes + 1 if self.affinity == "low" else 2)
            if tp <= self.node_devices and tp * pp <= self.most_devices
        }
        ordered = sorted(found, key=lambda pair: (pair[0] * pair[1], -pair[0]))
        return [Degrees(tensor_parallel=tp, pipeline_parallel=pp) for tp, pp in ordered]

    def units(self, fitting: list[Degrees]) -> Iterator[Unit]:
        """Low affinity: every unit of which each node holds the same stages of both phases; on as few nodes as do."""
        seen: set[tuple[Degrees, int, Degrees, int]] = set()
        for nodes, prefill, decode in product(range(1, self.most_nodes + 1), fitting, fitting):
            if prefill.pipeline_parallel % nodes or decode.pipeline_parallel % nodes:
                continue
            room = min(self.node_devices, self.most_devices)
            each, other = prefill.devices // nodes, decode.devices // nodes
            for prefills in range(1, (room - other) // each + 1):
                for decodes in range(1, (room - prefills * each) // other + 1):
                    key = prefill, prefills, decode, decodes
                    if key not in seen:
                        seen.add(key)
                        yield Unit(prefill=prefill, prefills=prefills, decode=decode, decodes=decodes, nodes=nodes)

    def split(self, unit: Unit) -> Scenario:
        """The scenario of prefill and decode instances."""
        pools = (
            self._pool("prefill", unit.prefill, unit.prefills, "prefill-first", PROMPT_TOKENS),
            self._pool("decode", unit.decode, unit.decodes, "prefill-first", PROMPT_TOKENS),
        )
        return self._scenario(apply("distserve", FleetSpec(pools=pools, link=self.link)))

    def mixed(self, degrees: Degrees, policy: str, budget: int) -> Scenario:
        """The scenario of one instance that does both."""
        return self._scenario(FleetSpec(pools=(self._pool("mixed", degrees, 1, policy, budget),), link=self.link))

    def asked(self, scenario: Scenario, guess_per_s: float = 1.0) -> GoodputQuestion:
        """For the goodput of that scenario."""
        return GoodputQuestion(
            scenario=scenario, guess_per_s=guess_per_s, step=self.step, least_requests=self.least_requests,
            residences=self.residences, most_requests=max(100_000, self.least_requests),
        )  # fmt: skip

    def flags(self, unit: Unit) -> str:
        """What `megalith simulate` is told to run it."""
        more = f":policy=prefill-first:budget={PROMPT_TOKENS}:seqs={MOST_SEQUENCES}:prefix_cache=false"
        pools = ((unit.prefills, unit.prefill, "prefill"), (unit.decodes, unit.decode, "decode"))
        fleet = ",".join(f"{role}={n}x{self.device}{degrees.options}{more}" for n, degrees, role in pools)
        timer = "" if self.timer == "auto" else f" --timer {self.timer}"
        return f"--fleet {fleet} --policy distserve{timer}"

    def _pool(self, name: str, degrees: Degrees, count: int, policy: str, budget: int) -> PoolSpec:
        return PoolSpec(
            name=name, device=self.device, count=count, role=name,  # type: ignore[arg-type]
            tensor_parallel=degrees.tensor_parallel, pipeline_parallel=degrees.pipeline_parallel, policy=policy,
            token_budget=budget, max_sequences=MOST_SEQUENCES, prefix_cache=False,
        )  # fmt: skip

    def _scenario(self, fleet: FleetSpec) -> Scenario:
        return Scenario(
            model=self.model, fleet=fleet, workload=self.workload, slo=self.slo, seed=self.seed, timer=self.timer,
            weight_format=self.weight_format, kv_format=self.kv_format, max_context=self.max_context,
        )  # fmt: skip
