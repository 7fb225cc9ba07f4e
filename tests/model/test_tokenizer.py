"""Tokenizers against ids that other implementations gave, and the stream against the whole."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelFormatError, RequestError
from megalith.model.gguf import GgufFile
from megalith.model.sentencepiece import AddedTokens, PieceMerger
from megalith.model.tokenizer import Tokenizer
from megalith.model.tokenizer_gguf import tokenizer_from_gguf
from megalith.model.tokenizer_hf import tokenizer_from_hf
from tests.model.packaged import NAMES, opened

_GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer_ids.json").read_text())


def _tokenizer(name: str) -> Tokenizer:
    return opened(name).tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_llama_cpps_on_every_recorded_text(name: str) -> None:
    tokenizer = _tokenizer(name)
    found = [tokenizer.encode(text, add_bos=False) for text in _GOLDEN["texts"]]
    assert len(found) > 90
    assert found == _GOLDEN["ids"][name]


@cache
def _smollm2_by_the_book() -> Any:
    """SmolLM2's tokenizer as its authors describe it, straight from the vocabulary and the merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    data = GgufFile(opened("smollm2").files.path).metadata
    texts = data["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in data["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([t for t, k in zip(texts, data["tokenizer.ggml.token_type"], strict=True) if k == 3])
    return backend


@cache
def _smollm2_bytes() -> set[int]:
    """The bytes that SmolLM2 has a token for: its vocabulary lacks some that UTF-8 hardly ever needs."""
    tokenizer = _tokenizer("smollm2")
    return {data[0] for i in range(tokenizer.vocab) if len(data := tokenizer.token_bytes(i)) == 1}


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_smollm2_equals_its_description_and_comes_back(text: str) -> None:
    tokenizer = _tokenizer("smollm2")
    ids = tokenizer.encode(text)
    assert ids == _smollm2_by_the_book().encode(text).ids
    assert 200 < len(_smollm2_bytes()) < 256
    if set(text.encode()) <= _smollm2_bytes():
        assert tokenizer.decode(ids, skip_special=False) == text


def test_the_digits_step_is_there() -> None:
    """Leaving it out is the known mistake: without it `1234` is fewer tokens."""
    tokenizer = _tokenizer("smollm2")
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a 1234")] == ["a", "Ġ", "1", "2", "3", "4"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "\u2581" not in text))
def test_gemma_text_comes_back(text: str) -> None:
    tokenizer = _tokenizer("gemma3-270m")
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == f"<bos>{text}"
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_gemma_piece_merging_equals_the_tokenizers_library() -> None:
    """The library with all merges spelled out, as Hugging Face converts such models."""
    tokenizer = _tokenizer("gemma3-270m")
    backend = tokenizer.backend
    texts = [*_GOLDEN["texts"], *(chr(0x4E00 + 7 * i) + "word" * (i % 5) for i in range(50))]
    for text in texts:
        assert tokenizer.encode(text, add_bos=False) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_stream_of_any_ids_is_the_decoding_of_all(name: str, data: st.DataObject) -> None:
    tokenizer = _tokenizer(name)
    # Byte tokens make broken and split characters likely.
    low = 238 if name == "gemma3-270m" else 0
    ids = data.draw(st.lists(st.integers(low, low + 400) | st.integers(0, tokenizer.vocab + 3), max_size=30))
    for skip in (True, False):
        stream = tokenizer.stream(skip_special=skip)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)
        assert stream.flush() == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_never_shows_half_a_character(name: str) -> None:
    tokenizer = _tokenizer(name)
    text = "naïve 🤦🏽‍♂️ 東京 𝔘𝔫𝔦 \U00010330 \x00"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text, add_bos=False)]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert "" in pieces, "some character should have needed two tokens"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_that_ends_in_half_a_character_says_so() -> None:
    tokenizer = _tokenizer("smollm2")
    half = tokenizer.encode("🤦")[:-1]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in half] == [""] * len(half)
    assert stream.flush() == "\ufffd"


def test_special_tokens_in_text() -> None:
    tokenizer = _tokenizer("smollm2")
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, *tokenizer.encode("a"), 2]
    plain = tokenizer.encode("<|im_start|>a", parse_special=False)
    assert 1 not in plain
    assert tokenizer.decode(plain) == "<|im_start|>a"
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2], skip_special=False) == "<|im_start|>a<|im_end|>"
    gemma = _tokenizer("gemma3-270m")
    assert gemma.encode("<start_of_turn>x\n")[1] == 105
    assert 105 not in gemma.encode("<start_of_turn>x\n", parse_special=False)


def test_beginnings_and_ends() -> None:
    smollm, gemma = _tokenizer("smollm2"), _tokenizer("gemma3-270m")
    assert (smollm.bos_id, smollm.eos_id, smollm.add_bos, smollm.vocab) == (1, 2, False, 49152)
    assert smollm.eos_ids == {0, 2}
    assert (gemma.bos_id, gemma.eos_id, gemma.add_bos, gemma.vocab) == (2, 1, True, 262144)
    assert gemma.eos_ids == {1, 106}
    assert gemma.encode("") == [2]
    assert gemma.encode("", add_bos=False) == smollm.encode("") == []
    assert smollm.encode("", add_bos=True) == [1]
    # A rendered template begins with it already; a second one would change the answer.
    assert gemma.encode("<bos>Hi") == gemma.encode("Hi")
    assert gemma.encode("<bos>Hi", add_bos=True)[:2] == [2, 2]


def test_ids_outside_the_vocabulary_are_nothing() -> None:
    tokenizer = _tokenizer("smollm2")
    assert tokenizer.token_bytes(tokenizer.vocab) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_text(10**9) == ""
    assert tokenizer.decode([-1, 10**9]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_half_a_surrogate_pair_is_the_callers_mistake(name: str) -> None:
    with pytest.raises(RequestError, match="character 3"):
        _tokenizer(name).encode("abc\ud800")


@pytest.mark.parametrize(("name", "limit_s"), [("smollm2", 1.0), ("gemma3-270m", 2.0)])
def test_building_takes_a_moment(name: str, limit_s: float) -> None:
    """About 0.1 s and 0.15 s on an idle machine; the library's way to Gemma takes seconds."""
    file = GgufFile(opened(name).files.path)
    start = time.process_time()
    tokenizer_from_gguf(file)
    assert time.process_time() - start < limit_s


def test_a_long_word_takes_no_quadratic_time() -> None:
    tokenizer = _tokenizer("gemma3-270m")
    start = time.process_time()
    ids = tokenizer.encode("ab" * 50_000)
    assert time.process_time() - start < 10
    assert tokenizer.decode(ids) == "ab" * 50_000


def _bpe_file(path: Path, pre: str, **extra: Any) -> GgufFile:
    """SmolLM2's vocabulary under another pre-tokenizer."""
    data = GgufFile(opened("smollm2").files.path).metadata
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(extra.get("model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(data["tokenizer.ggml.tokens"])
    writer.add_token_types(extra.get("types", data["tokenizer.ggml.token_type"].tolist()))
    if extra.get("merges", True):
        writer.add_token_merges(data["tokenizer.ggml.merges"])
    writer.add_bos_token_id(extra.get("bos", 1))
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("default", ["I", "'m", " 12345", " x", "\n\n ", " y"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " x", "\n\n ", " y"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " x", "\n\n", " ", " y"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " x", "\n\n", " ", " y"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_were_trained(pre: str, words: list[str], tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(_bpe_file(tmp_path / "t.gguf", pre))
    text = "I'm 12345 x\n\n  y"
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == words
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.add_bos == (pre == "llama-bpe")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pre": "tekken"}, "one of .*llama-bpe.*qwen2.*smollm"),
        ({"model": "t5"}, "'t5', which is not supported"),
        ({"merges": False}, "without merges"),
        ({"bos": 10**6}, "below 49152"),
        ({"types": [1, 2, 3]}, "49152 numbers"),
    ],
)
def test_tokenizers_that_we_do_not_have_are_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=message):
        tokenizer_from_gguf(_bpe_file(tmp_path / "t.gguf", **({"pre": "smollm"} | extra)))


def test_a_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFormatError, match="holds no tokenizer"):
        tokenizer_from_gguf(GgufFile(tmp_path / "x.gguf"))


def _sentencepiece_file(path: Path, prefix: bool) -> GgufFile:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "aa"]
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * 259 + [-9.0, -10.0, -11.0, -3.0, -1.0, -2.0, -4.0])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path)


def test_sentencepiece_with_a_space_prefix(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(_sentencepiece_file(tmp_path / "s.gguf", prefix=True))
    words = [tokenizer.token_text(i) for i in tokenizer.encode("ab aé")]
    assert words == ["<s>", "▁ab", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab aé")) == "ab aé"
    # Output that continues a prompt keeps its space.
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokenizer.encode("ab", add_bos=False))) == " ab"
    for text in ("ab aé", "aab", "b" * 9, "  a"):
        assert tokenizer.encode(text, add_bos=False) == tokenizer.backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc▁", max_size=14), seed=st.integers(0, 1000))
def test_joining_equals_the_definition(text: str, seed: int) -> None:
    """The heap against the rule itself: join the best-scored neighbours, leftmost on a tie, until none is a piece."""
    rng = np.random.default_rng(seed)
    texts = sorted({"".join(rng.choice(list("abc▁"), rng.integers(2, 5))) for _ in range(25)} | set("abc▁"))
    pieces = {piece: i for i, piece in enumerate(texts)}
    scores = rng.integers(-8, 0, len(texts)).astype(float).tolist()
    symbols = list(text)
    while True:
        joins = [(scores[pieces[a + b]], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in pieces]  # noqa: B905, RUF007
        if not joins:
            break
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    assert PieceMerger(pieces, scores, [], 0).encode(text) == [pieces[symbol] for symbol in symbols]


def test_added_tokens_are_found_leftmost_and_longest() -> None:
    added = AddedTokens([("<a>", 1), ("<a>b", 2), ("  ", 3), ("    ", 4), ("\n", 5), ("[", 6), ("", 7)])
    assert added.split("x<a>bc<a><a") == ["x", 2, "c", 1, "<a"]
    assert added.split("     y\n[z") == [4, " y", 5, 6, "z"]
    assert added.split("") == []
    assert AddedTokens([]).split("abc") == ["abc"]


def _save_json(tokenizer: Tokenizer, folder: Path, **config: Any) -> Tokenizer:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_from_hf(folder)


def test_tokenizer_json_gives_the_same_tokenizer(tmp_path: Path) -> None:
    ours = _tokenizer("smollm2")
    theirs = _save_json(ours, tmp_path, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    assert (theirs.bos_id, theirs.eos_id, theirs.eos_ids) == (ours.bos_id, ours.eos_id, ours.eos_ids)
    assert (theirs.vocab, theirs.add_bos) == (ours.vocab, False)
    for text in _GOLDEN["texts"]:
        for parse in (True, False):
            assert theirs.encode(text, parse_special=parse) == ours.encode(text, parse_special=parse), text
    assert [theirs.token_bytes(i) for i in range(0, 49155, 5)] == [ours.token_bytes(i) for i in range(0, 49155, 5)]


def test_tokenizer_json_of_the_sentencepiece_kind(tmp_path: Path) -> None:
    ours = tokenizer_from_gguf(_sentencepiece_file(tmp_path / "s.gguf", prefix=True))
    theirs = _save_json(ours, tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    assert theirs.encode("ab aé") == ours.encode("ab aé")
    assert theirs.decode(theirs.encode("ab aé")) == "ab aé"
    assert theirs.token_bytes(3 + 0xC3) == b"\xc3"


def test_end_tokens_from_every_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 11}')
    tokenizer = _save_json(_tokenizer("smollm2"), tmp_path, add_bos_token=True, bos_token="<|im_start|>")
    assert tokenizer.eos_ids == {0, 2, 7, 9, 11}
    assert tokenizer.add_bos


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', '{"added_tokens": 4}'])
def test_a_broken_tokenizer_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        tokenizer_from_hf(tmp_path)
