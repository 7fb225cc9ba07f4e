"""Which timer a pool gets: by name, by operator tables where there are some, else by the cost model.

Knows names and what the catalogue holds. Must not know batches.
"""

from __future__ import annotations

import difflib

from megalith.base.errors import ConfigError
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.operators import available, find_tables
from megalith.cost.profile import from_device
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_operators import OperatorTimer
from megalith.cost.timer_phases import DeviceTimer
from megalith.cost.timer_published import published, published_timers
from megalith.specs import catalog

NUMBERS = {"bf16": "bf16", "fp16": "bf16", "f16": "bf16", "fp8": "fp8", "mxfp4": "mxfp4", "fp4": "mxfp4"}
"""{weight format: number type of the operator tables}."""
KINDS = ("auto", "operators", "analytic")


def choose_timer(
    kind: str, model: str, device: str, tensor_parallel: int = 1, weight_format: str = "bf16", kv_format: str = "bf16"
) -> DeviceTimer:
    """The timer of one instance. `kind`: one of KINDS or the name of a published timer (`llumnix-7b`).

    `auto` takes operator tables when the catalogue has them for this very case, else the cost model; `operators` and
    `analytic` insist. Raises ConfigError with the nearest names, or with what the tables hold.
    """
    if kind not in KINDS:
        if kind not in published_timers():
            near = difflib.get_close_matches(kind.lower(), [*KINDS, *published_timers()], n=1, cutoff=0.4)
            known = f"Known: {', '.join(KINDS)}; published: {', '.join(published_timers())}."
            raise ConfigError(f"There is no timer {kind!r}.", f"Did you mean {near[0]!r}? {known}" if near else known)
        return published(kind).timer()
    spec, devices = catalog.model(model), catalog.device(device)
    if kind != "analytic":
        found = find_tables(device, model)
        number, kv = NUMBERS.get(weight_format.lower()), NUMBERS.get(kv_format.lower(), "")
        if found is not None and number is not None:
            dense = (tensor_parallel, number) in {(table.tensor_parallel, table.number) for table in found.dense}
            cached = (tensor_parallel, kv) in {(table.tensor_parallel, table.kv) for table in found.attention}
            if kind == "operators" or (dense and cached):
                return OperatorTimer(found, tensor_parallel, number, kv)
        if kind == "operators":
            here = ", ".join(name for where, name in available() if where == devices.name) or "none"
            raise ConfigError(
                f"There are no operator tables of {spec.name} in {weight_format} on {devices.name}.",
                f"Models with tables there: {here}. `analytic` does without.",
            )
    weights = weight_bytes(spec, weight_format)
    return AnalyticTimer(CostModel(spec, from_device(devices, weight_format), weights, kv_format, tensor_parallel))
