"""A model whose FFNs are on disk, through the engine: the tokens of memory, under the plan, with refusals in words."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.engine.api import EngineConfig
from megalith.engine.launch import BuiltEngine, build_engine
from megalith.engine.neuron_option import parse_neurons
from megalith.engine.params import SamplingParams
from megalith.engine.service import merge
from megalith.studies.llm_in_a_flash_model import Shape, write_relu_model
from tests.engine.tiny import write_tiny_llama

SHAPE = Shape(layers=2, hidden=128, ffn=1024, heads=2, kv_heads=1)
PROMPT = "Neurons that do not fire need not be read."


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_relu_model(tmp_path_factory.mktemp("relu") / "relu", SHAPE)


@pytest.fixture(scope="module")
def of_memory(sparse: Path) -> tuple[list[tuple[int, ...]], BuiltEngine]:
    return answers(config(sparse))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path / "home"))


def config(sparse: Path, window: str = "") -> EngineConfig:
    return EngineConfig(
        model=str(sparse), mode="float32", max_context=128, max_sequences=4, threads=1, neuron_window=window
    )


def answers(settings: EngineConfig) -> tuple[list[tuple[int, ...]], BuiltEngine]:
    """Of three requests at once, sampled, so that tokens vary."""

    async def run() -> tuple[list[tuple[int, ...]], BuiltEngine]:
        built = build_engine(settings)
        await built.engine.start()

        async def one(seed: int) -> tuple[int, ...]:
            params = SamplingParams(max_tokens=8, temperature=0.8, seed=seed, ignore_eos=True)
            ids = built.model.tokenizer.encode(PROMPT[seed:])
            return merge([delta async for delta in built.engine.generate(ids, params)]).token_ids

        try:
            return await asyncio.wait_for(asyncio.gather(*map(one, range(3))), 60), built
        finally:
            await built.engine.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("window", ["5", "0", "3/memory=512KiB", "5/sigmas=6"])
def test_neurons_from_disk_give_the_tokens_of_memory(
    sparse: Path, of_memory: tuple[list[tuple[int, ...]], BuiltEngine], window: str
) -> None:
    expected, whole = of_memory
    found, built = answers(config(sparse, window))
    assert found == expected
    assert len({token for tokens in expected for token in tokens}) > 8
    assert "fired" in built.streamed()
    neurons = built.runner.held.neurons  # type: ignore[attr-defined]
    fired = neurons.fired / neurons.rows / SHAPE.ffn
    assert 0.02 < fired < 0.1
    assert fired < neurons.predicted / neurons.rows / SHAPE.ffn
    assert whole.streamed() == ""
    weights = [{line.item: line.num_bytes for line in b.fit.plan.memory}["weights"] for b in (built, whole)]
    assert weights[0] < 0.7 * weights[1]


def test_what_cannot_be_is_refused_in_words(sparse: Path, tmp_path: Path) -> None:
    for text in ("x", "-1", "5/memory", "5/sigmas=.."):
        with pytest.raises(ConfigError, match="neuron_window is"):
            parse_neurons(text)
    for settings, words in (
        (replace(config(sparse, "5"), mode="native"), "streams whole layers"),
        (replace(config(sparse, "5"), device="cuda"), "on the CPU"),
        (replace(config(sparse, "5"), model=str(write_tiny_llama(tmp_path / "silu"))), "silu neurons"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_engine(settings)
    with pytest.raises(DoesNotFit, match="at the very least"):
        build_engine(config(sparse, "5/memory=1KiB"))
