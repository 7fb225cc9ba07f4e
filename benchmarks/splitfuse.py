"""Dynamic SplitFuse (DeepSpeed-FastGen) on and off, on real tokens: the same engine, the same requests, two policies.

    python benchmarks/splitfuse.py [--mode native] [--budget 128] [--long 8] [--repeats 3]

Short requests decode while long prompts arrive among them. With `splitfuse` long prompts are cut to the token budget
and ride along with the decodes; the control, `prefill-first`, runs each prompt whole and lets the decodes wait.
Printed: P95 of the inter-token latency of the short requests, output tokens a second over the whole trace, and
whether every request got the same tokens under both.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import random
import statistics
import sys
import time
from typing import Any

import history
import machine

from megalith.engine.api import EngineConfig
from megalith.engine.launch import build_engine
from megalith.engine.params import SamplingParams

SHORT_PROMPT, SHORT_OUTPUT, LONG_OUTPUT = 32, 96, 8
CONTROL = "prefill-first"


def main() -> None:
    """Run the trace under both policies in turn and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="native", choices=["native", "bf16", "float32"])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--short", type=int, default=8)
    parser.add_argument("--long", type=int, default=8)
    parser.add_argument("--long-prompt", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    machine.raise_priority()
    runs: dict[str, list[dict[str, Any]]] = {"splitfuse": [], CONTROL: []}
    for _ in range(options.repeats):
        for policy, results in runs.items():
            results.append(asyncio.run(trace(policy, options)))
            shown = {key: value for key, value in results[-1].items() if key != "tokens"}
            print(f"{policy:14} {shown}", file=sys.stderr)
    same = all(result["tokens"] == runs["splitfuse"][0]["tokens"] for results in runs.values() for result in results)
    row: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
        "machine": machine.describe(), "kind": "study", "case": "splitfuse", "arm": options.mode, "same_tokens": same,
        "settings": {key: value for key, value in vars(options).items() if key != "mode"},
    }  # fmt: skip
    for policy, results in runs.items():
        for key in ("itl_ms_p95", "itl_ms_max", "out_tok_s", "rows_a_step"):
            row[f"{policy}_{key}"] = round(statistics.median(result[key] for result in results), 3)
    row["itl_p95_gain"] = round(row[f"{CONTROL}_itl_ms_p95"] / row["splitfuse_itl_ms_p95"], 2)
    row["throughput_ratio"] = round(row["splitfuse_out_tok_s"] / row[f"{CONTROL}_out_tok_s"], 3)
    print(row)
    history.append([row])
    history.write_results()


async def trace(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the trace under one policy."""
    config = EngineConfig(
        model="smollm2", mode=options.mode, policy=policy, token_budget=options.budget, prefix_cache=False, threads=1,
        max_context=options.long_prompt + 64, max_sequences=32,
    )  # fmt: skip
    engine = build_engine(config).engine
    await engine.start()
    source = random.Random(7)
    prompts = [source.choices(range(64, 40_000), k=SHORT_PROMPT) for _ in range(options.short)]
    longs = [source.choices(range(64, 40_000), k=options.long_prompt) for _ in range(options.long)]
    gaps: list[float] = []
    progress = [0] * options.short

    async def short(index: int) -> list[int]:
        tokens: list[int] = []
        last = 0.0
        async for delta in engine.generate(prompts[index], _greedy(SHORT_OUTPUT)):
            now = time.perf_counter()
            if tokens and delta.token_ids:
                gaps.append((now - last) / len(delta.token_ids))
            last = now
            tokens += delta.token_ids
            progress[index] = len(tokens)
        return tokens

    async def long(index: int) -> list[int]:
        due = SHORT_OUTPUT * (index + 1) // (options.long + 1)
        while max(progress) < due:
            await asyncio.sleep(0.002)
        deltas = engine.generate(longs[index], _greedy(LONG_OUTPUT))
        return [token async for delta in deltas for token in delta.token_ids]

    before, begin = engine.stats(), time.perf_counter()
    tokens = await asyncio.gather(*(short(i) for i in range(options.short)), *(long(i) for i in range(options.long)))
    wall, after = time.perf_counter() - begin, engine.stats()
    await engine.stop()
    gaps.sort()
    return {
        "tokens": tokens,
        "itl_ms_p95": 1e3 * gaps[len(gaps) * 95 // 100],
        "itl_ms_max": 1e3 * gaps[-1],
        "out_tok_s": sum(map(len, tokens)) / wall,
        "rows_a_step": (after.step_rows - before.step_rows) / max(1, after.steps - before.steps),
    }


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


if __name__ == "__main__":
    main()
