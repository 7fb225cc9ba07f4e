"""`megalith simulate blocks`: many fine-tuned models on one set of devices, shared by the model, base or block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from megalith.cli.output import JsonFlag, print_json, print_tables, progress

if TYPE_CHECKING:
    from megalith.report.table import Table
    from megalith.sim.block_result import BlockResult
    from megalith.specs.blocks import BlockScenario


@Parameter(name="*", group="Applications and devices")
@dataclass(frozen=True)
class Blocks:
    """What is served, and how much of it is shared."""

    sharing: str = "blocks"
    """`model` (each application its own), `parameters` (adapters share their base) or `blocks`."""
    applications: int = 20
    """Synthetic fine-tunes, dealt to the bases in turn."""
    bases: str = "llama-2-7b,llama-3.1-8b,llama-2-13b"
    """Catalogue models."""
    blocks: int = 4
    """Blocks of a model, 8 at most."""
    skew: float = 1.0
    """Exponent of popularity over rank; 0 makes all applications the same."""
    device: str = "a100-80gb"
    servers: str = "2,2,4,4"
    """Devices of each server."""
    trace: str = "azure-conv"
    """A built-in workload, a file or a drawn one, as for `simulate`."""
    rate: float | None = None
    """Requests a second, as a Poisson process; by default as the trace says."""
    requests: int | None = None
    kv: str = "coordinated"
    """How the next hop is chosen: `coordinated`, `queue` or `pinned`."""
    speculation: Annotated[bool, Parameter(negative="--no-speculation")] = True
    locality: Annotated[bool, Parameter(negative="--no-locality")] = True
    adaptive: Annotated[bool, Parameter(negative="--no-adaptive")] = True
    replicas: str = "popularity"
    """Places of each application at the start: as its part of the requests is of the devices, or `one`."""
    seed: int = 0


def blocks(what: Blocks | None = None, *, json: JsonFlag = False) -> int:
    """Simulate applications as chains of blocks that batch on their own (BlockLLM), or as whole models."""
    from megalith.sim.blocks import BlockRun

    scenario = _scenario(what or Blocks())
    run, done = BlockRun(scenario), 0
    with progress("simulating", scenario.workload.requests, "requests") as advance:

        def tell(ended: int) -> None:
            nonlocal done
            advance(ended - done)
            done = ended

        result = run.run(tell)
    if json:
        print_json({"simulated": figures(result), "digest": result.digest})
    else:
        print_tables({"figures": _table(result)}, json=False)
    return 0


def _scenario(what: Blocks) -> BlockScenario:
    import msgspec

    from megalith.base.config import convert
    from megalith.base.errors import ConfigError
    from megalith.specs.arrivals import PoissonArrivals
    from megalith.specs.blocks import BlockScenario
    from megalith.specs.workload_text import parse_workload

    load = parse_workload(what.trace)
    if what.rate is not None:
        load = msgspec.structs.replace(load, arrivals=PoissonArrivals(rate_per_s=what.rate))
    if what.requests is not None:
        load = msgspec.structs.replace(load, requests=what.requests)
    try:
        servers = [int(number) for number in what.servers.split(",")]
    except ValueError:
        raise ConfigError(f"{what.servers!r} are no servers.", "Write devices of each, such as 2,2,4,4.") from None
    zoo = {
        "bases": what.bases.split(","), "applications": what.applications, "blocks": what.blocks, "skew": what.skew,
    }  # fmt: skip
    table = {
        "zoo": zoo, "device": what.device, "servers": servers, "sharing": what.sharing, "kv": what.kv,
        "speculation": what.speculation, "locality": what.locality, "adaptive": what.adaptive,
        "replicas": what.replicas,
        "seed": what.seed,
        "workload": msgspec.to_builtins(load),
    }  # fmt: skip
    return convert(table, BlockScenario, "the command line")


def figures(result: BlockResult) -> dict[str, float]:
    """By name; seconds, shares and counts."""
    found: dict[str, float] = {"requests": result.requests, "end_s": result.end_ns / 1e9}
    for name in ("ttft_ns", "tpot_ns", "e2e_ns"):
        one = result.figures.latencies.get(name)
        if one is not None:
            found |= {f"{name[:-3]}_{part}_s": getattr(one, part) / 1e9 for part in ("mean", "p50", "p95", "p99")}
    counters = result.counters
    return found | {
        "output_tokens_per_s": result.figures.steady.output_tokens_per_s,
        "busy_share": result.busy_share,
        "compute_share": result.compute_share,
        "rows_a_step": result.batch,
        "instances": result.instances,
        "weights_gb": result.weights_bytes / 1e9,
        "stored_gb": result.unit_bytes / 1e9,
        "hops": counters.hops,
        "messages": counters.messages,
        "kv_moves": counters.kv_moves,
        "recomputes": counters.recomputes,
        "stood_in": counters.stood_in,
        "begun_ahead": counters.trials,
        "redone": counters.redone,
        "instances_added": counters.added,
    }


def _table(result: BlockResult) -> Table:
    from megalith.report.table import Column, Table

    zoo = result.scenario.zoo
    title = f"{zoo.applications} applications, sharing: {result.scenario.sharing}; digest {result.digest}"
    table = Table([Column("figure", "figure"), Column("value", "value", "number", "simulated")], title)
    for name, value in figures(result).items():
        table.add(name, value)
    return table
