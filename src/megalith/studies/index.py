"""The overview of all studies that a folder holds, and the rows of the census page that they answer for.

Knows the JSON that page.py writes; must not know how a study is run. A folder `docs/studies` beside `docs/systems.md`
keeps that page true: what stands between `<!-- NAME -->` and `<!-- end -->` in it is what the full run of NAME found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megalith.base.errors import ConfigError, MachineError
from megalith.base.whole_file import write_whole
from megalith.report.table import render_number
from megalith.studies.registry import STUDIES

CENSUS = "systems.md"
_SHOWN = 4
"""Claims of a study that its row in the census page tells; the others are on the study's own page."""

Document = Mapping[str, Any]


def documents(out: Path) -> list[Document]:
    """The reports that a folder holds, in the order of the registry. Raises MachineError for one that is damaged."""
    found: list[Document] = []
    for name in STUDIES:
        path = out / name / "report.json"
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
        except FileNotFoundError:
            continue
        except (OSError, msgspec.DecodeError) as error:
            raise MachineError(f"{path} cannot be read ({error}).", f"Run `megalith reproduce {name}` again.") from None
    return found


def write_index(out: Path, found: Sequence[Document]) -> Path:
    """README.md of the folder: every claim of every study of its `documents`. Raises MachineError."""
    path = out / "README.md"
    _replace(path, index(found))
    return path


def index(found: Sequence[Document]) -> str:
    """The overview as Markdown."""
    lines = [
        "# Published systems, reproduced", "",
        "A page for each system: what it is, the claim and setting, the command, the figure, ours against claim and",
        "control, and what differs. Made by `megalith reproduce --all`; do not edit. What the words mean: "
        "[studies](../studies.md).", "",
        "| study, claim | published | ours | with | control (mechanism off) | verdict |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for one in found:
        gates = one["gates"]
        passed = sum(gate["passed"] for gate in gates)
        kind = f"{' and '.join(one['nature'])}{', a fast run' if one['fast'] else ''}"
        head = f"**[{one['study']}]({one['study']}.md)**, {kind}, {passed} of {len(gates)} gates kept"
        lines.append(f"| {head} | | | | | **{one['verdict']}** |")
        for finding in one["findings"]:
            word = finding["verdict"] if finding["counts"] else f"({finding['verdict']})"
            cells = (
                f"{finding['text']}, {finding['setting']}", _figure(finding, "published"), _figure(finding, "ours"),
                finding["with"], finding["control"], word,
            )  # fmt: skip
            lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    missing = [name for name in STUDIES if name not in {one["study"] for one in found}]
    if missing:
        lines += ["", f"Not run here: {', '.join(missing)}."]
    return "\n".join([*lines, ""])


def refresh_census(page: Path, found: Sequence[Document]) -> list[str]:
    """Put what full runs found into their rows. Returns the studies whose rows changed; fast runs change nothing.

    Raises ConfigError for a study without a place on the page, MachineError for a page that cannot be written.
    """
    old = text = page.read_text(encoding="utf-8")
    changed = []
    for one in found:
        if one["fast"] or not one["system"]:
            continue
        name = one["study"]
        place = re.compile(rf"(<!-- {re.escape(name)} -->).*?(<!-- end -->)")
        if not place.search(text):
            raise ConfigError(
                f"{page.name} has no place for the study {name}.", f"Write <!-- {name} --><!-- end --> in its row."
            )
        said = _row(one)
        fresh = place.sub(lambda match, said=said: f"{match[1]}{said}{match[2]}", text)  # type: ignore[misc]
        if fresh != text:
            changed.append(name)
        text = fresh
    if text != old:
        _replace(page, text)
    return changed


def _row(one: Document) -> str:
    claims = [finding for finding in one["findings"] if finding["counts"]]
    parts = [
        f"{finding['text']} {_figure(finding, 'ours')} (published {_figure(finding, 'published')})"
        for finding in claims[:_SHOWN]
    ]
    if len(claims) > _SHOWN:
        parts.append(f"{len(claims) - _SHOWN} more")
    head = f"[{one['verdict']}](studies/{one['study']}.md), {' and '.join(one['nature'])}: "
    return head + "; ".join(parts).replace("|", "/") + ". "


def _figure(finding: Mapping[str, Any], key: str) -> str:
    if key == "published" and finding.get("said"):
        return str(finding["said"])
    return "-" if finding[key] is None else f"{render_number(finding[key])}{finding['unit']}"


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another folder with --out.") from None
