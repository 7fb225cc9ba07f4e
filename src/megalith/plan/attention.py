"""plan_attention: tokens for a dollar with attention on other devices, against devices of one kind, by context.

Decode only, in steady state: as many requests as the memory holds (or a limit on TPOT allows), each with so many tokens
behind it. Mixed instances are timed by `ElsewhereTimer`, the others by `AnalyticTimer`, both from the same catalogue
rates. Everything is predicted. Must not simulate or measure.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.attention_devices import attention_devices, down_bytes, held_share
from megalith.cost.compute import CostModel
from megalith.cost.memory import (
    RESIDENCY,
    Workspace,
    activation_bytes,
    kv_bytes_per_token,
    per_device_kv_heads,
    per_device_weights,
    weight_bytes,
)
from megalith.cost.profile import from_device
from megalith.cost.timer import PS_PER_NS, StepTimer
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_elsewhere import ElsewhereTimer
from megalith.sim.elsewhere import instance_price
from megalith.specs import catalog
from megalith.specs.attention import parse_attention
from megalith.specs.model import ModelSpec

ETHERNET_BYTES_PER_S = 50e9
"""400 Gb/s, each way: the link that a requirement is held against."""
LOSS = 0.05
"""A link is enough when a step takes at most so much longer than over one without end."""
STEP_ROWS = 256
"""Rows of the largest step that room is kept for: these instances decode."""
PS_PER_S = NS_PER_S * PS_PER_NS


class AttentionQuestion(Config, kw_only=True):
    """A model, two kinds of devices, and contexts."""

    spec: ModelSpec
    device: str = "h100-sxm"
    """Of model replicas, and of the fleets of one kind."""
    attention_device: str = "h20"
    """A device or drive."""
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    """Tokens behind a request, in the mean."""
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Attention devices of an instance."""
    batches: tuple[int, ...] = (1, 2)
    options: str = ""
    """Of the attention, as in a fleet: `link=25e9/trip=66e-6`."""
    weight_format: str = "bf16"
    kv_format: str = "bf16"
    memory_share: float = 0.9
    tpot_ms: float | None = None
    most_requests: int = 100_000
    """At once on an instance."""


class Deployment(Config, kw_only=True):
    """One instance at one context. Predicted."""

    name: str
    """`2xh100-sxm + 4xh20, 2 batches`."""
    tensor_parallel: int
    count: int
    """Attention devices; 0: all is on the model devices."""
    batches: int
    requests: int
    step_s: float
    usd_per_hour: float | None
    link_bytes_per_s: float = 0.0
    """That the link carries each way in the mean, the busier way."""
    needed_bytes_per_s: float = 0.0
    """With a link of so much a step takes LOSS longer than over one without end."""

    @property
    def tokens_per_s(self) -> float:
        """Of all requests."""
        return self.requests / self.step_s

    @property
    def tokens_per_usd(self) -> float:
        """0 without a price."""
        return self.tokens_per_s * 3600 / self.usd_per_hour if self.usd_per_hour else 0.0


class ContextRow(Config, kw_only=True):
    """The best of each kind at one context; None where nothing fits or is in time."""

    context: int
    mixed: Deployment | None
    own: Deployment | None
    """All on `device`."""
    other: Deployment | None
    """All on `attention_device`; None for drives."""

    @property
    def gain(self) -> float | None:
        """Tokens for a dollar, mixed over the better fleet of one kind."""
        best = max((one.tokens_per_usd for one in (self.own, self.other) if one is not None), default=0.0)
        return self.mixed.tokens_per_usd / best if self.mixed is not None and best else None

    @property
    def gain_over_own(self) -> float | None:
        """The same over `device` alone."""
        own = 0.0 if self.own is None else self.own.tokens_per_usd
        return self.mixed.tokens_per_usd / own if self.mixed is not None and own else None


class AttentionPlan(Config, kw_only=True):
    """The answer, row by row."""

    model: str
    device: str
    attention_device: str
    rows: tuple[ContextRow, ...]
    priced: bool
    """Whether every device has a price; else rows are the best by tokens a second of a device."""


class _Room(NamedTuple):
    timer: StepTimer
    tokens: int
    """Of KV."""


def plan_attention(question: AttentionQuestion) -> AttentionPlan:
    """The best deployments by context. Raises ConfigError for what cannot be asked."""
    if not question.contexts or min(question.contexts) < 1:
        raise ConfigError("Contexts must be at least one token.", "Write them like 1024,8192.")
    kinds = [
        parse_attention(_text(question, count, number)) for count in question.counts for number in question.batches
    ]
    for kind in kinds:
        kind.check_quality()
    is_device = catalog.find_device(question.attention_device) is not None
    rows = tuple(
        ContextRow(
            context=context,
            mixed=with_link(question, context, best(
                [mixed(question, context, tp, *way) for tp in question.tensor_parallel for way in _ways(question)]
            )),
            own=best([plain(question, context, tp, question.device) for tp in question.tensor_parallel]),
            other=best([plain(question, context, tp, question.attention_device) for tp in question.tensor_parallel])
            if is_device else None,
        ) for context in question.contexts
    )  # fmt: skip
    found = [one for row in rows for one in (row.mixed, row.own) if one is not None]
    priced = all(one.usd_per_hour is not None for one in found)
    return AttentionPlan(
        model=question.spec.name, device=question.device, attention_device=question.attention_device, rows=rows,
        priced=priced,
    )  # fmt: skip


def best(found: list[Deployment | None]) -> Deployment | None:
    """The most tokens for a dollar; a second and model device where something has no price."""
    there = [one for one in found if one is not None]
    priced = all(one.usd_per_hour is not None for one in there)
    return max(
        there, key=lambda one: one.tokens_per_usd if priced else one.tokens_per_s / one.tensor_parallel, default=None
    )


def plain(question: AttentionQuestion, context: int, tensor_parallel: int, device: str) -> Deployment | None:
    """An instance with everything on its own devices; None where it does not fit or is late."""
    spec, profile = question.spec, from_device(catalog.device(device), question.weight_format)
    if spec.num_heads % tensor_parallel or tensor_parallel > profile.max_group:
        return None
    cost = _cost(question, device, tensor_parallel)
    share = per_device_kv_heads(spec, tensor_parallel) / spec.num_kv_heads
    token = kv_bytes_per_token(spec, question.kv_format) * share
    tokens = int(_left(question, cost) / token)
    found = _most(question, _Room(AnalyticTimer(cost), tokens), context)
    if found is None:
        return None
    price = None if profile.price_per_hour_usd is None else profile.price_per_hour_usd * tensor_parallel
    return Deployment(
        name=f"{tensor_parallel}x{device}", tensor_parallel=tensor_parallel, count=0, batches=1, requests=found[0],
        step_s=found[1], usd_per_hour=price,
    )  # fmt: skip


def mixed(
    question: AttentionQuestion, context: int, tensor_parallel: int, count: int, batches: int
) -> Deployment | None:
    """An instance with its attention elsewhere; None where it does not fit or is late."""
    spec, profile = question.spec, from_device(catalog.device(question.device), question.weight_format)
    if spec.num_heads % tensor_parallel or tensor_parallel > profile.max_group:
        return None
    devices = attention_devices(parse_attention(_text(question, count, batches)))
    cost = _cost(question, question.device, tensor_parallel)
    if _left(question, cost) < 0:
        return None
    token = kv_bytes_per_token(spec, question.kv_format) * held_share(devices)
    timer = ElsewhereTimer(cost, devices)
    room = int(count * devices.memory_bytes * question.memory_share / token)
    found = _most(question, _Room(timer, room), context)
    if found is None:
        return None
    requests, step_s = found
    query, pair = down_bytes(spec)
    at_home = kv_bytes_per_token(spec, question.kv_format) * context
    crossing = (query + pair) * spec.num_layers if devices.spec.at == "there" else at_home
    replicas = f"{devices.spec.replicas}x" if devices.spec.replicas > 1 else ""
    return Deployment(
        name=f"{replicas}{tensor_parallel}x{question.device} + {count}x{question.attention_device}, {batches} batches",
        tensor_parallel=tensor_parallel, count=count, batches=batches, requests=requests, step_s=step_s,
        usd_per_hour=instance_price(devices, profile.price_per_hour_usd, tensor_parallel),
        link_bytes_per_s=requests * crossing / step_s,
    )  # fmt: skip


def with_link(question: AttentionQuestion, context: int, found: Deployment | None) -> Deployment | None:
    """The same with what its link must carry."""
    if found is None:
        return None
    devices = attention_devices(parse_attention(_text(question, found.count, found.batches)))
    timer = ElsewhereTimer(_cost(question, question.device, found.tensor_parallel), devices)
    return msgspec.structs.replace(found, needed_bytes_per_s=needed_link(timer, found.requests, context))


def needed_link(timer: ElsewhereTimer, requests: int, context: int) -> float:
    """Bytes a second each way with which a step takes at most LOSS longer than over a link without end."""

    def step(link: float) -> int:
        devices = timer.devices._replace(link_bytes_per_s=link)
        return ElsewhereTimer(timer.cost, devices).step_ps((), requests, requests * context, context)

    enough = step(1e15) * (1.0 + LOSS)
    low, high = 1e6, 1e13
    if step(low) <= enough:
        return low
    while high > low * 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if step(middle) <= enough else (middle, high)
    return high


def _ways(question: AttentionQuestion) -> list[tuple[int, int]]:
    return [(count, batches) for count in question.counts for batches in question.batches]


def _text(question: AttentionQuestion, count: int, batches: int) -> str:
    more = f"/{question.options}" if question.options else ""
    return f"{count}x{question.attention_device}/batches={batches}{more}"


def _cost(question: AttentionQuestion, device: str, tensor_parallel: int) -> CostModel:
    profile = from_device(catalog.device(device), question.weight_format)
    weights = weight_bytes(question.spec, question.weight_format)
    return CostModel(question.spec, profile, weights, question.kv_format, tensor_parallel)


def _left(question: AttentionQuestion, cost: CostModel) -> float:
    """Bytes of a device beside weights, activations and runner; below zero where it does not fit."""
    kind = cost.profile.kind
    work = Workspace(STEP_ROWS, STEP_ROWS)
    activations = activation_bytes(question.spec, kind, work)[0] // cost.devices
    fixed = per_device_weights(cost.weights, cost.devices) + activations + RESIDENCY[kind].base_bytes
    return cost.profile.memory_bytes * question.memory_share - fixed


def _most(question: AttentionQuestion, room: _Room, context: int) -> tuple[int, float] | None:
    """(requests, seconds of a step): as many as there is room for, or as are in time."""
    most = min(room.tokens // context, question.most_requests)
    limit_s = inf if question.tpot_ms is None else question.tpot_ms / 1e3

    def seconds(requests: int) -> float:
        return room.timer.step_ps((), requests, requests * context, context) / PS_PER_S

    if most < 1 or seconds(1) > limit_s:
        return None
    if seconds(most) <= limit_s:
        return most, seconds(most)
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= limit_s else (low, middle)
    return low, seconds(low)
