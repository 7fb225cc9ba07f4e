"""check_fits: what the serving verbs ask before they load anything.

Turns an engine configuration into a plan and the sizes that the engine is then built with, or refuses with numbers.
Must not know runners; the configuration is read through a protocol, because the engine stands above this floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from megalith.base.errors import DoesNotFit
from megalith.base.units import MIB, format_bytes
from megalith.cost.memory import blocks_for, device_block_bytes
from megalith.cost.profile import RunnerKind
from megalith.cost.streaming import DiskRate
from megalith.plan import machine
from megalith.plan.explain import plan_text
from megalith.plan.request import DEVICE_SHARE, SMALLEST_CONTEXT, ServeRequest, blocks_that_fit, check, need_bytes
from megalith.plan.serve import plan_serve
from megalith.plan.source import PlannedModel, resolve
from megalith.plan.window import can_stream, least_window, streaming
from megalith.policy.layer_share import LayerShare, parse_window, share_layers
from megalith.specs.plan import ServePlan

SPEED_CONTEXT = 1024
"""Context of the speeds that the serving verbs print; few requests are longer."""
_KV_SHARE = 0.25
"""Part of the free memory that KV may take when no limit was given."""

_WINDOW_SLACK = 1.05
"""Over the bytes of a window of layers: the margin of the torch runner, and rounding."""


class EngineSettings(Protocol):
    """The fields of `engine.api.EngineConfig` that decide memory."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def mode(self) -> str: ...  # noqa: D102
    @property
    def memory_bytes(self) -> int | None: ...  # noqa: D102
    @property
    def max_context(self) -> int | None: ...  # noqa: D102
    @property
    def max_sequences(self) -> int: ...  # noqa: D102
    @property
    def token_budget(self) -> int: ...  # noqa: D102
    @property
    def preempt(self) -> str: ...  # noqa: D102
    @property
    def block_tokens(self) -> int: ...  # noqa: D102
    @property
    def num_blocks(self) -> int | None: ...  # noqa: D102
    @property
    def num_host_blocks(self) -> int | None: ...  # noqa: D102
    @property
    def threads(self) -> int | None: ...  # noqa: D102
    @property
    def weights(self) -> str: ...  # noqa: D102
    @property
    def window(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Fit:
    """What to build the instance with, and the plan that says so."""

    kind: RunnerKind
    max_context: int
    num_blocks: int
    num_host_blocks: int
    limit_bytes: int
    plan: ServePlan
    text: str
    """The plan in a few lines, for the terminal."""
    window_bytes: int | None = None
    """Memory that the weights stream through, where they do not stay."""
    layers: LayerShare | None = None
    """Which layers are in memory, where the torch runner has a window of them."""


def check_fits(
    config: EngineSettings,
    *,
    kind: RunnerKind | None = None,
    model: PlannedModel | None = None,
    kv_format: str | None = None,
    disk: DiskRate | None = None,
    resident_bytes: int | None = None,
    stream_bytes: int | None = None,
) -> Fit:
    """Sizes for `config`, or DoesNotFit with the numbers and what would fit.

    `kind` is the runner that will be used (None: what the configuration implies), `model` one that is already resolved,
    `kv_format` what that runner stores (None: its default), `disk` was measured, `resident_bytes` stay in memory of the
    weights where the runner streams the rest by itself, `stream_bytes` of it a step (None: all layers). Reads headers
    and profiles only.
    """
    kind = kind or kind_of(config)
    request = base_request(config, kind, model or resolve(config.model), kv_format)
    if resident_bytes is not None:
        request = _with(
            request,
            window_bytes=resident_bytes,
            stream_bytes=request.weights.layers if stream_bytes is None else stream_bytes,
        )
    check(request)
    swap = config.num_host_blocks is None and config.preempt == "swap"
    host_blocks = config.num_host_blocks or 0
    one = blocks_for(request.context, request.block_tokens)
    if config.num_blocks is not None:
        blocks = config.num_blocks
        needed = _with(request, num_blocks=blocks, num_host_blocks=blocks if swap else host_blocks)
    else:
        room = blocks_that_fit(_with(request, num_host_blocks=host_blocks)) // (2 if swap else 1)
        if config.max_context is None and room < one:
            request = _shorter(request, room)
            one = blocks_for(request.context, request.block_tokens)
        blocks = max(one, min(room, _wanted(config, request)))
        needed = _with(request, num_blocks=blocks, num_host_blocks=blocks if swap else host_blocks)
    plan = plan_serve(needed)
    layers = None
    if _may_stream(config, plan.fits):
        base = base_request(config, kind, model or resolve(config.model), kv_format)
        base = msgspec.structs.replace(base, disk=disk)
        streamed: ServeRequest | None
        if kind == "native":
            streamed = window_request(config, base)
        else:
            streamed, layers = layer_request(config, base)
        if streamed is not None:
            needed, request = streamed, streamed
            blocks, plan = streamed.wanted_blocks(), plan_serve(streamed)
    if not plan.fits:
        raise does_not_fit(plan)
    return Fit(
        kind, request.context, blocks, needed.num_host_blocks, request.limit_bytes, plan, plan_text(plan),
        needed.window_bytes, layers,
    )  # fmt: skip


def _may_stream(config: EngineSettings, fits: bool) -> bool:
    choice = config.weights
    return choice == "window" or config.window is not None or (choice == "auto" and not fits)


def layer_request(config: EngineSettings, request: ServeRequest) -> tuple[ServeRequest | None, LayerShare | None]:
    """`request` with a window of layers, as asked for or as the limit allows, and which; None where none fits.

    Embedding and head stay in memory. A window that was asked for is planned even where it does not fit.
    """
    spec, weights = request.spec, request.weights
    layer, stays = -(-weights.layers // spec.num_layers), weights.head + weights.tables
    share = None if config.window is None else parse_window(config.window, spec.num_layers)
    least = stays + layer * (min(2, spec.num_layers) if share is None else share.near)
    sized = _beside_window(config, _with(request, window_bytes=int(_WINDOW_SLACK * least)))
    sized = _with(sized, window_bytes=0)
    left = int((request.limit_bytes - need_bytes(sized, sized.wanted_blocks())[1]) / _WINDOW_SLACK)
    if share is None:
        if left < least:
            return None, None
        share = share_layers(spec.num_layers, layer, left - stays)
    needed = stays + layer * share.near
    return msgspec.structs.replace(sized, window_bytes=needed, stream_bytes=share.streamed * layer), share


def window_request(config: EngineSettings, request: ServeRequest) -> ServeRequest | None:
    """`request` with weights that stream from disk, or None where not even the smallest ring fits the limit.

    KV gets one sequence, or a quarter of the limit where that is more; the weights get what is left.
    """
    if not can_stream(request):
        return None
    return streaming(_beside_window(config, least_window(request)))


def _beside_window(config: EngineSettings, request: ServeRequest) -> ServeRequest:
    """Context and KV blocks beside the window of the request, which has the smallest that there can be."""
    host_blocks = config.num_host_blocks or 0
    room = blocks_that_fit(_with(request, num_host_blocks=host_blocks))
    one = blocks_for(request.context, request.block_tokens)
    block = device_block_bytes(request.spec, request.memory_request(1))
    share = int(_KV_SHARE * request.limit_bytes) // block
    if config.max_context is None and min(room, share) < one:
        request = _shorter(request, min(room, share))
        one = blocks_for(request.context, request.block_tokens)
    blocks = config.num_blocks or max(one, min(room, share, _wanted(config, request)))
    return _with(request, num_blocks=blocks, num_host_blocks=host_blocks)


def kind_of(config: EngineSettings) -> RunnerKind:
    """The kind of runner that a configuration implies; `auto` counts as native, which is tried first."""
    if config.device.startswith("cuda"):
        return "cuda"
    return "native" if config.mode in ("auto", "native") else "torch-cpu"


def base_request(config: EngineSettings, kind: RunnerKind, model: PlannedModel, kv_format: str | None) -> ServeRequest:
    """The request for one sequence at full context, before the number of blocks is decided."""
    profile = machine.here(kind, config.threads)
    exact = config.mode == "float32"
    limit, limit_source = memory_limit(config.memory_bytes, kind, profile.memory_bytes)
    return ServeRequest(
        model=model.name, spec=model.spec, weights=model.weights(kind, "f32" if exact else None), profile=profile,
        limit_bytes=limit, limit_source=limit_source, context=config.max_context or model.spec.max_context,
        kv_format=kv_format or ("f32" if exact else "bf16"), block_tokens=config.block_tokens,
        rows=config.token_budget, outputs=min(config.max_sequences, config.token_budget),
        speed_context=min(config.max_context or model.spec.max_context, SPEED_CONTEXT),
    )  # fmt: skip


def memory_limit(given: int | None, kind: RunnerKind, device_bytes: int) -> tuple[int, str]:
    """(bytes, where that comes from): what was given, else what is free now less a margin."""
    if given is not None:
        return given, "given"
    if kind == "cuda":
        return round(DEVICE_SHARE * device_bytes), f"{DEVICE_SHARE:.0%} of the device"
    free = machine.available_memory_bytes()
    margin = max(256 * MIB, free // 20)
    return max(free - margin, 1), f"{format_bytes(free)} free less {format_bytes(margin)}"


def _wanted(config: EngineSettings, request: ServeRequest) -> int:
    """Blocks for every sequence at full context; without a given limit at most a quarter of what is free on a CPU."""
    wanted = config.max_sequences * blocks_for(request.context, request.block_tokens)
    if config.memory_bytes is None and request.profile.kind != "cuda":
        block = device_block_bytes(request.spec, request.memory_request(1))
        wanted = min(wanted, int(_KV_SHARE * request.limit_bytes) // block)
    return wanted


def _shorter(request: ServeRequest, room: int) -> ServeRequest:
    """The longest context that `room` blocks hold, when it is worth having; else the request as it was."""
    context = room * request.block_tokens
    return request if context < SMALLEST_CONTEXT else _with(request, context=context)


def _with(request: ServeRequest, **changes: int | None) -> ServeRequest:
    return msgspec.structs.replace(request, **changes)


def does_not_fit(plan: ServePlan) -> DoesNotFit:
    """The refusal: what is needed, by item, against the limit; and every change that would make it fit."""
    items = " + ".join(f"{line.item} {format_bytes(line.num_bytes)}" for line in plan.memory)
    each = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
    sequences = "one sequence" if plan.batch == 1 else f"{plan.batch} sequences"
    what = (
        f"{plan.model} in {plan.weight_format} with {sequences} of {plan.context:,} tokens needs "
        f"{format_bytes(plan.need_bytes)}{each} ({items}), which is {format_bytes(plan.need_bytes - plan.limit_bytes)} "
        f"more than the limit of {format_bytes(plan.limit_bytes)} ({plan.limit_source})."
    )
    ways = "; or ".join(
        f"{_spoken(remedy.change)} (needs {format_bytes(remedy.need_bytes)})"
        for remedy in plan.remedies
        if not remedy.change.startswith("--devices")  # an instance runs on one device
    )
    return DoesNotFit(what, f"What would fit: {ways}." if ways else "No device of the catalogue holds it alone.")


def _spoken(change: str) -> str:
    """A remedy in words where its flag belongs to `plan` alone: who serves cannot type it."""
    for flag, words in (("--device ", "a device such as "), ("--format ", "weights in ")):
        change = change.replace(flag, words)
    return change
