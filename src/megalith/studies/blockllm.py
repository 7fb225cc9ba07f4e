"""BlockLLM: fine-tuned models as chains of shared blocks, against models of their own and a shared base.

Twenty synthetic fine-tunes on twelve A100: by rate, with popularity by a power law and without, by the number of
applications, and with each mechanism off. What the points run is in blockllm_cases.
"""

from __future__ import annotations

from functools import partial
from statistics import median

from megalith.report.table import Column, Table
from megalith.sim.sweep import PointResult
from megalith.studies.results import Results, quotient
from megalith.studies.study import (
    Arm,
    Case,
    Claim,
    Computed,
    Experiment,
    Figure,
    Finding,
    Gate,
    Judgement,
    Picture,
    Study,
)

BLOCKS = Arm("blocks", "on", "blocks")
PARAMETERS = Arm("parameters", "baseline", "shared parameters")
MODEL = Arm("model", "off", "a model for each")
PARAMETERS_APART = Arm("parameters-apart", "baseline", "shared parameters, placed by load")
MODEL_APART = Arm("model-apart", "baseline", "a model for each, placed by load")
SHARING = (BLOCKS, PARAMETERS, PARAMETERS_APART, MODEL, MODEL_APART)
"""Both baselines with either placement; the better one counts."""
FULL = Arm("coordinated", "on", "blocks")
QUEUE = Arm("queue", "off", "shortest queue, wherever the KV is")
PINNED = Arm("pinned", "baseline", "KV never moves")
TRUE_OUTPUT = Arm("true-output", "baseline", "no speculation")
ABLATION = (FULL, QUEUE, PINNED, TRUE_OUTPUT)
RATES = (10.0, 25.0, 50.0, 75.0)
RATE = 25.0
"""Requests a second at which claims are judged: decodes are short of rows, and devices are busy."""
UNIFORM = (25.0, 50.0)
APPLICATIONS = (10.0, 20.0, 30.0, 60.0, 120.0)
TOGETHER, APART = 1.0, 0.0
_CALL = "megalith.studies.blockllm_cases:serve"


def _options(case: Case, **more: float | str) -> Computed:
    sharing, _, apart = case.arm.partition("-")
    options: dict[str, float | str] = {"sharing": sharing, "apart": float(bool(apart)), "seed": case.seed}
    return Computed(call=_CALL, options=options | more)


def _rate(case: Case) -> Computed:
    return _options(case, rate=case.at, requests=_requests(case.at))


def _requests(rate: float) -> int:
    """Eight seconds of arrivals, 200 at least."""
    return max(200, round(8 * rate))


def _uniform(case: Case) -> Computed:
    return _options(case, rate=case.at, requests=_requests(case.at), skew=0.0)


def _applications(case: Case) -> Computed:
    return _options(case, rate=RATE, requests=_requests(RATE), applications=case.at)


def _ablation(case: Case) -> Computed:
    options: dict[str, float | str] = {
        "rate": RATE,
        "requests": 80,
        "seed": case.seed,
        "change": case.arm,
        "apart": float(case.at == APART),
    }
    return Computed(call=_CALL, options=options)


def judge(results: Results) -> Judgement:
    """P95 and utilisation against the better placement of each baseline; ablations; what fits."""
    p95, busy = _over(results, "rate", MODEL, "e2e_p95", RATE), _over(results, "rate", MODEL, "utilisation", RATE, -1)
    tokens = _over(results, "rate", MODEL, "tokens_per_s", RATE, -1)
    claim = STUDY.claim
    findings = [
        Finding(claim("p95"), _change(p95), *_pair(results, "e2e_p95", " s"), f"{RATE:g} req/s"),
        Finding(claim("utilisation"), _change(busy), *_pair(results, "utilisation", ""), "to the last arrival"),
        Finding(
            claim("whole"), _change(tokens), *_pair(results, "tokens_per_s", " tokens/s"), "to the last answer", False
        ),
    ]
    for rate in results.places("rate"):
        if rate != RATE:
            ours = _change(_over(results, "rate", MODEL, "e2e_p95", rate))
            pair = _pair(results, "e2e_p95", " s", rate)
            findings.append(Finding(claim("p95"), ours, *pair, f"{rate:g} req/s", False))
    base = _over(results, "rate", PARAMETERS, "e2e_p95", RATE)
    findings.append(Finding(claim("p95"), _change(base), *_pair(results, "e2e_p95", " s", RATE, PARAMETERS),
                            f"{RATE:g} req/s, over shared parameters", False))  # fmt: skip
    pictures = [
        Picture("p95", "P95 from end to end, seconds", "requests a second",
                panels={"P95, s": {a.title: results.curve("rate", a.name, "e2e_p95") for a in SHARING}}),
        Picture("applications", "Stored weights, GB", "applications",
                panels={"GB": {a.title: results.curve("applications", a.name, "stored_gb")
                               for a in (BLOCKS, PARAMETERS, MODEL)}}),
    ]  # fmt: skip
    return Judgement(findings, _gates(results), {"sharing": _table(results)}, pictures, [*_NOTES, _skew_note(results)])


def _gates(results: Results) -> list[Gate]:
    p95 = _over(results, "rate", MODEL, "e2e_p95")
    base = _over(results, "rate", PARAMETERS, "e2e_p95")
    shared = _over(results, "rate", MODEL, "e2e_p95", None, 1, PARAMETERS)
    stored = [results.middle("rate", arm.name, "stored_gb", RATE) for arm in (BLOCKS, PARAMETERS, MODEL)]
    same = results.middle_ratio("rate", BLOCKS.name, MODEL.name, "tokens", RATE)
    gates = [
        Gate("P95 of blocks over a model for each", p95, 0.0, 0.999, "sign"),
        Gate("P95 of blocks over shared parameters", base, 0.0, 0.999, "rank"),
        Gate("P95 of shared parameters over a model for each", shared, 0.0, 0.999, "rank"),
        Gate("utilisation of blocks over a model for each", _over(results, "rate", MODEL, "utilisation", None, -1),
             1.0, 9.0, "sign; the better of either placement"),
        Gate("stored: blocks over shared parameters", quotient(stored[0], stored[1]), 0.0, 0.999, "rank"),
        Gate("stored: shared parameters over models", quotient(stored[1], stored[2]), 0.0, 0.999, "rank"),
        Gate("tokens of blocks over a model for each", same, 1.0, 1.0, "the same requests"),
    ]  # fmt: skip
    for arm in (QUEUE, PINNED, TRUE_OUTPUT):
        for at, name in ((TOGETHER, "together"), (APART, "apart")):
            if at in results.places("ablation"):
                value = results.middle_ratio("ablation", FULL.name, arm.name, "tokens_per_s", at)
                gates.append(Gate(f"tokens/s, chains {name}, over: {arm.title}", value, 0.98, 99.0, "2 % for the tail"))
    return gates


def _over(
    results: Results, experiment: str, arm: Arm, figure: str, at: float | None = None, sign: int = 1, ours: Arm = BLOCKS
) -> float | None:
    """Ours over a baseline, seed by seed, the middle one; of the baseline's two placements the one better for it.

    `at` None: the middle one of all places and seeds, as the P95 of 200 requests is that of ten.
    """
    found = [results.ratio(experiment, ours.name, name, figure) for name in (arm.name, f"{arm.name}-apart")]
    values = [[one for place, some in ratios.items() if at in (None, place) for one in some] for ratios in found]
    ratios = [sign * median(some) for some in values if some]
    return sign * max(ratios) if ratios else None


def _change(ratio: float | None) -> float | None:
    return None if ratio is None else (ratio - 1.0) * 100


def _skew_note(results: Results) -> str:
    even, skewed = (_change(_over(results, name, MODEL, "e2e_p95", RATE)) for name in ("uniform", "rate"))
    if even is None or skewed is None:
        return "No figures with all applications as popular."
    word = "shrinks" if even > skewed else "does not shrink, which goes against what was expected"
    return (
        f"P95 over a model for each at {RATE:g} req/s: {even:.1f} % with all as popular, {skewed:.1f} % with "
        f"popularity 1 / rank, so the gain {word}. Requests that are spread evenly leave each model fewer rows, "
        "and a shared base merges them; what skew adds is a popular model that has queues of its own."
    )


def _pair(results: Results, figure: str, unit: str, at: float = RATE, arm: Arm = MODEL) -> tuple[str, str]:
    on = results.middle("rate", BLOCKS.name, figure, at)
    off = [results.middle("rate", name, figure, at) for name in (arm.name, f"{arm.name}-apart")]
    values = [one for one in off if one is not None]
    return _text([] if on is None else [on], unit), _text(values, unit)


def _text(values: list[float], unit: str) -> str:
    return " or ".join(f"{one:.3g}" for one in values) + unit if values else "-"


def _table(results: Results) -> Table:
    columns = [
        Column("applications", "applications", "count"),
        Column("arm", "sharing"),
        Column("stored", "stored, GB", "number", "predicted"),
        Column("fits", "fits", "number", "predicted"),
        Column("p95", "P95, s", "number", "simulated"),
    ]
    table = Table(columns, f"Twelve A100, 60 % of their memory for weights at most, {RATE:g} req/s")
    for at in results.places("applications"):
        for arm in (BLOCKS, PARAMETERS, MODEL):
            fits = results.curve("applications", arm.name, "fits").get(at, [])
            shown = ("stored_gb", partial(_where_it_fits, "e2e_p95"))
            values = [results.middle("applications", arm.name, figure, at) for figure in shown]
            table.add(int(at), arm.title, values[0], median(fits) if fits else None, values[1])
    return table


def _where_it_fits(name: str, result: PointResult) -> float | None:
    return result.figures.get(name)


_NOTES = [
    "No profile, model set or trace of BlockLLM was published: sizes of gains are no gates. Signs and rank are.",
    "What sharing saves is reading weights: a device reads all blocks that it serves in each round. Where prompts are "
    "most of the work, that is at high rates, little is left of it.",
    "With chains on one device no block has a next hop elsewhere: KV never moves and no surrogate runs, so those two "
    "mechanisms do nothing there. `apart` places blocks one by one; there they act.",
]
_SHOWN = {
    "P95, s": "e2e_p95", "P50, s": "e2e_p50", "tokens/s": "tokens_per_s", "utilisation": "utilisation", "busy": "busy",
    "rows a step": "rows", "stored, GB": "stored_gb",
}  # fmt: skip
_SHOWN_IF: dict[str, Figure] = {title: partial(_where_it_fits, name) for title, name in _SHOWN.items()}
STUDY = Study(
    name="blockllm",
    system="BlockLLM: Multi-tenant Finer-grained Serving for Large Language Models",
    title="BlockLLM: shared blocks of many fine-tuned models",
    summary=(
        "Fine-tunes of a few bases are mostly the same weights. BlockLLM cuts models into blocks, deploys equivalent",
        "ones once, and lets every block batch on its own across applications.",
        "KV is kept where it is when that is quicker; a surrogate may begin the next block ahead; chains are placed",
        "together. Control: the same requests on a model for each application, and on shared bases (as S-LoRA).",
    ),
    reference="Li et al., BlockLLM, arXiv:2404.18322",
    claims=(
        Claim("p95", "P95 latency over a model for each", "20 applications, 12 A100", -33.5, (-43.5, -23.5), 0.0, " %"),
        Claim("utilisation", "GPU utilisation over a model for each", "the same", 20.1, (10.1, 30.1), 0.0, " %"),
        Claim("whole", "GPU utilisation over the whole run", "the same", 20.1, (10.1, 30.1), 0.0, " %"),
    ),
    experiments=(
        Experiment("rate", "20 applications by rate, popularity 1 / rank", SHARING, "requests/s", RATES, _rate, 3,
                   (RATE,), shown=_SHOWN),
        Experiment("uniform", "20 applications by rate, all as popular", SHARING, "requests/s", UNIFORM, _uniform, 3,
                   (RATE,), shown=_SHOWN),
        Experiment("applications", f"by applications, {RATE:g} req/s", (BLOCKS, PARAMETERS, MODEL), "applications",
                   APPLICATIONS, _applications, 2, (30.0,), shown={"fits": "fits", **_SHOWN_IF}),
        Experiment("ablation", f"chains apart (0) or together (1), {RATE:g} req/s", ABLATION, "together",
                   (APART, TOGETHER), _ablation, 2, (TOGETHER,),
                   shown={**_SHOWN, "KV moves": "moves", "begun ahead": "trials", "messages": "messages"}),
    ),
    judge=judge,
    profiles=("a100-80gb of the catalogue, analytic timer; 100 Gb/s between servers",),
    differences=(
        "Fine-tunes are synthetic: half add an adapter only, of the others' blocks 60 % stay within cosine 0.98 of "
        "their base. These shares are assumptions, and gains follow them.",
        "Lengths are Azure's conversations. All arms know popularity, and have as many places for an application as "
        "its part of the requests is of the devices; more come with load.",
        "Placement is one rule for all arms, whole chains where a round costs least. Baselines run with placement by "
        "load as well, and each ratio is against the better one.",
        "Utilisation is useful FLOPs of the linear layers over the peak, to the last arrival; over the whole run it is "
        "as tokens/s. The published one is not defined in what was at hand.",
        "Models have four blocks. Stitching of different sizes is not in it; models that do not fit are not swapped.",
    ),
)  # fmt: skip
