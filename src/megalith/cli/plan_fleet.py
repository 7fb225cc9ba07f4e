"""`megalith plan fleet`: the cheapest or the least-power fleet that keeps a service level under a load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.number_list import whole_numbers
from megalith.cli.output import JsonFlag, print_json, progress, result_console

if TYPE_CHECKING:
    from megalith.plan.fleet_answer import FleetPlan
    from megalith.plan.fleet_question import FleetQuestion
    from megalith.plan.mix_table import Knows
    from megalith.sim.sweep import PointResult

app = App(
    name="fleet",
    help="Find the cheapest fleet that keeps a service level under a load.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
_EXAMPLES = """\
TRACE is what `megalith simulate` takes. Every device, degree and set-up is
tried that can be: arithmetic first, then simulated runs that stop as soon as
the service level is lost. The answer says what binds, what every published
mechanism contributes, how much more load the winner takes, what becomes of it
when steps are longer or an instance is down, and what holds every other fleet
back; --page puts all of it on one page with pictures.

Examples:
  megalith plan fleet --trace azure-conv --model llama-3.1-8b \\
      --slo ttft=400ms,tpot=50ms --device h100-sxm --device a100-80gb --page fleet.html
  megalith plan fleet --trace azure-conv --rate 40 --model llama-3.1-70b \\
      --slo ttft=1s@p90,tpot=60ms@p90 --device h100-sxm --minimise power
  megalith plan fleet --trace azure-code --model qwen3-32b --slo ttft=2s,tpot=80ms \\
      --device h200 --price h200=6.1 --setup mixed --predict-only
  megalith plan fleet --trace azure-conv --rate 8 --model llama-2-7b --mix prompt \\
      --slo ttft=2s,tpot=120ms --device l4 --device a10g --device a100-80gb
  megalith plan fleet --trace azure-conv --rate 20 --model llama-3.1-8b --setup mixed \\
      --slo ttft=400ms,tpot=40ms --device a100-80gb --power-budget 2600
  megalith plan fleet --trace load.csv --model llama-3.1-8b --slo ttft=1s,tpot=60ms \\
      --device l4 --start 120 --posterior load.posterior"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class Fleet:
    """The load, the promise and what may be bought."""

    trace: str = ""
    """A trace file, a built-in workload or a drawn one (`poisson:rate=5,...`)."""
    model: str = ""
    """A model of the catalogue (`megalith models`)."""
    slo: str = ""
    """Service level, such as ttft=400ms,tpot=40ms@p90."""
    device: tuple[str, ...] = ()
    """A device of the catalogue. Give it once for each that may be bought."""
    attention_device: tuple[str, ...] = ()
    """A device or drive that may hold KV and compute attention beside them (Lamina, InstInfer)."""
    minimise: str = "cost"
    """cost, power or devices."""
    max_devices: int = 1024
    """The largest fleet."""
    price: tuple[str, ...] = ()
    """DEVICE=USD of one for an hour, where the catalogue's is not yours."""
    setup: tuple[str, ...] = ("all",)
    """mixed, llumnix, splitwise, distserve or all."""
    tensor_parallel: str = "1,2,4,8"
    """Devices of an instance that may be tried."""
    mix: str = "no"
    """Whether a mix of devices is cheaper: no (not asked), or what its router knows: prompt (its length) or sizes."""
    rate: float | None = None
    """Requests a second: the workload at another rate."""
    requests: int = 20_000
    """Of the workload, so many are simulated at most."""
    seed: int = 0
    power_budget: float | None = None
    """Watts for all devices and what stands beside them: provisioned by rating, or shared under POLCA."""
    beside: float = 388.0
    """Watts beside each device, with --power-budget."""
    start: float | None = None
    """Seconds until one more instance serves: may the fleet follow its load?"""
    posterior: str | None = None
    """With --start: samples of the load to come, as `megalith forecast --posterior` writes them."""


@Parameter(name="*", group="How")
@dataclass(frozen=True)
class Details:
    """Model formats and costs."""

    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int8, ..."""
    kv_format: Annotated[str, Parameter(name="--kv")] = "bf16"
    """KV cache: bf16 or fp8."""
    timer: str = "auto"
    """auto, operators or analytic."""
    max_context: int | None = None
    """Most tokens of prompt and answer together."""
    max_new: str | None = None
    """What schedulers are told of an answer: context (default), a number, or true (an oracle)."""


@app.default
def fleet(
    what: Fleet | None = None,
    how: Details | None = None,
    *,
    predict_only: Annotated[bool, Parameter(negative="", help="Arithmetic only: seconds, and predicted.")] = False,
    workers: Annotated[int | None, Parameter(help="Processes; by default one a core.")] = None,
    plot: Annotated[Path | None, Parameter(help="Winner and runner-up against the rate, as a picture.")] = None,
    page: Annotated[Path | None, Parameter(help="All of the answer on one page (.html), with pictures.")] = None,
    json: JsonFlag = False,
) -> int:
    """Search and explain."""
    from megalith.plan.fleet_all import plan_all

    what = what or Fleet()
    question, knows = make_question(what, how or Details()), _knows(what.mix)
    if plot is not None:
        from megalith.report.plot import check_plot_path

        check_plot_path(plot)
    if page is not None:
        from megalith.report.html_page import check_page_path
        from megalith.report.plot import check_plot_path

        check_page_path(page)
        check_plot_path(page.with_suffix(".png"))
    if knows is not None:
        from megalith.plan.mix_plan import add_mix, check

        if question.power_budget_w is not None or question.start_s is not None:
            raise ConfigError("A mix has neither a power budget nor scaling.", "Ask without --mix, or without these.")
        check(question)
    with progress("simulating" if not predict_only else "planning", None, "runs") as advance:
        plan = plan_all(question, simulate=not predict_only, workers=workers, advance=advance)
        if knows is not None:
            plan = add_mix(plan, question, knows, advance=advance)
        drawn = plot is not None or (page is not None and not predict_only)
        points = _curve_points(plan, question, workers) if drawn else []
        if plot is not None:
            _draw(plot, plan, question, points)
        if page is not None:
            _write(page, plan, question, points if not predict_only else [])
    if json:
        print_json(plan)
    else:
        _print(plan)
    return 0


def make_question(what: Fleet, how: Details) -> FleetQuestion:
    """The question that the flags ask. Raises ConfigError."""
    import msgspec

    from megalith.base.config import convert
    from megalith.plan.fleet_question import OBJECTIVES, SETUP_NAMES, FleetQuestion
    from megalith.specs.slo import parse_slo
    from megalith.specs.workload_rate import at_rate
    from megalith.specs.workload_text import parse_workload

    for name in ("trace", "model", "slo", "device"):
        if not getattr(what, name):
            raise ConfigError(f"A fleet cannot be planned without --{name}.", "`megalith plan fleet --help` shows how.")
    if what.minimise not in OBJECTIVES:
        raise ConfigError(f"{what.minimise!r} is nothing to minimise.", f"Choose {', '.join(OBJECTIVES)}.")
    workload = parse_workload(what.trace)
    if what.rate is not None:
        workload = at_rate(workload, what.rate)
    if how.max_new is not None:
        told: int | str = int(how.max_new) if how.max_new.isdigit() else how.max_new
        workload = convert(msgspec.to_builtins(workload) | {"max_new": told}, type(workload), "--max-new")
    return FleetQuestion(
        model=what.model, workload=workload, slo=parse_slo(what.slo), devices=what.device,
        tensor_parallel=whole_numbers("--tensor-parallel", what.tensor_parallel, "1,2,4,8", "degrees"),
        setups=SETUP_NAMES if "all" in what.setup else what.setup,
        minimise=what.minimise, most_devices=what.max_devices, prices_usd=_prices(what.price), seed=what.seed,
        weight_format=how.weight_format, kv_format=how.kv_format, timer=how.timer, max_context=how.max_context,
        most_requests=what.requests, power_budget_w=what.power_budget, beside_w=what.beside, start_s=what.start,
        posterior=what.posterior, attention_devices=what.attention_device,
    )  # fmt: skip


def _knows(text: str) -> Knows | None:
    if text not in ("no", "prompt", "sizes"):
        raise ConfigError(f"--mix {text} is nothing that a router may know.", "Choose no, prompt or sizes.")
    return None if text == "no" else text  # type: ignore[return-value]


def _prices(texts: tuple[str, ...]) -> dict[str, float]:
    prices = {}
    for text in texts:
        device, _, price = text.partition("=")
        try:
            prices[device] = float(price)
        except ValueError:
            raise ConfigError(f"--price {text!r} is no price.", "Write it like h100-sxm=2.99.") from None
        if not prices[device] >= 0:
            raise ConfigError(f"--price {text!r} is below zero.", "Write it like h100-sxm=2.99.")
    return prices


def _print(plan: FleetPlan) -> None:
    from megalith.plan.fleet_explain import choice_table, headline, passed_table
    from megalith.plan.mix_explain import mix_table

    console = result_console()
    for line in headline(plan):
        console.print(line, soft_wrap=True)
    console.print(choice_table(plan).to_rich())
    if plan.mix is not None and plan.mix.parts:
        console.print(mix_table(plan.mix).to_rich())
    if plan.passed:
        console.print(passed_table(plan).to_rich())


def _draw(path: Path, plan: FleetPlan, question: FleetQuestion, results: list[PointResult]) -> None:
    """Winner and runner-up at several rates around the planned one."""
    from megalith.report.plot_frame import Caption
    from megalith.report.plot_sweep import plot_curves
    from megalith.sim.sweep_rows import curves

    requests = f"the first {max(one.requests for one in results):,} requests"
    settings = {"model": plan.model, "load": f"{plan.load}, {requests}", "service level": plan.slo}
    panels, limits = curves(results, question.slo)
    plot_curves(path, Caption("Winner and runner-up", settings), panels, limits)


def _write(path: Path, plan: FleetPlan, question: FleetQuestion, results: list[PointResult]) -> None:
    """The answer as one page; without results there is no picture against the rate."""
    from tempfile import TemporaryDirectory

    from megalith.plan.fleet_page import page
    from megalith.report.html_page import write_page
    from megalith.sim.sweep_rows import curves, power_panel

    shown = None
    if results:
        panels, limits = curves(results, question.slo)
        shown = panels | power_panel(results), limits
    with TemporaryDirectory() as folder:
        write_page(path, page(plan, shown, Path(folder)))


def _curve_points(plan: FleetPlan, question: FleetQuestion, workers: int | None) -> list[PointResult]:
    from megalith.plan.fleet_curves import fleet_points
    from megalith.sim.sweep import run_points

    return list(run_points(fleet_points(plan, question), workers=workers))
