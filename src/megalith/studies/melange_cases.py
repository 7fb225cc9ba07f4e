"""What the points of the Mélange study compute: fleets by the integer program, their replay, and published cells.

Llama-2-7B on four types of GPU at the prices of the publication. Throughput is Megalith's own prediction: the
publication's profiles were not released. Knows the planner; must not know claims.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from math import ceil, inf

import msgspec

from megalith.plan.fleet_bounds import Ability
from megalith.plan.fleet_load import cut
from megalith.plan.fleet_question import FleetQuestion, Shape
from megalith.plan.mix import TOLERANCE, Mix, Offer, cheapest_mix
from megalith.plan.mix_plan import STEP, Market, best_single, solve
from megalith.plan.mix_table import Knows, loads, most_requests_per_s, sizes
from megalith.plan.mix_trial import run_mix
from megalith.specs import catalog
from megalith.specs.slo import parse_slo
from megalith.specs.workload_rate import at_rate
from megalith.specs.workload_text import parse_workload

Options = Mapping[str, float | str]
Figures = dict[str, float | None]

MODEL = "llama-2-7b"
DEVICES = ("l4", "a10g", "a100-80gb", "h100-sxm")
PRICES = {"a10g": 1.01, "a100-80gb": 3.67}
"""USD an hour, of the worked example (Mélange, section 4.2, and config/example.json of its release)."""
LENGTHS = 5_000
"""Requests of which a load's histogram is made."""
MOST_TOKENS = 4_096
"""Of prompt and answer together: Llama 2's positions."""
PUBLISHED_SLICES = 8
_STEPS = 20
"""Over-provisioning factors that are tried: up to STEP ** 19, which is 2.5."""

SIZES = (25, 100, 250, 500, 1_000, 2_000)
PUBLISHED = (
    (72, 52, 20, 17, 13, 11),
    (52, 25, 15, 1, -1, -4),
    (28, 11, 2, 1, -8, -13),
    (12, 2, 1, -4, -17, -21),
    (-6, -10, -11, -11, -18, -20),
    (-8, -10, -13, -17, -18, -38),
)
"""Per cent by which A10G gives more tokens for a dollar than A100 (below zero: A100 than A10G), Llama-2-7B, rows by
answer and columns by prompt length: plot 1 of the publication's web page."""
UNDECIDED = 5
"""Published cells within so many per cent are not compared."""


@functools.cache
def ability(device: str) -> Ability:
    """One instance of Llama-2-7B."""
    return Ability(_question("lmsys", 120.0), Shape(device=device, tensor_parallel=1, setup="mixed"))


def _question(load: str, tpot_ms: float) -> FleetQuestion:
    return FleetQuestion(
        model=MODEL, workload=parse_workload(load), slo=parse_slo(f"tpot={tpot_ms:g}ms@p95,ttft=1000s@p50"),
        devices=DEVICES, tensor_parallel=(1,), setups=("mixed",),
    )  # fmt: skip


def _at(load: str, tpot_ms: float, rate: float, requests: int) -> FleetQuestion:
    question = _question(load, tpot_ms)
    workload = msgspec.structs.replace(
        at_rate(question.workload, rate), max_total_tokens=MOST_TOKENS, requests=requests
    )
    return msgspec.structs.replace(question, workload=workload)


@functools.cache
def market(load: str, tpot_ms: float, seed: int, knows: Knows = "sizes") -> Market:
    """Types and loads at one request a second."""
    question = _at(load, tpot_ms, 1.0, LENGTHS)
    _, found, _ = cut(question.workload, seed, LENGTHS)
    buckets, keys = sizes(found, knows)
    table = [
        [
            most_requests_per_s(ability(device), size.prompt_tokens, size.answer_tokens, tpot_ms * 1e6)
            for size in buckets
        ]
        for device in DEVICES
    ]
    offers = [Offer(device, catalog.device(device).price_per_hour_usd or inf) for device in DEVICES]
    at_one = [[load / found.rate_per_s for load in row] for row in loads(buckets, table)]
    return Market([ability(device).shape for device in DEVICES], offers, at_one, keys, knows, [])


def plan(options: Options) -> tuple[Market, Mix]:
    """The fleet of an arm: `sizes` and `prompt` are mixes by what the router knows, `uncut` is a mix whose groups are
    not cut into slices, `single` is the best type alone, a device is that type alone."""
    arm, rate = str(options["arm"]), float(options["rate"]) * float(options.get("factor", 1.0))
    seed = int(options["seed"])
    places = market(str(options["load"]), float(options["tpot_ms"]), seed, "prompt" if arm == "prompt" else "sizes")
    if arm in ("sizes", "uncut", "prompt"):
        return places, solve(places, rate, slices=None if arm == "uncut" else PUBLISHED_SLICES)
    one = places
    if arm != "single":
        at = DEVICES.index(arm)
        offers = [offer._replace(most=None if place == at else 0) for place, offer in enumerate(places.offers)]
        one = places._replace(offers=offers)
    found = best_single(one, rate)
    counts = tuple(0 if found is None or offer.name != found[0].name else found[1] for offer in places.offers)
    price = sum(offer.price * count for offer, count in zip(places.offers, counts, strict=True)) if found else inf
    shares = tuple(tuple(float(count > 0) for count in counts) for _ in places.loads)
    return places, Mix(counts=counts, price=price, shares=shares, busy=tuple(map(float, counts)), bound=price)


def cost(options: Options) -> Figures:
    """USD an hour and instances by type; predicted. No figures where a type cannot serve the load."""
    _, mix = plan(options)
    if mix.price == inf:
        return dict.fromkeys(("cost", "types", *(f"n_{device}" for device in DEVICES)))
    return {"cost": mix.price, "types": float(sum(count > 0 for count in mix.counts)), **_counts(mix)}


def replay(options: Options) -> Figures:
    """The same fleet under its load: the share of the requests whose TPOT is within the limit; and what a fleet costs
    that is over-provisioned, in steps of 5 %, until `keep` of them are. Simulated."""
    figures: Figures = dict.fromkeys(("cost", "within", "kept_cost", "kept_factor"))
    for step in range(_STEPS):
        factor = STEP**step
        places, mix = plan({**options, "factor": factor})
        if mix.price == inf:
            break
        within = _within(options, places, mix)
        if step == 0:
            figures |= {"cost": mix.price, "within": within}
        if within >= float(options["keep"]):
            figures |= {"kept_cost": mix.price, "kept_factor": factor}
            break
    return figures


def _within(options: Options, places: Market, mix: Mix) -> float:
    question = _at(str(options["load"]), float(options["tpot_ms"]), float(options["rate"]), int(options["requests"]))
    question = msgspec.structs.replace(question, seed=int(options["seed"]))
    trial = run_mix(question, places.shapes, mix.counts, places.knows, places.keys, mix.shares)
    return next(share for bound, share in trial.shares.items() if bound.startswith("tpot"))


def _counts(mix: Mix) -> Figures:
    return {f"n_{device}": float(count) for device, count in zip(DEVICES, mix.counts, strict=True)}


def worked(options: Options) -> Figures:
    """Section 4.2: 4.3 requests/s of one size, A10G takes 0.37 a second and A100 2.0. `slices` 0: not cut."""
    offers = [Offer(name, price) for name, price in PRICES.items()]
    row = [4.3 / 0.37, 4.3 / 2.0]
    if options["arm"] == "single":
        prices = [offer.price * ceil(load) for offer, load in zip(offers, row, strict=True)]
        best = prices.index(min(prices))
        return {
            "cost": prices[best],
            **{f"n_{o.name}": float(ceil(row[j]) * (j == best)) for j, o in enumerate(offers)},
        }
    mix = cheapest_mix(offers, [row], slices=int(options["slices"]) or None)
    return {"cost": mix.price, "n_a10g": float(mix.counts[0]), "n_a100-80gb": float(mix.counts[1])}


def advantage(prompt: int, answer: int, host_ms: float = 0.0) -> float:
    """A10G's tokens for a dollar over A100's; without a limit on TPOT, as published. Predicted."""
    per_dollar = [
        most_requests_per_s(ability(device), prompt, answer, host_ns=host_ms * 1e6) / price
        for device, price in PRICES.items()
    ]
    return per_dollar[0] / per_dollar[1]


def cells(options: Options) -> Figures:
    """The share of published cells, of those that are decided, whose better type is ours too. The control knows one
    size only, the mean of both lengths' grid."""
    host_ms = float(options["host_ms"])
    middle = sum(SIZES) // len(SIZES)
    same, compared, cheap = 0, 0, 0
    for answer, row in zip(SIZES, PUBLISHED, strict=True):
        for prompt, published in zip(SIZES, row, strict=True):
            at = (prompt, answer) if options["arm"] == "sizes" else (middle, middle)
            ours = advantage(*at, host_ms) > 1
            cheap += ours
            if abs(published) > UNDECIDED:
                compared += 1
                same += ours == (published > 0)
    return {"agreement": same / compared, "compared": float(compared), "a10g_cells": float(cheap)}


def exact(options: Options) -> Figures:
    """The price of a small random case over that of trying everything. The control sends each group to the type that is
    cheapest by load, and rounds up."""
    draw = random.Random(int(options["case"]))
    offers = [Offer(f"t{place}", round(draw.uniform(0.5, 8), 2)) for place in range(draw.randint(2, 3))]
    rows = [[draw.uniform(0.05, 2.5) for _ in offers] for _ in range(draw.randint(1, 3))]
    slices = draw.randint(1, 4)
    if options["arm"] == "sizes":
        price = cheapest_mix(offers, rows, slices=slices).price
    else:
        busy = [0.0] * len(offers)
        for row in rows:
            place = min(range(len(offers)), key=lambda at: row[at] * offers[at].price)
            busy[place] += row[place]
        price = _rounded(offers, busy)
    return {"over": price / _everything(offers, rows, slices)}


def _everything(offers: Sequence[Offer], rows: Sequence[Sequence[float]], slices: int) -> float:
    ways = itertools.product(*[itertools.combinations_with_replacement(range(len(offers)), slices) for _ in rows])
    best = inf
    for choice in ways:
        busy = [0.0] * len(offers)
        for row, places in zip(rows, choice, strict=True):
            for place in places:
                busy[place] += row[place] / slices
        best = min(best, _rounded(offers, busy))
    return best


def _rounded(offers: Sequence[Offer], busy: Sequence[float]) -> float:
    return sum(offer.price * ceil(load - TOLERANCE) for offer, load in zip(offers, busy, strict=True))
