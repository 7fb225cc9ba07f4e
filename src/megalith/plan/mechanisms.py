"""What each published mechanism is worth for a load: the best fleet with it against the best without it.

Set-ups compete as kinds of fleets of their own. Extras are tried on the best kind: one policy more, such as whole
prompts first instead of SplitFuse, which is SplitFuse's control. Of the others arithmetic says why they do not apply,
or the most that they could save. Knows choices and loads; must not simulate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from megalith.base.errors import MegalithError
from megalith.plan.attention import plan_attention
from megalith.plan.fleet_answer import Choice, Contribution, FleetPlan, Passed
from megalith.plan.fleet_elsewhere import attention_choices, attention_question
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import FleetQuestion, Shape

WORTH = 0.005
"""Savings below that share are none."""
_WINDOW_S = 600.0


POLCA = "more servers under one power budget"
SCALING = "scaling with the load"
"""What is decided after the search has this name among the contributions."""


class Mechanism(NamedTuple):
    """One that the search can switch on or off."""

    name: str
    source: str
    setup: str = ""
    """The set-up that it is."""
    extra: str = ""
    """The policy that switches it on, or off where `default`."""
    default: bool = False
    """Plain fleets have it."""


MECHANISMS = (
    Mechanism("SplitFuse", "DeepSpeed-FastGen", extra="prefill-first", default=True),
    Mechanism("live migration", "Llumnix", setup="llumnix"),
    Mechanism("prompt and token pools", "Splitwise", setup="splitwise"),
    Mechanism("prefill and decode apart", "DistServe", setup="distserve"),
    Mechanism("nano-batches", "NanoFlow", extra="nanoflow"),
    Mechanism("KV lent between instances", "Infinite-LLM", extra="infinite"),
)
"""In the order of the answer."""


def variants(best: Shape) -> list[Shape]:
    """The best kind of fleet with each extra policy, and as pipelines of two stages on as many devices."""
    extra = [
        msgspec.structs.replace(best, extras=(*best.extras, one.extra))
        for one in MECHANISMS
        if one.extra and one.extra not in best.extras and _takes(best, one)
    ]
    return extra + pipelines(best)


def pipelines(best: Shape) -> list[Shape]:
    """Half the tensor parallel degree, twice the stages: without blocking and, as the control, blocking."""
    if best.tensor_parallel % 2 or best.split or best.extras:
        return []
    half = msgspec.structs.replace(best, tensor_parallel=best.tensor_parallel // 2, pipeline_parallel=2)
    return [msgspec.structs.replace(half, pipeline=way) for way in ("non-blocking", "blocking")]


def contributions(
    question: FleetQuestion, load: Load, choices: Sequence[Choice], passed: Sequence[Passed], nature: str,
    not_apart: str = "",
) -> list[Contribution]:  # fmt: skip
    """One for each mechanism, in the order of MECHANISMS; then those that could not be tried here.

    `not_apart`: why no fleet with its attention on other devices was simulated.
    """
    apart = _apart(choices, passed, nature) or _attention(question, load, choices[0].shape, not_apart)
    choices = [one for one in choices if one.shape.attention is None]
    passed = [one for one in passed if one.shape.attention is None]
    found = [_worth(one, choices, passed, nature) for one in MECHANISMS if _asked(question, one)]
    further = [apart, _scaling(load), *_elsewhere(question)]
    return [*found, _pipeline(choices, passed, nature), *further]


def _asked(question: FleetQuestion, one: Mechanism) -> bool:
    return not one.setup or one.setup in question.setups


def _takes(shape: Shape, one: Mechanism) -> bool:
    """Splitwise has a batch policy of its own; who lends KV has a router of its own and whole instances."""
    if one.extra == "infinite":
        return shape.setup == "mixed"
    return not (one.extra == "prefill-first" and shape.setup == "splitwise")


def _worth(one: Mechanism, choices: Sequence[Choice], passed: Sequence[Passed], nature: str) -> Contribution:
    ordered = sorted(choices, key=lambda choice: choice.objective)
    if one.setup:
        with_it = [choice for choice in ordered if choice.shape.setup == one.setup and not choice.shape.extras]
        without = [choice for choice in ordered if choice.shape.setup == "mixed" and not choice.shape.extras]
        tried = [each for each in passed if each.shape.setup == one.setup and not each.shape.extras]
    else:
        switched = [choice for choice in ordered if one.extra in choice.shape.extras]
        tried = [each for each in passed if one.extra in each.shape.extras]
        shapes: list[Shape] = [*(each.shape for each in switched), *(each.shape for each in tried)]
        bases = [msgspec.structs.replace(shape, extras=_less(shape, one.extra)) for shape in shapes]
        base = [choice for choice in ordered if choice.shape in bases]
        with_it, without = (base, switched) if one.default else (switched, base)
    return _compare(one, with_it, without, tried, nature)


def _compare(
    one: Mechanism, with_it: Sequence[Choice], without: Sequence[Choice], tried: Sequence[Passed], nature: str
) -> Contribution:
    common = {"mechanism": one.name, "source": one.source, "nature": nature}
    objective = with_it[0].objective if with_it else None
    control = without[0].objective if without else None
    if objective is not None and control is not None:
        saves = 1 - objective / control if control else 0.0
        why = f"{with_it[0].title} against {without[0].title}"
        state = "pays" if saves > WORTH else "does not pay"
        return _made(**common, state=state, objective=objective, control=control, saves=saves, why=why)
    reasons = "; ".join(dict.fromkeys(each.why for each in tried[:2]))
    if objective is not None:
        why = f"{with_it[0].title}; without it no fleet was found" + (f": {reasons}" if reasons else "")
        return _made(**common, state="pays", objective=objective, why=why)
    if not tried and control is None:
        why = "only a simulated run tells" if nature == "predicted" else "the best fleet leaves no choice here"
        return _made(**common, state="not asked" if nature == "predicted" else "does not apply", why=why)
    why = reasons or "no fleet with it was found that comes before the runner-up"
    return _made(**common, state="does not pay", control=control, why=why)


def _pipeline(choices: Sequence[Choice], passed: Sequence[Passed], nature: str) -> Contribution:
    """The best fleet of pipelines that do not block against the best one without any; the blocking one beside them."""
    common = {"mechanism": "non-blocking pipeline", "source": "EnergonAI", "nature": nature}
    ordered = sorted(choices, key=lambda choice: choice.objective)
    found = {
        way: [one for one in ordered if one.shape.pipeline == way] for way in ("queue", "non-blocking", "blocking")
    }
    missed = {one.shape.pipeline: one for one in passed if one.objective is None}
    if nature == "predicted":
        return _made(**common, state="not asked", why="only a simulated run tells")
    if not found["non-blocking"] and "non-blocking" not in missed:
        why = "the best fleet has one device an instance, pools or a policy of its own: pipelines are not tried"
        return _made(**common, state="does not apply", why=why)
    beside = "blocking, no fleet was found"
    if found["blocking"]:
        beside = f"blocking, {found['blocking'][0].title} ({found['blocking'][0].objective:,.4g})"
    base = _same_without(found)
    if not found["non-blocking"]:
        why = f"{missed['non-blocking'].why}; {beside}"
        return _made(**common, state="does not pay", control=base.objective if base else None, why=why)
    best = found["non-blocking"][0]
    saves = None if base is None or not base.objective else 1 - best.objective / base.objective
    why = f"{best.title} against {base.title if base else 'none without a pipeline'}; {beside}"
    state = "pays" if saves is None or saves > WORTH else "does not pay"
    return _made(
        **common, state=state, objective=best.objective, control=base.objective if base else None, saves=saves, why=why
    )


def _same_without(found: Mapping[str, Sequence[Choice]]) -> Choice | None:
    plain = [one for one in found["queue"] if not one.shape.extras]
    return plain[0] if plain else None


def _scaling(load: Load) -> Contribution:
    """The most that a fleet which follows the load can save: nothing is held back for the peak."""
    common = {"mechanism": SCALING, "source": "HARMONY", "nature": "predicted"}
    if load.span_s < 3 * _WINDOW_S:
        why = f"the load lasts {load.span_s / 60:.3g} min: too short to be followed"
        return _made(**common, state="does not apply", why=why)
    peak = load.peak_over_mean(_WINDOW_S)
    why = (
        f"the busiest ten minutes have {peak:.3g} times the mean: at most {1 - 1 / peak:.0%}; --start SECONDS tries it"
    )
    return _made(**common, state="not asked", why=why)


def _apart(choices: Sequence[Choice], passed: Sequence[Passed], nature: str) -> Contribution | None:
    """The best fleet with its attention on other devices against the best without, where runs tried one."""
    tried = [one for one in passed if one.shape.attention is not None]
    ordered = sorted(choices, key=lambda choice: choice.objective)
    with_it = [one for one in ordered if one.shape.attention is not None]
    if not tried and not with_it:
        return None
    without = [one for one in ordered if one.shape.attention is None]
    return _compare(Mechanism("attention on other devices", "Lamina, InstInfer"), with_it, without, tried, nature)


def _attention(question: FleetQuestion, load: Load, best: Shape, not_apart: str) -> Contribution:
    """Decode with attention on another of the offered devices, at the mean context of the load; by arithmetic."""
    common = {"mechanism": "attention on other devices", "source": "Lamina, InstInfer", "nature": "predicted"}
    others = attention_choices(question, best.device)
    if not others:
        why = "one kind of device is offered: name several with --device, or --attention-device"
        return _made(**common, state="does not apply", why=why)
    rows = []
    for other in others:
        try:
            plan = plan_attention(attention_question(question, load, best.device, other))
        except MegalithError as error:
            return _made(**common, state="does not pay", why=error.what)
        rows += [row for row in plan.rows if row.gain]  # 0: no price
    if not rows:
        why = f"nothing with {' or '.join(others)} beside {best.device} fits, is in time and has a price"
        return _made(**common, state="does not pay", why=why)
    row = max(rows, key=lambda row: row.gain or 0.0)
    gain, name = row.gain or 0.0, "" if row.mixed is None else row.mixed.name
    why = f"{name}: {gain:.2f} times the decode tokens for a dollar of either device alone (`megalith plan attention`)"
    why += f"; {not_apart}" if not_apart else ""
    return _made(**common, state="pays" if gain > 1 + WORTH else "does not pay", saves=1 - 1 / gain, why=why)


def _elsewhere(question: FleetQuestion) -> list[Contribution]:
    """Mechanisms that this question says nothing for, and what would have to be asked."""
    common = {"nature": "predicted", "state": "does not apply"}
    found = [
        {
            "mechanism": "composition of experts, shared blocks", "source": "SN40L, BlockLLM",
            "why": "one model is served: there is nothing to switch or share (`megalith plan coe` asks for many)",
        },
        {
            "mechanism": POLCA, "source": "POLCA", "state": "not asked",
            "why": "no budget is given: --power-budget WATTS tries it",
        },
    ]  # fmt: skip
    if len(set(question.devices)) < 2:
        why = "one kind of device is offered: name several with --device"
        found.append({"mechanism": "mix of devices", "source": "Mélange", "why": why})
    return [_made(**(common | one)) for one in found]


def put(plan: FleetPlan, one: Contribution, runs: int = 0) -> FleetPlan:
    """The plan with this contribution in the place of what the search said of the mechanism, and after more runs."""
    changed = [one if old.mechanism == one.mechanism else old for old in plan.contributions]
    return msgspec.structs.replace(plan, contributions=changed, runs=plan.runs + runs)


def _less(shape: Shape, extra: str) -> tuple[str, ...]:
    return tuple(name for name in shape.extras if name != extra)


def _made(**fields: object) -> Contribution:
    return msgspec.convert(fields, Contribution)
