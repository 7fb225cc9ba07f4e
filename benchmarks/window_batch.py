"""Throughput by batch of a model that streams: a step reads the same bytes for one sequence or for 64.

    python benchmarks/window_batch.py llama-7b.gguf --memory 1GiB [--batches 1,4,16,64] [--store]

Each batch is an engine of its own whose KV cache has one block of 16 tokens for each sequence; prompts of 4 tokens, 8
tokens of answer. The plan holds the limit here (no control group). Prints decode steps, measured beside predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
from pathlib import Path
from typing import Any

import history
import machine

from megalith.base.units import NS_PER_S, parse_bytes
from megalith.engine.api import Delta, EngineConfig
from megalith.engine.launch import build_engine
from megalith.engine.params import SamplingParams

PROMPT, ANSWER, BLOCK = 4, 8, 16


def main() -> None:
    """One engine for each batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--store", action="store_true", help="append the rows to history.jsonl")
    options = parser.parse_args()
    rows = []
    print("| batch | step, measured | step, predicted | tokens/s, measured | read a step |\n|---|---|---|---|---|")
    for batch in map(int, options.batches.split(",")):
        found = asyncio.run(measured(options, batch))
        rows.append(
            {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
                "machine": machine.describe(), "kind": "window-batch", "arm": "megalith",
                "case": f"{options.model.stem} in {options.memory}, batch {batch}",
                "threads": os.cpu_count() or 1, **found,
            }
        )  # fmt: skip
        print(
            f"| {batch} | {found['step_s']:.2f} s | {found['predicted_step_s']:.2f} s | {found['decode_tok_s']:.2f} | "
            f"{found['step_bytes'] / 1e9:.2f} GB |", flush=True,
        )  # fmt: skip
    if options.store:
        history.append(rows)


async def measured(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Mean of the steps that only decode."""
    config = EngineConfig(
        model=str(options.model), memory_bytes=parse_bytes(options.memory), max_context=BLOCK, max_sequences=batch,
        num_blocks=batch, block_tokens=BLOCK, weights="window",
    )  # fmt: skip
    built = build_engine(config)
    await built.engine.start()
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)

    async def ask(number: int) -> int:
        last: Delta | None = None
        async for delta in built.engine.generate([100 + number, 200, 300, 400][:PROMPT], params):
            last = delta
        assert last is not None
        assert last.finish_reason == "length", last
        return last.completion_tokens

    try:
        await asyncio.gather(*(ask(number) for number in range(batch)))
    finally:
        await built.engine.stop()
    facts = built.streamed_facts()
    point = next(point for point in built.fit.plan.points if point.batch == batch)
    step_ns = facts["measured_step_ns"]
    return {
        "step_s": step_ns / NS_PER_S, "predicted_step_s": point.tpot_ns.value / NS_PER_S,
        "decode_tok_s": batch * NS_PER_S / step_ns, "step_bytes": facts["step_bytes"],
        "decode_steps": facts["decode_steps"], "need_bytes": built.fit.plan.need_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
