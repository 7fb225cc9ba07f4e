"""What a study says, as tables, as a Markdown page with pictures, and as JSON.

Knows studies and their results; must not know how points were run. Every figure stands beside the word for what it is:
simulated, predicted or measured. The same results give the same page: no date and no time of a run is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from megalith.base.errors import MachineError
from megalith.report.plot import check_plot_path
from megalith.report.plot_frame import Caption
from megalith.report.plot_sweep import plot_curves, plot_knee
from megalith.report.table import Column, Nature, Table, render_number
from megalith.studies.results import Results, read
from megalith.studies.study import Experiment, Finding, Judgement, Picture, Study, Word, overall, sentence


@dataclass(frozen=True, slots=True)
class Report:
    """A study that has been run and judged."""

    study: Study
    results: Results
    judgement: Judgement
    timings: Sequence[str]
    """How steps were timed."""

    @property
    def verdict(self) -> Word:
        """On the claims."""
        return overall(self.judgement.findings)

    @property
    def sentence(self) -> str:
        """The verdict in words with numbers."""
        return f"{self.verdict}: {sentence(self.judgement.findings)}"

    @property
    def passed(self) -> bool:
        """Every gate passed and every point has a result."""
        return not self.results.failures and all(gate.passed for gate in self.judgement.gates)

    @property
    def natures(self) -> list[Nature]:
        """What its figures are: simulated, predicted or measured."""
        return list(dict.fromkeys(experiment.nature for experiment in self.study.experiments))


def claims_table(report: Report) -> Table:
    """Claim, published, ours, with the mechanism and without it."""
    nature = report.natures[0]
    columns = [
        Column("claim", "claim"),
        Column("setting", "setting"),
        Column("published", "published"),
        Column("ours", "ours", nature=nature),
        Column("with", "with", nature=nature),
        Column("control", "control (off)", nature=nature),
        Column("verdict", "verdict"),
    ]
    table = Table(columns, "Claims")
    for finding in report.judgement.findings:
        claim = finding.claim
        setting = f"{claim.setting}; {finding.note}" if finding.note else claim.setting
        word = finding.word if finding.counts else f"({finding.word})"
        ours = "-" if finding.ours is None else f"{render_number(finding.ours)}{claim.unit}"
        published = claim.said or f"{render_number(claim.published)}{claim.unit}"
        table.add(claim.text, setting, published, ours, finding.on, finding.off, word)
    if any(not finding.counts for finding in report.judgement.findings):
        table.notes.append("A verdict in brackets has no say in the whole.")
    return table


def gates_table(report: Report) -> Table:
    """What must hold for the study to pass."""
    nature = report.natures[0]
    columns = [
        Column("gate", "gate"),
        Column("value", "ours", "number", nature, 4),
        Column("low", "at least", "number", digits=4),
        Column("high", "at most", "number", digits=4),
        Column("passed", "passed"),
        Column("source", "band from"),
    ]
    table = Table(columns, "Gates")
    for gate in report.judgement.gates:
        high = None if gate.high == float("inf") else gate.high
        table.add(gate.name, gate.value, gate.low, high, gate.passed, gate.source)
    return table


def points_table(results: Results, experiment: Experiment) -> Table:
    """The shown figures of every point: the median over seeds, and from the least to the most."""
    whole = all(at == int(at) for at in results.places(experiment.name))
    columns = [Column("at", experiment.axis, "count" if whole else "number"), Column("arm", "arm")]
    columns += [Column(title, title, nature=experiment.nature) for title in experiment.shown]
    seeds = results.seeds(experiment.name)
    table = Table(columns, f"{experiment.title} ({seeds} seed{'s' if seeds > 1 else ''}: median, least to most)")
    for at in results.places(experiment.name):
        for arm in experiment.arms:
            found = [results.curve(experiment.name, arm.name, figure).get(at) for figure in experiment.shown.values()]
            if any(found):
                table.add(at, arm.title, *(_spread(values) for values in found))
    return table


def tables(report: Report) -> dict[str, Table]:
    """All tables of a study by name."""
    found = {"claims": claims_table(report), "gates": gates_table(report), **report.judgement.tables}
    for experiment in report.study.experiments:
        if experiment.shown:
            name = experiment.name if experiment.name not in found else f"{experiment.name}-points"
            found[name] = points_table(report.results, experiment)
    return found


def document(report: Report) -> dict[str, Any]:
    """The whole report as plain data, without what differs from run to run."""
    study, judgement = report.study, report.judgement
    return {
        "study": study.name,
        "title": study.title,
        "system": study.system,
        "reference": study.reference,
        "nature": report.natures,
        "timing": list(report.timings),
        "fast": report.results.fast,
        "verdict": report.verdict,
        "sentence": report.sentence,
        "passed": report.passed,
        "findings": [_finding(finding) for finding in judgement.findings],
        "gates": [{**gate._asdict(), "high": _finite(gate.high), "passed": gate.passed} for gate in judgement.gates],
        "points": [_point(report.results, experiment) for experiment in study.experiments],
        "differences": list(study.differences),
        "notes": [*judgement.notes, *(f"no result: {failure}" for failure in report.results.failures)],
    }


def markdown(report: Report, pictures: Sequence[tuple[str, str]]) -> str:
    """The page. `pictures` are (title, path beside the page)."""
    study, results = report.study, report.results
    command = f"megalith reproduce {study.name}" + (" --fast" if results.fast else "")
    lines = [f"# {study.title}", "", f"**{report.verdict}**: {sentence(report.judgement.findings)}", ""]
    lines += [*study.summary, "", f"Source: {study.reference}.", ""]
    seeds = max(results.seeds(experiment.name) for experiment in study.experiments)
    lines += [f"    {command}", "", f"Figures are {' and '.join(report.natures)}, with up to {seeds} seeds a point."]
    if report.timings:
        lines += ["Steps are timed by:", "", *(f"- {timing}" for timing in report.timings)]
    if results.fast:
        lines += ["", "This is a fast run: few points, short runs. The full one is what counts."]
    found = tables(report)
    for name in ("claims", "gates"):
        lines += ["", found.pop(name).to_markdown().rstrip()]
    lines += [""] + [f"![{title}]({path})" for title, path in pictures]
    notes = [*report.judgement.notes, *(f"No result: {failure}" for failure in results.failures)]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    lines += ["", "## What differs from the publication, and why", "", *(f"- {text}" for text in study.differences)]
    lines += ["", "## All points", ""]
    for table in found.values():
        lines += [table.to_markdown().rstrip(), ""]
    return "\n".join(lines)


def write(report: Report, out: Path) -> Path:
    """Page, pictures and JSON under `out`; the page's path. Raises MachineError on what cannot be written."""
    page, folder = out / f"{report.study.name}.md", out / report.study.name
    pictures: list[tuple[str, str]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            check_plot_path(folder / "any.png")
        except MachineError as missing:
            report.judgement.notes.append(f"No pictures: {missing}")
        else:
            pictures = [_draw(report, picture, folder) for picture in report.judgement.pictures]
        body = msgspec.json.format(msgspec.json.encode(document(report)), indent=2)
        (folder / "report.json").write_bytes(body + b"\n")
        page.write_text(markdown(report, pictures), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{out} cannot be written ({error.strerror}).", "Name another folder with --out.") from None
    return page


def _draw(report: Report, picture: Picture, folder: Path) -> tuple[str, str]:
    path = folder / f"{picture.name}.png"
    nature = report.natures[0]
    timing = {"timing": "; ".join(report.timings)} if report.timings else {}
    caption = Caption(picture.title, {"study": report.study.name, **timing}, nature)
    if picture.ratios:
        plot_knee(path, caption, picture.ylabel, picture.ratios, picture.claim, xlabel=picture.axis)
    else:
        plot_curves(path, caption, picture.panels, logarithmic=picture.logarithmic, xlabel=picture.axis)
    return picture.title, f"{folder.name}/{path.name}"


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        **finding.claim._asdict(),
        "ours": finding.ours,
        "with": finding.on,
        "control": finding.off,
        "note": finding.note,
        "counts": finding.counts,
        "verdict": finding.word,
    }


def _point(results: Results, experiment: Experiment) -> dict[str, Any]:
    rows = []
    for case in results.cases[experiment.name]:
        result = results.get(experiment.name, case)
        if result is not None:
            figures = {title: read(result, figure) for title, figure in experiment.shown.items()}
            rows.append(
                {"arm": case.arm, "at": case.at, "seed": case.seed, "digest": result.digest, "figures": figures}
            )
    return {"experiment": experiment.name, "axis": experiment.axis, "nature": experiment.nature, "rows": rows}


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    middle = render_number(median(values))
    low, high = render_number(min(values)), render_number(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
