"""plan_platform: what a platform must have, so that a model keeps a use case's limits (GenZ, arXiv:2406.01698).

The inverse of `cost.roofline`. Capacity is weights and KV. Compute and memory bandwidth start at FLOPs / time and
bytes / time, the larger over prompt and decode, and are raised together until the passes, operator by operator, are in
time; that takes a factor between 1 and 2, for no operator takes longer than both its times together. Where devices
share a layer, a share of each limit is the links'. Everything is predicted; rates are reached ones, not data-sheet
peaks. Must not measure or load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost import roofline
from megalith.cost.memory import kv_bytes_per_token, weight_bytes
from megalith.cost.parameters import count as count_parameters
from megalith.cost.profile import from_device, number_for
from megalith.cost.roofline import Operator, Platform
from megalith.plan.request import DEVICE_SHARE
from megalith.specs.device import DeviceSpec
from megalith.specs.model import ModelSpec
from megalith.specs.use_case import UseCase


class PlatformQuestion(Config, kw_only=True):
    """A model, a use case, and how the platform is cut."""

    spec: ModelSpec
    use_case: UseCase
    weight_format: str = "bf16"
    kv_format: str = "bf16"
    batch: int = 1
    """Requests at once, each with the beams of the use case."""
    devices: int = 1
    """Devices that share every layer (tensor parallel)."""
    link_share: float = 0.2
    """Part of each limit that collectives may take, where there are several devices."""
    link_latency_ns: float = 500.0
    """Of one hop: an assumption, of the order of a switched link inside a node."""


class DeviceCount(Config, kw_only=True):
    """How many devices of one kind have what is needed, by the resource that asks for most."""

    device: str
    count: int
    most: int
    """Where times lie at the upper end of the device's band."""
    binds: str
    """capacity, compute or memory bandwidth."""
    within_a_node: bool
    """Whether as many share fast links."""


class PlatformPlan(Config, kw_only=True):
    """What the whole platform must have. Predicted; rates are those reached."""

    model: str
    parameters: int
    use_case: UseCase
    batch: int
    devices: int
    weight_bytes: int
    kv_bytes: int
    prefill_flops: float
    """Of one device."""
    step_bytes: float
    """Of one device: what the last decode reads and writes."""
    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float | None
    """Between neighbours of the ring, one direction; 0 without collectives, None where latency alone is too much."""
    most_hop_ns: float | None
    """Latency of a hop at which no bandwidth is enough any more; None without collectives."""
    factor: float
    """By which compute and bandwidth lie above what either would need alone."""
    ttft_s: float
    tpot_s: float
    """Of a platform with just these rates; the last token of the answer."""
    prefill_binding: str
    decode_binding: str

    @property
    def memory_bytes(self) -> int:
        """Weights and KV."""
        return self.weight_bytes + self.kv_bytes


Passes = tuple[list[tuple[Operator, int]], list[tuple[Operator, int]]]


def passes(question: PlatformQuestion) -> Passes:
    """Operators of the prompts, and of the last decode, on one device."""
    use, spec = question.use_case, question.spec
    sizes = roofline.sizes_of(question.weight_format, question.kv_format)
    works = (
        roofline.prefill(use.prompt_tokens, question.batch),
        roofline.decode(use.prompt_tokens, use.output_tokens, question.batch, use.beams),
    )
    first, step = (roofline.model_operators(spec, work, question.devices, sizes=sizes) for work in works)
    return first, step


def plan_platform(question: PlatformQuestion) -> PlatformPlan:
    """The requirement. Raises ConfigError on sizes that mean nothing."""
    _check(question)
    use, spec, devices = question.use_case, question.spec, question.devices
    first, step = passes(question)
    limits = (use.ttft_ms / 1e3, use.tpot_ms / 1e3)
    share = question.link_share if devices > 1 else 0.0
    flops, num_bytes, factor = _rates((first, step), tuple(limit * (1.0 - share) for limit in limits))
    link, most_hop = _links((first, step), limits, question)
    platform = Platform(
        flops, num_bytes, link_bytes_per_s=link or float("inf"), ring_start_s=0.0,
        link_latency_s=question.link_latency_ns / 1e9 if devices > 1 else 0.0,
    )  # fmt: skip
    ttft, tpot = (roofline.pass_cost(operators, platform, devices) for operators in (first, step))
    tokens = question.batch * (use.prompt_tokens + use.beams * use.output_tokens)
    return PlatformPlan(
        model=spec.name, parameters=count_parameters(spec).total, use_case=use, batch=question.batch, devices=devices,
        weight_bytes=weight_bytes(spec, question.weight_format).total,
        kv_bytes=tokens * kv_bytes_per_token(spec, question.kv_format),
        prefill_flops=_sum(first, "flops"), step_bytes=_sum(step, "num_bytes"),
        flops_per_s=flops * devices, memory_bytes_per_s=num_bytes * devices,
        link_bytes_per_s=link, most_hop_ns=most_hop, factor=factor, ttft_s=ttft.seconds, tpot_s=tpot.seconds,
        prefill_binding=ttft.binding, decode_binding=tpot.binding,
    )  # fmt: skip


def device_counts(plan: PlatformPlan, weight_format: str, devices: Sequence[DeviceSpec]) -> tuple[DeviceCount, ...]:
    """Devices of each kind whose reached rates and usable memory add up to the requirement, fewest first.

    A lower bound: work that cannot be cut evenly, collectives and fixed times of a step are not in it.
    """
    found = []
    for device in devices:
        number, reach = number_for(weight_format, device), device.achievable
        compute = reach.compute.get(number, min(reach.compute.values())) * device.peak_flops_per_s(number)
        needs = {
            "capacity": plan.memory_bytes / (DEVICE_SHARE * device.memory_bytes),
            "compute": plan.flops_per_s / compute,
            "memory bandwidth": plan.memory_bytes_per_s / (reach.memory * device.memory_bytes_per_s),
        }
        binds = max(needs, key=lambda name: needs[name])
        slow = from_device(device, weight_format).band.high
        slower = max(need * (1.0 if name == "capacity" else slow) for name, need in needs.items())
        count, most = (max(1, math.ceil(need)) for need in (needs[binds], slower))
        found.append(
            DeviceCount(
                device=device.name, count=count, most=most, binds=binds, within_a_node=count <= device.max_group
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda one: (one.count, one.device)))


def _check(question: PlatformQuestion) -> None:
    if question.batch < 1 or question.devices < 1:
        raise ConfigError(f"batch {question.batch} and devices {question.devices} must be at least 1.")
    if question.spec.num_heads % question.devices:
        raise ConfigError(f"{question.spec.num_heads} heads cannot be cut over {question.devices} devices evenly.")
    if not 0.0 < question.link_share < 1.0 or question.link_latency_ns < 0.0:
        raise ConfigError("The links' share must lie between 0 and 1, and a latency cannot be below zero.")


def _sum(operators: list[tuple[Operator, int]], name: str) -> float:
    return float(sum(getattr(operator, name) * times for operator, times in operators))


def _rates(both: Passes, limits_s: tuple[float, ...]) -> tuple[float, float, float]:
    """(FLOP/s, bytes/s, factor) of one device that keep both limits, links aside: 60 halvings of [1, 2]."""
    floors = [
        max(_sum(operators, name) / limit for operators, limit in zip(both, limits_s, strict=True))
        for name in ("flops", "num_bytes")
    ]

    def late(factor: float) -> bool:
        platform = Platform(factor * floors[0], factor * floors[1])
        times = [sum(_roof(one, platform) * often for one, often in operators) for operators in both]
        return any(time > limit for time, limit in zip(times, limits_s, strict=True))

    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if late(middle) else (low, middle)
    return high * floors[0], high * floors[1], high


def _roof(operator: Operator, platform: Platform) -> float:
    """The longer of compute and memory; links have a share of their own."""
    cost = roofline.operator_cost(operator, platform)
    return max(cost.compute_s, cost.memory_s)


def _links(
    both: Passes, limits_s: tuple[float, float], question: PlatformQuestion
) -> tuple[float | None, float | None]:
    """(bytes/s of a link or None where latency is too much, latency of a hop at which nothing helps)."""
    devices = question.devices
    if devices == 1:
        return 0.0, None
    hops, needed, most = 2 * (devices - 1), 0.0, float("inf")
    for operators, limit in zip(both, limits_s, strict=True):
        reduces = sum(times for operator, times in operators if operator.payload_bytes)
        left = limit * question.link_share - reduces * hops * question.link_latency_ns / 1e9
        most = min(most, limit * question.link_share / (reduces * hops))
        if left <= 0.0:
            needed = float("inf")
        else:
            needed = max(needed, hops * _sum(operators, "payload_bytes") / devices / left)
    return (None if needed == float("inf") else needed), most * 1e9
