"""How far the native backend is from exact float32 on the packaged models, and that real models keep their bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import ModelNotFound
from megalith.engine.batch import Runner
from megalith.engine.native import build
from megalith.engine.native_runner import NativeRunner
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel, open_model
from tests.engine.native_models import batch_of

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
TOKENS, BLOCKS = 320, 40
pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def model(request: pytest.FixtureRequest) -> OpenModel:
    try:
        return open_model(request.param)
    except ModelNotFound as error:
        pytest.skip(str(error))


def native(model: OpenModel, threads: int = 1) -> NativeRunner:
    return NativeRunner(
        model.spec, model.checkpoint, block_tokens=16, num_blocks=BLOCKS, num_host_blocks=0, max_rows=128,
        threads=threads,
    )  # fmt: skip


def logits_of(runner: Runner, tokens: np.ndarray, pieces: tuple[int, ...]) -> np.ndarray:
    """Logits of every token, fed in `pieces` through scattered blocks."""
    table = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
    parts, done = [], 0
    for count in pieces:
        piece = tokens[done : done + count]
        parts.append(np.array(runner.logits(batch_of([(piece, done)], [table], [list(range(len(piece)))]))))
        done += len(piece)
    assert done == len(tokens)
    return np.concatenate(parts)


def log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def test_native_stays_close_to_float32(model: OpenModel) -> None:
    """KL at most 0.01 and perplexity within 1 % where all formats are kept exactly; Q6_K layers are rounded."""
    tokens = np.array(model.tokenizer.encode(TEXT.read_text())[:TOKENS], np.int32)
    runner = native(model)
    got = log_softmax(logits_of(runner, tokens, (128, 128, 64)))
    runner.close()
    oracle = TorchRunner(
        model.spec, model.checkpoint, device="cpu", dtype="float32", block_tokens=16, num_blocks=BLOCKS,
        num_host_blocks=0, threads=1,
    )  # fmt: skip
    want = log_softmax(logits_of(oracle, tokens, (128, 128, 64)))
    oracle.close()
    kl = float((np.exp(want) * (want - got)).sum(1).mean())
    following = tokens[1:, None]
    losses = [-np.take_along_axis(x[:-1], following, 1).mean() for x in (got, want)]
    assert kl <= 0.01
    assert abs(np.exp(losses[0] - losses[1]) - 1) <= 0.01


def test_a_real_model_gives_the_same_bits_chunked_and_on_two_threads(model: OpenModel) -> None:
    tokens = np.array(model.tokenizer.encode(TEXT.read_text())[:70], np.int32)
    one, two = native(model), native(model, threads=2)
    whole = logits_of(one, tokens, (70,))
    np.testing.assert_array_equal(logits_of(two, tokens, (33, 1, 1, 30, 5)), whole)
    one.close()
    two.close()
