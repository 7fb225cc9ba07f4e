"""The text of what the load generator sends: prompts of given lengths, decided by (seed, request number).

Where requests come from and when is `specs.workload`; this knows only their words. Knows nothing of HTTP.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from megalith.base.random import splitmix64
from megalith.specs.shape import PREFIX_BLOCK_TOKENS, RequestShape

PromptKind = Literal["ids", "text"]

# Numbers of the random streams under a seed; those of `specs.workload` are others.
_STREAM_PROMPT, _STREAM_PREFIX = 4, 5

# Short frequent English words: one token each, with the space before it, in the usual vocabularies.
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good sentence "
    "man think say great where help through much before line right too mean old any same tell boy follow came want "
    "show also around form three small set put end does another well large must big even such because turn here why "
    "ask went men read need land different home us move try kind hand picture again change off play spell air away "
    "animal house point page letter mother answer found study still learn should world high every near add food"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Prompts of given lengths. `ids`: token ids drawn from `id_range`, exact in length. `text`: frequent English
    words, about one token each; the server's usage says how many they were.

    The first `shared_tokens` of every prompt are the same, which a prefix cache can use; nothing else repeats, except
    where a trace says so.
    """

    kind: PromptKind = "ids"
    seed: int = 0
    id_range: tuple[int, int] = (1000, 32_000)
    shared_tokens: int = 0

    def prompt(self, shape: RequestShape) -> str | list[int]:
        """The prompt of one request."""
        shared = min(self.shared_tokens, shape.input_tokens)
        runs = [self._run(_stream(self.seed, _STREAM_PREFIX), 0, shared)]
        left = shape.input_tokens - shared
        for block in shape.prefix_ids:
            taken = min(left, PREFIX_BLOCK_TOKENS)
            runs.append(self._run(_stream(self.seed, _STREAM_PREFIX), block + 1, taken))
            left -= taken
        runs.append(self._run(_stream(self.seed, _STREAM_PROMPT), shape.index, left))
        if self.kind == "text":
            return " ".join(_WORDS[i % len(_WORDS)] for i in chain.from_iterable(runs))
        return list(chain.from_iterable(runs))

    def _run(self, stream: int, index: int, count: int) -> list[int]:
        """`count` ids. The standard generator, seeded by our own: 20 times faster than a hash an id."""
        if count <= 0:
            return []
        return random.Random(splitmix64(stream, index)).choices(range(*self.id_range), k=count)


def _stream(seed: int, purpose: int) -> int:
    return splitmix64(seed, purpose)
