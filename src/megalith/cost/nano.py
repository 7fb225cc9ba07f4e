"""Nano-batches: the layers of a step as a pipeline of operators over parts of its rows that share one device.

NanoFlow (Zhu et al., arXiv:2408.12757): products are bound by compute, attention of decodes by memory, collectives by
links. Cut the rows in two or more, and operators of one part can run beside those of another. An operator that takes a
share R of the device runs at P(R) = min(1, R / r*) of its best speed; shares never add up to more than the device.

Three streams, one for each class, run their operators in a fixed order, one at a time: what one class saturates is not
handed out twice. Memory bandwidth is conserved: attention beside a product gets what the product's weights leave.

Knows operators, orders and shares; must not know models or how an order is found (`nano_choice`, `plan.nano_search`).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeAlias

from megalith.base.errors import ConfigError
from megalith.cost.graph import WHOLE, Op, Schedule, schedule
from megalith.cost.lowering import KINDS, Kind, LayerCosts, Piece, StepWork, pieces

Stream: TypeAlias = Literal["compute", "memory", "link"]
STREAMS: Final[tuple[Stream, ...]] = ("compute", "memory", "link")
STREAM_OF: Final[dict[Kind, Stream]] = {
    "kqv": "compute", "prefill": "compute", "decode": "memory", "o": "compute", "reduce": "link", "up": "compute",
    "down": "compute", "gather": "link",
}  # fmt: skip
PARENTS: Final[dict[Kind, tuple[Kind, ...]]] = {
    "kqv": ("gather",), "decode": ("kqv",), "prefill": ("kqv",), "o": ("decode", "prefill"), "reduce": ("o",),
    "up": ("reduce",), "down": ("up",), "gather": ("down",),
}  # fmt: skip
"""What each kind waits for, for every range of rows that overlaps; `kqv` waits for the layer before."""
SEARCH_LAYERS = 6
"""Layers that are scheduled to see the period of a layer; the rest of the model repeats it."""
DEVICE = "device"


class Enough(NamedTuple):
    """r*: the share of the device, in thousandths, with which a class of operators reaches its best speed.

    Nobody published the table that NanoFlow measured. Assumption: products use all of a device, attention of decodes
    (108 of an A100's blocks in the release) 0.4, collectives (8 to 32 blocks) 0.2.
    """

    memory: int = 400
    link: int = 200


class Cuts(NamedTuple):
    """Where the rows are cut, from 0 to all of them: for KQV and attention of decodes, and for everything else."""

    fine: tuple[int, ...]
    coarse: tuple[int, ...]


class Slot(NamedTuple):
    """An operator in the order of a stream."""

    kind: Kind
    part: int
    """Which of the ranges of its kind."""
    lag: int = 0
    """How many layers behind the first slots of its period it works."""


class Order(NamedTuple):
    """Which operator follows which in each stream, over one period: every operator of a layer once."""

    compute: tuple[Slot, ...]
    memory: tuple[Slot, ...] = ()
    link: tuple[Slot, ...] = ()


class Pipeline(NamedTuple):
    """Operators of a layer, in a numbering of their own; `shares` by that number."""

    parts: tuple[Piece, ...]
    order: Order
    shares: tuple[int, ...]


class Frame(NamedTuple):
    """The graph of some layers under an order, without durations: shares may change, who waits for whom does not."""

    pieces: tuple[int, ...]
    """By operator of the graph, its number in the layer."""
    layers: tuple[int, ...]
    """By operator of the graph."""
    after: tuple[tuple[int, ...], ...]


def cut(costs: LayerCosts, work: StepWork, cuts: Cuts) -> tuple[Piece, ...]:
    """The operators of a layer, kind by kind, each over its ranges."""
    return tuple(
        piece
        for kind in KINDS
        for piece in pieces(costs, work, kind, cuts.fine if kind in ("kqv", "decode") else cuts.coarse)
    )


def frame(parts: Sequence[Piece], order: Order, layers: int) -> Frame:
    """The graph of that many layers. Raises ConfigError for an order that waits for itself or leaves something out."""
    slots = {stream: getattr(order, stream) for stream in STREAMS}
    numbers = _numbers(parts)
    named = sorted(numbers[slot.kind, slot.part] for stream in STREAMS for slot in slots[stream])
    if named != list(range(len(parts))):
        raise ConfigError("The order names not every operator of a layer once.", "Give each stream all of its own.")
    chains: list[list[tuple[int, int]]] = []
    lags = {slot.lag for stream in STREAMS for slot in slots[stream]}
    for stream in STREAMS:
        chain = [
            (window - slot.lag, numbers[slot.kind, slot.part])
            for window in range(layers + max(lags))
            for slot in slots[stream]
            if 0 <= window - slot.lag < layers
        ]
        chains.append(chain)
    waits: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    within, across = dependencies(parts)
    for layer in range(layers):
        for number in range(len(parts)):
            waits[layer, number] |= {(layer, before) for before in within[number]}
            if layer:
                waits[layer, number] |= {(layer - 1, before) for before in across[number]}
    for chain in chains:
        for before, after in pairwise(chain):
            waits[after].add(before)
    return _numbered(waits)


def dependencies(parts: Sequence[Piece]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """What each operator waits for, in its own layer and in the one before: for every range that overlaps.

    Attention of prompt rows waits for the keys of all prompt rows before them as well.
    """
    by_kind: dict[Kind, list[int]] = defaultdict(list)
    for number, piece in enumerate(parts):
        by_kind[piece.kind].append(number)
    decodes = max((piece.rows[1] for piece in parts if piece.kind == "decode"), default=0)
    within: list[tuple[int, ...]] = []
    across: list[tuple[int, ...]] = []
    for piece in parts:
        first, end = piece.rows
        if piece.kind == "prefill":
            first = decodes
        parents = _parents(piece.kind, by_kind)
        found = tuple(
            number
            for kind in parents
            for number in by_kind[kind]
            if parts[number].rows[0] < end and parts[number].rows[1] > first
        )
        within.append(() if piece.kind == "kqv" else found)
        across.append(found if piece.kind == "kqv" else ())
    return within, across


def _parents(kind: Kind, by_kind: dict[Kind, list[int]]) -> list[Kind]:
    """The nearest kinds before it that this layer has: without links there are no collectives."""
    found: list[Kind] = []
    for parent in PARENTS[kind]:
        if by_kind[parent]:
            found.append(parent)
        elif parent in ("reduce", "gather"):
            found += _parents(parent, by_kind)
    return found


def slowed_ps(pipeline: Pipeline, enough: Enough) -> list[int]:
    """How long each operator of a layer takes with its share.

    Attention of decodes that leaves room for a product also leaves it the bandwidth that its weights need.
    """
    products = [piece for piece in pipeline.parts if STREAM_OF[piece.kind] == "compute" and piece.duration_ps]
    greed = max((piece.memory_ps / piece.duration_ps for piece in products), default=0.0)
    times = []
    for piece, share in zip(pipeline.parts, pipeline.shares, strict=True):
        stream = STREAM_OF[piece.kind]
        if share == WHOLE:
            times.append(piece.duration_ps)
            continue
        best = WHOLE if stream == "compute" else getattr(enough, stream)
        speed = min(1.0, share / best)
        if stream == "memory":
            speed = min(speed, 1.0 - greed * (WHOLE - share) / WHOLE)
        times.append(-int(-piece.duration_ps // max(speed, 1e-3)))
    return times


def operators(pipeline: Pipeline, shape: Frame, enough: Enough) -> list[Op]:
    """The graph with durations, shares and what each operator keeps busy, for `graph.schedule`."""
    times, ops = slowed_ps(pipeline, enough), []
    uses = [
        {} if not time else {
            "compute": min(piece.compute_ps / time, share / WHOLE),
            "memory": min(piece.memory_ps / time, 1.0),
            "link": min(piece.link_ps / time, 1.0),
        }
        for piece, share, time in zip(pipeline.parts, pipeline.shares, times, strict=True)
    ]  # fmt: skip
    for number, layer, after in zip(shape.pieces, shape.layers, shape.after, strict=True):
        piece = pipeline.parts[number]
        ops.append(
            Op(f"{piece.kind} {layer}", DEVICE, times[number], after, pipeline.shares[number], uses[number], piece.rows)
        )
    return ops


def quick_times(pipeline: Pipeline, shape: Frame, enough: Enough) -> tuple[Schedule, list[int]]:
    """When everything runs, and when each layer ends."""
    times, shares = slowed_ps(pipeline, enough), pipeline.shares
    ops = [
        Op("", DEVICE, times[number], after, shares[number])
        for number, after in zip(shape.pieces, shape.after, strict=True)
    ]
    plan = schedule(ops)
    ends = [0] * (max(shape.layers) + 1)
    for layer, end in zip(shape.layers, plan.end_ps, strict=True):
        ends[layer] = max(ends[layer], end)
    return plan, ends


def layers_ps(pipeline: Pipeline, shape: Frame, enough: Enough, layers: int) -> tuple[int, int]:
    """(all layers of a model, one layer in steady state) from the few layers of `shape`, in picoseconds.

    The period is taken inside, away from where the pipeline fills and drains.
    """
    plan, ends = quick_times(pipeline, shape, enough)
    here = len(ends)
    if here >= layers or here < 5:
        return plan.makespan_ps, plan.makespan_ps // here
    period = -(-(ends[-2] - ends[-4]) // 2)
    return plan.makespan_ps + (layers - here) * period, period


def _numbers(parts: Sequence[Piece]) -> dict[tuple[Kind, int], int]:
    """Number in the layer by kind and part."""
    seen: dict[Kind, int] = defaultdict(int)
    numbers = {}
    for number, piece in enumerate(parts):
        numbers[piece.kind, seen[piece.kind]] = number
        seen[piece.kind] += 1
    return numbers


def _numbered(waits: dict[tuple[int, int], set[tuple[int, int]]]) -> Frame:
    """Operators in an order in which they could run, earlier layers first."""
    followers: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    missing = {one: len(before) for one, before in waits.items()}
    for one, before in waits.items():
        for each in before:
            followers[each].append(one)
    ready = [one for one, left in missing.items() if not left]
    heapq.heapify(ready)
    place: dict[tuple[int, int], int] = {}
    while ready:
        one = heapq.heappop(ready)
        place[one] = len(place)
        for follower in followers[one]:
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, follower)
    if len(place) < len(waits):
        raise ConfigError("The order of the streams waits for itself.", "Let each operator follow what it waits for.")
    after = tuple(tuple(sorted(place[before] for before in waits[one])) for one in place)
    return Frame(tuple(number for _, number in place), tuple(layer for layer, _ in place), after)
