"""The overview of studies and the rows of the census page that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.cli.main import run
from megalith.studies.index import documents, index, refresh_census, write_index

FINDING = {
    "text": "P95", "setting": "16 clients", "published": 3.7, "ours": 3.0, "unit": "x", "with": "1 s", "control": "3 s",
    "counts": True, "verdict": "reproduced",
}  # fmt: skip


def report(name: str = "fastgen", **other: Any) -> dict[str, Any]:
    return {
        "study": name, "system": "A title", "nature": ["simulated"], "fast": False, "verdict": "reproduced",
        "gates": [{"passed": True}, {"passed": False}], "findings": [FINDING],
    } | other  # fmt: skip


def test_the_overview_has_every_claim_and_what_was_not_run() -> None:
    text = index([report(findings=[FINDING, {**FINDING, "counts": False, "ours": None}])])
    assert "| **[fastgen](fastgen.md)**, simulated, 1 of 2 gates kept | | | | | **reproduced** |" in text
    assert "| P95, 16 clients | 3.70x | 3.00x | 1 s | 3 s | reproduced |" in text
    assert "| P95, 16 clients | 3.70x | - | 1 s | 3 s | (reproduced) |" in text
    assert "Not run here: genz" in text
    assert "16 clients | fewer hours |" in index([report(findings=[{**FINDING, "said": "fewer hours"}])])


def test_rows_say_what_full_runs_found_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "systems.md"
    page.write_text("| a | <!-- fastgen -->old<!-- end -->By hand. |\n| b | <!-- genz --><!-- end --> |\n")
    many = [{**FINDING, "text": f"claim {number}"} for number in range(6)]
    found = [report(findings=many), report("genz", fast=True)]
    assert refresh_census(page, found) == ["fastgen"]
    first, second = page.read_text().splitlines()
    assert first.startswith(
        "| a | <!-- fastgen -->[reproduced](studies/fastgen.md), simulated: claim 0 3.00x (published 3.70x)"
    )
    assert first.endswith("; 2 more. <!-- end -->By hand. |")
    assert second == "| b | <!-- genz --><!-- end --> |"
    assert refresh_census(page, found) == []


def test_a_study_without_a_place_is_refused_and_one_without_a_system_needs_none(tmp_path: Path) -> None:
    page = tmp_path / "systems.md"
    page.write_text("nothing\n")
    with pytest.raises(ConfigError, match="no place for the study fastgen"):
        refresh_census(page, [report()])
    assert refresh_census(page, [report(system="")]) == []


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    assert documents(tmp_path) == []
    (tmp_path / "genz").mkdir()
    (tmp_path / "genz" / "report.json").write_text("{")
    with pytest.raises(MachineError, match="genz"):
        write_index(tmp_path, documents(tmp_path))


def test_all_goes_on_after_a_study_that_fails_and_writes_pages_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megalith.studies import index as index_module
    from megalith.studies import registry

    few = {"broken": "no such module", "long-context": "seconds"}
    monkeypatch.setattr(registry, "STUDIES", few)
    monkeypatch.setattr(index_module, "STUDIES", few)

    def study(name: str) -> Any:
        if name == "broken":
            raise ConfigError("it is broken", "")
        return found(name)

    found = registry.study
    monkeypatch.setattr(registry, "study", study)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "systems.md").write_text("| x | <!-- long-context --><!-- end -->By hand. |\n")
    assert run(["reproduce", "--all"]) == 1
    shown = capsys.readouterr()
    assert "broken: it is broken" in shown.err
    assert "Rows of systems.md that say something else now: long-context" in " ".join(shown.out.split())
    assert (tmp_path / "docs" / "studies" / "long-context.md").is_file()
    assert "**[long-context](long-context.md)**" in (tmp_path / "docs" / "studies" / "README.md").read_text()
    assert "users in 80 GB" in (tmp_path / "docs" / "systems.md").read_text()

    assert run(["reproduce", "--all", "--fast", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == ["broken"]
    assert (tmp_path / "studies" / "README.md").is_file()
