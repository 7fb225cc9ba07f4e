"""What the points of the InstInfer study compute: decode steps with KV on drives, by path, batch, drives and sparsity.

OPT-13B on one A6000 of the catalogue. Rates are profiles; nothing here is measured or fitted to a published gain.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import msgspec

from megalith.base.units import NS_PER_S
from megalith.cost.attention_devices import attention_devices, kept_share
from megalith.cost.compute import CostModel
from megalith.cost.memory import kv_bytes_per_token, weight_bytes
from megalith.cost.profile import from_device
from megalith.cost.timer_elsewhere import ElsewhereTimer
from megalith.plan.attention import PS_PER_S
from megalith.sim.run import simulate
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs import catalog
from megalith.specs.attention import parse_attention

Options = Mapping[str, float | str]
Figures = dict[str, float | None]

MODEL, DEVICE = "opt-13b", "a6000"
CONTEXT = 1_536
"""1,024 tokens of prompt and half of 1,024 of answer, as published."""
HOST_BYTES_PER_S = 25e9
"""Of the accelerator's own link, which all drives share: PCIe 4.0 x16, reached (catalogue)."""
DRIVE_LINK_BYTES_PER_S = 3.5e9
DECLARED_BYTES_PER_S = 1.6e9
"""Effective path of FlexGen from drives to the GPU that the published 6.85x needs. Declared, not measured."""


def attention_text(arm: str, drives: int = 1, rate: float = 5.5e9, keep: int = 8, run: int = 4) -> str:
    """The attention of a pool by arm."""
    link = min(drives * DRIVE_LINK_BYTES_PER_S, HOST_BYTES_PER_S)
    if arm == "host":
        return f"{drives}xnvme-gen4/at=home/batches=1/rate={rate:g}/link={min(drives * rate, HOST_BYTES_PER_S):g}"
    sparse = f"/keep={keep}/run={run}/unmeasured=true" if arm == "sparse" else ""
    return f"{drives}xinstcsd/batches=1/early=off/link={link:g}{sparse}"


@functools.cache
def timer(text: str) -> ElsewhereTimer:
    """OPT-13B with this attention."""
    spec = catalog.model(MODEL)
    cost = CostModel(spec, from_device(catalog.device(DEVICE)), weight_bytes(spec, "bf16"))
    return ElsewhereTimer(cost, attention_devices(parse_attention(text)))


def step(options: Options) -> Figures:
    """A decode step of a batch."""
    arm, requests = str(options["arm"]), int(options.get("requests", 64))
    if arm == "declared":
        arm, rate = "host", DECLARED_BYTES_PER_S
    else:
        rate = float(options.get("rate", 5.5e9))
    run, drives = int(options.get("run", 4)), int(options.get("drives", 1))
    one = timer(attention_text(arm, drives, rate, int(options.get("keep", 8)), run))
    seconds = one.step_ps((), requests, requests * CONTEXT, CONTEXT) / PS_PER_S
    kv_bytes = requests * CONTEXT * kv_bytes_per_token(catalog.model(MODEL))
    return {
        "step_s": seconds, "tokens_per_s": requests / seconds, "kv_gb": kv_bytes / 1e9,
        "kept": kept_share(one.devices, one.cost.spec),
    }  # fmt: skip


def measure(point: Point) -> PointResult:
    """A plain run, with all its output tokens over its length."""
    result = simulate(point.scenario)
    span = result.end_ns / NS_PER_S
    figures: dict[str, float | None] = {
        "tokens_per_s": result.figures.output_tokens / span, "requests_per_s": result.requests / span,
    }  # fmt: skip
    return msgspec.structs.replace(summarise(point, result), figures=figures)
