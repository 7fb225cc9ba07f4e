"""`megalith sweep`: fleets x policies x rates x seeds on all cores, each result kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, progress, result_console, warn
from megalith.cli.scenario_flags import How, What, make_scenario

if TYPE_CHECKING:
    from megalith.sim.scenario import Scenario
    from megalith.sim.sweep import Point, PointResult, Store
    from megalith.specs.slo import Slo

app = App(
    name="sweep",
    help="Simulate fleets, policies, rates and seeds on all cores, and compare.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
_INTERRUPTED = 130
_EXAMPLES = """\
Every combination of the fleets, policies, rates and seeds is one point. Results
go into the folder --out as they come: the same command goes on where it was
stopped. Several policies at once are joined with `+`. TRACE, FLEET and the
policies are those of `megalith simulate` (`--list` shows them). Every figure
is simulated.

Examples:
  megalith sweep --trace azure-conv:requests=2000 --model llama-3.1-8b \\
      --fleet 2xh100-sxm --fleet 4xa100-80gb --rate 2,4,8 --seeds 3 --out runs/a
  megalith sweep --trace azure-conv --model llama-3.1-8b --fleet 4xa100-80gb \\
      --policy first-come --policy splitfuse --policy llumnix+splitfuse \\
      --rate 4..24x4 --slo ttft=400ms,tpot=50ms --out runs/b --plot curves.png"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to sweep")
@dataclass(frozen=True)
class Sweep:
    """The product of what may be given several times."""

    trace: str = ""
    """A trace file, a built-in workload or a drawn one (`poisson:rate=5,...`)."""
    model: str = ""
    """A model of the catalogue (`megalith models`)."""
    fleet: tuple[str, ...] = ()
    """Pools such as 4xh100-sxm:tp2, or a TOML file. Give it once for each fleet."""
    policy: tuple[str, ...] = ()
    """A set-up, batch policy, router or controller, or several joined with `+`. Give it once for each."""
    rate: str | None = None
    """Requests a second: 1,2,4,8 or 1..8x0.5 (from, to, step). By default the workload's own."""
    seeds: int = 1
    """So many seeds for every combination."""
    seed: int = 0
    """The first of them."""
    slo: str | None = None
    """Service level, such as ttft=400ms,tpot=40ms@p90."""
    requests: int | None = None
    """Stop each point after so many requests."""


@app.default
def sweep(
    what: Sweep | None = None,
    how: How | None = None,
    *,
    out: Annotated[Path | None, Parameter(help="Folder for sweep.json and the results.")] = None,
    restart: Annotated[bool, Parameter(negative="", help="Throw away what is in the folder.")] = False,
    workers: Annotated[int | None, Parameter(help="Processes; by default one a core.")] = None,
    plot: Annotated[Path | None, Parameter(help="Latency-throughput curves as a picture.")] = None,
    json: JsonFlag = False,
) -> int:
    """Run the product; exit code 1 when a point failed."""
    from megalith.sim.sweep_folder import define, open_folder

    asked, how = what or Sweep(), how or How()
    if out is None:
        raise ConfigError("A sweep needs a folder for its results.", "Add --out runs/first.")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} is nobody.", "Give 1 or more.")
    if plot is not None:
        from megalith.report.plot import check_plot_path

        check_plot_path(plot)
    points, impossible = make_points(asked, how)
    store = open_folder(out, define(_words(asked, how), points), restart=restart)
    results, complete = _run(points, store, workers)
    slo = points[0].scenario.slo if points else None
    code = _report(asked, points, [*impossible, *results], slo, plot, json)
    if not complete:
        kept = sum(point.key in store.known for point in points)
        warn(f"stopped: {kept} of {len(points)} points are in {out}; the same command goes on from there.")
        return _INTERRUPTED
    return code


def make_points(asked: Sweep, how: How) -> tuple[list[Point], list[PointResult]]:
    """All points in the order of fleets, policies, rates and seeds; and as failures those that no fleet can be.

    Raises ConfigError where nothing is left, and for flags that cannot be used.
    """
    from megalith.sim.sweep import Point, PointResult
    from megalith.specs.rate_text import parse_rates

    if asked.seeds < 1:
        raise ConfigError(f"--seeds {asked.seeds} leaves nothing to run.", "Give 1 or more.")
    if how.config is None and not asked.fleet:
        raise ConfigError("A sweep needs --fleet.", "`megalith sweep --help` has examples.")
    rates = parse_rates(asked.rate) if asked.rate is not None else None
    points: list[Point] = []
    failures: list[PointResult] = []
    errors: list[ConfigError] = []
    for fleet in dict.fromkeys(asked.fleet or ("",)):
        for policy in dict.fromkeys(asked.policy or ("",)):
            labels = {"fleet": fleet or "stored", "policy": policy or "default"}
            try:
                base = make_scenario(_one(asked, fleet, policy), how)
            except ConfigError as error:
                errors.append(error)
                failures.append(PointResult(key="", labels=labels, error=str(error)))
                continue
            for rate, scenario in _at_rates(base, rates):
                for seed in range(asked.seed, asked.seed + asked.seeds):
                    more = {"rate": f"{rate:.6g}", "seed": str(seed)}
                    points.append(Point(labels=labels | more, scenario=_replace(scenario, seed=seed)))
    if not points:
        raise errors[0]
    return points, failures


def _one(asked: Sweep, fleet: str, policy: str) -> What:
    names = tuple(filter(None, policy.split("+")))
    return What(asked.trace, asked.model, fleet, names, slo=asked.slo, requests=asked.requests, seed=asked.seed)


def _at_rates(base: Scenario, rates: Sequence[float] | None) -> list[tuple[float, Scenario]]:
    from megalith.specs.workload_rate import at_rate, mean_rate

    if rates is None:
        return [(mean_rate(base.workload), base)]
    return [(rate, _replace(base, workload=at_rate(base.workload, rate))) for rate in rates]


def _replace(scenario: Scenario, **changes: object) -> Scenario:
    import msgspec

    return msgspec.structs.replace(scenario, **changes)


def _words(asked: Sweep, how: How) -> dict[str, str]:
    """What was asked for, flag by flag."""
    words = {}
    for group in (asked, how):
        for field in fields(group):
            value = getattr(group, field.name)
            words[field.name] = " ".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
    return words


def _run(points: Sequence[Point], store: Store, workers: int | None) -> tuple[list[PointResult], bool]:
    """Results in the order of the points, and whether they are complete."""
    from megalith.sim.sweep import run_points

    results: dict[tuple[str, ...], PointResult] = {}
    complete = True
    found = run_points(points, store, workers)
    with progress("simulating", len(points), "points") as advance:
        try:
            for result in found:
                results[tuple(result.labels.values())] = result
                advance(1)
        except KeyboardInterrupt:
            complete = False
        finally:
            found.close()
    order = [tuple(point.labels.values()) for point in points]
    return [results[labels] for labels in order if labels in results], complete


def _report(
    asked: Sweep,
    points: Sequence[Point],
    results: Sequence[PointResult],
    slo: Slo | None,
    plot: Path | None,
    json: bool,
) -> int:
    from megalith.sim.sweep_rows import FORMAT, curves, failure_table, make_rows, sweep_table

    rows, failures = make_rows(results)
    settings = _settings(asked, points)
    if json:
        body = {"format": FORMAT, "nature": "simulated", "settings": settings, "rows": rows, "failures": failures}
        print_json(body)
    else:
        console = result_console()
        for name, text in settings.items():
            console.print(f"{name}: {text}", soft_wrap=True)
        if rows:
            console.print(sweep_table(rows).to_rich())
        if failures:
            console.print(failure_table(failures).to_rich())
    if plot is not None and rows:
        from megalith.report.plot_frame import Caption
        from megalith.report.plot_sweep import plot_curves

        panels, limits = curves(results, slo)
        plot_curves(plot, Caption("Latency and throughput", settings), panels, limits)
    return 1 if failures else 0


def _settings(asked: Sweep, points: Sequence[Point]) -> dict[str, str]:
    """What one must know to read the rows."""
    from megalith.cli.simulate_output import settings

    first = points[0].scenario
    words = settings(first)
    told = {"model": f"{first.model} in {first.weight_format}", "load": words["load"]}
    if "service level" in words:
        told["service level"] = words["service level"]
    told["seeds"] = f"{asked.seed} to {asked.seed + asked.seeds - 1}" if asked.seeds > 1 else str(asked.seed)
    if asked.seeds > 1 and first.workload.nature == "recorded":
        told["seeds"] += " (the load is recorded: only policies that draw differ between seeds)"
    return told
