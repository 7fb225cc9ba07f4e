"""Bipolar integers of any width: products by pairs of bit planes, against all planes and against the usual formats.

Measured on this machine's CPU. The published figures are of tensor cores against CUTLASS, and no accelerator is used
here, so what is judged is what the decomposition gives where popcounts are table look-ups. What the points measure is
in bipolar_int_cases.
"""

from __future__ import annotations

from statistics import median

from megalith.report.table import Column, Table
from megalith.studies.bipolar_int_cases import bits_of
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Computed, Experiment, Finding, Gate, Judgement, Picture, Study

ON = Arm("planes", "on", "as many planes as bits")
OFF = Arm("all-planes", "off", "the same kernel, always 8 x 8 planes")
INT8, INT4 = Arm("q8_0", "baseline", "Q8_0, 8-bit products"), Arm("q4_0", "baseline", "Q4_0, 8-bit activations")
ARMS = (ON, OFF, INT8, INT4)
PAIRS = (1.1, 1.2, 2.2, 1.8, 2.4, 2.8, 3.3, 4.4, 3.8, 6.6, 4.8, 6.8, 8.8)
"""Bits of weights . bits of activations."""
FITTED = (1.1, 2.4, 4.8, 8.8)
"""Places that the line is fitted to; all others are predicted."""
SERVED = (1.1, 2.2, 2.8, 4.4, 4.8, 8.8)
ROWS = 32
_CASES = "megalith.studies.bipolar_int_cases"


def _product(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:product", options={"arm": case.arm, "at": case.at, "rows": ROWS, "seed": case.seed})


def _served(case: Case) -> Computed:
    layers = 2 if case.fast else 0
    return Computed(call=f"{_CASES}:serve", options={"arm": case.arm, "at": case.at, "layers": layers})


def planes(at: float) -> int:
    """Pairs of planes."""
    weights, activations = bits_of(at)
    return weights * activations


def line(points: dict[float, float]) -> tuple[float, float]:
    """(a, b) of time = a + b * pairs with the least relative error."""
    pairs = {at: (1 / value, planes(at) / value) for at, value in points.items()}
    uu = sum(u * u for u, _ in pairs.values())
    uv = sum(u * v for u, v in pairs.values())
    vv = sum(v * v for _, v in pairs.values())
    u1, v1 = sum(u for u, _ in pairs.values()), sum(v for _, v in pairs.values())
    determinant = uu * vv - uv * uv
    return (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant


def judge(results: Results) -> Judgement:
    """The best pairs against the usual products; the line of time over pairs of planes, and how far others are from it.

    Times are over those of Q8_0 in the same run: what slows the machine slows both.
    """
    found = _times(results, ON, "over_q8_0")
    fours = {at: 1 / value for at, value in _times(results, ON, "over_q4_0").items()}
    claim = STUDY.claim
    best = max(fours, key=lambda at: fours[at], default=1.1)
    findings = [
        Finding(claim("product"), fours.get(best), *_ps(results, best), f"{_name(best)}, activations included"),
        Finding(claim("product-w4a4"), fours.get(4.4), *_ps(results, 4.4), "", False),
        Finding(claim("product-int8"), 1 / found[best] if best in found else None, *_ps(results, best), "", False),
        Finding(claim("decode"), *_decode(results), "SmolLM2's shape, one sequence, one thread"),
    ]
    same = results.middle_ratio("products", ON.name, OFF.name, "over_q8_0", 8.8)
    growth = found[8.8] / found[1.1] if 1.1 in found and 8.8 in found else None
    gates = [
        Gate("8 x 8 planes as they are over the control", same, 0.8, 1.25, "the same kernel on the same numbers"),
        Gate("8 x 8 planes over 1 x 1, times longer", growth, 4.0, 64.0, "64 times the pairs, and a constant"),
    ]
    tables = {}
    if all(at in found for at in FITTED) and len(found) > len(FITTED):
        fitted = line({at: found[at] for at in FITTED})
        tables["planes"] = _table(found, fours, fitted)
        others = [_predicted(fitted, at) / found[at] for at in found if at not in FITTED]
        for which, value in (("farthest below", min(others)), ("farthest above", max(others))):
            gates.append(Gate(f"a + b x pairs over measured, {which}", value, 0.6, 1.67, "fitted to 4 other pairs"))
    ratios = {float(planes(at)): [1 / value] for at, value in found.items()}
    pictures = [
        Picture(
            "planes", "Times faster than Q8_0", "pairs of planes", ratios={"product": ratios}, ylabel="times faster"
        ),
    ]
    return Judgement(findings, gates, tables, pictures, _NOTES)


def _times(results: Results, arm: Arm, figure: str) -> dict[float, float]:
    return {at: median(values) for at, values in results.curve("products", arm.name, figure).items()}


def _name(at: float) -> str:
    weights, activations = bits_of(at)
    return f"w{weights}a{activations}"


def _predicted(fitted: tuple[float, float], at: float) -> float:
    return fitted[0] + fitted[1] * planes(at)


def _table(found: dict[float, float], fours: dict[float, float], fitted: tuple[float, float]) -> Table:
    columns = [
        Column("pair", "bits", "text"),
        Column("planes", "pairs of planes", "count"),
        Column("time", "over Q8_0's time", "number", "measured"),
        Column("line", "the line", "number", "predicted"),
        Column("over", "line over measured", "number"),
        Column("four", "times Q4_0's speed", "number", "measured"),
    ]
    table = Table(columns, f"Over Q8_0's time: {fitted[0]:.3g} + {fitted[1]:.3g} x pairs of planes (* fitted to)")
    for at in sorted(found, key=planes):
        guess = _predicted(fitted, at)
        name = f"{_name(at)}{'*' if at in FITTED else ''}"
        table.add(name, planes(at), found[at], guess, guess / found[at], fours.get(at))
    return table


def _ps(results: Results, at: float) -> tuple[str, str]:
    """With and without the mechanism."""
    both = (results.middle("products", arm.name, "ps", at) for arm in (ON, OFF))
    on, off = ("-" if value is None else f"{value:.3g} ps a weight" for value in both)
    return on, off


def _decode(results: Results) -> tuple[float | None, str, str]:
    """The fastest width: over Q8_0's speed, tokens/s, and those of the control."""
    speedups = {at: median(values) for at, values in results.curve("decode", ON.name, "speedup").items()}
    if not speedups:
        return None, "-", "-"
    best = max(speedups, key=lambda at: speedups[at])
    both = (results.middle("decode", arm.name, "tokens_per_s", best) for arm in (ON, OFF))
    on, off = ("-" if value is None else f"{value:.3g} tokens/s" for value in both)
    return speedups[best], f"{_name(best)}, {on}", off


_NOTES = [
    "The claim is judged against Q4_0, the narrowest usual format. Over Q8_0 single bits come to the published figure "
    "too, at an eighth of its bits: that is no reproduction of it.",
    "No accelerator was used: nothing here says what tensor cores give. On AVX2 a pair of planes of 256 weights takes "
    "six instructions, while one vpmaddubsw multiplies 32 weights of up to 8 bits at once, so few planes are needed "
    "before the usual formats are faster.",
    "What each width does to answers is not in this study: `megalith perplexity` on a file of `megalith quantize "
    "--to bipolar4a8` says it; docs/guides/bipolar-int.md has a table.",
]
STUDY = Study(
    name="bipolar-int",
    system="Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores",
    title="Bipolar integers of 1 to 8 bits, by bit planes",
    summary=(
        "Every bit of a weight and of an activation stands for +1 or -1 times its power of two.",
        "A product of p-bit and q-bit numbers is p x q products of single bits, put together again exactly.",
        "So any width of 1 to 8 bits runs, takes exactly its bits of memory, and costs by its planes.",
        "Control: the same kernel with all 8 x 8 planes, whatever the width. Also the 8-bit products of Q8_0 and Q4_0.",
    ),
    reference="Ma et al., Efficient Arbitrary Precision Acceleration for LLMs on GPU Tensor Cores, arXiv:2409.17870",
    claims=(
        Claim("product", "a product over the usual one, up to", "CUTLASS there; Q4_0 on a CPU here", 2.4, (2.0, 2.8)),
        Claim("product-w4a4", "the same, 4 x 4 bits", "Q4_0 on a CPU", 2.4, (2.0, 2.8)),
        Claim("product-int8", "the same, over Q8_0", "a format of eight times the bits", 2.4, (2.0, 2.8)),
        Claim("decode", "inference, up to", "Llama 2 7B on a GPU there; decode on a CPU here", 6.7, (5.5, 8.0)),
    ),
    experiments=(
        Experiment(
            "products", f"{ROWS} rows by 1,536 x 576 weights", ARMS, "weights . activations, bits", PAIRS, _product, 3,
            (1.1, 2.2, 2.4, 4.8, 8.8), nature="measured",
            shown={"ps a weight and row": "ps", "over Q8_0's time": "over_q8_0", "over Q4_0's time": "over_q4_0"},
        ),
        Experiment(
            "decode", "a decode step of one sequence", ARMS, "bits of weights . of activations", SERVED, _served, 1,
            (1.1,), nature="measured",
            shown={"tokens/s": "tokens_per_s", "times Q8_0's speed": "speedup", "weights, MiB": "mib"},
        ),
    ),
    judge=judge,
    profiles=("this machine's CPU, one thread, AVX2 where it has it: measured as the study runs",),
    differences=(
        "A CPU and its own int8 kernels stand for the GPU and CUTLASS. The published layouts for shared memory and "
        "tensor cores have no counterpart; planes lie in panels of 16 columns.",
        "Scales are of 64 weights, and of 64 activations of a row, as each step finds them.",
        "Embedding and head stay in Q8_0 and are part of every decode step.",
        "Weights are random in the timed products and steps; kernels do not look at values.",
    ),
)  # fmt: skip
