"""`megalith plan placement`: how prefill and decode are cut over devices, and how many instances of each there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.number_list import whole_numbers
from megalith.cli.output import JsonFlag, print_json, progress, result_console

if TYPE_CHECKING:
    from megalith.plan.placement_question import PlacementQuestion

app = App(
    name="placement",
    help="Place prefill and decode apart: degrees and instances of each, by goodput a device.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
_EXAMPLES = """\
Goodput is the highest rate at which enough requests keep TTFT and TPOT at once
(0.9 of them, or attain= of --slo). Every pair of tensor and pipeline degrees
that fits is simulated, each phase alone (--affinity high) or both in units
inside a node (low), after DistServe; the answer says whether to split at all.

Examples:
  megalith plan placement --trace poisson:rate=1,input=512,output=64 --model opt-13b \\
      --device a100-80gb --timer distserve:vllm --slo ttft=400ms,tpot=40ms \\
      --tensor-parallel 1,2 --pipeline-parallel 1
  megalith plan placement --trace azure-conv --model llama-3.1-8b --device h100-sxm \\
      --slo ttft=400ms,tpot=25ms --rate 40 --tensor-parallel 1,2 --pipeline-parallel 1
  megalith plan placement --trace azure-conv:max_total=2048 --model opt-13b --node 4 \\
      --device a100-80gb --timer distserve --slo ttft=200ms,tpot=100ms --affinity low"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class Placement:
    """The load, the promise and what there is to place."""

    trace: str = ""
    """A trace file, a built-in workload or a drawn one (`poisson:rate=5,...`); its rate does not matter."""
    model: str = ""
    """A model of the catalogue (`megalith models`)."""
    slo: str = ""
    """Limits on TTFT and TPOT, such as ttft=400ms,tpot=40ms,attain=0.9."""
    device: str = ""
    """A device of the catalogue."""
    rate: float | None = None
    """Requests a second to serve; by default the smallest balanced fleet is sought."""
    affinity: str = "high"
    """high: KV may go between nodes. low: only inside a node."""
    node: int = 8
    """Devices of a node."""
    max_devices: int = 8
    """Of one instance; with low affinity of what a unit has in one node."""
    max_nodes: int = 1
    """Low affinity: nodes that a pipeline may go over."""
    tensor_parallel: str = "1,2,4,8"
    """Degrees that may be tried."""
    pipeline_parallel: str = "1,2,4"
    """Degrees that may be tried."""
    link: float | None = None
    """Bytes a second for KV; by default the device's network (high) or peer link (low)."""
    seed: int = 0


@Parameter(name="*", group="How")
@dataclass(frozen=True)
class Details:
    """Model formats, costs and how closely to look."""

    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int8, ..."""
    kv_format: Annotated[str, Parameter(name="--kv")] = "bf16"
    """KV cache: bf16 or fp8."""
    timer: str = "auto"
    """auto, operators, analytic, distserve (or distserve:vllm), vidur or splitwise."""
    max_context: int | None = None
    """Most tokens of prompt and answer together."""
    requests: int = 1000
    """Of each run at least; more where ten mean times of a request need it."""
    step: float = 1.02
    """Goodput is found to within this factor."""
    exhaustive: bool = False
    """Low affinity: simulate also what the phases alone rule out."""


@app.default
def placement(
    what: Placement | None = None,
    how: Details | None = None,
    *,
    workers: Annotated[int | None, Parameter(help="Processes; by default one a core.")] = None,
    json: JsonFlag = False,
) -> int:
    """Search and explain."""
    from megalith.plan.placement import plan_placement
    from megalith.plan.placement_explain import headline, measured_table

    question = make_question(what or Placement(), how or Details())
    with progress("simulating", None, "runs") as advance:
        plan = plan_placement(question, workers, advance)
    if json:
        print_json(plan)
        return 0
    console = result_console()
    for line in headline(plan):
        console.print(line, soft_wrap=True)
    console.print(measured_table(plan).to_rich())
    return 0


def make_question(what: Placement, how: Details) -> PlacementQuestion:
    """The question that the flags ask. Raises ConfigError."""
    from megalith.plan.placement_question import PlacementQuestion
    from megalith.specs import catalog
    from megalith.specs.slo import parse_slo
    from megalith.specs.workload_text import parse_workload

    for name in ("trace", "model", "slo", "device"):
        if not getattr(what, name):
            raise ConfigError(f"Nothing can be placed without --{name}.", "`megalith plan placement --help` shows how.")
    return PlacementQuestion(
        model=catalog.entry(what.model).spec.name, workload=parse_workload(what.trace), slo=parse_slo(what.slo),
        device=catalog.device(what.device).name, rate_per_s=what.rate, affinity=what.affinity,  # type: ignore[arg-type]
        node_devices=what.node, most_devices=what.max_devices, most_nodes=what.max_nodes,
        tensor_parallel=_degrees(what.tensor_parallel, "tensor"),
        pipeline_parallel=_degrees(what.pipeline_parallel, "pipeline"),
        link_bytes_per_s=what.link, timer=how.timer, seed=what.seed, weight_format=how.weight_format,
        kv_format=how.kv_format, max_context=how.max_context, step=how.step, least_requests=how.requests,
        exhaustive=how.exhaustive,
    )  # fmt: skip


def _degrees(text: str, kind: str) -> tuple[int, ...]:
    return tuple(sorted(set(whole_numbers(f"--{kind}-parallel", text, "1,2,4", "degrees"))))
