"""Incremental text of one request: tokens in, text that is safe to show out. Knows stop strings; knows no tokenizer.

Text is safe when it holds only whole characters (the tokenizer's stream sees to that) and cannot be the start of a stop
string that a later token completes.
"""

from __future__ import annotations

from typing import Protocol


class TokenStream(Protocol):
    """A tokenizer's incremental decoder, as `model.Tokenizer.stream()` gives."""

    def push(self, token_id: int, /) -> str:
        """The characters that this token completes; empty while a character is unfinished."""
        ...

    def flush(self) -> str:
        """What is left, unfinished characters as U+FFFD."""
        ...


class TextStream:
    """Text of one request.

    `stopped` is the stop string that was met, or None. Once it is set, the text before it has all been given out, and
    nothing that follows ever is.
    """

    __slots__ = ("_held", "_longest", "_prefixes", "_stops", "_stream", "stopped")

    def __init__(self, stream: TokenStream, stops: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._prefixes = frozenset([stop[:size] for stop in stops for size in range(1, len(stop))])
        self._held = ""
        self.stopped: str | None = None

    def push(self, token_id: int, *, check_stops: bool = True) -> str:
        """Text that this token makes safe. `check_stops` False (before min_tokens) lets a stop string pass."""
        text = self._stream.push(token_id)
        if not self._stops or not text:
            return text
        text = self._held + text
        self._held = ""
        if not check_stops:
            return text
        return self._cut(text)

    def finish(self) -> str:
        """The rest of the text, when the request ends for a reason other than a stop string."""
        if self.stopped is not None:
            return ""
        text = self._held + self._stream.flush()
        self._held = ""
        # An unfinished character may be the last thing a stop string was waiting for.
        return self._cut(text) + self._release() if self._stops else text

    def _release(self) -> str:
        text, self._held = self._held, ""
        return "" if self.stopped is not None else text

    def _cut(self, text: str) -> str:
        """`text` up to the first stop string, else up to where one may be starting (kept for later)."""
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]  # longer wins a tie
        if found:
            at, _, self.stopped = min(found)
            return text[:at]
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                self._held = text[-size:]
                return text[:-size]
        return text
