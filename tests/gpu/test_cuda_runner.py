"""The same engine on a CUDA device. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megalith.engine.params import SamplingParams
from megalith.engine.torch_runner import TorchRunner, _greedy
from megalith.model.open import OpenModel, open_model
from tests.engine.running import Way, make_engine, run_prompts
from tests.engine.test_torch_runner import whole
from tests.engine.tiny import VOCAB, write_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in (1, 3, 9, 17, 30, 5, 12, 21)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    directory: Path = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    return open_model(str(directory))


@pytest.fixture(scope="module")
def cuda(model: OpenModel) -> Iterator[TorchRunner]:
    runner = TorchRunner(
        model.spec, model.checkpoint, device="cuda", block_tokens=4, num_blocks=96, num_host_blocks=64
    )  # fmt: skip
    yield runner
    runner.close()


def test_float32_logits_equal_the_cpu(cuda: TorchRunner, model: OpenModel) -> None:
    cpu = TorchRunner(model.spec, model.checkpoint, block_tokens=4, num_blocks=96, threads=1)
    for prompt in PROMPTS:
        expected, got = cpu.logits(whole(prompt)), cuda.logits(whole(prompt))
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    "way",
    [Way(), Way(budget=5), Way(prefix=True), Way(blocks=24, budget=16), Way(blocks=24, budget=16, preempt="swap")],
    ids=["batch", "chunked", "prefix", "recompute", "swap"],
)
def test_greedy_tokens_are_those_of_the_cpu_however_scheduled(cuda: TorchRunner, model: OpenModel, way: Way) -> None:
    """Every decode here runs through a CUDA graph; the CPU never does."""
    cpu = TorchRunner(model.spec, model.checkpoint, block_tokens=4, num_blocks=96, threads=1)
    expected = run_prompts(make_engine(cpu, Way()), model.tokenizer, PROMPTS, GREEDY, Way())
    got = run_prompts(make_engine(cuda, way), model.tokenizer, PROMPTS, GREEDY, way)
    assert [delta.token_ids for delta in got] == [delta.token_ids for delta in expected]


def test_decodes_really_run_in_graphs(cuda: TorchRunner, model: OpenModel) -> None:
    run_prompts(make_engine(cuda, Way()), model.tokenizer, PROMPTS, GREEDY, Way())
    assert cuda._graphs is not None
    assert any(bucket.graph is not None for bucket in cuda._graphs._buckets.values())


def test_the_device_arg_max_takes_the_lowest_id_on_a_tie() -> None:
    logits = torch.zeros((3, 1000), device="cuda")
    logits[1, 400:] = 2.0
    logits[2, 999] = 1.0
    assert _greedy(logits).tolist() == [0, 400, 999]


def test_bf16_runs_the_real_model() -> None:
    model = open_model("smollm2")
    runner = TorchRunner(model.spec, model.checkpoint, device="cuda", dtype="bf16", num_blocks=256)
    prompts = [model.tokenizer.encode(text) for text in ("The capital of France is", "1, 2, 3, 4,")]
    outputs = run_prompts(make_engine(runner, Way()), model.tokenizer, prompts, GREEDY, Way())
    assert "5, 6, 7" in outputs[1].text
    runner.close()
