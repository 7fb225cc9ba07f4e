"""How long the steps of a recorded run took: a decision log read as a calibration run for the cost model.

Knows the log's words (`sim.shadow`) and nothing else. A step lasts from the end of the one before it to its own end, so
everything that the engine does between kernels is in it: plans, arrays, text, and the admission of who came meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from megalith.cost.calibrate_steps import TimedStep
from megalith.sim.shadow import AbortCall, AddCall, CompleteCall, DecisionLog, PlanCall


def recorded_steps(path: str | Path) -> list[TimedStep]:
    """The steps of a decision log in order. The first one after an idle time begins when a request comes.

    Raises ConfigError for a file that is no decision log. Steps that were completed several at once say nothing of
    each and are left out.
    """
    steps: list[TimedStep] = []
    chunks: tuple[tuple[int, int, int, bool], ...] = ()
    boundary_ns = live = runs = 0
    for _, call in DecisionLog.open(path).calls():
        match call:
            case AddCall(refused=""):
                if not live:
                    boundary_ns = call.ns
                live += 1
            case AbortCall(found=True):
                live -= 1
            case PlanCall():
                chunks, runs = call.chunks, 0
            case CompleteCall():
                if chunks and call.steps == 1:
                    requests = tuple([(new, context + runs) for _, new, context, _ in chunks])
                    outputs = sum([samples for *_, samples in chunks])
                    steps.append(TimedStep(requests, outputs, call.ns - boundary_ns))
                boundary_ns = call.ns
                runs += call.steps
                live -= len(call.finished)
            case _:
                pass
    return steps
