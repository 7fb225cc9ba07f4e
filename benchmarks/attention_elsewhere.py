"""Attention in other processes: bytes over the link, decode speed, and what SparF costs in quality.

    python benchmarks/attention_elsewhere.py [--model smollm2] [--tokens 700] [--steps 24]

Measured here, on one machine: link bytes are counted at the sockets, speeds are decode steps of one sequence whose
context is a text, and quality is that of decoded tokens of several texts after prompts that were attended to in full.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from megalith.engine.attention_option import parse_attention
from megalith.engine.batch import StepBatch
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel, open_model

HOME = Path(__file__).resolve().parent.parent
TEXTS = [HOME / name for name in ("LICENSE", "ARCHITECTURE.md", "README.md", "docs/guides/engine.md")]
BLOCK = 16


def open_runner(model: OpenModel, attention: str, tokens: int) -> TorchRunner:
    option = parse_attention(attention)
    blocks = -(-tokens // BLOCK) + 1
    blocks = blocks if option.place != "spread" else max(-(-blocks // option.instances), 3)
    return TorchRunner(
        model.spec, model.checkpoint, block_tokens=BLOCK, num_blocks=blocks, threads=1, attention=option
    )  # fmt: skip


def rows_of(ids: np.ndarray, low: int, high: int) -> StepBatch:
    return StepBatch.of_one(ids[low:high], low, np.arange(high - low), BLOCK)


def fill(runner: TorchRunner, ids: np.ndarray, high: int) -> None:
    for low in range(0, high, 16):
        runner.logits(rows_of(ids, low, min(low + 16, high)))


def crossed(runner: TorchRunner) -> dict[str, int]:
    if runner.elsewhere is None:
        return {"data": 0, "headers": 0, "read": 0}
    group = runner.elsewhere.group
    traffic = group.traffic()
    return {**traffic, "read": sum(link.stats()["read"] for link in group.links)}


def speed(model: OpenModel, attention: str, ids: np.ndarray, steps: int, *, early: bool = True) -> None:
    for context in (len(ids) // 4, len(ids) - steps):
        runner = open_runner(model, attention, len(ids))
        try:
            if runner.elsewhere is not None and not early:
                runner.elsewhere.early_query = False  # type: ignore[attr-defined]
            fill(runner, ids, context)
            before, times = crossed(runner), []
            for at in range(context, context + steps):
                begin = time.perf_counter()
                runner.logits(rows_of(ids, at, at + 1))
                times.append(time.perf_counter() - begin)
            after = crossed(runner)
        finally:
            runner.close()
        each = {key: (after[key] - before[key]) / steps for key in after}
        name = attention.partition("/")[0].replace("storage:", "storage") + (
            "/keep=" + attention.rpartition("=")[2] if "keep" in attention else ""
        )
        print(
            f"{name:18} {'' if early else 'late q':7} context {context:5}: data {each['data']:10,.0f} B/token, "
            f"headers {each['headers']:8,.0f} B/token, KV read there {each['read']:13,.0f} B/token, "
            f"median step {1e3 * statistics.median(times):7.2f} ms",
            flush=True,
        )


def quality(model: OpenModel, keeps: list[int], pieces: np.ndarray, decoded: int, folder: str) -> None:
    """Prompts are attended to in full, as in InstInfer; then `decoded` tokens of each text follow one at a time."""
    count, length = pieces.shape
    width = -(-length // BLOCK)
    tables = np.arange(count * width, dtype=np.int32).reshape(count, width)
    starts = np.arange(count + 1, dtype=np.int32)
    dense: np.ndarray | None = None
    for keep in keeps:
        runner = open_runner(model, f"storage:{folder}/keep={keep}", count * width * BLOCK)
        parts = []
        try:
            for s, low in ((s, low) for s in range(count) for low in range(0, length - decoded, 64)):
                rows = np.arange(low, min(low + 64, length - decoded), dtype=np.int32)
                ends = np.array([0, len(rows)], np.int32)
                runner.logits(StepBatch(pieces[s, rows], rows, ends, tables[s : s + 1], rows[-1:] - low))
            before = crossed(runner)["read"]
            for at in range(length - decoded, length - 1):
                position = np.full(count, at, np.int32)
                parts.append(runner.logits(StepBatch(pieces[:, at].copy(), position, starts, tables, starts[:-1])))
            read = crossed(runner)["read"] - before
        finally:
            runner.close()
        wide = np.stack(parts, axis=1).astype(np.float64)
        logs = wide - wide.max(axis=2, keepdims=True)
        logs -= np.log(np.exp(logs).sum(axis=2, keepdims=True))
        loss = -np.take_along_axis(logs, pieces[:, length - decoded + 1 :, None].astype(np.int64), axis=2).mean()
        dense = logs if dense is None else dense
        same = (logs.argmax(axis=2) == dense.argmax(axis=2)).mean()
        kl = (np.exp(dense) * (dense - logs)).sum(axis=2).mean()
        print(
            f"SparF keep={keep:2}: perplexity {np.exp(loss):7.3f}, same top-1 as dense {same:6.1%}, KL {kl:.4f}, "
            f"KV read {read / (count * len(parts)):13,.0f} B/token ({count * len(parts)} tokens)",
            flush=True,
        )


def main() -> None:
    """Print bytes, speeds and quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--decoded", type=int, default=64, help="tokens scored of each of eight texts")
    options = parser.parse_args()
    model = open_model(options.model)
    ids = np.array(model.tokenizer.encode("".join(text.read_text() for text in TEXTS)), np.int32)
    count = min(8, len(ids) // options.tokens)
    pieces = ids[: count * options.tokens].reshape(count, -1)
    ids = ids[: options.tokens]
    spec = model.spec
    group = spec.num_heads / spec.num_kv_heads
    formula = spec.num_layers * (2 + 2 / group) * 4 * spec.num_heads * spec.head_dim
    print(f"{spec.name}: (2 + 2/G) * e * d * layers = {formula:,.0f} B/token with G = {group:g}, e = 4")
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "quality":
            storage = f"storage:{folder}"
            for attention in ("here", "workers:1", "workers:2", "spread:3", storage, f"{storage}/keep=8"):
                speed(model, attention, ids, options.steps)
            speed(model, "workers:1", ids, options.steps, early=False)
        if options.only != "speed":
            quality(model, [1, 4, 8], pieces, options.decoded, folder)


if __name__ == "__main__":
    main()
