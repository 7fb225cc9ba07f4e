"""KV in block floating point, with K's channels in an order that suits the blocks, against the order they have.

Measured on this machine's CPU with a real model and text; what the points measure is in bfp_outliers_cases.
"""

from __future__ import annotations

from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Computed, Experiment, Finding, Gate, Judgement, Study

ON = Arm("ordered", "on", "channels of K in a calibrated order")
OFF = Arm("natural", "off", "the same format, channels as the model has them")
ARMS = (ON, OFF)
TOKENS, FAST_TOKENS, BLOCK = 4096, 1024, 32
_CASES = "megalith.studies.bfp_outliers_cases"


def _point(case: Case, bits: int, values: int, block: int, call: str = "quality") -> Computed:
    tokens = FAST_TOKENS if case.fast else TOKENS
    options: dict[str, float | str] = {
        "arm": case.arm,
        "bits": bits,
        "values": values,
        "block": block,
        "tokens": tokens,
    }
    return Computed(call=f"{_CASES}:{call}", options=options)


def _keys(case: Case) -> Computed:
    return _point(case, int(case.at), 8, BLOCK)


def _both(case: Case) -> Computed:
    return _point(case, int(case.at), int(case.at), BLOCK)


def _blocks(case: Case) -> Computed:
    return _point(case, 3, 8, int(case.at))


def _decode(case: Case) -> Computed:
    return _point(case, int(case.at), int(case.at), BLOCK, "decode")


def removed(results: Results, experiment: str, at: float, figure: str) -> float | None:
    """Share of a loss without the order that is not there with it; None where nothing is lost without it."""
    on, off = (results.middle(experiment, arm.name, figure, at) for arm in ARMS)
    return None if on is None or off is None or off <= 0 else 1 - on / off


def judge(results: Results) -> Judgement:
    """How much of the rise of perplexity the order takes away at 4 and 3 bits, and what the cache takes."""
    claim = STUDY.claim
    findings = [
        _finding(results, claim("rise-4"), "keys", 4.0, "rise"),
        _finding(results, claim("rise-3"), "keys", 3.0, "rise"),
        Finding(claim("bytes"), _saving(results), *_bytes(results, 4.0, 8.0), "both K and V: the formula, and held"),
        _finding(results, claim("kl-4"), "keys", 4.0, "kl", counts=False),
        _finding(results, claim("kl-3"), "keys", 3.0, "kl", counts=False),
        _finding(results, claim("both-4"), "both", 4.0, "rise", counts=False),
        _finding(results, claim("both-3"), "both", 3.0, "rise", counts=False),
    ]
    eight = results.middle("keys", OFF.name, "rise", 8.0)
    base = results.middle("keys", OFF.name, "float", 8.0)
    over = results.middle("decode", ON.name, "over", 4.0)
    gates = [
        Gate("decode step, ordered over natural", over, 0.85, 1.15, "the order is in the weights"),
        Gate("perplexity with 8 bits over float KV's", _ratio(eight, base), -0.01, 0.01, "rise over perplexity"),
    ]
    whole = removed(results, "blocks", 64.0, "kl")
    gates.append(Gate("KL taken away with a head in one block", whole, -0.02, 0.02, "order cannot matter there"))
    return Judgement(findings, gates, notes=_NOTES)


def _finding(
    results: Results, claim: Claim, experiment: str, at: float, figure: str, *, counts: bool = True
) -> Finding:
    on, off = (results.middle(experiment, arm.name, figure, at) for arm in ARMS)
    words = ["-" if value is None else f"{value:.3g}" for value in (on, off)]
    note = "" if figure == "kl" else "float KV has the perplexity that the points print"
    return Finding(claim, removed(results, experiment, at, figure), words[0], words[1], note, counts)


def _saving(results: Results) -> float | None:
    four, eight = (results.middle("both", ON.name, "bytes", at) for at in (4.0, 8.0))
    return None if four is None or eight is None else eight / four


def _bytes(results: Results, *places: float) -> tuple[str, str]:
    found = (results.middle("both", ON.name, "bytes", at) for at in places)
    four, eight = ("-" if value is None else f"{value:,.0f} B a token" for value in found)
    return four, eight


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


_NOTES = [
    "Perplexity of 2,040 tokens is known to about 7 %, but arms see the same tokens and most of that cancels; the KL "
    "divergence from float KV is far less noisy.",
    "The publication sorts by the norms of W_k's rows. That raises the error of the logits in some heads of this "
    "model, so each head takes the best of three orders, by that error on another text. Rotary pairs sorted by energy "
    "and laid side by side were tried first and made perplexity higher than no order (4 bits: 39.9 against 34.9, "
    "once): the two of a pair take turns in being large, and apart they rarely set both blocks' exponents at once.",
    "The cache is packed and unpacked by NumPy here: nothing on this page says how fast a kernel would be.",
]
_REMOVED = "share of the loss taken away"
_HALF = "perplexity close to that of 16 bits; read here as at least half of the loss"
STUDY = Study(
    name="bfp-outliers",
    system="Accurate Block Quantization in LLMs with Outliers",
    title="KV in block floating point, outlier channels kept together",
    summary=(
        "Blocks of channels share an exponent, so one large channel costs all others of its block their low bits.",
        "The same channels of K are large for every token: an order of channels puts like beside like.",
        "The order is one of rows of W_q and W_k, fixed when weights are loaded; q . k does not change.",
        "Control: the same formats with the channels as the model has them.",
    ),
    reference="Trukhanov and Soloveychik, Accurate Block Quantization in LLMs with Outliers, arXiv:2403.20137",
    claims=(
        Claim("rise-4", "rise of perplexity taken away, 4 bits", _REMOVED, 0.5, (0.5, 1.0), 0.0, "", _HALF),
        Claim("rise-3", "the same, 3 bits", _REMOVED, 0.5, (0.5, 1.0), 0.0, "", _HALF),
        Claim("bytes", "KV of 8-bit mantissas over 4-bit ones", "blocks of 32", 2.0, (1.85, 2.15)),
        Claim("kl-4", "KL divergence taken away, 4 bits", "from float KV", 0.5, (0.5, 1.0), 0.0, "", _HALF),
        Claim("kl-3", "the same, 3 bits", "from float KV", 0.5, (0.5, 1.0), 0.0, "", _HALF),
        Claim("both-4", "rise taken away, V at 4 bits too", _REMOVED, 0.5, (0.5, 1.0), 0.0, "", _HALF),
        Claim("both-3", "rise taken away, V at 3 bits too", _REMOVED, 0.5, (0.5, 1.0), 0.0, "", _HALF),
    ),
    experiments=(
        Experiment(
            "keys", "K in m bits, V in 8, blocks of 32", ARMS, "bits of a mantissa of K", (8.0, 4.0, 3.0), _keys, 1,
            (3.0,), nature="measured",
            shown={"perplexity": "perplexity", "rise over float KV": "rise", "KL, nats": "kl",
                   "same first choice": "same", "bytes a token": "bytes", "times smaller than bf16": "saving"},
        ),
        Experiment(
            "both", "K and V in m bits, blocks of 32", ARMS, "bits of a mantissa", (8.0, 4.0, 3.0), _both, 1,
            (3.0,), nature="measured",
            shown={"perplexity": "perplexity", "rise over float KV": "rise", "KL, nats": "kl",
                   "bytes a token": "bytes", "times smaller than bf16": "saving"},
        ),
        Experiment(
            "blocks", "K in 3 bits, V in 8, heads of 64", ARMS, "channels of a block", (16.0, 64.0), _blocks, 1,
            (64.0,), nature="measured",
            shown={"perplexity": "perplexity", "rise over float KV": "rise", "KL, nats": "kl"},
        ),
        Experiment(
            "decode", "a decode step after 511 tokens", ARMS, "bits of a mantissa", (4.0,), _decode, 1,
            nature="measured", shown={"ms": "ms", "over natural": "over"},
        ),
    ),
    judge=judge,
    profiles=("this machine's CPU: measured as the study runs",),
    differences=(
        "SmolLM2 135M (heads of 64) and 4,096 tokens of a novel of 1890 stand for Llama 2 7B (heads of 128) and "
        "WikiText-2.",
        "An order is chosen for each head on a calibration text of some 500 tokens, not by the norms of W_k alone.",
        "K is rounded after rotary embedding, as it is cached; each channel's angle and partner move with it.",
        "The saving is read as 8-bit over 4-bit mantissas, an exponent byte for 32 in both.",
    ),
)  # fmt: skip
