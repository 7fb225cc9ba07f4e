"""`megalith plan nano`: nano-batches that overlap compute, memory and links inside a device, and what they bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, result_console

if TYPE_CHECKING:
    from megalith.cost.nano import Enough
    from megalith.cost.timer_phases import DeviceTimer
    from megalith.plan.nano import NanoPlan

app = App(
    name="nano",
    help="Search nano-batches that overlap compute, memory and links of a device; say how far from the optimum.",
    help_format="plaintext",
)
_EXAMPLES = """\
Every figure is predicted. The search needs the solver (`pip install
'megalith[plan]'`) and takes about half a minute; --quick some seconds.

Examples:
  megalith plan nano llama-2-70b --device a100-80gb --tensor-parallel 8 --batch 2048
  megalith plan nano llama-2-70b --device a100-80gb --tensor-parallel 8 --timer operators
  megalith plan nano llama-3.1-8b --device h100 --prompt 512 --output 1024 --quick
  megalith plan nano llama-2-70b --device a100-80gb --tensor-parallel 8 --out pipeline.png"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class What:
    """The deployment, its traffic and the assumptions."""

    device: str = "a100-80gb"
    """A device of the catalogue."""
    tensor_parallel: int = 1
    """Devices that share every layer."""
    batch: int = 2048
    """Rows of a step: decodes and prompt chunks together."""
    prompt: int = 512
    """Mean prompt tokens of a request."""
    output: int = 512
    """Mean answer tokens of a request."""
    timer: str = "analytic"
    """analytic (rates of the data sheet) or operators (measured tables)."""
    tflops: float | None = None
    """TFLOP/s of one device for the optimum; by default what the profile reaches."""
    memory_share: float = 0.4
    """Share of a device with which attention of decodes reaches its best speed: an assumption."""
    link_share: float = 0.2
    """The same of a collective."""
    quick: bool = False
    """Fewer sizes and orders."""
    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int4, ..."""
    kv_format: Annotated[str, Parameter(name="--kv")] = "bf16"
    """KV cache: bf16 or fp8."""


@app.default
def nano(model: str, /, what: What | None = None, *, out: Path | None = None, json: JsonFlag = False) -> int:
    """Print the pipeline of MODEL. --out draws it, with how busy compute, memory and links are."""
    from megalith.plan import nano_explain
    from megalith.plan.mix import check_solver
    from megalith.plan.nano import Traffic, plan_nano
    from megalith.plan.nano_search import QUICK, Effort
    from megalith.report.plot import check_plot_path

    what = what or What()
    check_solver()
    if out is not None:
        check_plot_path(out)
    timer = _timer(model, what)
    plan = plan_nano(
        timer, Traffic(what.prompt, what.output, what.batch), enough=_enough(what),
        flops_per_s=None if what.tflops is None else what.tflops * 1e12, effort=QUICK if what.quick else Effort(),
    )  # fmt: skip
    if out is not None:
        _draw(plan, out)
    if json:
        print_json(plan)
        return 0
    console = result_console()
    for line in nano_explain.headline(plan):
        console.print(line, soft_wrap=True)
    for table in (nano_explain.way_table, nano_explain.pipeline_table, nano_explain.busy_table):
        console.print(table(plan).to_rich())
    return 0


def _enough(what: What) -> Enough:
    from megalith.cost.nano import Enough

    if not (0 < what.memory_share <= 1 and 0 < what.link_share <= 1):
        shares = f"{what.memory_share:g} and {what.link_share:g}"
        raise ConfigError(f"Shares of a device of {shares} cannot be.", "Give more than 0, at most 1.")
    if what.tflops is not None and not what.tflops > 0:
        raise ConfigError(f"--tflops {what.tflops:g} is no rate.", "Give more than 0.")
    return Enough(round(what.memory_share * 1000), round(what.link_share * 1000))


def _timer(model: str, what: What) -> DeviceTimer:
    from megalith.cost.compute import CostModel
    from megalith.cost.profile import from_device
    from megalith.cost.timer_analytic import AnalyticTimer
    from megalith.cost.timer_choice import choose_timer
    from megalith.plan.source import resolve
    from megalith.specs import catalog

    if what.timer != "analytic":
        return choose_timer(
            what.timer, model, what.device, what.tensor_parallel, what.weight_format, what.kv_format
        )  # fmt: skip
    planned = resolve(model)
    profile = from_device(catalog.device(what.device), what.weight_format)
    weights = planned.weights(profile.kind, what.weight_format)
    return AnalyticTimer(CostModel(planned.spec, profile, weights, what.kv_format, what.tensor_parallel))


def _draw(plan: NanoPlan, out: Path) -> None:
    from megalith.plan.nano_explain import NAMES
    from megalith.report.plot_frame import Caption
    from megalith.report.plot_pipeline import Bar, plot_pipeline

    half = plan.cuts[1][1] if len(plan.cuts[1]) > 2 else plan.rows
    bars = [
        Bar(one.stream, NAMES[one.kind], one.start_ns / 1e3, one.end_ns / 1e3, "second" if one.row >= half else "first")
        for one in plan.timeline
    ]
    levels = {name: [(at / 1e3, level) for at, level in points] for name, points in plan.levels.items()}
    settings = {"model": plan.model, "device": f"{plan.devices} x {plan.device}", "rows": f"{plan.rows:,}"}
    span = (0.0, 2.0 * plan.period_ns / 1e3)
    caption = Caption("Nano-batches in steady state, two layers", settings, "predicted")
    plot_pipeline(caption, bars, levels, span, out)
