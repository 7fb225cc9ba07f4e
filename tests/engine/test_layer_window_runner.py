"""The torch runner with a window of its layers: the tokens of memory, the limit's share, and failures of one step."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import ConfigError, DoesNotFit, StepFailed
from megalith.base.units import MIB
from megalith.engine import torch_residence
from megalith.engine.api import EngineConfig
from megalith.engine.launch import BuiltEngine, build_engine
from megalith.engine.layer_far import FarFile
from megalith.engine.params import SamplingParams
from megalith.engine.service import merge
from megalith.engine.torch_residence import Residence
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel
from megalith.model.transformer import plain_linear
from megalith.policy.layer_share import LayerShare, parse_window, share_layers
from tests.engine.native_models import batch_of
from tests.model.packaged import opened

PROMPT = "The capital of France is"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))


def prompt(vocab: int, count: int, done: int = 0):  # type: ignore[no-untyped-def]
    tokens = np.random.default_rng(3).integers(3, vocab, 64).astype(np.int32)[done : done + count]
    return batch_of([(tokens, done)], [np.arange(4, dtype=np.int32)], [list(range(count))])


def runner_of(model: OpenModel, layers: LayerShare | None) -> TorchRunner:
    return TorchRunner(model.spec, model.checkpoint, num_blocks=8, threads=1, residence=Residence(layers))


def test_logits_have_the_bits_of_the_same_linear_layers_in_memory(
    tiny_model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_residence, "packed_linear", plain_linear)
    count = tiny_model.spec.num_layers
    resident = runner_of(tiny_model, None)
    for share in (LayerShare(count, 1), LayerShare(count, 1, 1, (0,)), LayerShare(count, count)):
        windowed = runner_of(tiny_model, share)
        for batch in (prompt(tiny_model.spec.vocab, 20), prompt(tiny_model.spec.vocab, 1, 20)):
            np.testing.assert_array_equal(windowed.logits(batch), resident.logits(batch))
        assert windowed.memory_bytes()["weights"] <= resident.memory_bytes()["weights"] + 4096 * count
        windowed.close()
        windowed.close()
        assert windowed.memory_bytes()["weights"] == 0
    resident.close()


def test_a_layer_that_cannot_be_read_fails_its_step_and_no_other(tiny_model: OpenModel) -> None:
    runner = runner_of(tiny_model, LayerShare(tiny_model.spec.num_layers, 1))
    assert runner.held.window is not None
    batch = prompt(tiny_model.spec.vocab, 9)
    expected = runner.logits(batch)
    far = runner.held.window._stow.far
    assert isinstance(far, FarFile)
    offset, _ = far._blocks[1]
    held = os.pread(far._file._plain, 8, offset)
    far._verified.clear()
    os.pwrite(far._file._plain, bytes(byte ^ 1 for byte in held), offset)
    far._file.sync()
    with pytest.raises(StepFailed, match=r"window/layer\.1 .*corrupted"):
        runner.step(batch, None)  # type: ignore[arg-type]
    os.pwrite(far._file._plain, held, offset)
    far._file.sync()
    np.testing.assert_array_equal(runner.logits(batch), expected)
    runner.close()


def answer(config: EngineConfig) -> tuple[BuiltEngine, tuple[int, ...]]:
    async def ask() -> tuple[BuiltEngine, tuple[int, ...]]:
        built = build_engine(config)
        await built.engine.start()
        try:
            ids = built.model.tokenizer.encode(PROMPT)
            params = SamplingParams(temperature=0, max_tokens=4)
            return built, merge([delta async for delta in built.engine.generate(ids, params)]).token_ids
        finally:
            await built.engine.stop()

    return asyncio.run(ask())


def test_a_memory_limit_makes_a_window_of_the_real_model_with_the_same_tokens(tmp_path: Path) -> None:
    opened("smollm2")
    sizes = {"model": "smollm2", "mode": "bf16", "max_context": 256, "threads": 1}
    built, tokens = answer(EngineConfig(**sizes, max_sequences=2))  # type: ignore[arg-type]
    whole = built.fit.plan.need_bytes
    assert built.fit.layers is None
    limited, same = answer(EngineConfig(**sizes, max_sequences=2, memory_bytes=whole - 150 * MIB))  # type: ignore[arg-type]
    assert same == tokens
    assert limited.fit.layers is not None
    assert limited.fit.layers.k == 3
    assert 8 <= limited.fit.layers.streamed < limited.fit.layers.count  # how many is a matter of the processor
    assert limited.fit.plan.need_bytes <= whole - 150 * MIB
    assert "Weights do not stay in memory" in " ".join(limited.fit.plan.notes)
    assert list((tmp_path / "windows").iterdir()) == []


@pytest.mark.parametrize("mode", ["float32", "bf16", "auto"])
def test_a_window_that_is_asked_for_is_that_window(tiny: Path, mode: str) -> None:
    _, tokens = answer(EngineConfig(model=str(tiny), mode="bf16" if mode == "auto" else mode, threads=1))  # type: ignore[arg-type]
    built, same = answer(EngineConfig(model=str(tiny), mode=mode, threads=1, window="1,1"))  # type: ignore[arg-type]
    assert same == tokens
    assert built.fit.layers == LayerShare(built.model.spec.num_layers, 1)
    assert built.fit.kind == "torch-cpu"


def test_windows_that_cannot_be_are_refused_before_anything_is_loaded(tiny: Path) -> None:
    config = EngineConfig(model=str(tiny), mode="float32", threads=1)
    for text in ("x", "2,3", "0", "1,2,3", "1,"):
        with pytest.raises(ConfigError, match=r"window"):
            build_engine(EngineConfig(model=config.model, mode="float32", window=text))
    with pytest.raises(DoesNotFit, match="more than the limit"):
        build_engine(EngineConfig(model=config.model, mode="float32", window="1", memory_bytes=100 * MIB))


def test_shares_use_the_budget_and_spread_what_stays() -> None:
    for count in range(1, 40):
        for room in range(1, 45):
            if room < min(2, count):
                with pytest.raises(DoesNotFit):
                    share_layers(count, 10, room * 10 + 9)
                continue
            share = share_layers(count, 10, room * 10 + 9)
            assert share.near == min(room, count)
            assert share.streamed == (0 if room >= count else count - len(share.keep))
            assert len(set(share.keep)) == len(share.keep)
    assert share_layers(32, 10, 70).keep == (0, 8, 16, 24)
    assert parse_window("4,2", 30) == LayerShare(30, 4, 2)
    assert parse_window("40", 30).streamed == 0
