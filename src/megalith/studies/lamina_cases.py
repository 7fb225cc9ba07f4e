"""What the points of the Lamina study compute: pairs of fleets by trace and by context, ablations, simulated fleets.

Rates are those of the catalogue for H100 and H20 (80 % of the bandwidth). Knows planner and simulator; not claims.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import msgspec

from megalith.base.units import NS_PER_S
from megalith.cost.attention_devices import attention_devices
from megalith.cost.attention_elsewhere import steady_ps
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import from_device
from megalith.cost.timer_elsewhere import ElsewhereTimer
from megalith.plan.attention import PS_PER_S, AttentionQuestion, Deployment, mixed, plain, with_link
from megalith.sim.run import simulate
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs import catalog
from megalith.specs.attention import parse_attention

Options = Mapping[str, float | str]
Figures = dict[str, float | None]

PAIRS = {"llama-33b": (1, 2, 2), "llama-65b": (2, 4, 4), "llama-3.1-70b": (2, 4, 4)}
"""Published: H100 and H20 of Lamina, and H100 of the baseline. Llama 3.1 70B has the shape of Llama 3 70B."""
TRACES = {"conv": 1_155 + 211 // 2, "code": 2_048 + 28 // 2, "Kimi": 12_035 + 343 // 2}
"""Tokens behind a request in the mean: the prompt and half of the answer (Azure 2023 and Mooncake recordings)."""
CELLS = tuple((model, trace) for model in PAIRS for trace in TRACES)
SLOW = "trip=66e-6"
"""There and back in 66 us, as the analytic figures that the gate is for."""
ARMS = {"lamina": SLOW, "fast": "", "wide": "", "one-batch": SLOW, "home": f"at=home/{SLOW}"}
"""Options of the attention by arm."""
LONGEST = 140_000
"""Positions: traces of long contexts ran on models of short ones."""


def deployment(model: str, context: int, arm: str) -> Deployment | None:
    """The instance of an arm: Lamina's pair, or H100 or H20 of the baseline's number."""
    model_devices, count, own = PAIRS[model]
    question = AttentionQuestion(spec=catalog.model(model), options=ARMS.get(arm, ""))
    if arm in ("own", "other"):
        return plain(question, context, own, "h100-sxm" if arm == "own" else "h20")
    if arm == "wide":
        question = msgspec.structs.replace(question, options=f"link={45.7e9 * model_devices}")
    batches = 1 if arm in ("one-batch", "home") else 2
    found = mixed(question, context, model_devices, count, batches)
    return with_link(question, context, found) if arm in ("lamina", "fast") else found


def cell(options: Options) -> Figures:
    """One model under the lengths of one trace."""
    model, trace = CELLS[int(options["cell"])]
    return _figures(deployment(model, TRACES[trace], str(options["arm"])))


def by_context(options: Options) -> Figures:
    """One model at one context."""
    return _figures(deployment(str(options["model"]), int(options["context"]), str(options["arm"])))


def _figures(found: Deployment | None) -> Figures:
    if found is None:
        return dict.fromkeys(("tokens_per_s", "tokens_per_usd", "tbt_ms", "requests", "link_gbps"))
    return {
        "tokens_per_s": found.tokens_per_s, "tokens_per_usd": found.tokens_per_usd, "tbt_ms": found.step_s * 1e3,
        "requests": float(found.requests), "link_gbps": found.needed_bytes_per_s * 8 / 1e9,
    }  # fmt: skip


@functools.cache
def timer(model: str, options: str) -> ElsewhereTimer:
    """Lamina's pair with these options."""
    model_devices, count, _ = PAIRS[model]
    spec = catalog.model(model)
    cost = CostModel(spec, from_device(catalog.device("h100-sxm")), weight_bytes(spec, "bf16"), devices=model_devices)
    return ElsewhereTimer(cost, attention_devices(parse_attention(f"{count}xh20/{options}")))


def ablation(options: Options) -> Figures:
    """Time between tokens of so many requests at 1,024 tokens, every operator of the step scheduled."""
    model, requests = str(options["model"]), int(options["requests"])
    words = {"early": "batches=1", "late": "batches=1/early=off", "rotation": "batches=2"}[str(options["arm"])]
    one = timer(model, words)
    batches, way = one.times(requests, 1_024, min(one.devices.spec.batches, requests))
    return {"tbt_ms": steady_ps(batches, one.cost.spec.num_layers, way) / PS_PER_S * 1e3}


def measure(point: Point) -> PointResult:
    """A plain run with as many positions as the KV cache has room for."""
    spec = msgspec.structs.replace(catalog.model(point.scenario.model), max_context=LONGEST)
    result = simulate(point.scenario, spec)
    figures: dict[str, float | None] = {
        "tokens_per_s": result.figures.steady.output_tokens_per_s,
        "span_s": result.end_ns / NS_PER_S,
    }
    return msgspec.structs.replace(summarise(point, result), figures=figures)
