"""Fleets whose decode attention runs on other devices (Lamina, InstInfer): the layouts that are worth a simulated run.

Arithmetic only, at the mean context of the load: for every pair of devices, so many of each, the decode tokens for what
is minimised. It leaves out prompts and queues, which the runs that follow do not. Must not simulate.
"""

from __future__ import annotations

from itertools import product
from math import inf

from megalith.cost.timer import StepTimer
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.plan.attention import AttentionQuestion, mixed
from megalith.plan.fleet_bounds import limits
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import FleetQuestion, Shape
from megalith.specs import catalog

_TRIED = 2
"""Layouts that runs are spent on."""


def attention_choices(question: FleetQuestion, device: str) -> list[str]:
    """What may hold the KV cache beside a device: what is offered for that alone, then the other devices."""
    return [one for one in dict.fromkeys((*question.attention_devices, *question.devices)) if one != device]


def layouts(question: FleetQuestion, load: Load, timer: StepTimer) -> tuple[list[Shape], str]:
    """(the best layouts, best first; why there is none). `timer`: of the fleet that they are compared with.

    Source: Lamina (arXiv:2405.01814v2) for model and attention devices, InstInfer (arXiv:2409.04992) for drives.
    """
    if not any(attention_choices(question, device) for device in question.devices):
        return [], ""
    if question.minimise == "power" or question.power_budget_w is not None:
        return [], "not simulated: watts are searched for fleets of one kind of device only"
    if not isinstance(timer, AnalyticTimer):
        why = (
            "not simulated: the other fleets are timed by measured operators, which do not part attention from the rest"
        )
        return [], f"{why} (--timer analytic compares them)"
    found: list[tuple[float, int, Shape]] = []
    for device in dict.fromkeys(question.devices):
        for other in attention_choices(question, device):
            asked = attention_question(question, load, device, other)
            for degree, count, batches in product(asked.tensor_parallel, asked.counts, asked.batches):
                one = mixed(asked, asked.contexts[0], degree, count, batches)
                text = f"{count}x{other}/batches={batches}"
                shape = Shape(device=device, tensor_parallel=degree, setup="mixed", attention=text)
                spent = _spent(question, shape)
                if one is not None and spent is not None and shape.devices <= question.most_devices:
                    found.append((spent / one.tokens_per_s, len(found), shape))
    if not found:
        return [], "no layout fits, is in time and has a price"
    return [shape for _, _, shape in sorted(found, key=lambda one: one[:2])[:_TRIED]], ""


def attention_question(question: FleetQuestion, load: Load, device: str, other: str) -> AttentionQuestion:
    """The same question of one instance, for decode alone."""
    tpot_ns = limits(question.slo).tpot[0]
    return AttentionQuestion(
        spec=catalog.model(question.model), device=device, attention_device=other,
        contexts=(max(1, round(load.mean_context)),), tensor_parallel=question.tensor_parallel,
        weight_format=question.weight_format, kv_format=question.kv_format,
        tpot_ms=None if tpot_ns == inf else tpot_ns / 1e6,
    )  # fmt: skip


def _spent(question: FleetQuestion, shape: Shape) -> float | None:
    return float(shape.devices) if question.minimise == "devices" else question.instance_price_usd(shape)
