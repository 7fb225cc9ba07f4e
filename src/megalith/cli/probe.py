"""`megalith probe`: measure this machine and store its profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from megalith.base.units import format_bytes
from megalith.cli.output import JsonFlag, print_json, progress, result_console, say

if TYPE_CHECKING:
    from megalith.plan.machine import MachineFacts
    from megalith.report.table import Table

app = App(
    name="probe",
    help="Measure this machine and store its profile.",
    help_format="plaintext",
    help_epilogue="""\
Measures memory bandwidth, matrix products, attention, disk and
process-to-process copies in under a minute. The result is stored under the
Megalith home; `plan`, `serve` and `bench` use it.

Examples:
  megalith probe                      measure, store and print
  megalith probe --no-store --json    measure and print only
  megalith probe --folder /mnt/nvme   take the disk figures there""",
)


@app.default
def probe(*, folder: Path | None = None, threads: int | None = None, store: bool = True, json: JsonFlag = False) -> int:
    """Measure this machine.

    Parameters
    ----------
    folder
        Where the disk is measured; by default the Megalith home.
    threads
        Threads of the parallel figures; by default one for each core.
    store
        Keep the result for `plan` and `bench`.
    """
    from megalith.base.home import home_dir
    from megalith.engine.probe import probe as measure
    from megalith.plan import machine

    with progress("probe", total=6, unit="parts") as advance:

        def next_part(name: str) -> None:
            say(f"measuring {name}")
            advance(1)

        facts = measure(folder or home_dir(), next_part, threads)
    if store:
        say(f"stored in {machine.store(machine.facts_path(), facts)}")
    if json:
        print_json(facts)
    else:
        result_console().print(facts_table(facts).to_rich())
    return 0


def facts_table(facts: MachineFacts) -> Table:
    """The figures of a probe, one a row, in units that people read."""
    from megalith.report.table import Column, Table, render_number

    title = f"{facts.machine}, {facts.threads} threads, {facts.date}"
    columns = (Column("figure", "figure"), Column("value", "value", nature="measured"))
    table = Table(columns=columns, title=title, notes=list(facts.notes))
    for name, value in facts.figures.items():
        stem, unit = _split_unit(name)
        text = f"{format_bytes(value)}/s" if unit == "bytes_per_s" else f"{render_number(value / 1e9)} {unit}"
        table.add(stem.replace("_", " "), text)
    return table


def _split_unit(name: str) -> tuple[str, str]:
    for suffix, unit in (
        ("_bytes_per_s", "bytes_per_s"),
        ("_flops_per_s", "GFLOP/s"),
        ("_macs_per_s", "GMAC/s"),
    ):
        if name.endswith(suffix):
            return name.removesuffix(suffix), unit
    return name, ""
