"""A model several times the memory limit: who generates how fast inside the same control group, from the same disk.

    python benchmarks/synthetic_model.py 7b llama-7b.gguf
    python benchmarks/bigger_than_memory.py llama-7b.gguf --memory 1GiB --llama-python PEER/bin/python [--store]

Arms: megalith (`complete --memory`), llama.cpp with mmap (in an interpreter that has `xllamacpp`, outside this
repository), and the disk itself: direct reads of the model file, in pieces of 4 MiB into huge-page buffers. Before each
run the file's pages are dropped from the page cache, and the peak is read from outside. An arm that cannot run says why
and gets no figure. Decode rates do not count the first token, which pays for the prompt and for the start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import history
import machine

from megalith.base.confined import Confinement, Peak, run_confined
from megalith.base.errors import MegalithError
from megalith.base.memory_sample import drop_cached
from megalith.base.units import GIB, NS_PER_S, format_bytes, parse_bytes
from megalith.tier.disk import DirectFile
from megalith.tier.memory import HugeBuffer

PROMPT = "The capital of France is"
PIECE_BYTES = 4 << 20
READ_BYTES = 2 * GIB
INTO_FILE = 'out="$1"; shift; exec "$@" > "$out"'
PEER = Path(__file__).resolve().parent / "peers" / "llama_cpp_limited.py"
Figures = dict[str, Any]


def main() -> None:
    """Run every arm in turn, `--repeats` rounds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--llama-python", type=Path, help="interpreter with the xllamacpp wheel")
    parser.add_argument("--store", action="store_true", help="append the rows to history.jsonl")
    options = parser.parse_args()
    arms: dict[str, Callable[[], Figures]] = {
        "disk, direct": lambda: {"read_bytes_s": direct_rate(options.model)},
        "megalith": lambda: megalith(options),
    }
    if options.llama_python is not None:
        arms["llama.cpp, mmap"] = lambda: llama_cpp(options)
    rounds: dict[str, list[Figures]] = {name: [] for name in arms}
    for _ in range(options.repeats):
        for name, measure in arms.items():
            load = machine.Load()
            before = os.times()
            found = measure()
            after = os.times()
            own = sum(after[:4]) - sum(before[:4])
            rounds[name].append({**found, "other_cores": round(load.other_cores(own), 2)})
            print(name, rounds[name][-1], file=sys.stderr, flush=True)
    rows = [row(name, found, options) for name, found in rounds.items()]
    print(table(rows))
    if options.store:
        history.append(rows)


def megalith(options: argparse.Namespace) -> Figures:
    """One fresh `megalith complete`, in the limit."""
    command = [sys.executable, "-m", "megalith", "complete", str(options.model), PROMPT, "--json", "--temperature", "0"]
    command += ["--max-tokens", str(options.tokens), "--memory", options.memory, "--threads", str(options.threads)]

    def rate(out: Path) -> float:
        return float(json.loads(out.read_text())["measured_tokens_per_s"])

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        return limited(["/bin/sh", "-c", INTO_FILE, "sh", str(out), *command], out, options, rate)


def llama_cpp(options: argparse.Namespace) -> Figures:
    """One fresh process of llama.cpp, in the limit."""

    def rate(out: Path) -> float:
        return float(json.loads(out.read_text())["timings"]["predicted_per_second"])

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = (PEER, options.model, out, PROMPT, options.tokens, options.threads)
        return limited([str(options.llama_python), *map(str, words)], out, options, rate)


def limited(command: Sequence[str], out: Path, options: argparse.Namespace, rate: Callable[[Path], float]) -> Figures:
    """Run it in the control group; tokens a second, peak, seconds from start to end."""
    peaks: list[Peak] = []
    begin_ns = time.perf_counter_ns()
    wish = Confinement(parse_bytes(options.memory), "cgroup", (options.model,))
    try:
        code = run_confined(command, wish, peaks.append)
    except MegalithError as error:
        return {"failed": str(error)}
    if code:
        said = out.read_text()[:300] if out.exists() else ""
        return {"failed": f"exit code {code}. {said}".strip()}
    took_s = (time.perf_counter_ns() - begin_ns) / NS_PER_S
    peak = peaks[-1]
    return {
        "decode_tok_s": rate(out), "run_s": round(took_s, 2), "peak_bytes": peak.peak_bytes,
        "held_elsewhere_bytes": peak.held_elsewhere_bytes,
    }  # fmt: skip


def direct_rate(path: Path) -> float:
    """Bytes a second of direct reads of the model file, past the page cache."""
    drop_cached([path])
    with DirectFile(path) as file, HugeBuffer(PIECE_BYTES) as buffer:
        buffer.view[:1] = b"\0"
        end = min(READ_BYTES, file.size // PIECE_BYTES * PIECE_BYTES)
        begin_ns = time.perf_counter_ns()
        for at in range(0, end, PIECE_BYTES):
            file.read_into(at, buffer.view)
        return end * NS_PER_S / (time.perf_counter_ns() - begin_ns)


def row(name: str, found: list[Figures], options: argparse.Namespace) -> history.Row:
    """Medians of one arm, with their spread, as a row of the history."""
    figures: Figures = {}
    for key in ("decode_tok_s", "read_bytes_s", "run_s", "peak_bytes", "held_elsewhere_bytes", "other_cores"):
        values = [one[key] for one in found if key in one]
        if values:
            figures[key] = statistics.median(values)
            figures[f"{key}_spread"] = [min(values), max(values)]
    failures = [one["failed"] for one in found if "failed" in one]
    size = options.model.stat().st_size
    if "read_bytes_s" in figures:
        figures["whole_file_s"] = round(size / figures["read_bytes_s"], 3)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(), "machine": machine.describe(), "kind": "bigger-than-memory", "arm": name,
        "case": f"{options.model.stem} in {options.memory}", "model_bytes": size,
        "limit_bytes": parse_bytes(options.memory), "tokens": options.tokens, "threads": options.threads,
        "runs": len(found), **figures, **({"failed": failures[0], "failures": len(failures)} if failures else {}),
    }  # fmt: skip


def table(rows: Sequence[history.Row]) -> str:
    """The rows for a person; everything is measured."""
    lines = ["| arm | tokens/s | reads | run | peak | other cores |", "|---|---|---|---|---|---|"]
    for found in rows:
        rate = f"{found['decode_tok_s']:.3f}" if "decode_tok_s" in found else found.get("failed", "")[:80]
        reads = f"{found['read_bytes_s'] / 1e9:.2f} GB/s" if "read_bytes_s" in found else ""
        run = f"{found['run_s']:.1f} s" if "run_s" in found else ""
        peak = format_bytes(found["peak_bytes"]) if "peak_bytes" in found else ""
        lines.append(f"| {found['arm']} | {rate} | {reads} | {run} | {peak} | {found.get('other_cores', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
