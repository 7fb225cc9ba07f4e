"""Which pipeline: nano-batch sizes, an order out of a few, and shares by descent over what `graph.schedule` says.

The quick choice that a step timer makes for every shape of a step. The planner looks for orders and sizes with an
integer program (`plan.nano_search`) and hands them to the same second stage. Answers may be: do not split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from megalith.cost.graph import WHOLE
from megalith.cost.lowering import Kind, LayerCosts, Piece, StepWork, sequential
from megalith.cost.nano import (
    SEARCH_LAYERS,
    STREAM_OF,
    Cuts,
    Enough,
    Frame,
    Order,
    Pipeline,
    Slot,
    Stream,
    cut,
    frame,
    layers_ps,
)

LEAST_ROWS = 256
"""Smaller steps are not split: their products are bound by weights, which every nano-batch reads again."""
SIZES: Final = (0.375, 0.5, 0.625)
"""Share of the rows in the first nano-batch. The release has 640 of 2,048 (0.3125) and its neighbours."""
ROW_UNIT = 64
PASSES = 2
"""Times that the descent goes over all operators, unless it stops earlier."""
Overlap: TypeAlias = Literal["both", "link", "none"]
"""What may run beside products: collectives and attention of decodes, collectives alone, nothing."""


class Chosen(NamedTuple):
    """The best pipeline that was found for a shape of a step; None: operators one after the other, unsplit."""

    pipeline: Pipeline | None
    cuts: Cuts
    sequential_ps: int
    """All layers without nano-batches."""
    unoverlapped_ps: int
    """All layers with these nano-batches, one operator at a time."""
    layers_ps: int
    """All layers as chosen: never more than `sequential_ps`."""
    period_ps: int
    """Of one layer in steady state."""

    @property
    def saving_ps(self) -> int:
        """What a step is shorter by."""
        return self.sequential_ps - self.layers_ps


def candidate_cuts(rows: int, sizes: Sequence[float] = SIZES) -> list[Cuts]:
    """Ways to cut rows in two, KQV and attention of decodes in two or four; none where there are too few."""
    found = []
    for size in sizes:
        middle = round(rows * size / ROW_UNIT) * ROW_UNIT
        if rows < LEAST_ROWS or not 0 < middle < rows:
            continue
        coarse = (0, middle, rows)
        quarters = [_halved(0, middle), _halved(middle, rows)]
        fine = tuple(sorted({*coarse, *quarters}))
        found += [Cuts(coarse, coarse), Cuts(fine, coarse)]
    return list(dict.fromkeys(found))


def orders(parts: Sequence[Piece], cuts: Cuts) -> list[Order]:
    """Orders worth a try: both halves side by side, either of them first; the second half a layer behind (attention of
    one hides the FFN of the other); and the second half, which has the prompts, half a layer ahead."""
    middle = cuts.coarse[1]
    slots: dict[tuple[Kind, int], list[Slot]] = {}
    seen: dict[Kind, int] = {}
    for piece in parts:
        part = seen.get(piece.kind, 0)
        seen[piece.kind] = part + 1
        slots.setdefault((piece.kind, int(piece.rows[0] >= middle)), []).append(Slot(piece.kind, part))
    named = {f"{kind}-{'ab'[half]}": found for (kind, half), found in slots.items()}

    def take(text: str, lag: int = 0) -> tuple[Slot, ...]:
        """Slots named like `o-a`; `lag` counts for the second half's operators behind attention."""
        late = {"o-b", "reduce-b", "up-b", "down-b", "gather-b"} if lag else set()
        return tuple(slot._replace(lag=int(name in late)) for name in text.split() for slot in named.get(name, []))

    attention, links = take("decode-a decode-b"), take("reduce-a reduce-b gather-a gather-b")
    # Prompt rows of the second half read keys of those in the first, so it can only go first when it has them all.
    prompts_first = "kqv-b kqv-a" if "prefill-a" in named else "kqv-b prefill-b o-b kqv-a"
    then = "prefill-a prefill-b o-b up-b o-a" if "prefill-a" in named else "up-b o-a"
    return [
        Order(take("kqv-a kqv-b prefill-a prefill-b o-a o-b up-a up-b down-a down-b"), attention, links),
        Order(
            take("o-b kqv-a prefill-a up-b down-b o-a kqv-b prefill-b up-a down-a", 1),
            attention,
            take("reduce-b gather-b reduce-a gather-a", 1),
        ),
        Order(
            take(f"{prompts_first} {then} down-b up-a down-a"),
            take("decode-b decode-a"),
            take("reduce-b reduce-a gather-b gather-a"),
        ),
        Order(take("kqv-a prefill-a o-a kqv-b prefill-b up-a o-b down-a up-b down-b"), attention, links),
    ]


def choose(
    costs: LayerCosts,
    work: StepWork,
    enough: Enough = Enough(),  # noqa: B008 - a constant
    candidates: Iterable[tuple[Cuts, Order]] | None = None,
    overlap: Overlap = "both",
    keep: int = 2,
) -> Chosen:
    """Stage 2: shares for the best of the candidates (by default the quick ones), never slower than sequential.

    `keep` of them, the best before the descent, are gone through.
    """
    layers = costs.cost.spec.num_layers
    plain = sum(piece.duration_ps for piece in sequential(costs, work)) * layers
    none = Chosen(None, Cuts((0, work.rows), (0, work.rows)), plain, plain, plain, plain // layers)
    tried: list[tuple[int, int, Cuts, Pipeline, Frame]] = []
    for cuts, order in _all(costs, work) if candidates is None else candidates:
        parts = cut(costs, work, cuts)
        shape = frame(parts, order, min(layers, SEARCH_LAYERS))
        for shares in _starts(parts, enough, overlap):
            pipeline = Pipeline(parts, order, shares)
            tried.append((layers_ps(pipeline, shape, enough, layers)[0], len(tried), cuts, pipeline, shape))
    best = none
    for _, _, cuts, pipeline, shape in _few(tried, keep):
        found = descend(pipeline, shape, enough, layers, overlap)
        whole, period = layers_ps(found, shape, enough, layers)
        if whole < best.layers_ps:
            alone = sum(piece.duration_ps for piece in found.parts) * layers
            best = Chosen(found, cuts, plain, alone, whole, period)
    return best


def descend(pipeline: Pipeline, shape: Frame, enough: Enough, layers: int, overlap: Overlap = "both") -> Pipeline:
    """Change one share at a time, in a fixed order, for as long as it shortens the step."""
    shares = list(pipeline.shares)
    best = layers_ps(pipeline, shape, enough, layers)[0]
    options = _options(enough, overlap)
    for _ in range(PASSES):
        before = best
        for number, piece in enumerate(pipeline.parts):
            kept = shares[number]
            for share in options[STREAM_OF[piece.kind]]:
                if share == shares[number]:
                    continue
                old, shares[number] = shares[number], share
                time = layers_ps(pipeline._replace(shares=tuple(shares)), shape, enough, layers)[0]
                if time < best:
                    best, kept = time, share
                else:
                    shares[number] = old
            shares[number] = kept
        if best == before:
            break
    return pipeline._replace(shares=tuple(shares))


def _all(costs: LayerCosts, work: StepWork) -> Iterable[tuple[Cuts, Order]]:
    for cuts in candidate_cuts(work.rows):
        for order in orders(cut(costs, work, cuts), cuts):
            yield cuts, order


def _options(enough: Enough, overlap: Overlap) -> dict[Stream, tuple[int, ...]]:
    """Shares worth trying, by stream: a product leaves room for one or both of the others, or for part of them."""
    memory, link = enough.memory, enough.link
    rooms = {"both": (0, link // 2, link, memory // 2, memory, memory + link), "link": (0, link // 2, link)}
    products = tuple(dict.fromkeys(WHOLE - room for room in rooms.get(overlap, (0,)) if WHOLE - room >= 100))
    attention = (memory, memory * 3 // 4, memory // 2, memory // 4, WHOLE) if overlap == "both" else (WHOLE,)
    links = (link, link * 3 // 4, link // 2) if overlap != "none" else (WHOLE,)
    return {"compute": products, "memory": attention, "link": links}


def _starts(parts: Sequence[Piece], enough: Enough, overlap: Overlap) -> list[tuple[int, ...]]:
    """Where the descent may begin: products leave room for nobody, for collectives, for attention, for both."""
    options = _options(enough, overlap)
    memory, link = options["memory"][0], options["link"][0]
    narrow = max(min(memory, WHOLE - link), 100)
    rooms = {WHOLE - enough.link, WHOLE - enough.memory, max(WHOLE - enough.memory - enough.link, 100)}
    rooms = rooms if overlap == "both" else {WHOLE - enough.link} if overlap == "link" else {WHOLE}
    rooms = {max(room, 100) for room in rooms}
    if overlap == "both":
        memory = narrow
    return [
        tuple({"compute": room, "memory": memory, "link": link}[STREAM_OF[piece.kind]] for piece in parts)
        for room in sorted(rooms)
    ]


def _few(
    tried: list[tuple[int, int, Cuts, Pipeline, Frame]], keep: int
) -> list[tuple[int, int, Cuts, Pipeline, Frame]]:
    """The best start of each of the `keep` best candidates."""
    found: dict[tuple[Cuts, Order], tuple[int, int, Cuts, Pipeline, Frame]] = {}
    for one in sorted(tried, key=lambda each: each[:2]):
        found.setdefault((one[2], one[3].order), one)
    return list(found.values())[:keep]


def _halved(first: int, end: int) -> int:
    middle = first + round((end - first) / 2 / ROW_UNIT) * ROW_UNIT
    return middle if first < middle < end else (first + end) // 2
