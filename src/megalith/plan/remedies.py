"""What would make a plan fit: each change on its own, with the bytes that it would then need.

Works on a ServeRequest and gives Remedy values. Must not change what was asked for.
"""

from __future__ import annotations

import msgspec

from megalith.base.units import MIB, format_bytes
from megalith.cost.borrow import layer_bytes
from megalith.cost.memory import SHRINKING, WeightBytes, bits_per_weight, blocks_for, weight_bytes
from megalith.cost.profile import from_device
from megalith.plan.request import DEVICE_SHARE, SMALLEST_CONTEXT, ServeRequest, blocks_that_fit, need_bytes
from megalith.plan.source import native_bytes, weight_bytes_by_part
from megalith.plan.window import can_stream, least_window, streaming
from megalith.specs import catalog
from megalith.specs.plan import Remedy
from megalith.tier.memory import HUGE_PAGE_BYTES

WORTH_BORROWING = 0.5
"""Borrowed layers that make a decode step longer by more than this are no remedy: one computes better. A choice."""


def remedies(request: ServeRequest) -> tuple[Remedy, ...]:
    """Changes that make it fit, the least painful first; last, the memory it needs where the device has it."""
    found = [
        *_smaller_context(request),
        *_fewer_sequences(request),
        *_smaller_format(request),
        *_borrowed_layers(request),
        *_more_devices(request),
        *_bigger_device(request),
        *_streamed_weights(request),
    ]
    need = _need(request)
    rounded = -(-need // MIB) * MIB
    if rounded <= request.profile.memory_bytes:
        found.append(
            Remedy(change=f"give it {format_bytes(rounded)} instead of {format_bytes(request.limit_bytes)}",
                   need_bytes=need, limit_bytes=rounded)
        )  # fmt: skip
    return tuple(found)


def _need(request: ServeRequest) -> int:
    return need_bytes(request, request.wanted_blocks())[1]


def _remedy(change: str, changed: ServeRequest) -> list[Remedy]:
    need = _need(changed)
    if need > changed.limit_bytes:
        return []
    return [Remedy(change=change, need_bytes=need, limit_bytes=changed.limit_bytes)]


def _smaller_context(request: ServeRequest) -> list[Remedy]:
    context = blocks_that_fit(request) // request.batch * request.block_tokens
    if context < request.block_tokens or context >= request.context:
        return []
    changed = msgspec.structs.replace(request, context=context, num_blocks=None)
    each = "" if request.batch == 1 else f" for each of {request.batch} sequences"
    return _remedy(f"--context {context}{each} instead of {request.context}", changed)


def _fewer_sequences(request: ServeRequest) -> list[Remedy]:
    batch = blocks_that_fit(request) // blocks_for(request.context, request.block_tokens)
    if batch < 1 or batch >= request.batch:
        return []
    changed = msgspec.structs.replace(request, batch=batch, num_blocks=None)
    return _remedy(f"--batch {batch} instead of {request.batch}", changed)


def weights_in(request: ServeRequest, name: str) -> WeightBytes:
    """The weights of the request's model in another format, as its kind of runner would hold them."""
    if request.profile.kind == "native":
        return native_bytes(weight_bytes_by_part(request.spec, name), "formula")
    return weight_bytes(request.spec, name)


def _smaller_format(request: ServeRequest) -> list[Remedy]:
    """The widest narrower format that fits, of those that its kind of runner can hold."""
    for name in SHRINKING[request.profile.kind]:
        weights = weights_in(request, name)
        if weights.total >= request.weights.total:
            continue
        changed = msgspec.structs.replace(request, weights=weights)
        size = f"{format_bytes(weights.total)} of weights, {bits_per_weight(name):.2g} bits each"
        found = _remedy(f"--format {name} ({size})", changed)
        if found:
            return found
    return []


def _borrowed_layers(request: ServeRequest) -> list[Remedy]:
    """The fewest layers that a peer must lend; what it costs."""
    if request.profile.max_group < 2 or request.profile.peer_bytes_per_s <= 0.0 or request.peer_layers:
        return []
    base = request.cost().decode_step(request.batch, request.context).duration_ns
    for number in range(1, request.spec.num_layers - request.host_layers + 1):
        changed = msgspec.structs.replace(request, peer_layers=number)
        if _need(changed) <= request.limit_bytes:
            slower = changed.cost().decode_step(request.batch, request.context).duration_ns / base - 1.0
            if slower > WORTH_BORROWING:
                return []
            size = format_bytes(number * layer_bytes(request.weights, request.spec.num_layers, request.devices))
            return _remedy(
                f"--peer-layers {number} ({size} of a peer's memory, decode steps {slower:.0%} longer)", changed
            )
    return []


def _more_devices(request: ServeRequest) -> list[Remedy]:
    degree = request.devices * 2
    while degree <= request.profile.max_group:
        if request.spec.num_heads % degree == 0:
            found = _remedy(f"--devices {degree} (tensor parallel)", msgspec.structs.replace(request, devices=degree))
            if found:
                return found
        degree *= 2
    return []


def _bigger_device(request: ServeRequest) -> list[Remedy]:
    """The smallest catalogue device that holds it alone; failing that, the smallest group that does."""
    options = sorted(catalog.devices().values(), key=lambda device: (device.memory_bytes, device.name))
    for degree in (1, 2, 4, 8):
        for device in options:
            if degree > device.max_group or request.spec.num_heads % degree:
                continue
            profile = from_device(device)
            changed = msgspec.structs.replace(
                request, profile=profile, limit_bytes=round(DEVICE_SHARE * device.memory_bytes), devices=degree,
                weights=_on_device(request),
            )  # fmt: skip
            if device.name == request.profile.name and degree == request.devices:
                continue
            group = "" if degree == 1 else f" --devices {degree}"
            found = _remedy(f"--device {device.name}{group} ({format_bytes(device.memory_bytes)} each)", changed)
            if found:
                return found
    return []


def _streamed_weights(request: ServeRequest) -> list[Remedy]:
    """Weights that stream from disk: here, or in the least memory in which they would."""
    if request.window_bytes is not None or not can_stream(request):
        return []
    streamed = streaming(request)
    if streamed is None:
        context = min(request.context, SMALLEST_CONTEXT)
        need = _need(least_window(msgspec.structs.replace(request, context=context, num_blocks=None)))
        least = -(-need // MIB) * MIB + 2 * HUGE_PAGE_BYTES
        shorter = f" and a context of {context}" if context < request.context else ""
        return [
            Remedy(
                change=f"{format_bytes(least)}, the least with weights that stream from disk in every step{shorter}",
                need_bytes=need, limit_bytes=least,
            )
        ]  # fmt: skip
    rate = 1e9 / streamed.cost().decode_step(1, request.speed_context or request.context).duration_ns
    return _remedy(f"weights that stream from disk in every step ({rate:.2g} tokens/s for one sequence)", streamed)


def _on_device(request: ServeRequest) -> WeightBytes:
    """The weights as another device would hold them: native panels become the bf16 of the generic path."""
    return weight_bytes(request.spec, "bf16") if request.profile.kind == "native" else request.weights
