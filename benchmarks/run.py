"""Megalith beside its peers in one run: interleaved, pinned to one core, medians, one history row an arm and case.

    python benchmarks/run.py --peers peers.toml                     offline cases, every arm that is installed
    python benchmarks/run.py --cases context threads --arms megalith "vLLM float32"
    python benchmarks/run.py --report                               only write RESULTS.md again from the history

Rows go to history.jsonl, then RESULTS.md is written anew.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import history
import machine
from arms import ArmProcess, ArmSpec, read_arms
from http_side import run_http

HERE = Path(__file__).resolve().parent
RATES = ("prefill_tok_s", "decode_tok_s", "out_tok_s")
CASE_TIMEOUT_S = 240.0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="TOML file that says where each peer is installed")
    parser.add_argument("--cases", nargs="+", default=["offline"], help="files of cases/, without .toml")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--arms", nargs="+", help="arms whose name contains one of these words")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=1, help="the core to pin to; two-thread cases add core 0")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md")
    options = parser.parse_args()
    if not options.report:
        compare(options)
    history.write_results()


def compare(options: argparse.Namespace) -> None:
    """Run the chosen cases over the chosen arms and append the rows."""
    print(machine.raise_priority(), file=sys.stderr)
    arms = [arm for arm in read_arms(options.peers) if wanted(arm.name, options.arms)]
    cases = [
        case
        for name in options.cases
        for case in tomllib.loads((HERE / "cases" / f"{name}.toml").read_text())["case"]
        if not options.only or case["name"] in options.only
    ]
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    history.append([{**stamp, "kind": "limits", **machine.limits(options.core)}])
    for threads in sorted({case.get("threads", 1) for case in cases}):
        offline = [c for c in cases if c.get("threads", 1) == threads and c.get("kind") != "http"]
        if offline:
            history.append({**stamp, **row} for row in run_offline(arms, offline, threads, options))
    for case in (c for c in cases if c.get("kind") == "http"):
        history.append({**stamp, **row} for row in run_http(arms, case, options.core, options.repeats))


def wanted(name: str, words: list[str] | None) -> bool:
    """Whether `name` contains one of the words (all do when there are none)."""
    return not words or any(word.lower() in name.lower() for word in words)


def run_offline(
    specs: list[ArmSpec], cases: list[dict[str, Any]], threads: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Load every arm, then go round: repeat by repeat, case by case, arm by arm."""
    cores = tuple(c for c in (options.core, 0 if options.core else 1))[:threads]
    log = Path(tempfile.gettempdir()) / "megalith-benchmark-arms.log"
    print(f"what the peers print goes to {log}", file=sys.stderr)
    arms = []
    for spec in specs:
        arm = ArmProcess(spec, cores, log)
        print(f"{spec.name}: {arm.skipped or f'{arm.version}, loaded in {arm.load_s:.1f} s'}", file=sys.stderr)
        arms.append(arm)
    live = [arm for arm in arms if not arm.skipped]
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for case in cases:
            if repeat >= case.get("repeats", options.repeats):
                continue
            for arm in live:
                answer = one_sample(arm, case, repeat, options.vocab)
                samples.setdefault((arm.spec.name, case["name"]), []).append(answer)
                print(f"{case['name']:24} {arm.spec.name:24} {short(answer)}", file=sys.stderr)
    for arm in live:
        arm.close()
    rows = [{"kind": "skipped", "arm": arm.spec.name, "reason": arm.skipped} for arm in arms if arm.skipped]
    by_name = {arm.spec.name: arm for arm in live}
    for case in cases:
        for name, arm in by_name.items():
            rows.append(summarise(case, arm, samples[name, case["name"]], threads))
    return rows


def one_sample(arm: ArmProcess, case: dict[str, Any], repeat: int, vocab: int) -> dict[str, Any]:
    """One run of one case, with what others used of the machine meanwhile."""
    load = machine.Load()
    request = {"case": case["name"], "seed": repeat, "vocab": vocab}
    request |= {key: case[key] for key in ("batch", "prompt_tokens", "output_tokens")}
    answer = arm.ask(request, case.get("timeout_s", CASE_TIMEOUT_S))
    own_cpu_s = answer.get("cpu_share", 0.0) * answer.get("wall_s", 0.0)
    return {**answer, "other_cores": load.other_cores(own_cpu_s)}


def short(answer: dict[str, Any]) -> str:
    """One line for the person who waits."""
    if "failed" in answer:
        return f"failed: {answer['failed']}"
    rates = "  ".join(f"{name.removesuffix('_tok_s')} {answer[name]:.0f}" for name in RATES if name in answer)
    return f"{rates}  (own {answer['cpu_share']:.2f}, others {answer['other_cores']:.2f} cores)"


def summarise(case: dict[str, Any], arm: ArmProcess, samples: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Median, least and most of each figure."""
    good = [sample for sample in samples if "failed" not in sample]
    row: dict[str, Any] = {
        "kind": "case", "case": case["name"], "about": case["about"], "threads": threads,
        "arm": arm.spec.name, "peer": arm.spec.peer, "faithful": arm.spec.faithful, "version": arm.version,
        "load_s": round(arm.load_s, 2), "samples": len(good),
        "failures": [sample["failed"] for sample in samples if "failed" in sample],
    }  # fmt: skip
    for name in sorted({key for sample in good for key, value in sample.items() if isinstance(value, int | float)}):
        values = [sample[name] for sample in good if name in sample]
        row[name] = round(statistics.median(values), 4)
        if name in RATES:
            row[f"{name}_spread"] = [round(min(values), 1), round(max(values), 1)]
    return row


if __name__ == "__main__":
    main()
