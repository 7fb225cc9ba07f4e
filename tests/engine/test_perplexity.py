"""Perplexity: the definition, window by window; the beginning-of-text token; divergences; what cannot be scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megalith.base.errors import ConfigError, EngineError
from megalith.engine.batch import F32, StepBatch
from megalith.engine.perplexity import TEXT, measure, tokens_run, windows
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import open_model
from megalith.model.quantize import Recipe, quantize
from megalith.model.source import resolve
from tests.engine.tiny import write_tiny_llama

CONTEXT = 150
"""Its halves are no multiple of the rows of a pass."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture(scope="module")
def runners(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TorchRunner, TorchRunner]]:
    """The model as it is, and in 4 bits."""
    small = tmp_path_factory.mktemp("small") / "q4_0.gguf"
    quantize(resolve(str(source)), Recipe("Q4_0"), small)
    opened = [open_model(str(path)) for path in (source, small)]
    made = [
        TorchRunner(model.spec, model.checkpoint, device="cpu", dtype="float32", block_tokens=16, num_blocks=16,
                    num_host_blocks=0, threads=1)
        for model in opened
    ]  # fmt: skip
    yield made[0], made[1]
    for runner in made:
        runner.close()


def _whole(runner: TorchRunner, window: np.ndarray) -> torch.Tensor:
    """Log probabilities [tokens, vocabulary] of a window in one pass, in float64 by torch's own function."""
    n = len(window)
    everything = np.arange(n, dtype=np.int32)
    table = np.arange(-(-n // 16), dtype=np.int32)[None, :]
    logits = runner.logits(StepBatch(window, everything, np.array([0, n], np.int32), table, everything))
    return torch.log_softmax(torch.from_numpy(logits).double(), -1)


def test_it_is_the_definition_over_second_halves(source: Path, runners: tuple[TorchRunner, TorchRunner]) -> None:
    parts = windows(open_model(str(source)).tokenizer, TEXT.read_text()[:2000], CONTEXT)
    exact, rough = runners
    losses, divergences, same = [], [], []
    for window in parts:
        ours, theirs = _whole(rough, window), _whole(exact, window)
        for at in range(CONTEXT // 2, CONTEXT - 1):
            losses.append(-float(ours[at, window[at + 1]]))
            divergences.append(float((theirs[at].exp() * (theirs[at] - ours[at])).sum()))
            same.append(float(ours[at].argmax() == theirs[at].argmax()))
    counted: list[int] = []
    found = measure(rough, parts, exact, counted.append)
    assert found.tokens == len(losses) == len(parts) * 74
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    wanted = found.perplexity * np.std(losses, ddof=1) / len(losses) ** 0.5
    assert found.standard_error == pytest.approx(wanted, rel=1e-4)
    assert found.mean_kl_nats == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.top1_agreement == np.mean(same) < 1
    assert found.reference_perplexity == pytest.approx(measure(exact, parts).perplexity, rel=1e-12)
    assert sum(counted) == tokens_run(parts)


def test_a_runner_is_itself(source: Path, runners: tuple[TorchRunner, TorchRunner]) -> None:
    parts = windows(open_model(str(source)).tokenizer, TEXT.read_text(), 64, 640)
    found = measure(runners[0], parts, runners[0])
    assert len(parts) == 10
    assert abs(found.mean_kl_nats or 0.0) < 1e-6
    assert found.top1_agreement == 1.0


def test_every_window_begins_as_the_model_wants_it(source: Path, tmp_path: Path) -> None:
    wants = write_tiny_llama(tmp_path / "wants")
    config = json.loads((wants / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (wants / "tokenizer_config.json").write_text(json.dumps(config))
    text = "<|im_end|>" + TEXT.read_text()[:400]
    plain, headed = (windows(open_model(str(path)).tokenizer, text, 32) for path in (source, wants))
    bos = open_model(str(wants)).tokenizer.bos_id
    assert {int(window[0]) for window in headed} == {bos}
    assert bos not in {int(window[0]) for window in plain}
    # The text itself is the same but for the first tokens, and control tokens written out in it are plain text.
    assert headed[0][1:].tolist() == plain[0][:-1].tolist()
    assert not {0, 1, 2} & set(np.concatenate(plain).tolist())


@pytest.mark.parametrize(
    ("size", "context", "message"), [(3, 64, "3 tokens.*longer"), (40, 64, "at most 40"), (99, 8, "16")]
)
def test_what_cannot_be_scored(source: Path, size: int, context: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        windows(open_model(str(source)).tokenizer, TEXT.read_text(), context, size)


def test_broken_logits_are_an_error(
    source: Path, runners: tuple[TorchRunner, TorchRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = windows(open_model(str(source)).tokenizer, TEXT.read_text()[:300], 64)
    real = runners[0].logits

    def broken(batch: StepBatch) -> F32:
        found = real(batch).copy()
        found[:1] = np.nan
        return found

    monkeypatch.setattr(runners[0], "logits", broken)
    with pytest.raises(EngineError, match="finite"):
        measure(runners[0], parts)
