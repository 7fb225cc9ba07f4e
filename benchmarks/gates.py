"""What Megalith has promised against its peers, judged from the newest rows: achieved, peer, physical limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OURS = "megalith native"
MODEL_BYTES = 96_400_000
"""Weights that one decode step of the shipped file reads: 66.4 MB of Q4_1 and 30.1 MB of Q8_0 head and embedding."""
OPS_PER_TOKEN = 269e6
OPS_PER_PROMPT_TOKEN = 212e6
"""Two operations a weight, with and without the head."""
KV_BYTES_PER_TOKEN = 23_040


@dataclass(frozen=True)
class Gate:
    """One promise. `figure` reads a row; `ratio` is the least quotient to the peer's best."""

    title: str
    case: str
    figure: str
    ratio: float
    peers: Callable[[Row], bool]
    limit: Callable[[Row], float] | None = None


def _memory(limit: Row, extra_bytes: float = 0.0, batch: int = 1) -> float:
    return batch * limit.get("read_96mib_gb_s", 0.0) * 1e9 / (MODEL_BYTES + extra_bytes)


def _compute(limit: Row, ops: float) -> float:
    best = max(limit.get(key, 0.0) for key in ("int8_gop_s", "int8_int16_sums_gop_s", "int8_vnni_gop_s"))
    return best * 1e9 / ops


def _any_peer(row: Row) -> bool:
    return bool(row.get("peer"))


def _same_file(row: Row) -> bool:
    return str(row["arm"]) == "llama.cpp Q4_1"


def _wall(limit: Row) -> float:
    """Output tokens over wall time when prompt and output are both 128 tokens: both phases at the compute limit."""
    return 1.0 / (1.0 / _compute(limit, OPS_PER_TOKEN) + 1.0 / _compute(limit, OPS_PER_PROMPT_TOKEN))


def _context(limit: Row) -> float:
    return min(_memory(limit, 32 * 528 * KV_BYTES_PER_TOKEN, 32), _compute(limit, OPS_PER_TOKEN))


GATES = (
    Gate("single stream, decode, same file", "single", "decode_tok_s", 1.8, _same_file, _memory),
    Gate("32 requests, output over wall time", "batch-32", "out_tok_s", 1.5, _any_peer, _wall),
    Gate("32 requests, decode at context 512", "batch-32-context-512", "decode_tok_s", 2.0, _any_peer, _context),
    Gate("32 streaming HTTP clients", "http-32", "out_tok_s", 1.3, _any_peer, _wall),
    Gate("prefill", "prefill", "prefill_tok_s", 1.0, _any_peer, lambda limit: _compute(limit, OPS_PER_PROMPT_TOKEN)),
)


def table(rows: list[Row], limit: Row, every: list[Row] | None = None) -> str:
    """The gates as a Markdown table; empty when our own arm has not run.

    `rows` are the newest of each arm and case, `every` all of this machine: a ratio is taken within one run.
    """
    every = rows if every is None else every
    lines = [line for gate in GATES if (line := _against_peers(gate, rows, limit, every))]
    lines += [*_threads(rows, every), *_quality(rows), *_own_limits(rows)]
    if not lines:
        return ""
    heads = "| promise | achieved | best peer | ratio | bar | met | physical limit |\n"
    rule = "| :--- | ---: | ---: | ---: | ---: | :--- | ---: |\n"
    return "### Promises\n\n" + heads + rule + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ours(case: str, figure: str, beside: Row, rows: list[Row], every: list[Row]) -> Row | None:
    """Our row of `case` from the run of `beside`, else our newest."""
    for row in [r for r in every if r.get("date") == beside.get("date")] + rows:
        if row.get("case") == case and row.get("arm") == OURS and figure in row:
            return row
    return None


def _against_peers(gate: Gate, rows: list[Row], limit: Row, every: list[Row]) -> list[str]:
    peers = [row for row in rows if row.get("case") == gate.case and gate.figure in row and gate.peers(row)]
    if not peers:
        return []
    best = max(peers, key=lambda row: float(row[gate.figure]))
    ours = _ours(gate.case, gate.figure, best, rows, every)
    if ours is None:
        return []
    ratio = ours[gate.figure] / best[gate.figure]
    ceiling = f"{gate.limit(limit):.0f} tok/s" if gate.limit and limit else "-"
    return [
        gate.title, f"{ours[gate.figure]:.0f} tok/s", f"{best[gate.figure]:.0f} ({best['arm']})", f"{ratio:.2f}",
        f"{gate.ratio:g}", "yes" if ratio >= gate.ratio else "no", ceiling,
    ]  # fmt: skip


def _threads(rows: list[Row], every: list[Row]) -> list[list[str]]:
    lines = []
    for title, one, two, figure in (
        ("two threads, 32 requests", "batch-32", "two-threads-batch-32", "out_tok_s"),
        ("two threads, prefill", "prefill", "two-threads-prefill", "prefill_tok_s"),
    ):
        many = _ours(two, figure, {"date": "no run"}, rows, every)
        single = _ours(one, figure, many, rows, every) if many else None
        if many and single:
            ratio = many[figure] / single[figure]
            achieved, base = f"{many[figure]:.0f} tok/s", f"{single[figure]:.0f} (one thread)"
            lines.append([title, achieved, base, f"{ratio:.2f}", "1.5", "yes" if ratio >= 1.5 else "no", "2.00 x"])
    return lines


def _quality(rows: list[Row]) -> list[list[str]]:
    lines = []
    scored = [row for row in rows if row["kind"] == "quality"]
    exact = {row["case"]: row for row in scored if row["arm"] == "float32"}
    for row in scored:
        if row["arm"] != OURS or row["case"] not in exact:
            continue
        change = row["perplexity"] / exact[row["case"]]["perplexity"] - 1
        good = "yes" if row["kl"] <= 0.01 else "no"
        lines.append([f"KL to float32, {row['case']}", f"{row['kl']:.4f}", "-", "-", "0.01", good, "0"])
        good = "yes" if abs(change) <= 0.01 else "no"
        lines.append([f"perplexity change, {row['case']}", f"{100 * change:+.2f} %", "-", "-", "1 %", good, "0"])
    return lines


def _own_limits(rows: list[Row]) -> list[list[str]]:
    """Promises about ourselves alone: milliseconds of Python a step, seconds of start-up."""
    lines = []
    bars = (("single", "python_ms_a_step", 0.3, "Python a step, one request"),
            ("batch-32", "python_ms_a_step", 2.0, "Python a step, 32 requests"))  # fmt: skip
    for case, figure, bar, title in bars:
        row = next((r for r in rows if r.get("case") == case and r.get("arm") == OURS and figure in r), None)
        if row:
            good = "yes" if row[figure] <= bar else "no"
            lines.append([title, f"{row[figure]:.3f} ms", "-", "-", f"{bar:g} ms", good, "-"])
    for row in rows:
        if row["kind"] == "figure" and row.get("bar"):
            good = "yes" if row["value"] <= row["bar"] else "no"
            achieved, bar_text = f"{row['value']:.3g} {row['unit']}", f"{row['bar']:g} {row['unit']}"
            lines.append([row["case"], achieved, "-", "-", bar_text, good, "-"])
    return lines
