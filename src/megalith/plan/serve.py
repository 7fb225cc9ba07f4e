"""plan_serve: one model on one device (or a group), before anything is loaded, as a ServePlan.

Asks `cost` for every figure and wraps it in the band of its profile. Must not measure, load or import torch.
"""

from __future__ import annotations

import msgspec

from megalith.base.units import format_bytes
from megalith.cost import energy
from megalith.cost.borrow import layer_bytes
from megalith.cost.compute import CostModel, StepCost
from megalith.cost.memory import blocks_for, kv_bytes_per_token
from megalith.cost.parameters import active_parameters, count
from megalith.cost.profile import band_for
from megalith.plan.remedies import remedies
from megalith.plan.request import ServeRequest, blocks_that_fit, check, need_bytes
from megalith.plan.window import BATCHES
from megalith.specs.plan import BatchPoint, Estimate, ServePlan

MAX_POINT_BATCH = 256


def plan_serve(request: ServeRequest) -> ServePlan:
    """The plan: memory by item, fit and remedies, speed, power and money by batch. Raises ConfigError on bad sizes."""
    check(request)
    wanted = request.wanted_blocks()
    lines, need = need_bytes(request, wanted)
    fits = need <= request.limit_bytes
    room = blocks_that_fit(request)
    per_sequence = blocks_for(request.context, request.block_tokens)
    cost = request.cost()
    pool = room if request.num_blocks is None else min(room, wanted)
    max_sequences = pool // per_sequence
    prompt = request.prompt_tokens or max(1, min(512, request.context // 2))
    prefill = banded(request, cost.prefill(prompt, request.rows).duration_ns)
    profile = request.profile
    return ServePlan(
        model=request.model,
        parameters=count(request.spec).total,
        active_parameters=active_parameters(request.spec),
        device=profile.name,
        device_source=f"{profile.source} ({profile.date})",
        devices=request.devices,
        weight_format=request.weights.format,
        kv_format=request.kv_format,
        context=request.context,
        batch=request.batch,
        block_tokens=request.block_tokens,
        num_blocks=wanted,
        kv_bytes_per_token=kv_bytes_per_token(request.spec, request.kv_format),
        memory=lines,
        need_bytes=need,
        limit_bytes=request.limit_bytes,
        limit_source=request.limit_source,
        fits=fits,
        remedies=() if fits else remedies(request),
        max_context=min(request.spec.max_context, pool * request.block_tokens),
        max_sequences=max_sequences,
        prompt_tokens=prompt,
        prefill_tokens_per_s=prefill.inverse(prompt * 1e9),
        ttft_ns=prefill,
        points=tuple(
            _point(request, cost, batch, batch <= max_sequences) for batch in _batches(request, max_sequences)
        ),
        band_source=band_for(profile, request.spec).source,
        notes=_notes(request),
    )


def _batches(request: ServeRequest, max_sequences: int) -> list[int]:
    """1, 2, 4, ... up to what fits (one more, to show where it ends), and the batch asked for."""
    top = min(max(max_sequences, request.batch), MAX_POINT_BATCH)
    powers = [1 << exponent for exponent in range(top.bit_length())]
    return sorted({*powers, request.batch, *(BATCHES if request.window_bytes is not None else ())})


def banded(request: ServeRequest, duration_ns: float) -> Estimate:
    """A predicted duration with its band (measured is between low and high times predicted)."""
    band = band_for(request.profile, request.spec)
    return Estimate(value=duration_ns, low=duration_ns * band.low, high=duration_ns * band.high)


def _point(request: ServeRequest, cost: CostModel, batch: int, fits: bool) -> BatchPoint:
    context = request.speed_context or request.context
    step = cost.decode_step(batch, context)
    tpot = banded(request, step.duration_ns)
    rate = tpot.inverse(batch * 1e9)
    power, joules = _energy(request, step, tpot, batch)
    price = request.profile.price_per_hour_usd
    return BatchPoint(
        batch=batch,
        context=context,
        fits=fits,
        tpot_ns=tpot,
        tokens_per_s=rate,
        binding=step.binding if fits else "KV capacity",
        power_w=power,
        joules_per_token=joules,
        usd_per_million_tokens=None if price is None else energy.usd_per_million_tokens(price, rate, request.devices),
    )


def _energy(
    request: ServeRequest, step: StepCost, tpot: Estimate, batch: int
) -> tuple[Estimate | None, Estimate | None]:
    power = request.profile.power
    if power is None:
        return None, None
    one = energy.power_w(power, step)
    return one.scaled(request.devices), energy.joules_per_token(one, tpot, batch, request.devices)


def _notes(request: ServeRequest) -> tuple[str, ...]:
    notes = []
    if request.spec.num_experts:
        notes.append("Experts: a step reads the expected number of distinct experts, tokens routed evenly.")
    if request.spec.sliding_window is not None:
        notes.append(
            f"Sliding window of {request.spec.sliding_window:,} tokens: it shortens attention; the paged cache still "
            "keeps every token of every layer."
        )
    notes += _borrowed(request)
    if request.window_bytes is not None:
        disk = request.disk_rate()
        where = "host memory" if request.profile.kind == "cuda" else "disk"
        notes.append(
            f"Weights do not stay in memory: a step reads {format_bytes(request.stream_bytes)} of "
            f"{format_bytes(request.weights.total)} from {where}, {request.stream_bytes / disk.bytes_per_s:.2f} s at "
            f"{format_bytes(round(disk.bytes_per_s))}/s ({disk.source}; the time is predicted)."
        )
    if request.profile.power is not None:
        notes.append(f"Power: {request.profile.power.source}.")
    return tuple(notes)


def _borrowed(request: ServeRequest) -> list[str]:
    """What layers that lie elsewhere take there, and what a decode step waits for them."""
    notes, layers = [], request.spec.num_layers
    one = layer_bytes(request.weights, layers, request.devices)
    plain = msgspec.structs.replace(request, peer_layers=0, host_layers=0)
    context = request.speed_context or request.context
    base = plain.cost().decode_step(request.batch, context).duration_ns
    for field, where in (("peer_layers", "a peer"), ("host_layers", "the host")):
        number = getattr(request, field)
        if number:
            borrowing = msgspec.structs.replace(plain, **{field: number})
            slower = borrowing.cost().decode_step(request.batch, context).duration_ns / base - 1.0
            notes.append(
                f"{number} of {layers} layers lie in the memory of {where}, {format_bytes(number * one)} for each "
                f"device here; fetched a layer ahead, they make a decode step of {request.batch} {slower:.1%} longer "
                "(predicted)."
            )
    return notes
