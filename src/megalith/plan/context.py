"""plan_context: what long contexts cost of one deployment, against a short one, and the ways back (arXiv:2405.08944).

Four costs, all of KV's size or the prompt's length: users that fit, prefill, decode, switching a user's KV out and in.
By `peak` rates with the paper's formulas, or by `reached` ones, with the same cost model as `plan serve`. Predicted.
Must not judge what a way back does to answers: no lever here is free, and none was measured for quality.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.compute import CostModel
from megalith.cost.long_context import (
    PLAIN,
    Levers,
    LongContextRow,
    PeakDevice,
    Session,
    long_context_row,
    sessions_per_hour,
)
from megalith.cost.memory import bits_per_weight, kv_bytes_per_token, per_device_kv_heads
from megalith.cost.profile import band_for
from megalith.plan.request import ServeRequest, check, need_bytes
from megalith.specs.device import DeviceSpec

Rates = Literal["peak", "reached"]
Row = Callable[[int, Levers], LongContextRow]
WITHIN = 2.0
"""A way back brings every cost of KV within this factor of the short context."""


class Choice(NamedTuple):
    """One setting of a lever, and who showed it."""

    value: float
    label: str
    source: str = ""


def choices(layers: int) -> dict[str, tuple[Choice, ...]]:
    """Published settings of each lever, from the whole to the least; for a model of so many layers.

    The parts are those of the abstracts named, recalled and not measured; what they do to answers is theirs to say.
    """
    return {
        "layers": (
            Choice(1.0, "a cache in every layer"),
            Choice(0.5, "2 layers a cache", "cross-layer attention, arXiv:2405.12981"),
            Choice(1.0 / layers, "1 cache for all layers", "YOCO, arXiv:2405.05254"),
        ),
        "heads": (
            Choice(1.0, "all heads"),
            Choice(0.6, "60 % of heads' tokens", "DuoAttention, arXiv:2410.10819: 1.67x less with grouped queries"),
            Choice(0.3, "30 % of heads' tokens", "RazorAttention, arXiv:2407.15891: over 70 % less"),
        ),
        "tokens": (
            Choice(1.0, "all tokens"),
            Choice(0.25, "4 tokens merged", "DMC, arXiv:2403.09636"),
            Choice(0.2, "80 % of tokens evicted", "H2O, arXiv:2306.14048"),
        ),
        "bits": (
            Choice(16.0, "16 bits"),
            Choice(bits_per_weight("int8"), "8 bits", "a scale for 32 values"),
            Choice(bits_per_weight("int4"), "4 bits", "a scale for 32 values"),
            Choice(3.0, "2 bits", "KIVI, arXiv:2402.02750; scale and zero for 32 values"),
        ),
        "host": (
            Choice(0.0, "all on the device"),
            Choice(0.5, "half offloaded", "read over the host link at every step"),
            Choice(0.9, "90 % offloaded", "read over the host link at every step"),
        ),
    }


class ContextQuestion(Config, kw_only=True):
    """A deployment, contexts, and what they are held against."""

    request: ServeRequest
    """Model, weights, profile, limit and devices; its context is not looked at."""
    device: DeviceSpec
    contexts: tuple[int, ...]
    against: int = 4096
    new_tokens: int = 250
    rates: Rates = "reached"
    session: Session = Session()


class ContextCost(Config, kw_only=True):
    """The costs of one context."""

    tokens: int
    kv_bytes: int
    users: int
    prefill_s: float
    decode_s: float
    switch_s: float
    sessions_per_hour: float


class WayBack(Config, kw_only=True):
    """Levers together, and each cost over that of the short context without levers."""

    levers: dict[str, float]
    kept: float
    users: float
    """Users of the short context over users of the long one."""
    decode: float
    switch: float
    prefill: float
    """No lever shortens it."""
    changes: tuple[str, ...]


class ContextPlan(Config, kw_only=True):
    """Costs by context, and ways back from the longest. Predicted."""

    model: str
    device: str
    devices: int
    rates: Rates
    against: ContextCost
    costs: tuple[ContextCost, ...]
    ways: tuple[WayBack, ...]
    """Gentle ones: with any lever eased by one setting, a cost of KV leaves the factor."""
    shared_prompts: int
    """Sessions that must read the same prompt once, for prefill to come within the factor too."""
    notes: tuple[str, ...]


def plan_context(question: ContextQuestion) -> ContextPlan:
    """The plan. Raises ConfigError on sizes that mean nothing and where the weights leave no room."""
    request = question.request
    if not question.contexts or min(*question.contexts, question.against, question.new_tokens) < 1:
        raise ConfigError("Contexts and new tokens must be at least 1.", "Write it like --context 4096,50000.")
    check(msgspec.structs.replace(request, context=1))
    row = row_of(question)
    short, longest = row(question.against, PLAIN), max(question.contexts)
    if short.concurrency < 1.0:
        raise ConfigError(
            f"Not one context of {question.against:,} tokens fits beside the weights of {request.model}.",
            "Take more --devices, a smaller --format or a bigger --device.",
        )
    far = row(longest, PLAIN)
    notes = ["Users, decode and switching follow KV; prefill follows the prompt's FLOPs.", _sure(question)]
    if longest > request.spec.max_context:
        notes.append(f"{request.model} was made for {request.spec.max_context:,} tokens: longer ones are arithmetic.")
    return ContextPlan(
        model=request.model, device=question.device.name, devices=request.devices, rates=question.rates,
        against=cost_of(short, question.session),
        costs=tuple(cost_of(row(tokens, PLAIN), question.session) for tokens in question.contexts),
        ways=tuple(gentle_ways(row, longest, short, request.spec.num_layers)),
        shared_prompts=-int(-far.prefill_s / (WITHIN * short.prefill_s) // 1), notes=tuple(notes),
    )  # fmt: skip


def cost_of(row: LongContextRow, session: Session) -> ContextCost:
    """A row as a person reads it: whole users."""
    return ContextCost(
        tokens=row.tokens, kv_bytes=round(row.kv_bytes), users=int(max(row.concurrency, 0.0)),
        prefill_s=row.prefill_s, decode_s=row.decode_s, switch_s=row.switch_s,
        sessions_per_hour=sessions_per_hour(row, session),
    )  # fmt: skip


def row_of(question: ContextQuestion) -> Row:
    """The function that gives a row of a context under levers, by the rates of the question."""
    request, device, new_tokens = question.request, question.device, question.new_tokens
    if question.rates == "peak":
        peak = peak_device(device, request.devices)
        return lambda tokens, levers: long_context_row(
            request.spec, request.weights.total, tokens, new_tokens, peak, levers
        )
    cost = CostModel(request.spec, request.profile, request.weights, request.kv_format, request.devices)

    @functools.cache
    def prefill_s(tokens: int) -> float:
        """No lever changes it, and a long prompt has many chunks."""
        return cost.prefill(tokens, request.rows).duration_ns / 1e9

    def row(tokens: int, levers: Levers) -> LongContextRow:
        return reached_row(request, device, cost, tokens, prefill_s(tokens), new_tokens, levers)

    return row


def peak_device(device: DeviceSpec, devices: int = 1) -> PeakDevice:
    """Data-sheet rates of so many devices together. Raises ConfigError without a link to the host."""
    return PeakDevice(
        device.peak_flops_per_s("bf16") * devices, device.memory_bytes_per_s * float(devices),
        device.memory_bytes * float(devices), _host(device) * devices,
    )  # fmt: skip


def reached_row(
    request: ServeRequest,
    device: DeviceSpec,
    cost: CostModel,
    tokens: int,
    prefill_s: float,
    new_tokens: int,
    levers: Levers = PLAIN,
) -> LongContextRow:
    """The row by the cost model of `plan serve`: reached rates, and its memory lines beside KV."""
    spec, devices = request.spec, request.devices
    kv_bytes = kv_bytes_per_token(spec, request.kv_format) * tokens * levers.kept
    # A device holds whole KV heads, so that its share of the cache may be more than one of `devices`.
    here = kv_bytes * per_device_kv_heads(spec, devices) / spec.num_kv_heads
    host = _host(device) * device.achievable.link
    step = cost.decode_step(1, round(tokens * levers.kept * (1.0 - levers.host)))
    free = request.limit_bytes - need_bytes(request, 0)[1]
    resident = here * (1.0 - levers.host)
    return LongContextRow(
        tokens=tokens,
        kv_bytes=kv_bytes,
        prefill_s=prefill_s,
        decode_s=new_tokens * (step.duration_ns / 1e9 + here * levers.host / host),
        switch_s=2 * resident / host,
        concurrency=max(free, 0) / resident,
    )


def _sure(question: ContextQuestion) -> str:
    """How far to trust the times."""
    if question.rates == "peak":
        return "Peak rates are bounds: no device gets there, so times are longer."
    band = band_for(question.request.profile, question.request.spec)
    return f"Prefill and decode should lie between {band.low:.2g} and {band.high:.2g} times that: {band.source}."


def _host(device: DeviceSpec) -> float:
    if "host" not in device.link_bytes_per_s:
        raise ConfigError(f"{device.name} has no link to the host in the catalogue.", "Name another --device.")
    return float(device.link_bytes_per_s["host"])


def all_ways(row: Row, tokens: int, short: LongContextRow, layers: int) -> Iterable[WayBack]:
    """Every combination of published settings, with its costs over the short context's."""
    known = choices(layers)
    for picked in itertools.product(*known.values()):
        levers = Levers(*(choice.value for choice in picked))
        found = row(tokens, levers)
        changed = [choice for choice, options in zip(picked, known.values(), strict=True) if choice is not options[0]]
        yield WayBack(
            levers=levers._asdict(), kept=levers.kept,
            users=short.concurrency / found.concurrency if found.concurrency >= 1.0 else float("inf"),
            decode=found.decode_s / short.decode_s, switch=found.switch_s / short.switch_s,
            prefill=found.prefill_s / short.prefill_s, changes=tuple(choice.label for choice in changed),
        )  # fmt: skip


def near(way: WayBack, within: float = WITHIN) -> bool:
    """Whether every cost of KV is within the factor."""
    return max(way.users, way.decode, way.switch) <= within


def gentle_ways(row: Row, tokens: int, short: LongContextRow, layers: int) -> list[WayBack]:
    """Ways that bring the costs of KV near, of which no lever can be eased; those that keep most first."""
    known = [tuple(choice.value for choice in options) for options in choices(layers).values()]
    good = {
        tuple(options.index(value) for options, value in zip(known, way.levers.values(), strict=True)): way
        for way in all_ways(row, tokens, short, layers)
        if near(way)
    }
    eased = {
        place: [(*place[:at], place[at] - 1, *place[at + 1 :]) for at in range(len(place)) if place[at]]
        for place in good
    }
    gentle = [way for place, way in good.items() if not any(other in good for other in eased[place])]
    return sorted(gentle, key=lambda way: (-way.kept, len(way.changes)))
