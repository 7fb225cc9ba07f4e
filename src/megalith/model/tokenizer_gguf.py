"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) with its pre-tokenizers, and SentencePiece BPE (`llama`).

Knows the metadata keys and which pre-tokenizer each name stands for. Must not read tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.base.errors import ModelFormatError
from megalith.model.fields import Fields
from megalith.model.gguf import GgufFile
from megalith.model.sentencepiece import SPACE, AddedTokens, PieceMerger
from megalith.model.tokenizer import END_OF_TURN, Tokenizer, Vocabulary
from megalith.model.tokenizer_hf import LibraryEncoder

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_NAMES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "smaug-bpe"})
_QWEN2_NAMES = frozenset({"qwen2", "deepseek-r1-qwen", "megrez"})
_DIGITS_NAMES = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
_GPT2_NAMES = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jina-v2-code"})


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The tokenizer of an opened GGUF file. Raises ModelFormatError: none inside, or of a kind that we do not have."""
    prefix = "tokenizer.ggml."
    keys = Fields({k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}, str(file.path))
    texts = keys.strings("tokens")
    if not texts:
        raise ModelFormatError(f"{file.path} holds no tokenizer.")
    types = _numbers(keys, file, "token_type", len(texts), _NORMAL)
    model = keys.text("model", "")
    if model == "gpt2":
        return _byte_level(keys, texts, types)
    if model == "llama":
        return _sentencepiece(keys, texts, types, _numbers(keys, file, "scores", len(texts), 0.0))
    raise ModelFormatError(
        f"{file.path} has a tokenizer of kind {model!r}, which is not supported.",
        "Supported: gpt2 (byte-level BPE) and llama (SentencePiece BPE).",
    )


def _numbers(keys: Fields, file: GgufFile, key: str, count: int, default: float) -> Any:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return np.full(count, default)
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise keys.bad(key, f"an array of {count} numbers, one for each token")
    return values


def _vocabulary(keys: Fields, texts: list[str], types: Any, byte_level: bool, add_bos: bool) -> Vocabulary:
    added = {i: types[i] == _CONTROL for i in np.flatnonzero((types == _CONTROL) | (types == _USER)).tolist()}
    byte_ids = {}
    for i in np.flatnonzero(types == _BYTE).tolist():
        try:
            byte_ids[i] = int(texts[i][3:5], 16)
        except ValueError:
            raise ModelFormatError(f"{keys.origin}: token {i} is a byte token but reads {texts[i]!r}.") from None
    ends = {i for i, special in added.items() if special and texts[i] in END_OF_TURN}
    named = (_token_id(keys, f"{key}_token_id", len(texts)) for key in ("eos", "eot", "eom"))
    ends |= {i for i in named if i is not None}
    return Vocabulary(
        texts=texts,
        byte_level=byte_level,
        added={i: bool(special) for i, special in added.items()},
        byte_ids=byte_ids,
        bos_id=_token_id(keys, "bos_token_id", len(texts)),
        eos_id=_token_id(keys, "eos_token_id", len(texts)),
        eos_ids=frozenset(ends),
        add_bos=keys.flag("add_bos_token", add_bos),
        space_prefix=not byte_level and keys.flag("add_space_prefix", True),
    )


def _token_id(keys: Fields, key: str, count: int) -> int | None:
    if not keys.present(key):
        return None
    value = keys.integer(key, least=0)
    # Converters write 2**32 - 1 for "none".
    if value >= count and value != 0xFFFFFFFF:
        raise keys.bad(key, f"below {count}, the number of tokens")
    return value if value < count else None


def _byte_level(keys: Fields, texts: list[str], types: Any) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    merges = keys.strings("merges")
    if merges is None:
        raise ModelFormatError(f"{keys.origin} has a BPE tokenizer without merges.")
    name = keys.text("pre", "default")
    pre_tokenizer = _pre_tokenizer(name, keys)
    pairs: list[Any] = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = models.BPE(dict(zip(texts, range(len(texts)), strict=True)), pairs, ignore_merges=name in _LLAMA3_NAMES)
    except Exception as error:  # the library has one class for everything
        raise ModelFormatError(f"{keys.origin}: merges and tokens do not fit together: {error}.") from None
    vocabulary = _vocabulary(keys, texts, types, byte_level=True, add_bos=name in _LLAMA3_NAMES)

    def build() -> Any:
        backend = Backend(model)
        if name in _QWEN2_NAMES:
            from tokenizers import normalizers

            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
        _add_tokens(backend, vocabulary)
        return backend

    backend = build()
    return Tokenizer(vocabulary, LibraryEncoder(backend, build), lambda: backend)


def _pre_tokenizer(name: str, keys: Fields) -> Any:
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    if name in _GPT2_NAMES:
        return pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS_NAMES:
        whole = pre.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre.Sequence([pre.Digits(individual_digits=True), whole])
    if name in _LLAMA3_NAMES or name in _QWEN2_NAMES:
        pattern = Regex(_LLAMA3 if name in _LLAMA3_NAMES else _QWEN2)
        plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre.Sequence([pre.Split(pattern, "isolated"), plain])
    known = sorted(_GPT2_NAMES | _DIGITS_NAMES | _LLAMA3_NAMES | _QWEN2_NAMES)
    raise keys.bad("pre", f"one of {', '.join(known)} (the pre-tokenizers that we have)")


class _PieceEncoder:
    """SentencePiece with added tokens cut out first."""

    def __init__(self, merger: PieceMerger, vocabulary: Vocabulary) -> None:
        self._merger = merger
        self._prefix = SPACE if vocabulary.space_prefix else ""
        named = [(vocabulary.texts[i], i) for i in vocabulary.added]
        self._all = AddedTokens(named)
        self._plain = AddedTokens((text, i) for text, i in named if not vocabulary.added[i])

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in (self._all if parse_special else self._plain).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._merger.encode(self._prefix + part.replace(" ", SPACE))
        return ids


def _sentencepiece(keys: Fields, texts: list[str], types: Any, scores: Any) -> Tokenizer:
    vocabulary = _vocabulary(keys, texts, types, byte_level=False, add_bos=True)
    pieces = dict(zip(texts, range(len(texts)), strict=True))
    for i in np.flatnonzero(types != _NORMAL).tolist():
        if pieces.get(texts[i]) == i:
            del pieces[texts[i]]
    unknown = _token_id(keys, "unknown_token_id", len(texts))
    ids_of_bytes = {byte: i for i, byte in vocabulary.byte_ids.items()}
    byte_ids = [ids_of_bytes[byte] for byte in range(256)] if len(ids_of_bytes) == 256 else []
    merger = PieceMerger(pieces, scores.tolist(), byte_ids, unknown or 0)
    encoder = _PieceEncoder(merger, vocabulary)
    return Tokenizer(vocabulary, encoder, lambda: _piece_backend(vocabulary, pieces, scores, unknown))


def _piece_backend(vocabulary: Vocabulary, pieces: dict[str, int], scores: Any, unknown: int | None) -> Any:
    """The same as a `tokenizers.Tokenizer`: merges are all ways to cut a piece in two, in the order of its score."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    merges = []
    for text in sorted(pieces, key=lambda piece: -scores[pieces[piece]]):
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [cut for cut in cuts if cut[0] in pieces and cut[1] in pieces]
    texts = vocabulary.texts
    backend = Backend(
        models.BPE(
            dict(zip(texts, range(len(texts)), strict=True)),
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else texts[unknown],
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if strip else spaces
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(backend, vocabulary)
    return backend


def _add_tokens(backend: Any, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken

    texts = vocabulary.texts
    for special in (True, False):
        chosen = [texts[i] for i, is_special in vocabulary.added.items() if is_special == special and texts[i]]
        tokens = [AddedToken(text, special=special, normalized=False) for text in chosen]
        backend.add_special_tokens(tokens) if special else backend.add_tokens(tokens)
