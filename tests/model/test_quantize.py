"""Writing models again: same description, tokenizer and row order; nothing left behind when it is cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.model import gguf_write
from megalith.model.open import open_model
from megalith.model.quantize import Recipe, quantize
from megalith.model.source import resolve
from tests.engine.tiny import write_tiny_llama
from tests.model import gguf_files, tiny

TEXT = "The rain in Spain, 1234 times: <|im_start|>naïve\n\n  doesn't it?"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "source")


def test_a_directory_becomes_a_gguf_file_with_the_same_values(source: Path, tmp_path: Path) -> None:
    """F32 keeps every bit: row order of q and k there and back, tokenizer, template, description."""
    outcome = quantize(resolve(str(source)), Recipe("F32"), tmp_path / "out.gguf")
    ours, theirs = open_model(str(tmp_path / "out.gguf")), open_model(str(source))
    assert outcome.num_bytes == (tmp_path / "out.gguf").stat().st_size
    for name in theirs.checkpoint.names():
        np.testing.assert_array_equal(ours.checkpoint.tensor(name).float32(), theirs.checkpoint.tensor(name).float32())
    assert ours.tokenizer.encode(TEXT) == theirs.tokenizer.encode(TEXT)
    assert ours.tokenizer.eos_ids == theirs.tokenizer.eos_ids
    assert ours.chat_template is not None
    assert theirs.chat_template is not None
    assert ours.chat_template.source == theirs.chat_template.source
    for key in ("num_layers", "hidden", "num_kv_heads", "head_dim", "max_context", "rope", "tied_embeddings"):
        assert getattr(ours.spec, key) == getattr(theirs.spec, key)


def test_formats_exceptions_and_second_roundings(source: Path, tmp_path: Path) -> None:
    first = quantize(resolve(str(source)), Recipe("Q4_1", {"down": "Q8_0", "layers.1.q": "BF16"}), tmp_path / "a.gguf")
    assert not first.requantized
    model = open_model(str(tmp_path / "a.gguf"))
    kinds = {name: model.checkpoint.stored_format(name) for name in model.checkpoint.names()}
    assert kinds["embed.weight"] == kinds["head.weight"] == kinds["layers.0.down.weight"] == "Q8_0"
    assert (kinds["layers.0.q.weight"], kinds["layers.1.q.weight"]) == ("Q4_1", "BF16")
    again = quantize(model.files, Recipe("Q4_1", {"down": "Q5_0"}), tmp_path / "b.gguf")
    assert again.requantized == {"Q8_0": 2}
    other = open_model(str(tmp_path / "b.gguf"))
    # What stays in its format is copied, not encoded again.
    np.testing.assert_array_equal(
        other.checkpoint.tensor("layers.0.q.weight").raw, model.checkpoint.tensor("layers.0.q.weight").raw
    )
    assert other.tokenizer.encode(TEXT) == model.tokenizer.encode(TEXT)


@pytest.mark.parametrize("to", ["Q4_0", "Q5_1", "Q8_0", "BF16"])
def test_values_stay_within_the_step_of_their_format(source: Path, tmp_path: Path, to: str) -> None:
    quantize(resolve(str(source)), Recipe(to), tmp_path / "out.gguf")
    ours, theirs = (open_model(str(path)).checkpoint for path in (tmp_path / "out.gguf", source))
    bound = {"Q4_0": 0.1, "Q5_1": 0.04, "Q8_0": 0.01, "BF16": 0.004}[to]
    for name in ("layers.0.q.weight", "layers.1.k.weight", "layers.0.down.weight"):
        want = theirs.tensor(name).float32()
        assert np.linalg.norm(ours.tensor(name).float32() - want) < bound * np.linalg.norm(want)


def test_it_does_not_overwrite_and_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    files, recipe = resolve(str(source)), Recipe("Q8_0")
    with pytest.raises(ConfigError, match="3 B"):
        quantize(files, recipe, out)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(files, recipe, out, force=True, advance=interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"old"
    monkeypatch.setattr(gguf_write, "_DISK_MARGIN_BYTES", 1 << 60)
    with pytest.raises(MachineError, match="free"):
        quantize(files, recipe, out, force=True)


def test_a_mixture_is_refused_whatever_it_comes_from_or_becomes(tmp_path: Path) -> None:
    model = tiny.make("mixtral")
    folder = tiny.save(model, tmp_path / "hf")
    file = gguf_files.write(model, tmp_path / "moe.gguf")
    for source in (folder, file):
        with pytest.raises(ConfigError, match="mixture of experts cannot be quantized"):
            quantize(resolve(str(source)), Recipe("Q8_0"), tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "moe.gguf"]


def test_a_wrong_exception_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'embedding'"):
        quantize(resolve(str(source)), Recipe("Q8_0", {"embedding": "F16"}), tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="Q3_K"):
        Recipe("Q3_K")
