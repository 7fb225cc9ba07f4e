"""Simulators side by side on recorded traces, requests a CPU second on one core; one history row a run.

    python benchmarks/simulator_peers.py --data ../shared/data/traces --peers peers.toml
    python benchmarks/simulator_peers.py --data ../shared/data/traces --arms megalith --cases azure-16

CPU seconds are user and system time of the simulation alone: start-up, reading a profile and fitting it are left out.
Every run is a process of its own on one pinned core, runs of a case follow each other. How to get the peers: README.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import history
import machine

HERE = Path(__file__).resolve().parent
TRACE_BLOCK = 512
TIMEOUT_S = 3000


class Case(NamedTuple):
    """One trace on a number of instances."""

    trace: str
    instances: int
    router: str = "least-outstanding"
    """Ours; the peers go round, or by prefix where this does."""
    block_tokens: int = 16
    vidur_requests: int | None = None
    """Vidur is given only so many, where all would take it many minutes; 0: it cannot do the case."""


CASES = {
    "azure-1": Case("azure2023_conv.csv.gz", 1),
    "azure-4": Case("azure2023_conv.csv.gz", 4, vidur_requests=5000),
    "azure-16": Case("azure2023_conv.csv.gz", 16, vidur_requests=2000),
    "azure-64": Case("azure2023_conv.csv.gz", 64, vidur_requests=2000),
    # Blocks as the trace has them; it has no prefix cache, so Vidur sits out.
    "mooncake-16": Case("mooncake_fast25_conversation.jsonl.gz", 16, "least-outstanding", TRACE_BLOCK, 0),
    "mooncake-16-by-prefix": Case("mooncake_fast25_conversation.jsonl.gz", 16, "prefix-aware", TRACE_BLOCK, 0),
}
ARMS = ("megalith", "dynosim", "vidur")


class Row(NamedTuple):
    """One request of a trace."""

    at_s: float
    prompt: int
    output: int
    blocks: list[int]


def read(path: Path) -> Iterator[Row]:
    """Requests of an Azure csv or a Mooncake jsonl; where no blocks are recorded, every prompt has its own."""
    with gzip.open(path, "rt", newline="") as file:
        if path.name.endswith(".jsonl.gz"):
            for line in file:
                row = json.loads(line)
                yield Row(row["timestamp"] / 1e3, row["input_length"], row["output_length"], row["hash_ids"])
            return
        first = block = 0.0
        for number, row in enumerate(csv.DictReader(file)):
            day, _, fraction = row["TIMESTAMP"].partition(".")
            seconds = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC).timestamp()
            at_s = seconds + float(f"0.{fraction or 0}")
            first = at_s if number == 0 else first
            prompt, count = int(row["ContextTokens"]), -(-int(row["ContextTokens"]) // TRACE_BLOCK)
            yield Row(at_s - first, prompt, max(1, int(row["GeneratedTokens"])), [int(block) + i for i in range(count)])
            block += count


def write(trace: Path, folder: Path) -> tuple[Path, Path]:
    """The trace in the forms of DynoSim and of Vidur."""
    mooncake, vidur = folder / f"{trace.name}.jsonl", folder / f"{trace.name}.csv"
    with mooncake.open("w") as lines, vidur.open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["arrived_at", "num_prefill_tokens", "num_decode_tokens"])
        for row in read(trace):
            fields = {"timestamp": row.at_s * 1e3, "input_length": row.prompt, "output_length": row.output}
            lines.write(json.dumps({**fields, "hash_ids": row.blocks}) + "\n")
            writer.writerow([row.at_s, row.prompt, row.output])
    return mooncake, vidur


def shortened(table: Path, requests: int | None) -> Path:
    """The first requests of Vidur's table."""
    if requests is None:
        return table
    short = table.with_suffix(f".{requests}.csv")
    short.write_text("\n".join(table.read_text().splitlines()[: requests + 1]) + "\n")
    return short


def command(arm: str, case: Case, trace: Path, peers: dict[str, Any], folder: Path) -> tuple[list[str], Path] | str:
    """What runs this arm, and where; or why it does not."""
    if arm == "megalith":
        words = [str(trace), str(case.instances), case.router, str(case.block_tokens)]
        return [sys.executable, str(HERE / "megalith_simulates.py"), *words], HERE
    if arm not in peers:
        return "not installed: no entry in the peers file"
    mooncake, table = write(trace, folder)
    if arm == "dynosim":
        side = str(HERE / "peers" / "dynosim_side.py")
        mode = "kv_router" if case.router == "prefix-aware" else "round_robin"
        return [peers[arm]["python"], side, str(mooncake), str(case.instances), mode], folder
    if case.vidur_requests == 0:
        return "it has no prefix cache"
    short = shortened(table, case.vidur_requests)
    words = [str(short), str(case.instances), peers[arm]["model"], str(peers[arm].get("tensor_parallel", 1))]
    return [peers[arm]["python"], str(HERE / "peers" / "vidur_side.py"), *words], Path(peers[arm]["folder"])


def run(arm: str, words: list[str], where: Path, core: int) -> dict[str, Any]:
    """One run. Raises RuntimeError with the end of what it said when it fails."""
    load = machine.Load()
    done = subprocess.run(
        [*machine.pinned((core,)), *words], cwd=where, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{arm}: {(done.stderr or done.stdout)[-800:]}")
    row: dict[str, Any] = json.loads(lines[-1])
    row["requests_cpu_s"] = round(row["requests"] / row["cpu_s"], 1)
    return {**row, "other_cores": load.other_cores(row["cpu_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the recorded traces")
    parser.add_argument("--peers", type=Path, help="TOML file that says where each peer is installed")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--core", type=int, default=1)
    options = parser.parse_args()
    peers = tomllib.loads(options.peers.read_text()) if options.peers else {}
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    for name in options.cases:
        case = CASES[name]
        trace = (options.data / case.trace).resolve()
        for arm in options.arms:
            row = {**stamp, "kind": "simulator", "case": name, "arm": arm, "instances": case.instances}
            with tempfile.TemporaryDirectory() as folder:
                found = command(arm, case, trace, peers, Path(folder))
                if isinstance(found, str):
                    history.append([{**row, "reason": found}])
                    print(name, arm, found, flush=True)
                    continue
                row |= run(arm, *found, options.core)
            history.append([row])
            print(name, arm, f"{row['requests_cpu_s']:,.0f} requests/CPU s", row["cpu_s"], flush=True)
    history.write_results()


if __name__ == "__main__":
    main()
