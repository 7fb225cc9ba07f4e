"""plan_experts: what a composition of many models asks of a node, and how long a request takes there (SN40L).

    weights of all models against each tier     which of them fits, and how many nodes would hold all in device memory
    switch = weight_bytes / host_bytes_per_s    one model from host memory to the device, over all devices of the node
    hit    = Che's approximation of an LRU cache of `slots` models under the popularity; misses of host memory likewise
    latency = router + misses * switch + models * (prompt + decode)      of a batch whose requests name their models

A batch of one has one model; a larger one is grouped by model and executed model by model, so `models` is the expected
number of different ones. Steps are timed by the cost model of `plan serve`. Everything is predicted, on profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import NS_PER_S, format_bytes
from megalith.cost.compute import CostModel
from megalith.cost.expert_cache import distinct, lru_hit_rate, popularity
from megalith.cost.memory import kv_bytes_per_token, per_device_weights, weight_bytes
from megalith.cost.profile import Profile, from_device
from megalith.specs import catalog
from megalith.specs.model import ModelSpec
from megalith.specs.node import NodeSpec

Fusion = Literal["profile", "ideal", "kernels"]
KERNEL_OP_NS, KERNEL_STEP_NS = 18_000.0, 1_000_000.0
"""What catalogue devices pay for the kernels of a layer (six) and for a step, where they say nothing else
(specs/device.py)."""


class ExpertsQuestion(Config, kw_only=True):
    """Models, a node, and the request to time."""

    spec: ModelSpec
    node: NodeSpec
    count: int
    weight_format: str = "bf16"
    kv_format: str = "bf16"
    prompt_tokens: int = 512
    output_tokens: int = 20
    batch: int = 1
    zipf: float = 0.0
    """Popularity falls as rank**-zipf; 0 is uniform."""
    router: bool = True
    """A model of the same size, always on the device, reads each prompt first."""
    memory_share: float = 0.9
    """Of the device memory, what weights and KV may take."""
    all_links: bool = False
    """Every link of the node carries its share of a switch, instead of what was published."""
    disk_bytes_per_s: float = 7e9
    """From disk to host memory, for models that it does not hold: see ExpertsSpec."""
    fusion: Fusion = "profile"
    """profile: as the catalogue has the device. ideal: nothing but weights, KV and matrix products takes time.
    kernels: launched kernel by kernel, as catalogue devices are by default."""

    def __post_init__(self) -> None:
        for name in ("count", "prompt_tokens", "output_tokens", "batch"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise ConfigError(f"{name} is {getattr(self, name)}.", "Give a whole number of at least 1.")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share is {self.memory_share:g}.", "Give a share above 0, at most 1.")


class Parts(Config, kw_only=True):
    """Time of one batch, and where it goes, in nanoseconds."""

    router_ns: int
    switch_ns: int
    """Copies from host memory, and from disk where host memory does not hold all."""
    prompt_ns: int
    decode_ns: int

    @property
    def total_ns(self) -> int:
        """All together."""
        return self.router_ns + self.switch_ns + self.prompt_ns + self.decode_ns


class ExpertsPlan(Config, kw_only=True):
    """The answer."""

    model: str
    node: str
    devices: int
    count: int
    weight_bytes: int
    """Of one model."""
    total_bytes: int
    """Of all of them."""
    device_bytes: int
    """Of a node, for models: without KV and router."""
    slots: int
    """Models on the devices of a node at once."""
    host_slots: int
    """Models in the host memory of a node."""
    nodes_on_device: int
    """Nodes that hold all models in device memory."""
    nodes_in_host: int
    """Nodes that hold all models in host memory."""
    switch_ns: int
    hit_rate: float
    models_a_batch: float
    misses_a_batch: float
    decode_step_ns: int
    parts: Parts
    by_hit_rate: tuple[tuple[float, int], ...]
    """(hit rate, latency in ns) of such a batch, whatever the cache does."""
    source: str


def plan_experts(question: ExpertsQuestion) -> ExpertsPlan:
    """The plan. Raises DoesNotFit where a node cannot hold one model, its router and the KV of the batch."""
    spec, node = question.spec, question.node
    weights = weight_bytes(spec, question.weight_format)
    held = per_device_weights(weights, node.devices) * node.devices
    profile = from_device(catalog.device(node.device), question.weight_format)
    tokens = question.prompt_tokens + question.output_tokens
    kv_bytes = question.batch * tokens * kv_bytes_per_token(spec, question.kv_format)
    beside = kv_bytes + (held if question.router else 0)
    room = int(node.devices * profile.memory_bytes * question.memory_share) - beside
    slots = min(question.count, room // held)
    if slots < 1:
        raise DoesNotFit(
            f"A node of {node.devices} {node.device} has {format_bytes(max(0, room))} left for models of "
            f"{format_bytes(held)} beside KV{' and the router' if question.router else ''}.",
            "Take a smaller format or batch, or a node with more memory.",
        )
    shares = popularity(question.count, question.zipf)
    drawn = [1.0 - (1.0 - share) ** question.batch for share in shares]
    models = distinct(shares, question.batch)
    hit = lru_hit_rate([share / models for share in drawn], slots)
    rate = node.host_links_bytes_per_s if question.all_links else node.host_bytes_per_s
    switch_ns = round(weights.total * NS_PER_S / rate)
    cost = CostModel(spec, fused(profile, question.fusion), weights, question.kv_format, node.devices)
    host_slots = node.host_memory_bytes // weights.total
    host_hit = lru_hit_rate([share / models for share in drawn], host_slots)
    disk_ns = models * (1.0 - host_hit) * weights.total * NS_PER_S / question.disk_bytes_per_s
    parts, step_ns = _parts(question, cost, models, models * (1.0 - hit) * switch_ns + disk_ns)
    fixed_ns = parts.total_ns - parts.switch_ns
    hits = sorted({0.0, 0.25, 0.5, 0.75, 0.9, 1.0, round(hit, 4)})
    return ExpertsPlan(
        model=spec.name, node=node.title, devices=node.devices, count=question.count, weight_bytes=weights.total,
        total_bytes=question.count * weights.total, device_bytes=room, slots=slots, host_slots=host_slots,
        nodes_on_device=-(-question.count // (room // held)), nodes_in_host=-(-question.count // max(1, host_slots)),
        switch_ns=switch_ns, hit_rate=hit, models_a_batch=models, misses_a_batch=models * (1.0 - hit),
        decode_step_ns=step_ns, parts=parts,
        by_hit_rate=tuple((one, fixed_ns + round(models * (1.0 - one) * switch_ns)) for one in hits),
        source=node.source,
    )  # fmt: skip


def fused(profile: Profile, fusion: Fusion) -> Profile:
    """The profile with another cost of running a layer. Fusion is a cost factor here, nothing that is executed.

    `ideal` leaves the bytes of weights and KV at the reached bandwidth and the matrix products at the reached rate.
    """
    if fusion == "profile":
        return profile
    if fusion == "kernels":
        rates = msgspec.structs.replace(profile.rates, op_ns=KERNEL_OP_NS, step_ns=KERNEL_STEP_NS)
        return msgspec.structs.replace(profile, rates=rates)
    rates = msgspec.structs.replace(profile.rates, op_ns=0.0, step_ns=0.0, row_value_ns=0.0, sequence_ns=0.0)
    return msgspec.structs.replace(profile, rates=rates, peer_bytes_per_s=0.0)


def nodes_for(count: int, weight_bytes_: int, capacity_bytes: int, beside: int = 1) -> int:
    """Nodes that hold so many models in so many bytes each, beside `beside` more models (the router) on every node.

    Raises DoesNotFit where not even one model is left."""
    slots = capacity_bytes // weight_bytes_ - beside
    if slots < 1:
        what = f"{format_bytes(capacity_bytes)} hold no model of {format_bytes(weight_bytes_)} beside {beside} others."
        raise DoesNotFit(what, "Take a smaller format, or nodes with more memory.")
    return -(-count // slots)


def _parts(question: ExpertsQuestion, cost: CostModel, models: float, switch_ns: float) -> tuple[Parts, int]:
    """Where the time of a batch goes, and one decode step. A group has the mean size, a whole number of requests."""
    prompt, batch = question.prompt_tokens, question.batch
    group = max(1, round(batch / models))
    prompts = cost.step(cost.shape([(prompt, 0)] * group)).duration_ns
    router = cost.step(cost.shape([(prompt, 0)] * batch)).duration_ns if question.router else 0
    steps = _decode_ns(cost, group, range(prompt, prompt + question.output_tokens - 1))
    step_ns = cost.decode_step(group, prompt + question.output_tokens // 2).duration_ns
    return Parts(
        router_ns=router, switch_ns=round(switch_ns), prompt_ns=round(models * prompts), decode_ns=round(models * steps)
    ), step_ns


def _decode_ns(cost: CostModel, group: int, contexts: Sequence[int]) -> int:
    """Steps at these contexts: they lie on a line but where a window fills, so the first and the last are enough."""
    if not contexts:
        return 0
    first, last = (cost.decode_step(group, context).duration_ns for context in (contexts[0], contexts[-1]))
    return round(len(contexts) * (first + last) / 2)
