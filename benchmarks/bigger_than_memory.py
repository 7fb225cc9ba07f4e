"""A model several times the memory limit: who generates how fast inside the same control group, from the same disk.

    python benchmarks/synthetic_model.py 7b llama-7b.gguf
    python benchmarks/bigger_than_memory.py llama-7b.gguf --memory 1GiB --llama-python PEER/bin/python \\
        --accelerate-python PEER/bin/python --accelerate-folder llama-7b-bf16 [--store]

Arms: megalith (`complete --memory`), llama.cpp with mmap (in an interpreter that has `xllamacpp`, outside this
repository), Hugging Face accelerate with all layers offloaded to disk (bfloat16: it has no smaller format on a CPU; see
peers/accelerate_offload.py), and the disk itself: the best of several shapes of direct reads of the model file into
huge-page buffers, measured in every round. Before each run the file's pages are dropped from the page cache, and the
peak is read from outside. An arm that cannot run says why and gets no figure. Decode rates do not count the first
token, which pays for the prompt and for the start. `disk share` is what Megalith's steps read, a second, against the
disk arm of the same round; `predicted` is its plan's step time against the measured one.
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
from megalith.tier.disk_rate import direct_rate

PROMPT = "The capital of France is"
READ_SHAPES = ((1, 4 << 20), (2, 8 << 20), (4, 4 << 20), (4, 8 << 20), (4, 32 << 20))
"""Readers and bytes of a read; the best of them counts as the disk's rate."""
INTO_FILE = 'out="$1"; shift; exec "$@" > "$out"'
PEERS = Path(__file__).resolve().parent / "peers"
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
    parser.add_argument("--accelerate-python", type=Path, help="interpreter with torch, transformers and accelerate")
    parser.add_argument("--accelerate-folder", type=Path, help="what its script made of the same shape")
    parser.add_argument("--context", type=int, default=512, help="of Megalith and llama.cpp")
    parser.add_argument("--store", action="store_true", help="append the rows to history.jsonl")
    options = parser.parse_args()
    arms: dict[str, Callable[[], Figures]] = {
        "disk, direct": lambda: disk(options.model),
        "megalith": lambda: megalith(options),
    }
    if options.llama_python is not None:
        arms["llama.cpp, mmap"] = lambda: llama_cpp(options)
    if options.accelerate_python is not None:
        arms["accelerate, disk offload"] = lambda: accelerate(options)
    rounds: dict[str, list[Figures]] = {name: [] for name in arms}
    for _ in range(options.repeats):
        for name, measure in arms.items():
            load = machine.Load()
            before = os.times()
            found = measure()
            after = os.times()
            own = sum(after[:4]) - sum(before[:4])
            if "step_bytes_s" in found:
                found["disk_share"] = round(found["step_bytes_s"] / rounds["disk, direct"][-1]["read_bytes_s"], 3)
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

    command += ["--context", str(options.context)]

    def figures(out: Path) -> Figures:
        found = json.loads(out.read_text())
        streamed = found.get("streamed")
        if streamed is None:
            return {"decode_tok_s": found["measured_tokens_per_s"]}
        measured_ns, predicted_ns = streamed["measured_step_ns"], streamed["predicted_step_ns"]
        return {
            "decode_tok_s": found["measured_tokens_per_s"], "step_bytes": streamed["step_bytes"],
            "step_bytes_s": streamed["step_bytes"] * NS_PER_S / measured_ns,
            "predicted_over_measured": round(predicted_ns / measured_ns, 3),
        }  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        return limited(["/bin/sh", "-c", INTO_FILE, "sh", str(out), *command], out, options, figures)


def llama_cpp(options: argparse.Namespace) -> Figures:
    """One fresh process of llama.cpp, in the limit."""

    def figures(out: Path) -> Figures:
        return {"decode_tok_s": float(json.loads(out.read_text())["timings"]["predicted_per_second"])}

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        script = PEERS / "llama_cpp_limited.py"
        words = (script, options.model, out, PROMPT, options.tokens, options.threads, options.context)
        return limited([str(options.llama_python), *map(str, words)], out, options, figures)


def accelerate(options: argparse.Namespace) -> Figures:
    """One fresh process of accelerate, in the limit; three tokens, because each takes so long."""

    def figures(out: Path) -> Figures:
        return {"decode_tok_s": float(json.loads(out.read_text())["decode_tok_s"])}

    drop_cached(sorted(options.accelerate_folder.glob("*.safetensors")))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        script = PEERS / "accelerate_offload.py"
        words = (script, "run", options.accelerate_folder, out, 3, options.threads)
        return limited([str(options.accelerate_python), *map(str, words)], out, options, figures)


def limited(
    command: Sequence[str], out: Path, options: argparse.Namespace, figures: Callable[[Path], Figures]
) -> Figures:
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
        **figures(out), "run_s": round(took_s, 2), "peak_bytes": peak.peak_bytes,
        "held_elsewhere_bytes": peak.held_elsewhere_bytes,
    }  # fmt: skip


def disk(path: Path) -> Figures:
    """The best rate of direct reads past the page cache, and which readers had it."""
    drop_cached([path])
    found = {shape: direct_rate(path, *shape, most_bytes=2 * GIB, limit_ns=NS_PER_S) for shape in READ_SHAPES}
    best = max(found, key=lambda shape: found[shape])
    return {"read_bytes_s": found[best], "readers": best[0], "reader_bytes": best[1]}


def row(name: str, found: list[Figures], options: argparse.Namespace) -> history.Row:
    """Medians of one arm, with their spread, as a row of the history."""
    figures: Figures = {}
    for key in (
        "decode_tok_s", "read_bytes_s", "step_bytes", "step_bytes_s", "disk_share", "predicted_over_measured", "run_s",
        "peak_bytes", "held_elsewhere_bytes", "other_cores",
    ):  # fmt: skip
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
    lines = ["| arm | tokens/s | reads | disk share | predicted | run | peak | other cores |", "|" + "---|" * 8]
    for found in rows:
        rate = f"{found['decode_tok_s']:.3f}" if "decode_tok_s" in found else found.get("failed", "")[:80]
        reads = found.get("read_bytes_s", found.get("step_bytes_s"))
        rest = "" if reads is None else f"{reads / 1e9:.2f} GB/s"
        rest += f" | {found['disk_share']:.0%}" if "disk_share" in found else " | "
        rest += f" | {found['predicted_over_measured'] - 1:+.0%}" if "predicted_over_measured" in found else " | "
        run = f"{found['run_s']:.1f} s" if "run_s" in found else ""
        peak = format_bytes(found["peak_bytes"]) if "peak_bytes" in found else ""
        lines.append(f"| {found['arm']} | {rate} | {rest} | {run} | {peak} | {found.get('other_cores', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
