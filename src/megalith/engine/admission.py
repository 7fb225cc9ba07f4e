"""Admission: what has to be right about a request before the engine takes it. Every refusal says the numbers.

Knows limits, vocabularies and grammars; knows no queue. Grammars are compiled here, on a worker thread, so that neither
the event loop nor a step waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from megalith.base.errors import PromptTooLong, RequestError
from megalith.engine.detokenize import TokenStream
from megalith.engine.grammar import GrammarCompiler
from megalith.engine.params import SamplingParams
from megalith.engine.sequence import Admitted


class Admission:
    """Checks requests against one model and one instance.

    `max_context` is the longest prompt + output in tokens. `new_stream` gives a fresh incremental decoder.
    """

    def __init__(
        self,
        *,
        max_context: int,
        vocab: int,
        eos_ids: frozenset[int],
        new_stream: Callable[[], TokenStream],
        grammars: GrammarCompiler,
    ) -> None:
        self.max_context = max_context
        self._vocab = vocab
        self._eos_ids = eos_ids
        self._new_stream = new_stream
        self._grammars = grammars

    async def admit(self, number: int, prompt_ids: list[int], params: SamplingParams, seed: int) -> Admitted:
        """The request, ready for the engine. Raises RequestError, PromptTooLong among them."""
        max_new = self._max_new(len(prompt_ids), params)
        self._check_ids(prompt_ids, params)
        grammar = None
        if params.grammar is not None:
            grammar = await asyncio.to_thread(self._grammars.compile, params.grammar)
        prompt = np.array(prompt_ids, np.int32)
        return Admitted(number, prompt, params, max_new, seed, self._eos_ids, self._new_stream(), grammar)

    def _max_new(self, prompt: int, params: SamplingParams) -> int:
        """Tokens that the request may generate."""
        if prompt == 0:
            raise RequestError("The prompt is empty.", "Send at least one token.", param="prompt")
        if prompt >= self.max_context:
            raise PromptTooLong(
                f"The prompt has {prompt} tokens; prompt and output together may have {self.max_context}.",
                f"Shorten the prompt to {self.max_context - 1} tokens or fewer.",
                param="prompt",
            )
        room = self.max_context - prompt
        wanted = room if params.max_tokens is None else params.max_tokens
        if wanted > room:
            raise PromptTooLong(
                f"{prompt} prompt tokens and max_tokens {wanted} make {prompt + wanted}; "
                f"together they may be {self.max_context}.",
                f"Ask for at most {room} tokens.",
                param="max_tokens",
            )
        if params.min_tokens > wanted:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, but at most {wanted} tokens can be generated.",
                f"Use {wanted} or fewer.",
                param="min_tokens",
            )
        return wanted

    def _check_ids(self, prompt_ids: list[int], params: SamplingParams) -> None:
        for name, ids in (
            ("prompt", prompt_ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < self._vocab:
                wrong = next(i for i in ids if not 0 <= i < self._vocab)
                raise RequestError(
                    f"{name} holds token id {wrong}; this model's ids are 0 to {self._vocab - 1}.",
                    "Use ids of this model's tokenizer.",
                    param=name,
                )
