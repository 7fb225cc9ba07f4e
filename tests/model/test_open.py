"""One call from a path to a model that answers: the Hugging Face directory as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megalith.base.errors import ModelFormatError, ModelNotFound
from megalith.model.open import open_model
from megalith.model.transformer import Transformer
from tests.model import tiny
from tests.model.generation import greedy
from tests.model.packaged import opened

_CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def _directory(folder: Path) -> tuple[torch.nn.Module, Path]:
    """A tiny Llama with a small byte-level tokenizer and a chat template, saved by transformers itself."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = ["<pad>", "<s>", "</s>", *letters, "he", "ll", "hell", "hello"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    backend = Backend(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = _CHAT
    model = tiny.make("llama", vocab_size=len(texts))
    tiny.save(model, folder)
    fast.save_pretrained(folder)
    return model, folder


def test_a_directory_saved_by_transformers_opens_whole(tmp_path: Path) -> None:
    reference, folder = _directory(tmp_path / "tiny-llama")
    model = open_model(str(folder))
    assert (model.files.kind, model.spec.name, model.spec.family) == ("hf", "tiny-llama", "llama")
    assert (model.tokenizer.bos_id, model.tokenizer.eos_ids) == (1, {2})
    assert model.chat_template is not None
    text = model.chat_template.render([{"role": "user", "content": "hello ü"}])
    assert text == "<s>[user] hello ü</s>"
    ids = model.tokenizer.encode(text)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert model.tokenizer.decode(ids) == "[user] hello ü"
    produced = greedy(Transformer(model.checkpoint), [ids, ids[:4]], 12)
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert produced[0] == expected[0, len(ids) :].tolist()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    _, folder = _directory(tmp_path / "m")
    opened("smollm2").tokenizer.backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelFormatError, match="49152 tokens, but the embedding 263 rows"):
        open_model(str(folder))


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("llama"), tmp_path / "m")
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        open_model(str(folder))


def test_broken_configs_beside_a_good_model(tmp_path: Path) -> None:
    _, folder = _directory(tmp_path / "m")
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        path = folder / name
        kept = path.read_text() if path.exists() else "{}"
        path.write_text(kept[:-3])
        with pytest.raises(ModelFormatError, match=name):
            open_model(str(folder))
        path.write_text(kept)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_smollm2_opens_by_name() -> None:
    model = opened("smollm2")
    assert model.files.name == "smollm2"
    assert model.spec.vocab == model.tokenizer.vocab
    assert model.chat_template is not None
    assert model.chat_template.eos == "<|im_end|>"
