"""The simulators' section of RESULTS.md, from the rows of simulator_peers.py."""

from __future__ import annotations

from typing import Any

_ABOUT = """Requests a CPU second (user and system) on one core, one run each, metrics on; in brackets how many times
slower than Megalith. Every simulator times steps in its own way and makes its own number of steps, so
whole tools are compared, not equal work: Megalith with operator tables of Llama 3.1 8B on H100, DynoSim
with its polynomial, Vidur with its linear regression on A100. Vidur cuts requests to 4,096 tokens and has
no prefix cache; on 4 instances it is given the first 5,000 requests, on more 2,000. `others`: what other
processes took meanwhile, in cores; CPU seconds grow with it, for all alike.
"""
ARMS = {"megalith": "Megalith", "dynosim": "DynoSim", "vidur": "Vidur"}


def section(rows: list[dict[str, Any]], markdown: Any) -> str:
    """A table of requests a CPU second; empty without rows. `rows`: the newest of each case and arm."""
    mine = [row for row in rows if row["kind"] == "simulator"]
    if not mine:
        return ""
    body = []
    for case in dict.fromkeys(row["case"] for row in mine):
        by_arm = {row["arm"]: row for row in mine if row["case"] == case}
        ours = by_arm.get("megalith", {}).get("requests_cpu_s")
        cells = [_cell(by_arm.get(arm), ours) for arm in ARMS]
        others = max(row.get("other_cores", 0.0) for row in by_arm.values())
        body.append([case, *cells, f"{others:.1f}", max(row["date"][:10] for row in by_arm.values())])
    versions = sorted({row["version"] for row in mine if "version" in row})
    heads = ["trace and instances", *ARMS.values(), "others", "date"]
    return f"### Simulators\n\n{_ABOUT}\n{markdown(heads, body)}\nVersions: {', '.join(versions)}.\n"


def _cell(row: dict[str, Any] | None, ours: float | None) -> str:
    if row is None:
        return "-"
    if "reason" in row:
        return str(row["reason"])
    rate = f"{row['requests_cpu_s']:,.0f}"
    if row["arm"] == "megalith" or not ours:
        return rate
    return f"{rate} ({ours / row['requests_cpu_s']:.1f} x)"
