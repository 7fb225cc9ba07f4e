"""The census page: every title once, valid states, and every claim names a command that exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from megalith.cli.main import VERBS
from megalith.studies.registry import STUDIES, study

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "systems.md"
STATES = {"works", "partly", "not yet", "outside"}
NUM_TITLES = 102
NUM_OUTSIDE = 11
GROUP_SIZES = {"A": 15, "B": 5, "C": 12, "D": 6, "E": 6, "F": 9, "G": 4, "H": 9, "I": 7, "J": 3, "K": 7, "L": 19}


class Row(NamedTuple):
    group: str
    title: str
    home: str
    state: str
    command: str
    measured: str


def read_rows(text: str) -> list[Row]:
    group, rows = "", []
    for line in text.splitlines():
        if heading := re.match(r"## ([A-Z])\. ", line):
            group = heading.group(1)
        if line.startswith("| ") and not line.startswith("| title |"):
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            rows.append(Row(group, *cells))
    return rows


ROWS = read_rows(PAGE.read_text(encoding="utf-8"))


def test_every_title_stands_once_in_its_group() -> None:
    assert len(ROWS) == NUM_TITLES
    assert [title for title, count in Counter(row.title for row in ROWS).items() if count > 1] == []
    assert Counter(row.group for row in ROWS) == GROUP_SIZES


def test_every_state_is_one_of_the_four() -> None:
    assert {row.state for row in ROWS} <= STATES
    assert sum(row.state == "outside" for row in ROWS) == NUM_OUTSIDE
    assert [row.title for row in ROWS if (row.state == "outside") != (row.home == "-")] == []


CLAIMS = [row for row in ROWS if row.state in {"works", "partly"}]


@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row.title[:40])
def test_a_claim_names_a_command_that_exists_and_a_figure(row: Row) -> None:
    commands = re.findall(r"`([^`]+)`", row.command)
    assert commands, f"{row.title}: no command"
    for command in commands:
        program, *words = command.split()
        if program == "megalith":
            assert words[0] in VERBS, command
        else:  # a script or test of the repository
            named = [ROOT / word.split("::")[0] for word in words if "/" in word]
            assert named, command
            assert all(path.exists() for path in named), command
    assert row.measured != "-", f"{row.title}: no figure"


def test_every_study_answers_for_the_row_of_its_system() -> None:
    for name in STUDIES:
        system = study(name).system
        marked = [row.title for row in ROWS if f"<!-- {name} -->" in row.measured and "<!-- end -->" in row.measured]
        assert marked == ([system] if system else []), name


def test_a_row_without_a_claim_has_neither_command_nor_figure() -> None:
    idle = [row for row in ROWS if row.state in {"not yet", "outside"}]
    assert [row.title for row in idle if (row.command, row.measured) != ("-", "-")] == []


def test_the_glossary_defines_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [m.group(1) for m in re.finditer(r"^\| ([^|]+?) \| [^|]+ \|$", text, re.MULTILINE) if m.group(1) != "word"]
    assert [word for word, count in Counter(words).items() if count > 1] == []
    required = {"block", "tier", "format", "mover", "step", "instance", "policy", "plan", "layout", "profile", "study"}
    assert required | {"TTFT", "TPOT", "ITL", "goodput", "MFU", "MBU"} <= set(words)
