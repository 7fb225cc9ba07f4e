"""Bytes, speed and perplexity of each weight format on real models: the table of docs/guides/formats.md.

    python benchmarks/formats.py smollm2 gemma3-270m
    python benchmarks/formats.py smollm2 --arms q8_0 q4_1 other.gguf q8_0,max_context=4096 --rounds 3 --tokens 4096

An arm is a format that `megalith quantize` writes, `shipped` (the model's own file) or the path of another file of the
same model; `,OPTION=VALUE` behind it sets an option of EngineConfig for that arm.

Speed: every arm's runner is loaded, then the arms take turns, `--rounds` times: 48 greedy tokens after a prompt of 128,
one sequence. Shown are the median tokens a second and the median (least to most) of an arm's ratio to `q8_0` of the
same round. Loss: perplexity of the text, and the KL divergence from the shipped file on the same backend, where the
noise of the text cancels. The shipped files are quantised themselves: the table shows what a second rounding loses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
import msgspec
import numpy as np

from megalith.engine.api import EngineConfig
from megalith.engine.batch import Runner, StepBatch
from megalith.engine.bench import greedy
from megalith.engine.launch import BuiltEngine, build_engine
from megalith.engine.perplexity import ROWS, TEXT, measure, windows
from megalith.model.open import open_model
from megalith.model.quantize import Recipe, quantize
from megalith.model.source import resolve

ARMS = ("shipped", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BASE = "q8_0"
PROMPT, OUTPUT, CONTEXT, BLOCK = 128, 48, 512, 16


@dataclasses.dataclass
class Arm:
    """One row of the table."""

    model: str
    name: str
    path: Path
    options: dict[str, object]
    file_bytes: int = 0
    packed_bytes: int = 0
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    perplexity: float = 0.0
    standard_error: float = 0.0
    kl: float = 0.0
    kl_error: float = 0.0
    top1: float = 0.0


def main() -> None:
    """Make the table of every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=9, help="0: no speed")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, help="of the text; without it all, 0: no perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the files here; without it they are removed")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    options = parser.parse_args()
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.folder or Path(scratch)
            folder.mkdir(exist_ok=True)
            arms = [prepared(model, text, folder) for text in options.arms]
            if options.rounds:
                speed(arms, options)
            if options.tokens != 0:
                loss(model, arms, options)
        print("\n".join(table(model, arms)), flush=True)
        if options.out is not None:
            stamp = {"commit": machine.commit(), "machine": machine.describe()}
            with options.out.open("a") as file:
                file.writelines(json.dumps(stamp | dataclasses.asdict(arm), default=str) + "\n" for arm in arms)


def prepared(model: str, text: str, folder: Path) -> Arm:
    """The arm with its file, written where it is not there yet."""
    name, *pairs = text.split(",")
    options = {
        key: json.loads(value) if value[:1].isdigit() else value for key, _, value in (p.partition("=") for p in pairs)
    }
    if name == "shipped":
        path = resolve(model).path
    elif Path(name).exists():
        path = Path(name)
    else:
        path = folder / f"{Path(model).name}-{name}.gguf"
        if not path.exists():
            quantize(resolve(model), Recipe.of(name, {}), path)
    size = sum(f.stat().st_size for f in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
    return Arm(model, text if len(name) < 24 else path.stem, path, options, file_bytes=size)


def built(arm: Arm, threads: int) -> BuiltEngine:
    """The arm's engine, native, for one sequence."""
    config = EngineConfig(
        model=str(arm.path), mode="native", threads=threads, max_context=CONTEXT, max_sequences=1, token_budget=PROMPT,
        num_blocks=CONTEXT // BLOCK + 1, block_tokens=BLOCK,
    )  # fmt: skip
    return build_engine(msgspec.structs.replace(config, **arm.options))


def speed(arms: list[Arm], options: argparse.Namespace) -> None:
    """Decode tokens a second of every arm, round by round."""
    engines = [built(arm, options.threads) for arm in arms]
    for arm, engine in zip(arms, engines, strict=True):
        arm.packed_bytes = engine.runner.memory_bytes()["weights"]
        decode(engine.runner)
    for i in range(options.rounds):
        print(f"{arms[0].model}: round {i + 1} of {options.rounds}", file=sys.stderr)
        for arm, engine in zip(arms, engines, strict=True):
            arm.tokens_per_s.append(decode(engine.runner))
    for engine in engines:
        engine.runner.close()


def decode(runner: Runner) -> float:
    """Tokens a second of OUTPUT greedy steps after a random prompt, the same for everyone."""
    prompt = np.random.default_rng(1).integers(64, 4096, PROMPT, dtype=np.int32)
    token = runner.step(step(prompt, 0), greedy(1)).tokens_N
    began_ns = time.perf_counter_ns()
    for i in range(OUTPUT):
        token = runner.step(step(token, PROMPT + i), greedy(1)).tokens_N
    return OUTPUT * 1e9 / (time.perf_counter_ns() - began_ns)


def step(tokens: np.ndarray, start: int) -> StepBatch:
    """These tokens of one sequence from position `start`; the last gives logits."""
    return StepBatch.of_one(tokens, start, [len(tokens) - 1], BLOCK)


def loss(model: str, arms: list[Arm], options: argparse.Namespace) -> None:
    """Perplexity of every arm, and its divergence from the shipped file."""
    shipped = Arm(model, "shipped", resolve(model).path, {})
    parts = windows(open_model(model).tokenizer, options.text.read_text(encoding="utf-8"), CONTEXT, options.tokens)
    reference = built(shipped, options.threads).runner
    assert reference.max_rows >= ROWS
    for arm in arms:
        print(f"{model}: perplexity of {arm.name}", file=sys.stderr)
        runner = built(arm, options.threads).runner
        found = measure(runner, parts, reference)
        arm.perplexity, arm.standard_error = found.perplexity, found.standard_error
        arm.kl, arm.kl_error = found.mean_kl_nats or 0.0, found.kl_standard_error or 0.0
        arm.top1 = found.top1_agreement or 0.0
        runner.close()
    reference.close()


def table(model: str, arms: list[Arm]) -> list[str]:
    """The rows as Markdown."""
    base = next((arm.tokens_per_s for arm in arms if arm.name == BASE), [])
    error = statistics.median(arm.standard_error for arm in arms)
    names = [model, "file", "in panels", "tokens/s", f"to {BASE}", f"perplexity (± {error:.2f})", "KL from shipped"]
    lines = ["| " + " | ".join([*names, "same first choice"]) + " |", "|---" * 8 + "|"]
    for arm in arms:
        ratios = [mine / other for mine, other in zip(arm.tokens_per_s, base, strict=False)]
        cells = [arm.name, f"{arm.file_bytes / 2**20:.1f} MiB", f"{arm.packed_bytes / 2**20:.1f} MiB"]
        cells.append(f"{statistics.median(arm.tokens_per_s):.1f}" if arm.tokens_per_s else "")
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
        cells += [f"{arm.perplexity:.2f}", f"{arm.kl:.4f} ± {arm.kl_error:.4f}", f"{arm.top1:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
