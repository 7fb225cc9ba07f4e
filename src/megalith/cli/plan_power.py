"""`megalith plan power`: what a row of servers draws of its power budget, and how many more it carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, result_console, working

if TYPE_CHECKING:
    from megalith.plan.row import RowQuestion
    from megalith.sim.fluid_row import RowResult
    from megalith.specs.fleet import PolicySpec

app = App(
    name="power",
    help="Say how many servers a row's power budget carries, and what capping costs them.",
    help_format="plaintext",
)
_EXAMPLES = """\
A row of --budget-servers was provisioned for what its servers may draw, and
draws --peak of that in a week: this fixes how much is asked of a server. Rows
of --servers with as much each are then simulated under no capping, one
threshold and POLCA, and without any control, which is what latencies are held
against. Half of the servers have low priority; they are slowed first.

Examples:
  megalith plan power --servers 52                      a day, a minute or so
  megalith plan power --servers 52 --days 7 --out row.png
  megalith plan power --headroom                        how many, in seconds
  megalith plan power --servers 52 --policy polca --actuation 120 --second 0.93"""
app.help_epilogue = _EXAMPLES
_POLICIES = ("no-cap", "single-threshold", "polca")


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class What:
    """The row, its budget and its load."""

    servers: int = 52
    """In the row."""
    budget_servers: int = 40
    """That the budget was provisioned for."""
    policy: tuple[str, ...] = _POLICIES
    """no-cap, single-threshold or polca. Give it once for each; by default all three."""
    days: float = 1.0
    """Simulated, from Monday on, and the same for the calibration."""
    peak: float = 0.79
    """Of the budget, what the provisioned servers draw at most."""
    rate: float | None = None
    """Requests a second and server in the busiest hour, instead of --peak."""
    seed: int = 0
    """Of the reported days; the calibration has others."""
    headroom: Annotated[bool, Parameter(negative="")] = False
    """Say how many servers hold in the busiest three hours of a Tuesday, by policy."""


@Parameter(name="*", group="Servers and control")
@dataclass(frozen=True)
class Details:
    """Machines, sensors and clocks."""

    model: str = "bloom-176b"
    """A model that splitwise-sim measured."""
    device: str = "a100-80gb"
    """A device that it measured."""
    devices: int = 8
    """Of one server."""
    rated_w: float = 6500.0
    """Provisioned for one server."""
    other_w: float = 3105.0
    """What one draws beside its devices."""
    actuation: float = 40.0
    """Seconds until a clock has changed."""
    first: float = 0.80
    """POLCA's first threshold, as a share of the budget."""
    second: float = 0.89
    """Its second, and the one of single-threshold."""
    exponent: float = 2.2
    """Of the clock in the power above idle."""


@app.default
def power(
    what: What | None = None, how: Details | None = None, *,
    out: Annotated[Path | None, Parameter(help="Picture of the row's power: .png, .svg or .pdf.")] = None,
    json: JsonFlag = False,
) -> int:  # fmt: skip
    """Print what a row draws, how often it brakes and what its requests lose."""
    from megalith.plan import row_explain
    from megalith.plan.row import calibrate, headroom
    from megalith.report.plot import check_plot_path
    from megalith.sim.fluid_row import simulate_rows
    from megalith.specs.row_load import S_PER_DAY

    what, how = what or What(), how or Details()
    if not 0.02 <= what.days <= 60:
        raise ConfigError(f"--days {what.days:g} cannot be simulated.", "Give 0.02 to 60 days.")
    if out is not None:
        check_plot_path(out)
    question = _question(what, how)
    policies = [_policy(question, name, how) for name in what.policy]
    span_s = what.days * S_PER_DAY
    with working("simulating rows") as report:
        if what.rate is None:
            report("looking for the rate that draws the peak")
            factor = calibrate(question, span_s)
        else:
            factor = what.rate / question.load.rate_per_server
        if what.headroom:
            report("rows of several sizes in the busiest hours")
            found = [headroom(question, policy, factor, seed=what.seed) for policy in policies]
        else:
            rows = [question.row(what.servers, policy, factor, what.seed) for policy in (*policies, None)]
            results = simulate_rows(rows, question.load, question.machine, span_s, lambda done: report(f"{done:.0%}"))
    rate = factor * question.load.rate_per_server
    console = result_console()
    if what.headroom:
        if json:
            print_json({"fidelity": "fluid", "rate_per_server": rate, "headroom": found})
            return 0
        console.print(row_explain.headroom_table(found).to_rich())
        return 0
    if out is not None:
        _draw(out, question, results)
    if json:
        print_json(_document(rate, results))
        return 0
    console.print(row_explain.headline(question, what.servers, rate, what.days), soft_wrap=True)
    console.print(row_explain.row_table(results).to_rich())
    return 0


def _question(what: What, how: Details) -> RowQuestion:
    from megalith.plan.row import RowQuestion

    return RowQuestion(
        model=how.model, device=how.device, devices=how.devices, rated_w=how.rated_w, other_w=how.other_w,
        budget_servers=what.budget_servers, peak=what.peak, actuation_s=how.actuation, exponent=how.exponent,
    )  # fmt: skip


def _policy(question: RowQuestion, name: str, how: Details) -> PolicySpec:
    from megalith.plan.row import policy_for

    if name not in _POLICIES:
        raise ConfigError(f"--policy {name!r} is no power policy.", f"Choose {', '.join(_POLICIES)}.")
    options: dict[str, dict[str, object]] = {
        "polca": {"first": how.first, "second": how.second},
        "single-threshold": {"threshold": how.second},
    }
    return policy_for(question, name, **options.get(name, {}))


def _document(rate: float, results: list[RowResult]) -> dict[str, object]:
    from megalith.plan.row import lost

    rows = [
        {
            "policy": None if one.spec.policy is None else one.spec.policy.name, "servers": one.spec.servers,
            "peak_share": one.peak_share, "mean_share": one.mean_share, "brakes": one.counters.brakes,
            "capped": one.capped, "requests": one.requests, "lost": lost(one, results[-1]),
            "rise_of_budget": {"1 sample": one.rise(1), "20 samples": one.rise(20)},
        }
        for one in results
    ]  # fmt: skip
    return {"nature": "simulated", "fidelity": "fluid", "rate_per_server": rate, "rows": rows}


def _draw(path: Path, question: RowQuestion, results: list[RowResult]) -> None:
    from megalith.report.plot_frame import Caption
    from megalith.report.plot_power import plot_power

    shares = {}
    for one in reversed(results):
        name = "nobody at the clocks" if one.spec.policy is None else one.spec.policy.name
        shares[name] = one.power_w / question.budget_w
    settings = {
        "model": question.model, "servers": str(results[0].spec.servers), "budget": f"{question.budget_w:,.0f} W",
        "actuation": f"{question.actuation_s:g} s",
    }  # fmt: skip
    lines = {"budget": 1.0, "89 %": 0.89, "80 %": 0.80}
    plot_power(path, Caption("Power of a row", settings), shares, question.telemetry_s, lines, ("budget",))
