"""From a kind, a size and what was found of it to a Choice; which of two choices comes first.

Knows figures and prices; must not search.
"""

from __future__ import annotations

from megalith.plan.fleet_answer import Choice
from megalith.plan.fleet_estimate import Prediction
from megalith.plan.fleet_kind import Kind
from megalith.plan.fleet_question import SETUP_NAMES, Size
from megalith.plan.fleet_trial import Trial
from megalith.specs.slo import Slo


def make_choice(
    slo: Slo, kind: Kind, size: Size, objective: float, trial: Trial | None, prediction: Prediction | None
) -> Choice:
    """The fleet with its figures: those of the trial, else of the prediction."""
    unit = kind.ability.price_per_hour_usd
    price = None if unit is None else unit * size.instances
    tokens = 0.0 if trial is None else trial.output_tokens_per_s
    return Choice(
        shape=kind.shape, size=size, flags=kind.shape.flags(size),
        devices=size.instances * kind.shape.devices, objective=objective,
        price_per_hour_usd=price, power_w=None if trial is None else trial.power_w,
        price_per_million_tokens_usd=None if price is None or tokens <= 0 else price / (tokens * 3600) * 1e6,
        trial=trial,
        ttft_ns=latency(slo, trial, "ttft") if prediction is None else prediction.ttft_ns,
        tpot_ns=latency(slo, trial, "tpot") if prediction is None else prediction.tpot_ns,
        margin=prediction.margin if prediction is not None else None if trial is None else trial.margin,
    )  # fmt: skip


def latency(slo: Slo, trial: Trial | None, metric: str) -> float | None:
    """What the trial had where the service level first bounds `metric` (ttft or tpot), in ns."""
    figures = {} if trial is None else trial.figures_ns
    return next((figures.get(str(bound)) for bound in slo.bounds if bound.metric == metric), None)


def order(choice: Choice) -> tuple[float, int, int, int, float]:
    """Best first; among equals the plainer set-up, then fewer devices, then the larger margin."""
    shape = choice.shape
    involved = SETUP_NAMES.index(shape.setup)
    return (
        choice.objective,
        involved,
        len(shape.extras) + shape.pipeline_parallel + (shape.attention is not None),
        choice.devices,
        -(choice.margin or 0.0),
    )


def bought(choice: Choice) -> tuple[str, int, int, str]:
    """What one has to buy for it."""
    apart = (choice.shape.attention or "").partition("/")[0]
    return choice.shape.device, choice.shape.devices, choice.size.instances, apart
