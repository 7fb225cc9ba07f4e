"""What room a planned fleet has beside its load, and what becomes of it when something is not as planned.

Knows trials of the winner; must not run them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from megalith.plan.fleet_answer import Choice, Headroom, PowerRoom, Risk
from megalith.plan.fleet_estimate import Steady
from megalith.plan.fleet_kind import Kind
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import Size
from megalith.plan.fleet_trial import Probe, Trial
from megalith.specs import catalog
from megalith.specs.slo import Slo

SLOWER = 1.2
"""Nine of ten predicted steps of published engines are at most so much too short (docs/fidelity.md)."""


def slo_room(trial: Trial | None) -> dict[str, float]:
    """By bound, the share of its limit that is left at the planned load."""
    return {} if trial is None else {bound: 1 - used for bound, used in trial.used.items() if used is not None}


def predicted_headroom(kind: Kind, winner: Choice, load: Load, slo: Slo, step: float, steps: int) -> Headroom:
    """By arithmetic alone: how much more load the winner takes, in powers of `step`, and what is left of each limit."""
    kept, broken = 0, None
    for power in range(1, steps + 1):
        found = Steady(kind.ability, load.times(step**power), slo).predict(winner.size)
        if not found.kept:
            broken = found
            break
        kept = power
    figures = {"ttft": winner.ttft_ns, "tpot": winner.tpot_ns}
    rooms = {
        str(bound): 1 - figure / bound.limit_ns
        for bound in slo.bounds
        if bound.limit_ns is not None and (figure := figures.get(bound.metric)) is not None
    }
    return Headroom(
        kept_times=step**kept,
        broken_times=None if broken is None else step ** (kept + 1),
        breaks="" if broken is None else f"the service level ({broken.resource})",
        slo=rooms,
    )


def power_room(choice: Choice) -> PowerRoom | None:
    """None where no power of the device is known, or the devices of an instance are not all of one rating."""
    trial, rated = choice.trial, catalog.find_device(choice.shape.device)
    if choice.shape.attention is not None:
        return None
    if trial is None or trial.power_w is None or trial.peak_power_w is None or rated is None or rated.tdp_w is None:
        return None
    rated_w = rated.tdp_w * choice.devices
    each_w = trial.peak_power_w / choice.size.instances
    more = int((rated_w - trial.peak_power_w) / each_w) if each_w > 0 else 0
    return PowerRoom(mean_w=trial.power_w, peak_w=trial.peak_power_w, rated_w=rated_w, instances=max(more, 0))


def hazards(task: Probe, winner: Choice) -> list[Probe]:
    """Runs of the winner with longer steps, with other requests, and without one of its instances."""
    probes = [
        msgspec.structs.replace(task, slower=SLOWER),
        msgspec.structs.replace(task, seed=task.question.seed + 1),
    ]
    if winner.size.instances > winner.shape.smallest:
        probes += [msgspec.structs.replace(task, size=size) for size in _one_less(winner.size)]
    return probes


def judge(winner: Choice, trials: Sequence[Trial]) -> list[Risk]:
    """What each of `hazards` says."""
    slower, other, *fewer = trials
    risks = [
        _risk(f"steps take {SLOWER - 1:.0%} longer than predicted", slower),
        _risk("other requests of the same kind come (another seed, where they are drawn)", other),
    ]
    if fewer:
        worst = min(fewer, key=lambda trial: (trial.kept, trial.attained))
        risks.append(_risk(f"one instance of {winner.size.instances} is down all the time", worst))
    else:
        one = "its only instance" if winner.size.instances == 1 else f"one of its {winner.size.instances} instances"
        risks.append(Risk(what=f"{one} is down", kept=False, says="nobody is served"))
    return risks


def _risk(what: str, trial: Trial) -> Risk:
    if trial.kept:
        left = min((1 - used for used in trial.used.values() if used is not None), default=None)
        says = "the service level is kept" + ("" if left is None else f", {left:.0%} of {trial.tightest} is left")
        return Risk(what=what, kept=True, says=says)
    share = trial.shares.get(trial.breaks, trial.attained)
    when = f" when {trial.requests:,} had ended" if trial.stopped_early else ""
    return Risk(what=what, kept=False, says=f"breaks {trial.breaks}: {share:.1%} were within it{when}")


def _one_less(size: Size) -> list[Size]:
    """The sizes that are left when an instance of either pool goes, as far as both pools still have one."""
    if not size.prefill:
        return [Size(size.instances - 1)]
    left = [Size(size.instances - 1, size.prefill - 1), Size(size.instances - 1, size.prefill)]
    return [one for one in left if one.prefill and one.decode] or [Size(size.instances - 1, 1)]
