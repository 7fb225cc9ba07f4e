"""The history (JSON lines, one row a measurement) and the page that is made from it.

RESULTS.md shows, for each machine, the newest row of each arm and case. Nothing in it is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gates
import simulator_speed_table
import simulator_table

HERE = Path(__file__).resolve().parent
HISTORY = HERE / "history.jsonl"
RESULTS = HERE / "RESULTS.md"
Row = dict[str, Any]


def append(rows: Iterable[Row]) -> None:
    """Add rows to the history."""
    with HISTORY.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read() -> list[Row]:
    """All rows, oldest first."""
    if not HISTORY.exists():
        return []
    return [json.loads(line) for line in HISTORY.read_text(encoding="utf-8").splitlines() if line]


def newest(rows: list[Row]) -> list[Row]:
    """The newest row of each (kind, case, arm), in order of first appearance."""
    latest: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        latest[row["kind"], row.get("case", ""), row.get("arm", "")] = row
    return list(latest.values())


def write_results() -> None:
    """RESULTS.md anew: a section a machine."""
    machines: dict[str, list[Row]] = {}
    for row in read():
        machine = row["machine"]
        key = f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}"
        machines.setdefault(key, []).append(row)
    parts = [_INTRODUCTION, *(_machine(name, newest(rows), rows) for name, rows in machines.items())]
    RESULTS.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


_INTRODUCTION = """# Megalith beside its peers

Written by `python benchmarks/run.py`; do not edit. Same model (SmolLM2-135M-Instruct), same prompts (random token ids),
greedy, no end-of-text stop, no prefix cache, the arms of a case in turn within one run, on one pinned core unless the
case says otherwise. Figures are medians of tokens a second, all measured; the range over the repeats is in brackets.
`others` is what other processes took meanwhile, in cores: above about 0.3 the memory-bound figures suffer.
How to get the peers, and what each figure means, is in [README.md](README.md).
"""


def _machine(name: str, rows: list[Row], every: list[Row]) -> str:
    limit = next((row for row in rows if row["kind"] == "limits"), {})
    parts = [f"## {name}\n", gates.table(rows, limit, every)]
    cases = {row["case"]: row.get("about", "") for row in rows if row["kind"] == "case"}
    parts += [_case(case, about, rows) for case, about in cases.items()]
    parts += [_http(rows), _quality(rows), _single_figures(rows), _splitfuse(rows)]
    parts += [simulator_table.section(rows, markdown), simulator_speed_table.section(rows, markdown)]
    parts += [_limits(limit), _skipped(rows)]
    return "\n".join(part for part in parts if part)


def _rate(row: Row, name: str) -> str:
    if name not in row:
        return "-"
    spread = row.get(f"{name}_spread")
    return f"{row[name]:.0f}" + (f" [{spread[0]:.0f}, {spread[1]:.0f}]" if spread else "")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [heads, [":---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _case(case: str, about: str, rows: list[Row]) -> str:
    body = [
        [
            row["arm"], _rate(row, "prefill_tok_s"), _rate(row, "decode_tok_s"), _rate(row, "out_tok_s"),
            f"{row.get('other_cores', 0):.2f}", str(row["samples"]), row["date"][:16].replace("T", " "), row["version"],
        ]
        for row in rows
        if row["kind"] == "case" and row["case"] == case and row["samples"]
    ]  # fmt: skip
    heads = ["arm", "prefill", "decode", "output / wall time", "others", "runs", "date (UTC)", "version"]
    return f"### {case}: {about}\n\n{markdown(heads, body)}"


def _http(rows: list[Row]) -> str:
    body = [
        [
            row["arm"], _rate(row, "out_tok_s"), f"{row['ttft_ms_p50']:.0f}", f"{row['itl_ms_p50']:.0f}",
            f"{row['itl_ms_p95']:.0f}", f"{row['load_s']:.1f}", f"{row['client_cores']:.2f}",
            f"{row['other_cores']:.2f}",
        ]
        for row in rows
        if row["kind"] == "http"
    ]  # fmt: skip
    heads = ["server", "output / wall time", "TTFT p50 ms", "ITL p50 ms", "ITL p95 ms", "ready s", "client", "others"]
    return f"### 32 streaming clients over HTTP\n\n{markdown(heads, body)}" if body else ""


def _quality(rows: list[Row]) -> str:
    body = [
        [
            row["arm"], row["case"], f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['top1']:.3f}",
            str(row["tokens"]),
        ]
        for row in rows
        if row["kind"] == "quality"
    ]  # fmt: skip
    heads = ["setting", "text", "perplexity", "KL to float32", "same top-1", "tokens"]
    return f"### Quality\n\n{markdown(heads, body)}" if body else ""


def _single_figures(rows: list[Row]) -> str:
    body = [
        [row["case"], f"{row['value']:.4g} {row['unit']}", f"[{row['spread'][0]:.4g}, {row['spread'][1]:.4g}]"]
        for row in rows
        if row["kind"] == "figure"
    ]
    return f"### Start-up and reading\n\n{markdown(['what', 'median', 'range'], body)}" if body else ""


def _splitfuse(rows: list[Row]) -> str:
    body = [
        [
            policy, row["arm"], f"{row[f'{policy}_itl_ms_p95']:.1f}", f"{row[f'{policy}_itl_ms_max']:.1f}",
            f"{row[f'{policy}_out_tok_s']:.1f}", "yes" if row["same_tokens"] else "no",
        ]
        for row in rows
        if row["kind"] == "study" and row["case"] == "splitfuse"
        for policy in ("splitfuse", "prefill-first")
    ]  # fmt: skip
    heads = ["policy", "mode", "ITL P95 ms", "ITL max ms", "output / wall time", "same tokens"]
    about = "### SplitFuse on and off: short requests decode while long prompts arrive\n\n"
    return about + markdown(heads, body) if body else ""


def _limits(limit: Row) -> str:
    names = {
        "read_1gib_gb_s": "memory read, 1 GiB, GB/s",
        "read_96mib_gb_s": "memory read, 96 MiB again and again, GB/s",
        "fp32_gflop_s": "float32 multiply-add, GFLOP/s",
        "int8_gop_s": "int8 x int8 into int32 (AVX2), GOP/s",
        "int8_int16_sums_gop_s": "int8 x int8 into int16 (AVX2), GOP/s",
        "int8_vnni_gop_s": "int8 x int8 into int32 (AVX-512 VNNI), GOP/s",
    }
    body = [[title, f"{limit[key]:.1f}"] for key, title in names.items() if key in limit]
    return f"### What one core can do at most\n\n{markdown(['resource', 'measured'], body)}" if body else ""


def _skipped(rows: list[Row]) -> str:
    lines = [f"- {row['arm']}: {row['reason']}" for row in rows if row["kind"] == "skipped"]
    return "### Did not take part\n\n" + "\n".join(lines) + "\n" if lines else ""
