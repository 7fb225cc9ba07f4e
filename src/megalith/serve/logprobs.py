"""Log probabilities in the two shapes that OpenAI's endpoints have.

Knows token texts and bytes; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalith.engine.api import TokenLogprob
from megalith.serve.answers import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob

if TYPE_CHECKING:
    from megalith.model.tokenizer import Tokenizer

# JSON has no infinity; this is what OpenAI documents for "practically impossible".
MIN_LOGPROB = -9999.0


class LogprobWriter:
    """Turns engine log probabilities into answers, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, entries: Sequence[TokenLogprob], top: int) -> ChatLogprobs:
        """The chat shape: a list of tokens, each with the `top` most likely."""
        content = []
        for entry in entries:
            name, raw = self._name(entry.token_id)
            tops = []
            for token_id, logprob in entry.top[:top]:
                top_name, top_raw = self._name(token_id)
                tops.append(TopLogprob(top_name, _finite(logprob), list(top_raw)))
            content.append(ChatTokenLogprob(name, _finite(entry.logprob), list(raw), tops))
        return ChatLogprobs(content)

    def completion(self, entries: Sequence[TokenLogprob | None], ids: Sequence[int], top: int, offset: int) -> tuple[
        CompletionLogprobs, int
    ]:  # fmt: skip
        """The completion shape for tokens `ids` that start at character `offset`, and the offset after them.

        The first token of a prompt has no entry: its log probability is null.
        """
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, entry in zip(ids, entries, strict=True):
            name, raw = self._name(token_id)
            tokens.append(name)
            offsets.append(offset)
            offset += len(raw.decode("utf-8", "ignore"))
            if entry is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(_finite(entry.logprob))
            best = {self._name(other)[0]: _finite(logprob) for other, logprob in entry.top[:top]}
            best.setdefault(name, _finite(entry.logprob))
            tops.append(best)
        return CompletionLogprobs(tokens, values, tops if top else None, offsets), offset

    def _name(self, token_id: int) -> tuple[str, bytes]:
        """A token's text and bytes; a piece of a character is written as `bytes:\\xe2\\x80`, as OpenAI does."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode("utf-8"), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
