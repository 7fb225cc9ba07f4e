"""Long contexts (arXiv:2405.08944): four costs at 50K against 4K tokens, and which of them KV is the source of.

Arithmetic by `cost.long_context` at the paper's peak rates, with KV as it grows (on) and with the keys held at those
of 4,000 tokens (off, the control): what is left of a cost then did not come from KV. Beside it the planner's own
prediction by reached rates. All figures are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeAlias

from megalith.cost.long_context import PLAIN, Levers, LongContextRow, long_context_row
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import from_device
from megalith.plan.context import WITHIN, ContextQuestion, gentle_ways, row_of
from megalith.plan.fit import memory_limit
from megalith.plan.request import ServeRequest
from megalith.report.table import Column, Table
from megalith.specs import catalog
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Computed, Experiment, Finding, Gate, Judgement, Picture, Study

MODEL, DEVICE = "yi-34b-200k", "a100-80gb"
WEIGHT_BYTES = 68e9
"""As the paper rounds them; the model has 68.8e9."""
SHORT, LONG, MILLION = 4_000, 50_000, 1_000_000
GIB = float(1 << 30)
At: TypeAlias = Callable[..., float | None]
"""(cost, tokens, arm) -> the figure."""
EXACT = 0.05
"""Published figures have two or three digits."""

ON = Arm("grows", "on", "KV grows, peak rates")
OFF = Arm("held", "off", "keys held at 4,000, peak rates")
PLANNED = Arm("planned", "baseline", f"the planner, reached rates of {DEVICE} x 2")
PLANNED_DEVICES = 2
"""One such device has room for 4 short contexts and for no long one beside the weights."""
CONTEXTS = (float(SHORT), 16_000.0, float(LONG), 100_000.0, 200_000.0, float(MILLION))
COSTS = {"prefill": "prefill_s", "decode": "decode_s", "switch": "switch_s"}
UNITS = {"kv": "GiB", "users": "users", "prefill": "s", "decode": "s", "switch": "s"}
PUBLISHED = {
    "kv": (0.91, 11.0),
    "users": (20.0, 1.0),
    "prefill": (0.89, 14.1),
    "decode": (8.5, 9.8),
    "switch": (0.09, 1.1),
}
"""By cost: at 4K and at 50K (section 2 and Figure 2 of the paper)."""
TEXT = {
    "kv": "KV of a context", "users": "users in 80 GB", "prefill": "prefill", "decode": "decode of 250 tokens",
    "switch": "context switch",
}  # fmt: skip


def row(options: Mapping[str, Any]) -> dict[str, float | None]:
    """The costs of one context under one arm."""
    tokens, arm = int(options["tokens"]), options["arm"]
    if arm == PLANNED.name:
        found = row_of(planned(tokens))(tokens, PLAIN)
    elif arm == OFF.name:
        held = Levers(tokens=min(1.0, SHORT / tokens))
        found = long_context_row(catalog.model(MODEL), WEIGHT_BYTES, tokens, levers=held, window=SHORT)
    else:
        found = long_context_row(catalog.model(MODEL), WEIGHT_BYTES, tokens)
    return figures(found)


def figures(found: LongContextRow) -> dict[str, float | None]:
    """By name; `*_paper` take a GiB of KV for a GB, as the published numbers do."""
    loose = found.kv_bytes / GIB * 1e9
    return {
        "kv": found.kv_bytes / GIB,
        "users": found.concurrency,
        "prefill": found.prefill_s,
        "decode": found.decode_s,
        "switch": found.switch_s,
        "kv_paper": loose / 1e9,
        "prefill_paper": found.prefill_s,
        "decode_paper": 250 * (WEIGHT_BYTES + loose) / 2e12,
        "switch_paper": 2 * loose / 20e9,
        "users_paper": (80e9 - WEIGHT_BYTES) / loose,
        "users_gib": (80 * GIB - WEIGHT_BYTES) / found.kv_bytes,
    }


def planned(tokens: int) -> ContextQuestion:
    """The planner's question: bf16 weights, 90 % of the memory, steps of 2,048 tokens."""
    spec, device = catalog.model(MODEL), catalog.device(DEVICE)
    profile = from_device(device)
    limit, source = memory_limit(None, profile.kind, profile.memory_bytes)
    request = ServeRequest(
        model=spec.name, spec=spec, profile=profile, weights=weight_bytes(spec, "bf16"), limit_bytes=limit,
        limit_source=source, context=1, devices=PLANNED_DEVICES, rows=2048, outputs=1,
    )  # fmt: skip
    return ContextQuestion(request=request, device=device, contexts=(tokens,))


def _task(case: Case) -> Computed:
    return Computed(call=f"{__name__}:row", options={"tokens": case.at, "arm": case.arm})


def judge(results: Results) -> Judgement:
    """The table of the paper, what KV is the source of, and the ways back from a million tokens."""

    def at(name: str, tokens: float, arm: Arm = ON) -> float | None:
        return results.middle("costs", arm.name, name, tokens)

    findings = [_cost(at, key) for key in TEXT]
    short = STUDY.claim("users-4k")
    findings.append(Finding(short, at("users", SHORT), _show(at("users", SHORT), "users"), "-"))
    findings.append(
        Finding(short, at("users_gib", SHORT), _show(at("users_gib", SHORT), "users"), "-", "80 GiB of memory", False)
    )
    loose = _show(at("switch_paper", LONG), "s"), _show(at("switch_paper", SHORT), "s")
    note = "a GiB of KV taken for a GB"
    findings.append(Finding(STUDY.claim("switch"), at("switch_paper", LONG), *loose, note, False))
    findings += [_source(at, key) for key in ("users", *COSTS)]
    table, plain = _ways()
    gates = [
        *(_near(at, key, place) for key in TEXT for place in (0, 1) if key != "users"),
        Gate("whole users at 50K, counted as published", _whole(at("users_paper", LONG)), 1.0, 1.0, "one user"),
        Gate("users at 4K by the formula", at("users", SHORT), 12.0, 13.0, "(80 - 68) GB / KV; published about 20"),
        *(_grows(results, key) for key in TEXT),
        Gate("ways that bring 1M within 2x of 4K", float(len(table.rows)), 1.0, float("inf"), "users, decode, switch"),
        Gate("1M over 4K with no lever, the cheapest of the costs of KV", plain, WITHIN, float("inf"), "control"),
    ]
    pictures = [Picture("costs", "Costs of a context, Yi-34B", "tokens", panels={
        f"{TEXT[key]}, {UNITS[key]}": {
            arm.title: results.curve("costs", arm.name, key) for arm in (ON, OFF, PLANNED)
        } for key in TEXT if key != "kv"
    })]  # fmt: skip
    return Judgement(findings, gates, {"ways": table}, pictures, notes(at))


def notes(at: At) -> list[str]:
    """What the table does not show."""
    linear = 2 * WEIGHT_BYTES / 2 * (LONG - SHORT) / 312e12
    extra = (at("prefill", LONG) or 0.0) - (at("prefill", SHORT) or 0.0)
    return [
        f"Of the {extra:.3g} s that prefill takes longer at 50K, {linear:.3g} s are the matrices meeting more tokens: "
        "no KV is in them, and no lever on KV shortens them.",
        f"From 4K to 1M prefill takes {(at('prefill', MILLION) or 0.0) / (at('prefill', SHORT) or 1.0):,.0f} times as "
        "long. The ways back leave that; it is paid once where sessions share a prompt.",
    ]


def _cost(at: At, key: str) -> Finding:
    on, off = (_show(at(key, tokens), UNITS[key]) for tokens in (LONG, SHORT))
    return Finding(STUDY.claim(key), at(key, LONG), on, off, "control: 4K")


def _source(at: At, key: str) -> Finding:
    """The part of what 50K costs more than 4K that goes away with KV held; users by what each takes of the room."""

    def cost(tokens: float, arm: Arm) -> float | None:
        value = at(key, tokens, arm)
        return 1.0 / value if key == "users" and value else value

    long, short, held = cost(LONG, ON), cost(SHORT, ON), cost(LONG, OFF)
    share = None if long is None or short is None or held is None else (long - held) / (long - short)
    unit = UNITS[key]
    return Finding(STUDY.claim(f"source-{key}"), share, _show(at(key, LONG), unit), _show(at(key, LONG, OFF), unit))


def _near(at: At, key: str, place: int) -> Gate:
    """The paper's own counting within 5 % of its table."""
    published, tokens = PUBLISHED[key][place], (SHORT, LONG)[place]
    low, high = published * (1 - EXACT), published * (1 + EXACT)
    name = f"{TEXT[key]} at {tokens // 1000}K, counted as published"
    return Gate(name, at(f"{key}_paper", tokens), low, high, f"{published:g} within 5 %")


def _grows(results: Results, key: str) -> Gate:
    """The least step from one context to the next; users must become fewer."""
    curve = results.curve("costs", ON.name, key)
    values = [curve[tokens][0] for tokens in sorted(curve)]
    steps = [after / before for before, after in pairwise(values)]
    steps = [1.0 / step for step in steps] if key == "users" else steps
    return Gate(
        f"{TEXT[key]} gets worse with every context", min(steps, default=None), 1.0 + 1e-6, float("inf"), "the paper"
    )


def _whole(value: float | None) -> float | None:
    return None if value is None else float(int(value))


def _ways() -> tuple[Table, float]:
    """(ways, the least cost of KV without any) from a million tokens, by the paper's formulas."""
    spec = catalog.model(MODEL)

    def by(tokens: int, levers: Levers) -> LongContextRow:
        return long_context_row(spec, WEIGHT_BYTES, tokens, levers=levers)

    short, far = by(SHORT, PLAIN), by(MILLION, PLAIN)
    ways = gentle_ways(by, MILLION, short, spec.num_layers)
    plain = min(short.concurrency / far.concurrency, far.decode_s / short.decode_s, far.switch_s / short.switch_s)
    columns = [Column("kept", "KV kept", "share", "predicted")]
    columns += [Column(name, name, "number", "predicted") for name in ("users", "decode", "switch", "prefill")]
    table = Table([*columns, Column("changes", "by")], "Ways that bring 1M tokens within twice the cost of 4K")
    for way in ways:
        table.add(way.kept, way.users, way.decode, way.switch, way.prefill, "; ".join(way.changes))
    table.notes.append(
        "Costs over those of 4,000 tokens. What a lever does to answers was not measured; prefill stays."
    )
    return table, plain


def _show(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}"


def _claim(key: str) -> Claim:
    short, long = PUBLISHED[key]
    band = (long * (1 - EXACT), long * (1 + EXACT))
    return Claim(key, f"{TEXT[key]} at 50K", "Yi-34B, A100 80 GB", long, band, short, f" {UNITS[key]}")


STUDY = Study(
    name="long-context",
    system="Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis",
    title="Long contexts: theoretical peak performance",
    summary=(
        "A user of a long context costs more in four ways: prefill takes FLOPs, KV takes room of other users,",
        "every decode reads KV, and users that do not fit are switched over the host's link.",
        "The running example is a model of 34B with 50K tokens on an A100, against 4K tokens.",
        "Control: the same contexts with no more keys than at 4,000 tokens. What stays did not come from KV.",
        "Beside it the planner's prediction by reached rates, and the ways back from a million tokens.",
    ),
    reference="Fu, Challenges in Deploying Long-Context Transformers, arXiv:2405.08944",
    claims=(
        *(_claim(key) for key in TEXT),
        Claim("users-4k", "users in 80 GB at 4K", "Yi-34B, A100 80 GB", 20.0, (19.0, 21.0), 0.0, " users"),
        *(
            Claim(f"source-{key}", f"KV is the source: {TEXT[key]}", "of what 50K costs more", 1.0, (0.95, 1.05), 0.0)
            for key in ("users", *COSTS)
        ),
    ),
    experiments=(
        Experiment(
            "costs", "Yi-34B by context", (ON, OFF, PLANNED), "tokens", CONTEXTS, _task, 1, nature="predicted",
            shown={f"{TEXT[key]}, {UNITS[key]}": key for key in TEXT},
        ),
    ),
    judge=judge,
    profiles=(
        "the paper's A100: 312 TFLOP/s, 2 TB/s, 80 GB, 20 GB/s to the host, all of it reached",
        f"{DEVICE} of the catalogue x {PLANNED_DEVICES}: {from_device(catalog.device(DEVICE)).source}",
    ),
    differences=(
        "Bytes are counted exactly. The published KV of 11 GB at 50K is 11.4 GiB, that is 12.3 GB, and the published "
        "switch of 1.1 s takes it for 11 GB; the gates count as published, the claims count bytes.",
        "About 20 users at 4K do not follow from the paper's formula: (80 - 68) GB / 0.98 GB is 12; 80 GiB give 18.",
        "4K is 4,000 tokens, by which the published prefill of 0.89 s follows.",
        f"The planner's arm is on two devices of {DEVICE} (catalogue): on one there is no room for 50K.",
        "Exactly counted, 0.977 users fit at 50K, so not one; the published 1 follows from 11.4 GiB taken for 11.4 GB.",
        "That KV is the source of users, decode and switching lies in the formulas, which have nothing else to grow; "
        "only prefill could have come out otherwise, and did.",
        "The parts of KV that published methods keep are recalled from their abstracts, and nothing says that four of "
        "them together still answer well: the ways back are arithmetic, not advice.",
        "The control holds keys, so that it also spares the attention of the prompt over the keys that are gone.",
    ),
)  # fmt: skip
