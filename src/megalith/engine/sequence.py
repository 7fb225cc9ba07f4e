"""What the engine knows of one running request: its tokens, its text, its grammar, and when it ends.

Knows one request; knows neither batch, blocks' owners nor other requests. Everything here is touched by the step loop
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalith.engine.api import Delta, FinishReason, TokenLogprob
from megalith.engine.batch import F32, I32
from megalith.engine.detokenize import TextStream, TokenStream
from megalith.engine.grammar import GrammarState
from megalith.engine.params import SamplingParams
from megalith.policy.hashing import BlockHasher


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that passed admission: everything that had to be checked or compiled has been."""

    id: int
    prompt: I32
    params: SamplingParams
    max_new: int
    seed: int
    eos_ids: frozenset[int]
    stream: TokenStream
    grammar: GrammarState | None = None
    priority: int = 0
    arrival_ns: int = 0


class TokenCounts:
    """Distinct tokens of a request and how often each was generated: the sparse input of the penalties."""

    __slots__ = ("_counts", "_ids", "_index", "_size")

    def __init__(self, prompt: I32) -> None:
        distinct = np.unique(prompt)
        self._size = distinct.size
        self._ids = np.zeros(max(64, 2 * distinct.size), np.int32)
        self._counts = np.zeros_like(self._ids)
        self._ids[: distinct.size] = distinct
        self._index = {token: i for i, token in enumerate(distinct.tolist())}

    def add(self, token: int) -> None:
        """Count one generated token."""
        at = self._index.setdefault(token, self._size)
        if at == self._size:
            if at == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[at] = token
            self._size += 1
        self._counts[at] += 1

    @property
    def ids(self) -> I32:
        """Distinct tokens, each once."""
        return self._ids[: self._size]

    @property
    def counts(self) -> I32:
        """How often each of `ids` was generated."""
        return self._counts[: self._size]


class Sequence:
    """One request in the engine."""

    __slots__ = (
        "bias", "bias_early", "cached", "counts", "end_ids", "eos_ids", "generated", "grammar", "hashed", "hasher",
        "id", "length", "logprobs_wanted", "max_new", "params", "prompt_logprobs", "prompt_size", "scalars", "seed",
        "table", "table_size", "text", "tokens",
    )  # fmt: skip

    def __init__(self, admitted: Admitted, block_tokens: int, hasher: BlockHasher | None) -> None:
        params = admitted.params
        self.id = admitted.id
        self.params = params
        self.seed = admitted.seed % 2**64
        self.max_new = admitted.max_new
        self.prompt_size = admitted.prompt.size
        self.length = self.prompt_size
        """Known tokens: prompt and generated."""
        self.generated = 0
        self.tokens = np.zeros(self.prompt_size + admitted.max_new, np.int32)
        self.tokens[: self.prompt_size] = admitted.prompt
        self.text = TextStream(admitted.stream, params.stop)
        self.grammar = admitted.grammar
        self.eos_ids = admitted.eos_ids
        self.end_ids = (frozenset() if params.ignore_eos else admitted.eos_ids) | frozenset(params.stop_token_ids)
        self.hasher = hasher
        self.hashed = self.prompt_size
        """Leading tokens that the hasher has seen."""
        self.cached = -1
        """Prompt tokens that the prefix cache served; -1 until the first output."""
        self.table = np.zeros(-(-self.tokens.size // block_tokens) + 1, np.int32)
        self.table_size = 0
        self.scalars = (
            params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty,
            params.presence_penalty, params.frequency_penalty,
        )  # fmt: skip
        self.logprobs_wanted = -1 if params.logprobs is None else params.logprobs
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        self.counts = TokenCounts(admitted.prompt) if penalised else None
        self.bias = _bias(params.logit_bias, frozenset())
        # While min_tokens lasts, what would end the request cannot be sampled; a grammar decides for itself.
        early = params.min_tokens > 0 and admitted.grammar is None
        self.bias_early = _bias(params.logit_bias, admitted.eos_ids | self.end_ids) if early else self.bias
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if params.prompt_logprobs else None

    @property
    def current_bias(self) -> tuple[I32, F32] | None:
        """Token ids and what is added to their logits at the next draw."""
        return self.bias_early if self.generated < self.params.min_tokens else self.bias

    def accept(self, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Append a sampled token: the text it makes safe, the finish reason if it ends here, and what stopped it.

        Raises StepFailed when the grammar cannot take the token.
        """
        self.tokens[self.length] = token
        self.length += 1
        self.generated += 1
        if self.counts is not None:
            self.counts.add(token)
        if token in self.end_ids:
            return self.text.finish(), "stop", None if token in self.eos_ids else token
        complete = self.grammar.accept(token) if self.grammar is not None else False
        text = self.text.push(token, check_stops=self.generated >= self.params.min_tokens)
        if self.text.stopped is not None:
            return text, "stop", self.text.stopped
        if complete:
            return text + self.text.finish(), "stop", None
        if self.generated >= self.max_new:
            return self._last_text(text)
        return text, None, None

    def _last_text(self, text: str) -> tuple[str, FinishReason, str | None]:
        text += self.text.finish()
        return (text, "length", None) if self.text.stopped is None else (text, "stop", self.text.stopped)

    def new_hashes(self, computed: int, block_tokens: int) -> tuple[int, ...]:
        """Hashes of the blocks that became complete, now that the first `computed` tokens are in the KV cache."""
        if self.hasher is None or computed // block_tokens <= self.hashed // block_tokens:
            return ()
        tokens = self.tokens[self.hashed : computed].tolist()
        self.hashed = computed
        return self.hasher.feed(tokens)

    def end(self, reason: FinishReason, error: str | None = None) -> Delta:
        """The last delta of a request that ends from outside: aborted or failed. Held text is given out."""
        try:
            text = self.text.finish()
        except Exception:  # the text stream itself may be what failed
            text = ""
        counts = (self.prompt_size, max(0, self.cached), self.generated)
        return Delta(text, (), reason, None, None, *counts, error=error)

    def reset_table(self) -> None:
        """Forget the cached block table: the request left the device or came back elsewhere."""
        self.table_size = 0


def _bias(bias: dict[int, float], banned: frozenset[int]) -> tuple[I32, F32] | None:
    merged = {**bias, **dict.fromkeys(banned, float("-inf"))}
    if not merged:
        return None
    return np.array(list(merged), np.int32), np.array(list(merged.values()), np.float32)
