"""Text to token ids and back, for every model the same way.

Knows how ids become bytes and when bytes become characters. How a file's vocabulary is turned into an encoder is the
business of `tokenizer_gguf` and `tokenizer_hf`. The `tokenizers` library is imported by them, and only when needed.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megalith.base.errors import RequestError
from megalith.model.sentencepiece import SPACE

END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<end_of_turn>",
        "<EOT>",
    }
)
"""Special tokens that end a turn or a text in the families that we run, whatever the file calls its end token."""


class Encoder(Protocol):
    """Text to ids, without a beginning-of-text token."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of `text`; special tokens written out in it are recognised only if `parse_special`."""
        ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each id stands for. `byte_level`: texts are GPT-2's printable stand-ins for bytes, else SentencePiece's."""

    texts: Sequence[str]
    byte_level: bool
    added: dict[int, bool]
    """{id of a token that is matched whole in raw text: whether it is special}"""
    byte_ids: dict[int, int] = field(default_factory=dict)
    """{id: byte} of SentencePiece's byte tokens."""
    bos_id: int | None = None
    eos_id: int | None = None
    """The file's own end-of-text token."""
    eos_ids: frozenset[int] = frozenset()
    """All tokens that end an answer, that one included."""
    add_bos: bool = False
    space_prefix: bool = False
    """A space is put before the text when encoding, so one is taken away when decoding a whole text."""


class Tokenizer:
    """The tokenizer of one model. Thread-safe once built."""

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder, backend: Callable[[], Any]) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._make_backend = backend
        self._backend: Any = None
        self._special = frozenset(i for i, special in vocabulary.added.items() if special)
        self.vocab = len(vocabulary.texts)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos

    @property
    def backend(self) -> Any:
        """The same tokenizer as a `tokenizers.Tokenizer`, built on first use (seconds for Gemma's vocabulary)."""
        if self._backend is None:
            self._backend = self._make_backend()
        return self._backend

    def encode(self, text: str, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_bos` None puts the beginning-of-text token first where the model wants one and the text does not begin with
        it already (as rendered chat templates do). Raises RequestError for text that is not valid Unicode.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"The text has half of a surrogate pair at character {error.start}.") from None
        ids = self._encoder.encode(text, parse_special) if text else []
        wanted = self.add_bos and ids[:1] != [self.bos_id] if add_bos is None else add_bos
        return [self.bos_id, *ids] if wanted and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are nothing."""
        special = self._special if skip_special else frozenset()
        data = b"".join([self.token_bytes(i) for i in ids if i not in special])
        text = data.decode("utf-8", "replace")
        return text[1:] if self._vocabulary.space_prefix and text.startswith(" ") else text

    def stream(self, skip_special: bool = True) -> DecodeStream:
        """A decoder for output that continues a prompt: its pieces together are `decode` of all, leading space kept."""
        return DecodeStream(self, self._special if skip_special else frozenset())

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which `decode` leaves out."""
        return token_id in self._special

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it (with stand-ins for bytes or spaces); empty outside the vocabulary."""
        return self._vocabulary.texts[token_id] if 0 <= token_id < self.vocab else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to the text; empty outside the vocabulary (padded output rows)."""
        known = self._vocabulary
        if not 0 <= token_id < self.vocab:
            return b""
        text = known.texts[token_id]
        if token_id in known.added:
            return text.encode("utf-8", "replace")
        if not known.byte_level:
            byte = known.byte_ids.get(token_id)
            return bytes((byte,)) if byte is not None else text.replace(SPACE, " ").encode("utf-8", "replace")
        try:
            return bytes([_BYTE_OF[char] for char in text])
        except KeyError:
            return text.encode("utf-8", "replace")


class DecodeStream:
    """Text of tokens as they come. Never gives out half a character: its bytes wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; may be empty."""
        return "" if token_id in self._skipped else self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never came, else nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_stand_ins() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_stand_ins()
