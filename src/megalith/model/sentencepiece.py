"""SentencePiece's BPE over a vocabulary with scores and no merge list (Llama 2, Mistral, Gemma in GGUF files).

Knows the algorithm (Kudo and Richardson, "SentencePiece", EMNLP 2018, arXiv:1808.06226): start from characters, always
join the neighbours whose joint piece has the highest score, the leftmost on a tie; what is left over and is not a piece
becomes bytes. Ours rather than the tokenizers library's, because the library needs the half million merges of Gemma
spelled out, which takes seconds at every start; this one starts at once and remembers words.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence

SPACE = "\u2581"
_CACHE_WORDS = 1 << 16
_CACHE_WORD_CHARS = 64


class PieceMerger:
    """Ids of text that contains no added token.

    `pieces` maps the text of ordinary pieces to ids, `scores` is indexed by id, `byte_ids` has 256 entries or none.
    """

    def __init__(
        self, pieces: dict[str, int], scores: Sequence[float], byte_ids: Sequence[int], unknown_id: int
    ) -> None:
        self._pieces, self._scores = pieces, scores
        self._byte_ids, self._unknown_id = byte_ids, unknown_id
        self._cache: dict[str, list[int]] = {}
        # No join can cross a place that no piece spans, so text may be cut there and words remembered. The usual
        # vocabulary has the space mark only at the start of a piece.
        crosses = any(SPACE in text.lstrip(SPACE) for text in pieces)
        self._words = re.compile(".+" if crosses else f"{SPACE}*[^{SPACE}]+|{SPACE}+", re.DOTALL)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, whose spaces are already marks."""
        ids: list[int] = []
        cache = self._cache
        for word in self._words.findall(text):
            known = cache.get(word)
            if known is None:
                known = self._word(word)
                if len(word) <= _CACHE_WORD_CHARS:
                    if len(cache) >= _CACHE_WORDS:
                        cache.clear()
                    cache[word] = known
            ids += known
        return ids

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        for piece in self._joined(word):
            found = self._pieces.get(piece)
            if found is not None:
                ids.append(found)
            elif self._byte_ids:
                ids += [self._byte_ids[byte] for byte in piece.encode()]
            else:
                ids.append(self._unknown_id)
        return ids

    def _joined(self, word: str) -> list[str]:
        """The pieces that joining ends in. A linked list of symbols and a heap of candidate joins."""
        symbols = list(word)
        count = len(symbols)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap = [entry for i in range(count - 1) if (entry := self._candidate(symbols[i] + symbols[i + 1], i))]
        heapq.heapify(heap)
        while heap:
            _, left, text = heapq.heappop(heap)
            right = after[left]
            # Either symbol may have been joined to something else since.
            if not symbols[left] or right >= count or symbols[left] + symbols[right] != text:
                continue
            symbols[left], symbols[right] = text, ""
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
                if entry := self._candidate(text + symbols[after[left]], left):
                    heapq.heappush(heap, entry)
            if before[left] >= 0 and (entry := self._candidate(symbols[before[left]] + text, before[left])):
                heapq.heappush(heap, entry)
        return [symbol for symbol in symbols if symbol]

    def _candidate(self, text: str, left: int) -> tuple[float, int, str] | None:
        found = self._pieces.get(text)
        return None if found is None else (-self._scores[found], left, text)


class AddedTokens:
    """Cuts text at added tokens: leftmost first, the longest where several start."""

    def __init__(self, tokens: Iterable[tuple[str, int]]) -> None:
        self._ids = {text: i for text, i in tokens if text}
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {head: sorted(sizes, reverse=True) for head, sizes in lengths.items()}
        # Thousands of tokens share a few heads of two characters: search for those, then try the lengths.
        self._heads = re.compile(_heads_pattern(self._lengths)) if self._lengths else None

    def split(self, text: str) -> list[str | int]:
        """Text and ids of added tokens, in order; no empty text."""
        parts: list[str | int] = []
        done = at = 0
        while self._heads is not None and (match := self._heads.search(text, at)):
            start = match.start()
            size = self._size_at(text, start)
            if not size:
                at = start + 1
                continue
            if start > done:
                parts.append(text[done:start])
            parts.append(self._ids[text[start : start + size]])
            done = at = start + size
        if done < len(text):
            parts.append(text[done:])
        return parts

    def _size_at(self, text: str, start: int) -> int:
        """Length of the longest added token that starts there, or 0."""
        for head in (text[start : start + 2], text[start]):
            for size in self._lengths.get(head, ()):
                if text[start : start + size] in self._ids:
                    return size
        return 0


def _heads_pattern(heads: Iterable[str]) -> str:
    """A pattern that finds any of the heads (one or two characters) fast: one alternative for each first character."""
    seconds: dict[str, set[str]] = {}
    for head in heads:
        seconds.setdefault(head[0], set()).add(head[1:])
    alternatives = []
    for first, rest in seconds.items():
        follow = "" if "" in rest else "[" + "".join(map(re.escape, sorted(rest))) + "]"
        alternatives.append(re.escape(first) + follow)
    return "|".join(alternatives)
