"""Hugging Face directories with packed weights: the bits of GGUF, readable by the definition, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megalith.base.errors import ConfigError, MachineError, ModelFormatError
from megalith.engine.native_runner import NativeRunner
from megalith.engine.perplexity import TEXT, measure, windows
from megalith.model import gguf_write
from megalith.model.formats import dequantize
from megalith.model.open import open_model
from megalith.model.quantize import Recipe, quantize
from megalith.model.quantize_hf import directory_recipe, quantize_directory
from megalith.model.source import resolve
from megalith.plan import source as plan_source
from tests.engine.tiny import write_tiny_llama

SAID = "The rain in Spain, 1234 times: <|im_start|>naïve\n\n  doesn't it?"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In int4, but for one part in int8 and one matrix plain."""
    out = tmp_path_factory.mktemp("packed") / "int4"
    quantize_directory(resolve(str(source)), Recipe("Q4_0", {"down": "Q8_0", "layers.1.q": "F16"}), out)
    return out


@pytest.mark.parametrize("origin", ["hf", "gguf"])
@pytest.mark.parametrize("to", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_a_directory_holds_the_bits_of_the_gguf_file(source: Path, tmp_path: Path, to: str, origin: str) -> None:
    """Descriptions, tokenizers, templates and perplexities are equal as well."""
    files = resolve(str(source))
    if origin == "gguf":
        quantize(files, Recipe("F32"), tmp_path / "exact.gguf")
        files = resolve(str(tmp_path / "exact.gguf"))
    recipe = directory_recipe(Recipe(to))
    outcome = quantize_directory(files, Recipe(to), tmp_path / "out")
    quantize(files, recipe, tmp_path / "out.gguf")
    ours, theirs, first = (open_model(str(path)) for path in (tmp_path / "out", tmp_path / "out.gguf", source))
    assert outcome.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert outcome.fallbacks == ()
    for name in theirs.checkpoint.names():
        mine, other = ours.checkpoint.tensor(name), theirs.checkpoint.tensor(name)
        assert (mine.format, mine.shape) == (other.format, other.shape)
        np.testing.assert_array_equal(mine.raw, other.raw)
    for key in ("family", "hidden", "num_kv_heads", "head_dim", "max_context", "rope", "tied_embeddings", "norm_eps"):
        assert getattr(ours.spec, key) == getattr(first.spec, key)
    assert ours.tokenizer.encode(SAID) == first.tokenizer.encode(SAID)
    assert (ours.tokenizer.eos_ids, ours.tokenizer.bos_id) == (first.tokenizer.eos_ids, first.tokenizer.bos_id)
    assert ours.chat_template is not None
    assert first.chat_template is not None
    assert ours.chat_template.source == first.chat_template.source
    if to == "Q4_0":
        assert _perplexity(tmp_path / "out") == _perplexity(tmp_path / "out.gguf")


def _perplexity(path: Path) -> float:
    model = open_model(str(path))
    runner = NativeRunner(
        model.spec, model.checkpoint, block_tokens=16, num_blocks=8, num_host_blocks=0, max_rows=64, threads=1
    )
    parts = windows(model.tokenizer, TEXT.read_text(), 64, 640)
    try:
        return measure(runner, parts).perplexity
    finally:
        runner.close()


def test_the_layout_is_the_published_one(packed: Path) -> None:
    """Read with the safetensors library and plain integer arithmetic, bit by bit."""
    tensors = load_file(packed / "model.safetensors")
    checkpoint = open_model(str(packed)).checkpoint
    for stem, name, bits in (
        (UP, "layers.0.up.weight", 4),
        ("model.layers.1.mlp.down_proj", "layers.1.down.weight", 8),
    ):
        words, scales = tensors[f"{stem}.weight_packed"].view(np.uint32), tensors[f"{stem}.weight_scale"]
        rows, columns = (int(n) for n in tensors[f"{stem}.weight_shape"])
        each = 32 // bits
        shifts = np.arange(each, dtype=np.uint32) * bits
        levels = (words[:, :, None] >> shifts & (2**bits - 1)).astype(np.int32).reshape(rows, columns) - 2 ** (bits - 1)
        values = levels.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)
        np.testing.assert_array_equal(values, checkpoint.tensor(name).float32())


def test_config_says_what_is_packed_how(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    said = config["quantization_config"]
    groups = [(group["weights"]["num_bits"], group["targets"]) for group in said["config_groups"].values()]
    downs = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert groups == [(4, ["Linear"]), (8, downs)]
    assert said["ignore"] == ["lm_head", "model.layers.1.self_attn.q_proj"]
    assert config["torch_dtype"] == "float16"
    kinds = open_model(str(packed)).checkpoint.formats()
    assert set(kinds) == {"Q4_0", "Q8_0", "F16", "F32"}


@pytest.mark.parametrize("groups", [1, 2])
def test_larger_groups_become_blocks_that_share_a_scale(packed: Path, tmp_path: Path, groups: int) -> None:
    """As others write them: one scale for a row or for 32 and more columns, in float32."""
    tensors = load_file(packed / "model.safetensors")
    rows, columns = (int(n) for n in tensors[f"{UP}.weight_shape"])
    wide = np.exp2(np.arange(rows * groups) % 7 - 9).reshape(rows, groups).astype(np.float32) * np.float32(1.0078125)
    tensors[f"{UP}.weight_scale"] = wide
    again = _copy(packed, tmp_path / "again")
    save_file(tensors, again / "model.safetensors")
    found = open_model(str(again)).checkpoint.tensor("layers.0.up.weight")
    assert found.format == "Q4_0"
    before = dequantize(found.raw, "Q4_0", (rows, columns))
    levels = before / np.repeat(wide, columns // groups, axis=1)
    np.testing.assert_array_equal(levels, np.rint(levels))
    assert levels.min() >= -8
    assert levels.max() <= 7
    tensors[f"{UP}.weight_scale"] = wide * np.float32(1.0001)
    save_file(tensors, again / "model.safetensors")
    with pytest.raises(ModelFormatError, match="no float16 number"):
        open_model(str(again)).checkpoint.tensor("layers.0.up.weight")


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_other_quantisations_are_refused(packed: Path, tmp_path: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    changes: tuple[tuple[str, np.ndarray | None, str], ...] = (
        ("weight_zero_point", np.zeros((12, 2), np.int32), "zero_point"),
        ("weight_scale", None, "lacks"),
        ("weight_scale", np.ones((96, 3), np.float16), "scales of shape"),
        ("weight_shape", np.array([96, 62]), "not read"),
        ("weight_shape", np.array([96, -64]), "not read"),
    )
    for i, (part, value, message) in enumerate(changes):
        broken = _copy(packed, tmp_path / str(i))
        changed = tensors | ({} if value is None else {f"{UP}.{part}": value})
        if value is None:
            del changed[f"{UP}.{part}"]
        save_file(changed, broken / "model.safetensors")
        with pytest.raises(ModelFormatError, match=message):
            open_model(str(broken))
    config = json.loads((packed / "config.json").read_text())
    said = config["quantization_config"]
    group = said["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8}}
    for change, message in (
        ({"quant_method": "gptq"}, "'gptq'"), ({"format": "int-quantized"}, "'int-quantized'"),
        ({"config_groups": {"group_0": group}}, "activations"),
    ):  # fmt: skip
        (broken / "config.json").write_text(json.dumps(config | {"quantization_config": said | change}))
        with pytest.raises(ModelFormatError, match=message):
            open_model(str(broken))


def test_what_has_no_place_is_refused(source: Path, tmp_path: Path) -> None:
    files = resolve(str(source))
    for recipe, message in (
        (Recipe("Q4_1"), "Q4_1 has no place"), (Recipe("F16", {"down": "Q5_0"}), "Q5_0 has no place"),
        (Recipe("Q8_0", {"embed": "Q8_0"}), "embed cannot be Q8_0"), (Recipe("Q8_0", {"ups": "F16"}), "'ups'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            quantize_directory(files, recipe, tmp_path / "out")
    with pytest.raises(ConfigError, match="being read"):
        quantize_directory(files, Recipe("Q8_0"), source, force=True)
    assert list(tmp_path.iterdir()) == []


def test_it_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, recipe, out = resolve(str(source)), Recipe("Q8_0"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("old")
    for force, message in ((False, "there already"), (True, "not replaced")):
        with pytest.raises(ConfigError, match=message):
            quantize_directory(files, recipe, out, force=force)
    (out / "config.json").write_text("{}")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_directory(files, recipe, out, force=True, advance=interrupted)
    with monkeypatch.context() as small:
        small.setattr(gguf_write, "_DISK_MARGIN_BYTES", 1 << 60)
        with pytest.raises(MachineError, match="free"):
            quantize_directory(files, recipe, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "old"
    quantize_directory(files, recipe, out, force=True)
    assert not (out / "mine.txt").exists()
    assert open_model(str(out)).checkpoint.stored_format("layers.0.up.weight") == "Q8_0"


def test_the_planner_knows_what_a_packed_directory_takes(packed: Path, source: Path, tmp_path: Path) -> None:
    recipe = directory_recipe(Recipe("Q4_0", {"down": "Q8_0", "layers.1.q": "F16"}))
    quantize(resolve(str(source)), recipe, tmp_path / "same.gguf")
    ours, theirs = (plan_source.resolve(str(path)).weights("native", None) for path in (packed, tmp_path / "same.gguf"))
    assert (ours.layers, ours.head, ours.vectors) == (theirs.layers, theirs.head, theirs.vectors)
    assert ours.layers < plan_source.resolve(str(source)).weights("native", None).layers
