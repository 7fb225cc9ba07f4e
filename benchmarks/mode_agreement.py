"""How often the bf16 and native modes choose another token than float32, on 20 prompts x 64 greedy tokens.

Float32 decodes first. Every mode then sees exactly those tokens and says, at each of the 64 places, what it would have
chosen: `differs` is the share of places where that is another token. A greedy request follows float32 until its first
such place, so `first` is where free-running outputs part. `lead` is how far float32's choice was ahead there (in
logits): a difference at a small lead is a near tie, at a large one a fault. KL is of the whole distribution to
float32's, averaged over all places.

    python benchmarks/mode_agreement.py smollm2 gemma3-270m

On a CPU without bfloat16 instructions the bf16 row is computed by emulation (slow), and `bf16-kv` is what bf16 mode
runs there: float32 weights, bfloat16 KV.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalith.engine.batch import Runner, StepBatch
from megalith.engine.launch import why_not_native
from megalith.model.open import OpenModel, open_model

NEW, BLOCK, BLOCKS_EACH = 64, 16, 6
PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,", "1, 1, 2, 3, 5,",
    "Ingredients: 200 g flour, 3 eggs. Method:", "Der schnelle braune Fuchs springt", "Q: Why is the sky blue?\nA:",
    "SELECT name, count(*) FROM orders", "Dear Sir or Madam, I am writing to complain about", "The mitochondrion is",
    "In 1969, the first human beings", "import numpy as np\n\nx =", "Roses are red,\nviolets are blue,\n",
    "The three laws of thermodynamics say that", '{"name": "Ada", "age": 36, "languages": [', "To be, or not to be,",
    "To install the package, run:\n```bash\n", "She opened the letter with trembling hands. Inside,",
    "Chapter 4: Memory management. An operating system", "The best way to learn a language is to",
)  # fmt: skip
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Where one prompt's places differ."""

    places: NDArray[np.intp]
    leads: F32
    kl: float


def greedy(runner: Runner, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Float32's own continuations, all prompts together."""
    tokens = [list(prompt) for prompt in prompts]
    batch = _rows(tokens, [0] * len(tokens), [[len(t) - 1] for t in tokens])
    for _ in range(NEW):
        for sequence, token in zip(tokens, runner.logits(batch).argmax(1).tolist(), strict=True):
            sequence.append(token)
        batch = _rows(tokens, [len(t) - 1 for t in tokens], [[0]] * len(tokens))
    return [sequence[len(prompt) :] for sequence, prompt in zip(tokens, prompts, strict=True)]


def forced(runner: Runner, prompt: Sequence[int], output: Sequence[int]) -> F32:
    """Logits [NEW, V] at the places of `output`, given float32's tokens before each."""
    tokens = [*prompt, *output[:-1]]
    return runner.logits(_rows([tokens], [0], [range(len(prompt) - 1, len(tokens))]))


def _rows(tokens: Sequence[Sequence[int]], first: Sequence[int], outputs: Sequence[Sequence[int]]) -> StepBatch:
    """Sequence s from its token first[s] on, over blocks of its own; outputs[s] are the rows wanted of it."""
    counts = [len(t) - f for t, f in zip(tokens, first, strict=True)]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return StepBatch(
        np.concatenate([t[f:] for t, f in zip(tokens, first, strict=True)]).astype(np.int32),
        np.concatenate([np.arange(f, len(t)) for t, f in zip(tokens, first, strict=True)]).astype(np.int32),
        starts,
        np.arange(len(tokens) * BLOCKS_EACH, dtype=np.int32).reshape(-1, BLOCKS_EACH),
        np.concatenate([np.array(rows) + s for rows, s in zip(outputs, starts[:-1], strict=True)]).astype(np.int32),
    )


def compare(exact: F32, other: F32) -> Difference:
    """`other`'s choices against those of float32."""
    places = np.flatnonzero(exact.argmax(1) != other.argmax(1))
    top = np.sort(exact[places], axis=1)[:, -2:] if places.size else np.zeros((0, 2), np.float32)
    p, q = (_log_softmax(x) for x in (exact, other))
    return Difference(places, top[:, 1] - top[:, 0], float((np.exp(p) * (p - q)).sum(1).mean()))


def _log_softmax(x: F32) -> NDArray[np.float64]:
    shifted = x.astype(np.float64) - x.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def modes(model: OpenModel, threads: int) -> dict[str, Callable[[], Runner]]:
    """The runners to compare with float32."""
    from megalith.engine.torch_linear import cpu_has_bf16
    from megalith.engine.torch_runner import TorchRunner

    blocks = len(PROMPTS) * BLOCKS_EACH

    def torch(widen: bool) -> Runner:
        return TorchRunner(
            model.spec,
            model.checkpoint,
            dtype="bf16",
            block_tokens=BLOCK,
            num_blocks=blocks,
            threads=threads,
            widen=widen,
        )

    def native() -> Runner:
        from megalith.engine.native_runner import NativeRunner

        return NativeRunner(
            model.spec, model.checkpoint, block_tokens=BLOCK, num_blocks=blocks, num_host_blocks=0, max_rows=256,
            threads=threads,
        )  # fmt: skip

    found: dict[str, Callable[[], Runner]] = {"bf16": lambda: torch(widen=False)}
    if not cpu_has_bf16():
        found["bf16-kv"] = lambda: torch(widen=True)
    if why_not_native(model) is None:
        found["native"] = native
    return found


def measure(name: str, threads: int, wanted: Sequence[str]) -> list[list[object]]:
    """One row a mode."""
    from megalith.engine.torch_runner import TorchRunner

    model = open_model(name)
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    blocks = len(PROMPTS) * BLOCKS_EACH
    runner: Runner = TorchRunner(model.spec, model.checkpoint, block_tokens=BLOCK, num_blocks=blocks, threads=threads)
    outputs = greedy(runner, prompts)
    exact = [forced(runner, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    runner.close()
    rows = []
    for mode, make in modes(model, threads).items():
        if wanted and mode not in wanted:
            continue
        runner = make()
        found = [
            compare(e, forced(runner, prompt, output))
            for e, prompt, output in zip(exact, prompts, outputs, strict=True)
        ]
        runner.close()
        leads = np.concatenate([difference.leads for difference in found])
        first = [int(difference.places[0]) for difference in found if difference.places.size]
        rows.append([
            name, mode, f"{leads.size / (NEW * len(prompts)):.2%}", f"{len(first)} of {len(prompts)}",
            f"{np.median(first):.0f}" if first else "-", f"{leads.max():.3f}" if leads.size else "-",
            f"{np.mean([difference.kl for difference in found]):.5f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", nargs="*", default=[], help="only these of bf16, bf16-kv, native")
    arguments = parser.parse_args()
    columns = ["model", "mode", "differs", "outputs that part", "first (median)", "largest lead", "KL"]
    print(" | ".join(columns))
    for name in arguments.models:
        for row in measure(name, arguments.threads, arguments.modes):
            print(" | ".join(str(cell) for cell in row), flush=True)


if __name__ == "__main__":
    main()
