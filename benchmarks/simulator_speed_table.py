"""The section of RESULTS.md on the simulator's speed and memory, from the rows of simulator_speed.py."""

from __future__ import annotations

from typing import Any

_ABOUT = """Simulated Llama 3.1 8B on H100, everything on: router, recorder, samples, service level, hash of all
decisions. Requests a CPU second (user and system) on one core, each run in a process of its own, the best of
`runs` and the range of all; CPU seconds include reading the trace. The code is compiled or plain Python
(docs/adr/0013), CPython built plainly or optimised, as distributions build it. `x calibration`: CPU time of a
request in turns of an empty loop (`x += i & 3`), whose time is given beside it: that figure compares better
between machines, and between moments of one that is busy. `others`: what other processes took meanwhile, in
cores. Memory is the largest resident size of the process; live: most requests that were in the cluster at once.
"""


def section(rows: list[dict[str, Any]], markdown: Any) -> str:
    """The table; empty without rows. `rows`: the newest of each case."""
    mine = [row for row in rows if row["kind"] == "simulator-speed" and row["arm"] != "megalith"]
    body = [
        [
            row["case"], row["arm"], f"{row['requests']:,}", f"{row['wanted']:,.0f}", f"{row['requests_cpu_s']:,.0f}",
            "[{:,.0f}, {:,.0f}]".format(*row["requests_cpu_s_spread"]), str(row["runs"]), f"{row['cpu_s']:.2f}",
            f"{row['cpu_s'] / row['requests'] * 1e9 / row['calibration_ns']:,.0f}", f"{row['calibration_ns']:.0f}",
            f"{row['other_cores']:.2f}", f"{row['most_live']:,}", str(row["rss_mib"]),
            row["date"][:16].replace("T", " "),
        ]
        for row in mine
    ]  # fmt: skip
    heads = ["case", "code", "requests", "wanted", "requests/CPU s", "range", "runs", "CPU s", "x calibration", "ns",
             "others", "live", "MiB", "date (UTC)"]  # fmt: skip
    return f"### Speed and memory of the simulator\n\n{_ABOUT}\n{markdown(heads, body)}" if body else ""
