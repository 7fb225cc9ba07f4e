"""FleetSpec: pools of instances, their links, router and controllers: what a person writes to say what to simulate.

Knows names and numbers. Must not know models, costs or policies; names are resolved above.
"""

from __future__ import annotations

from typing import Any, Literal

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs.bounds import bound
from megalith.specs.experts import ExpertsSpec

MOST_INSTANCES = 100_000
"""Of one pool."""
SHORTEST_PERIOD_S = 1e-4
"""Of what comes again and again: a heartbeat."""


class PolicySpec(Config):
    """A policy by name, with its options."""

    name: str
    options: dict[str, Any] = {}


class PoolSpec(Config, kw_only=True):
    """Instances of one kind."""

    name: str
    device: str
    """Name of a catalogue device, or `this-machine`."""
    count: int
    role: Literal["mixed", "prefill", "decode"] = "mixed"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    pipeline: Literal["queue", "blocking", "non-blocking"] = "queue"
    """How a stage sends. `queue`: messages wait at the next stage, and sending takes the sender's time, as in Vidur.
    `blocking`: both ends are held from when the next stage is free until it has all. `non-blocking`: neither is."""
    steps_under_way: int | None = None
    """Most steps in a pipeline at once; None: one for each stage, and twice as many where it is `non-blocking`."""
    padding: bool = False
    """Every batch is computed as a rectangle, at the length of its longest request."""
    peer_layers: int = 0
    """Layers that lie in the memory of a peer outside the fleet and are fetched a layer ahead."""
    host_layers: int = 0
    """Layers that lie in host memory, likewise."""
    timer: str | None = None
    """How its steps are timed; None: as the scenario says."""
    overlap: Literal["none", "nanoflow"] = "none"
    """Operators of a step side by side on each device: `nanoflow` cuts its rows into nano-batches."""
    policy: str = "splitfuse"
    """Batch policy of each instance."""
    token_budget: int = 2048
    max_sequences: int = 256
    max_waiting: int = 1_000_000
    block_tokens: int = 16
    kv_blocks: int | None = None
    """None: what the memory of the devices leaves beside the weights."""
    prefix_cache: bool = True
    watermark: float = 0.01
    """Share of the blocks that stays free at admission."""
    preempt: Literal["recompute", "swap"] = "recompute"
    host_blocks: int = 0
    host_bytes_per_s: float = 25e9
    """Between one device and host memory, when KV is swapped: what copies reach over PCIe 4.0 x16 (32e9 on paper)."""
    power_cap: float | None = None
    """Fraction of the rated power; None is uncapped."""
    max_count: int | None = None
    """Most instances that scaling may make of it; None: no bound but `count`."""
    attention: str | None = None
    """Devices of each instance that hold its KV cache and compute attention (`specs.attention`), as `4xh20`; None: its
    own. Beside `tensor_parallel`, which is of one model replica."""
    start_s: float = 0.0
    """From the decision to start one more instance until it serves: machine, weights, warm-up."""
    experts: ExpertsSpec | None = None
    """Many models behind each instance; None: one."""

    def __post_init__(self) -> None:
        least = {"count": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "token_budget": 1, "max_sequences": 1,
                 "max_waiting": 1, "block_tokens": 1, "kv_blocks": 1, "host_blocks": 0, "max_count": 1,
                 "start_s": 0, "steps_under_way": 1, "peer_layers": 0, "host_layers": 0}  # fmt: skip
        where = f" of pool {self.name!r}"
        for name, low in least.items():
            bound(name, getattr(self, name), low, MOST_INSTANCES if name in ("count", "max_count") else 10**12, where)
        bound("host_bytes_per_s", self.host_bytes_per_s, 1e6, 1e13, where)
        bound("watermark", self.watermark, 0, 0.99, where)
        bound("power_cap", self.power_cap, 0.01, 1, where)
        if self.pipeline_parallel == 1 and (self.pipeline != "queue" or self.steps_under_way not in (None, 1)):
            raise ConfigError(f"Pool {self.name!r} has one stage, which sends nothing.", "Add pp2, or leave it out.")

    @property
    def devices(self) -> int:
        """Devices of the whole pool."""
        own = self.tensor_parallel * self.pipeline_parallel
        if self.attention is not None:
            from megalith.specs.attention import parse_attention

            other = parse_attention(self.attention)
            return self.count * (own * other.replicas + other.count)
        return self.count * own


class PairSpec(Config, kw_only=True):
    """A link of its own from one pool to another, with ports apart from the common ones, as inside one node."""

    source: str
    """Name of a pool."""
    target: str
    """Name of a pool."""
    bytes_per_s: float
    latency_s: float = 0.0
    ports: int = 1


class LinkSpec(Config, kw_only=True):
    """The network between instances. Both ends share their ports among transfers that run at once."""

    bytes_per_s: float
    """Of one port, in each direction."""
    latency_s: float = 0.0
    contention: bool = True
    """False: every transfer has a whole port."""
    ports: int = 1
    """Ports of an instance; one transfer uses one of them at most."""
    pairs: tuple[PairSpec, ...] = ()
    """Links between pools that do not go over the common one."""


class HandoffSpec(Config, kw_only=True):
    """How the KV of a finished prompt gets to the instance that decodes."""

    refused: Literal["wait", "local"] = "wait"
    """When the decode side has no room: wait on the prefill side, whose memory is the buffer, or decode there."""
    max_waiting: int = 1024
    """Most that may wait on one prefill instance; those that come then decode there."""
    max_wait_s: float = 60.0
    """Whoever has waited this long decodes on the prefill side after all."""
    accept_share: float = 0.05
    """`pull`: the decode side fetches while less than this share of its blocks is on the way or waits there.
    Source: DistServe, waiting_block_prop_threshold."""
    whole_blocks: bool = True
    """Send whole blocks, also the last one that is not full."""
    hidden: float = 0.0
    """Share of the bytes of a `push` that costs no time. Splitwise's simulator has 0.9 in its overlap variants."""

    def __post_init__(self) -> None:
        bound("max_waiting", self.max_waiting, 0, 10**12)
        bound("max_wait_s", self.max_wait_s, 0, 1e9)
        bound("accept_share", self.accept_share, 0, 1)
        bound("hidden", self.hidden, 0, 1)


class MigrationSpec(Config, kw_only=True):
    """What moving a running request costs beside the bytes."""

    stage_s: float = 0.0
    """Handshake of each stage, before its bytes go."""
    slowdown: float = 1.0
    """Steps of both instances take this many times as long while a request is moved."""
    at_once: int = 1
    """Migrations that one instance may take part in at once, as source or target."""
    whole_blocks: bool = True
    """Send whole blocks, also the last one that is not full."""

    def __post_init__(self) -> None:
        bound("stage_s", self.stage_s, 0, 1e9)
        bound("slowdown", self.slowdown, 0.001, 1e6)
        bound("at_once", self.at_once, 1, 10**9)


class PowerSpec(Config, kw_only=True):
    """One power domain that holds all pools: budget, telemetry and actuators."""

    budget_w: float
    telemetry_s: float = 2.0
    actuation_s: float = 40.0
    name: str = "row"
    """What controllers call the domain."""
    brake_s: float = 5.0
    """How long an emergency brake lasts."""
    other_w: float = 0.0
    """What an instance draws beside its devices: host, fans, network. Its devices are about half of a server."""


class FaultSpec(Config, kw_only=True):
    """Failures and stragglers to inject, drawn from the seed."""

    mtbf_h: float | None = None
    """Mean time between failures of one instance."""
    repair_s: float = 600.0
    at_s: tuple[float, ...] = ()
    """Fail an instance at these times as well."""
    straggler_share: float = 0.0
    straggler_factor: float = 1.0
    """That share of the instances takes this many times as long for a step."""

    def __post_init__(self) -> None:
        bound("mtbf_h", self.mtbf_h, 1e-6, 1e9)
        bound("repair_s", self.repair_s, 0, 1e9)
        bound("straggler_share", self.straggler_share, 0, 1)
        bound("straggler_factor", self.straggler_factor, 0.001, 1e6)
        for at_s in self.at_s:
            bound("at_s", at_s, 0, 1e9)


class FleetSpec(Config, kw_only=True):
    """All of a cluster but the load on it."""

    pools: tuple[PoolSpec, ...]
    router: PolicySpec = PolicySpec(name="least-outstanding")
    controllers: tuple[PolicySpec, ...] = ()
    link: LinkSpec = LinkSpec(bytes_per_s=25e9, latency_s=10e-6)
    handoff: HandoffSpec = HandoffSpec()
    migration: MigrationSpec = MigrationSpec()
    heartbeat_s: float = 0.0
    """Age of the facts that policies see: 0 is exact, else they are taken this often."""
    power: PowerSpec | None = None
    faults: FaultSpec = FaultSpec()

    def __post_init__(self) -> None:
        if not self.pools:
            raise ConfigError("A fleet without a pool cannot be.", "Give it one with a name, a device and a count.")
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ConfigError(f"Two pools have the same name: {', '.join(names)}.", "Give each its own.")
        if self.heartbeat_s:
            bound("heartbeat_s", self.heartbeat_s, SHORTEST_PERIOD_S, 1e9)
