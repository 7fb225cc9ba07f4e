"""Tokenizers from a Hugging Face directory: `tokenizer.json`, with what the configs beside it say about special tokens.

Knows those files. The `tokenizers` library does the encoding; it is imported here, on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import msgspec

from megalith.base.errors import ModelFormatError, ModelNotFound
from megalith.model.tokenizer import END_OF_TURN, Tokenizer, Vocabulary

_MAX_JSON_BYTES = 256 << 20


class LibraryEncoder:
    """The `tokenizers` library as an Encoder. `build` makes a second one, for text whose special tokens are plain."""

    def __init__(self, backend: Any, build: Callable[[], Any]) -> None:
        self._backend = backend
        self._build = build
        self._literal: Any = None

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of `text`, with no token added in front or behind."""
        backend = self._backend
        if not parse_special:
            if self._literal is None:
                literal = self._build()
                # A switch of the whole tokenizer, hence the second one.
                literal.encode_special_tokens = True
                self._literal = literal
            backend = self._literal
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    """The parts of tokenizer.json that are ours to read; the vocabulary is skipped over."""

    added_tokens: list[_AddedToken] = []
    decoder: Any = None


class _Texts(Sequence[str]):
    """Vocabulary texts looked up in the library when asked for."""

    def __init__(self, backend: Any, count: int) -> None:
        self._text_of, self._count = backend.id_to_token, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._text_of(index) or ""

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(self._count))


def tokenizer_from_hf(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises ModelNotFound without tokenizer.json, ModelFormatError else."""
    from tokenizers import Tokenizer as Backend

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{directory} has no tokenizer.json.",
            "Save the tokenizer with save_pretrained of a fast tokenizer; tokenizer.model alone is not read.",
        )
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFormatError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read.")
    data = path.read_bytes()
    try:
        header = msgspec.json.decode(data, type=_TokenizerFile)
        backend = Backend.from_buffer(data)
    except Exception as error:  # the library has one class for everything
        raise ModelFormatError(f"{path} cannot be read: {error}.") from None
    kinds = _decoder_kinds(header.decoder)
    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise ModelFormatError(
            f"{path} has a decoder of {', '.join(sorted(kinds)) or 'no kind'}, which is not supported.",
            "Supported: ByteLevel and SentencePiece's ByteFallback.",
        )
    vocabulary = _vocabulary(directory, header, backend, "ByteLevel" in kinds, "Strip" in kinds)
    return Tokenizer(vocabulary, LibraryEncoder(backend, lambda: Backend.from_buffer(data)), lambda: backend)


def _vocabulary(directory: Path, header: _TokenizerFile, backend: Any, byte_level: bool, strip: bool) -> Vocabulary:
    config = read_json(directory / "tokenizer_config.json")
    added = {token.id: token.special for token in header.added_tokens}
    first = backend.encode("", add_special_tokens=True).ids[:1]
    bos = _token_id(backend, config.get("bos_token"))
    if bos is None and first and added.get(first[0]):
        bos = first[0]
    ends = {token.id for token in header.added_tokens if token.special and token.content in END_OF_TURN}
    ends.update(_listed(read_json(directory / "generation_config.json").get("eos_token_id")))
    ends.update(_listed(read_json(directory / "config.json").get("eos_token_id")))
    eos = _token_id(backend, config.get("eos_token"))
    eos = min(ends, default=None) if eos is None else eos
    wants = config.get("add_bos_token")
    byte_ids: dict[int, int] = {}
    if not byte_level:
        texts = ((f"<0x{byte:02X}>", byte) for byte in range(256))
        byte_ids = {i: byte for text, byte in texts if (i := backend.token_to_id(text)) is not None}
    return Vocabulary(
        texts=_Texts(backend, max([backend.get_vocab_size(), *(i + 1 for i in added)])),
        byte_level=byte_level,
        added=added,
        byte_ids=byte_ids,
        bos_id=bos,
        eos_id=eos,
        eos_ids=frozenset(ends | ({eos} if eos is not None else set())),
        add_bos=wants if isinstance(wants, bool) else bool(first) and first[0] == bos,
        space_prefix=not byte_level and strip,
    )


def token_content(token: Any) -> str | None:
    """The text of a special token in a config: a string, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the model; empty when the file is absent. Raises ModelFormatError when it is broken."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFormatError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read.")
        data = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path} holds a JSON {type(data).__name__}, not an object.")
    return data


def _token_id(backend: Any, token: Any) -> int | None:
    text = token_content(token)
    found: int | None = backend.token_to_id(text) if text is not None else None
    return found


def _listed(ids: Any) -> list[int]:
    values = ids if isinstance(ids, list) else [ids]
    return [value for value in values if type(value) is int and value >= 0]


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of the decoders inside it."""
    if not isinstance(decoder, dict):
        return set()
    kinds = {decoder["type"]} if isinstance(decoder.get("type"), str) else set()
    inner = decoder.get("decoders")
    return kinds.union(*map(_decoder_kinds, inner)) if isinstance(inner, list) else kinds
