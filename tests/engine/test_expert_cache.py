"""Experts that come from disk: the bits of memory, the cap, hits counted, refusals and a damaged file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megalith.base.errors import ConfigError, StepFailed
from megalith.engine import torch_residence
from megalith.engine.expert_cache import parse_cache
from megalith.engine.layer_far import FarFile
from megalith.engine.torch_residence import Residence
from megalith.engine.torch_runner import TorchRunner
from megalith.model.checkpoint import open_checkpoint
from megalith.model.source import resolve
from megalith.model.transformer import plain_linear
from tests.engine.native_models import batch_of
from tests.model import tiny

IDS = random.Random(5).choices(range(320), k=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.make("mixtral"), tmp_path_factory.mktemp("moe") / "m")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))


def runner_of(folder: Path, near: int | None) -> TorchRunner:
    checkpoint = open_checkpoint(resolve(str(folder)))
    return TorchRunner(
        checkpoint.spec, checkpoint, dtype="float32", block_tokens=16, num_blocks=4, threads=1,
        residence=Residence(experts=near, make_linear=plain_linear),  # In memory, packed ones sum in another order.
    )  # fmt: skip


def decoded(runner: TorchRunner) -> np.ndarray:
    """Logits of a prompt of 16 and of eight decode steps."""
    blocks = [np.arange(4, dtype=np.int32)]
    tokens = np.array(IDS, np.int32)
    found = [runner.logits(batch_of([(tokens[:16], 0)], blocks, [list(range(16))]))]
    found += [runner.logits(batch_of([(tokens[at : at + 1], at)], blocks, [[0]])) for at in range(16, 24)]
    return np.concatenate(found)


@pytest.mark.parametrize("near", [1, 2, 5, 18])
def test_the_bits_of_memory_whatever_is_near(folder: Path, near: int) -> None:
    whole, cached = runner_of(folder, None), runner_of(folder, near)
    try:
        expected, found = decoded(whole), decoded(cached)
        window = cached.held.window
        assert window is not None
        assert np.array_equal(expected, found)
        assert expected.std() > 0.5
        assert window.pool.peak_bytes <= near * window.num_bytes // 18
        if near == 18:
            assert window.moves <= 18, "an expert that stays is read once"
        if near == 1:
            assert window.moves > 3 * 2 * 8
    finally:
        whole.close()
        cached.close()


def test_hits_are_those_that_nothing_was_read_for(folder: Path) -> None:
    checkpoint = open_checkpoint(resolve(str(folder)))
    runner = runner_of(folder, 9)
    try:
        cache = runner.streamed.detail.__self__  # type: ignore[attr-defined]
        decoded(runner)
        # A prompt row runs two experts in each of three layers; all six of a layer at most.
        assert 8 * 3 * 2 + 3 * 2 <= cache.needed <= 8 * 3 * 2 + 3 * checkpoint.spec.num_experts
        assert cache.hit_rate == 1.0 - runner.held.window.moves / cache.needed  # type: ignore[union-attr]
        assert 0.0 < cache.hit_rate < 1.0
        assert f"{cache.hit_rate:.1%} of {cache.needed}" in cache.summary()
    finally:
        runner.close()


def test_control_the_router_decides(folder: Path) -> None:
    """With the router turned round, other experts run and other logits come."""
    runner = runner_of(folder, None)
    try:
        expected = decoded(runner)
        with torch.inference_mode():
            for layer in runner._model.layers:
                layer.ffn.router.weight.neg_()  # type: ignore[union-attr, operator]
        assert np.abs(decoded(runner) - expected).max() > 0.1
    finally:
        runner.close()


def test_a_damaged_expert_fails_its_step_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FarFile] = []

    class Watched(FarFile):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(torch_residence, "FarFile", Watched)
    runner = runner_of(folder, 2)
    try:
        expected = decoded(runner)
        real = made[0].read_into
        monkeypatch.setattr(made[0], "read_into", _fails)
        batch = batch_of([(np.array(IDS[:12], np.int32), 0)], [np.arange(4, dtype=np.int32)], [[11]])
        with pytest.raises(StepFailed, match="could not be brought"):
            runner.step(batch, None)  # type: ignore[arg-type]
        monkeypatch.setattr(made[0], "read_into", real)
        assert np.array_equal(decoded(runner), expected)
    finally:
        runner.close()


def _fails(part: int, view: memoryview) -> None:
    from megalith.base.errors import TierError

    raise TierError(f"Layer {part} is damaged.")


def test_caches_that_cannot_be(folder: Path) -> None:
    spec = open_checkpoint(resolve(str(folder))).spec
    one = 3 * 64 * 112 * 4
    assert parse_cache("5", spec, "f32") == 5
    assert parse_cache("99", spec, "f32") == 18
    assert parse_cache(str(3 * one) + "B", spec, "f32") == 3
    with pytest.raises(ConfigError, match=r"holds none: an expert takes 84\.00 KiB"):
        parse_cache("10KiB", spec, "f32")
    with pytest.raises(ConfigError, match="holds none"):
        parse_cache("0", spec, "f32")
