"""What the points of the study of BlockLLM run: fine-tunes on twelve A100, shared by the model, base or block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from megalith.base.errors import DoesNotFit
from megalith.cost.memory import weight_bytes
from megalith.policy.block_zoo import make_zoo
from megalith.sim.block_result import BlockResult
from megalith.sim.blocks import simulate_blocks
from megalith.specs import catalog
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.blocks import BlockScenario, Sharing, ZooSpec
from megalith.specs.workload_text import parse_workload

CHANGES: dict[str, dict[str, object]] = {
    "coordinated": {},
    "pinned": {"kv": "pinned"},
    "queue": {"kv": "queue"},
    "true-output": {"speculation": False},
}
"""What an arm of the ablation changes."""


def scenario(options: Mapping[str, float | str]) -> BlockScenario:
    """`sharing`, `rate`, `requests` and `seed`; `apart` places units one by one, `change` is a key of CHANGES."""
    load = msgspec.structs.replace(
        parse_workload("azure-conv"), arrivals=PoissonArrivals(rate_per_s=float(options["rate"])),
        requests=int(options["requests"]),
    )  # fmt: skip
    zoo = ZooSpec(applications=int(options.get("applications", 20)), skew=float(options.get("skew", 1.0)))
    one = BlockScenario(
        workload=load, zoo=zoo, sharing=cast(Sharing, options.get("sharing", "blocks")), seed=int(options["seed"]),
        locality=not options.get("apart", 0.0),
    )  # fmt: skip
    return msgspec.structs.replace(one, **CHANGES[str(options.get("change", "coordinated"))])


def serve(options: Mapping[str, float | str]) -> dict[str, float]:
    """Latency, utilisation, bytes. Where the weights do not fit, `fits` is 0 and there is nothing but bytes."""
    one = scenario(options)
    figures = {"stored_gb": stored_bytes(one) / 1e9, "fits": 0.0}
    try:
        result = simulate_blocks(one)
    except DoesNotFit:
        return figures
    return figures | {"fits": 1.0} | _figures(result)


def _figures(result: BlockResult) -> dict[str, float]:
    figures, counters = result.figures, result.counters
    latencies = {name: figures.latencies[name] for name in ("e2e_ns", "tpot_ns", "ttft_ns")}
    found = {f"{name[:-3]}_p95": one.p95 / 1e9 for name, one in latencies.items() if one is not None}
    return found | {
        "e2e_p50": latencies["e2e_ns"].p50 / 1e9 if latencies["e2e_ns"] is not None else 0.0,
        "tokens_per_s": figures.output_tokens / (result.end_ns / 1e9),
        "tokens": float(figures.output_tokens),
        "utilisation": result.compute_share,
        "busy": result.busy_share,
        "rows": result.batch,
        "weights_gb": result.weights_bytes / 1e9,
        "messages": float(counters.messages),
        "moves": float(counters.kv_moves + counters.recomputes),
        "trials": float(counters.trials),
        "requests": float(result.requests),
    }


def stored_bytes(one: BlockScenario) -> int:
    """Of one copy of each unit."""
    sizes = {name: weight_bytes(catalog.model(name), "bf16").total for name in one.zoo.bases}
    units = make_zoo(one.zoo, one.sharing, one.seed).units
    return sum(-(-sizes[unit.base] * unit.blocks // one.zoo.blocks) for unit in units)
