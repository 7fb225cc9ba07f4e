"""`megalith reproduce`: run the claim of a published system, with its mechanism on and off, and say what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError, MegalithError
from megalith.cli.output import JsonFlag, print_json, print_tables, progress, result_console, warn

if TYPE_CHECKING:
    from megalith.studies.page import Report
    from megalith.studies.study import Study

app = App(
    name="reproduce",
    help="Reproduce the claim of a published system: claim, ours, and the control with the mechanism off.",
    help_format="plaintext",
)
app.help_epilogue = """\
A study sweeps the load with several seeds on all cores, prints claim, ours
and control, and leaves a page with pictures, its figures as JSON and the
points in OUT (default: the folder `studies` here). An interrupted study goes
on where it stopped. Exit code 1: a gate failed, and the page says which.

--all runs every study, goes on after one that fails, and writes an overview.
In a checkout of the project OUT is then docs/studies, unless the run is fast,
and the rows of docs/systems.md say what was found.

Examples:
  megalith reproduce --list
  megalith reproduce fastgen --fast
  megalith reproduce llumnix --seeds 5 --out results
  megalith reproduce --all --fast"""


@app.default
def reproduce(
    name: str | None = None,
    /,
    *,
    list_: Annotated[bool, Parameter(name="--list", negative="", help="Show the studies, and stop.")] = False,
    all_: Annotated[bool, Parameter(name="--all", negative="", help="Run every study, one after the other.")] = False,
    fast: Annotated[
        bool, Parameter(negative="", help="Few points and short runs: seconds instead of minutes.")
    ] = False,
    seeds: Annotated[int | None, Parameter(help="Runs of every point with other random numbers.")] = None,
    out: Annotated[Path | None, Parameter(help="Folder for page, pictures and points; by default `studies`.")] = None,
    workers: Annotated[int | None, Parameter(help="Processes; by default one a core.")] = None,
    fresh: Annotated[bool, Parameter(negative="", help="Forget the points of earlier runs.")] = False,
    json: JsonFlag = False,
) -> int:
    """Run and judge."""
    from megalith.studies.registry import STUDIES, study

    if list_:
        print_tables(_known(), json=json)
        return 0
    if (name is None) == (not all_):
        raise ConfigError("`megalith reproduce` needs the name of a study, or --all.", f"Known: {', '.join(STUDIES)}.")
    for option, value in (("--seeds", seeds), ("--workers", workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}.", "Give at least 1.")
    out = _folder(all_ and not fast) if out is None else out
    reports, documents, failed = [], [], []
    for one in STUDIES if name is None else [name]:
        try:
            report = _run(study(one), fast=fast, seeds=seeds, out=out, workers=workers, fresh=fresh)
        except MegalithError as error:
            if name is not None:
                raise
            failed.append(one)
            warn(f"{one}: {error}")
            continue
        reports.append(report)
        if json:
            documents.append(_document(report))
        else:
            _print(report, out)
    if all_:
        _overview(out, json=json)
    if json:
        print_json({"studies": documents, "failed": failed} if all_ else documents[0])
    return 0 if not failed and all(report.passed for report in reports) else 1


def _folder(documented: bool) -> Path:
    """Where pages go unless it is said: a full run of all studies in a checkout makes the documentation."""
    from megalith.studies.index import CENSUS

    docs = Path("docs")
    return docs / "studies" if documented and (docs / CENSUS).is_file() else Path("studies")


def _overview(out: Path, *, json: bool) -> None:
    """The page over all pages, and the census beside them."""
    from megalith.studies.index import CENSUS, documents, refresh_census, write_index

    found = documents(out)
    page = write_index(out, found)
    census = out.resolve().parent / CENSUS
    changed = refresh_census(census, found) if census.is_file() else []
    if not json:
        console = result_console()
        console.print(f"Overview: {page}", soft_wrap=True)
        if changed:
            console.print(f"Rows of {census.name} that say something else now: {', '.join(changed)}", soft_wrap=True)


def _run(study: Study, *, fast: bool, seeds: int | None, out: Path, workers: int | None, fresh: bool) -> Report:
    from megalith.sim.sweep import Store
    from megalith.studies.page import Report, write
    from megalith.studies.results import Results
    from megalith.studies.run import run_study, timings

    points = out / study.name / "points.jsonl"
    if fresh:
        points.unlink(missing_ok=True)
    store = Store(points)
    total = sum(map(len, Results(study, fast, seeds).cases.values()))
    done = 0
    with progress(study.name, total, "points") as advance:

        def count(by: int) -> None:
            nonlocal done
            done += by
            advance(by)

        try:
            results = run_study(study, fast=fast, seeds=seeds, store=store, workers=workers, done=count)
        except KeyboardInterrupt:
            warn(f"stopped: {done} of {total} points are in {points}; the same command goes on from there.")
            raise
    report = Report(study, results, study.judge(results), timings(study, results))
    write(report, out)
    return report


def _print(report: Report, out: Path) -> None:
    from megalith.studies.page import claims_table, gates_table

    console = result_console()
    console.print(f"{report.study.title}", style="bold", soft_wrap=True)
    console.print("; ".join([" and ".join(report.natures), *report.timings]), soft_wrap=True)
    print_tables({"claims": claims_table(report), "gates": gates_table(report)}, json=False)
    for failure in report.results.failures:
        warn(f"no result: {failure}")
    console.print(f"Verdict: {report.sentence}", soft_wrap=True)
    console.print(f"Page: {out / report.study.name}.md", soft_wrap=True)


def _document(report: Report) -> dict[str, Any]:
    from megalith.studies.page import document

    return document(report)


def _known() -> dict[str, Any]:
    from megalith.report.table import Column, Table
    from megalith.studies.registry import STUDIES

    table = Table([Column("name", "name"), Column("what", "what")], "studies")
    for name, what in STUDIES.items():
        table.add(name, what)
    return {"studies": table}
