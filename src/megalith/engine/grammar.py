"""Constrained output: JSON mode, JSON schema, regular expressions and Lark grammars, through llguidance.

Knows grammars and bit masks; knows no logits and no scheduling. Compiling can take from milliseconds to a second, so it
happens where a request is admitted, never inside a step; a step only fills one mask row and advances by one token.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from megalith.base.errors import RequestError, StepFailed
from megalith.engine.batch import U32
from megalith.engine.params import Grammar

_CACHED_GRAMMARS = 64
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between JSON tokens. Bounded, because small models like to fill max_tokens with blanks."""


class GrammarState:
    """Where one request stands in its grammar. Not thread-safe; owned by the step loop."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask_row: U32) -> None:
        """Write the allowed tokens into `mask_row` (C-contiguous words). Raises StepFailed if the grammar gave up."""
        self._matcher.unsafe_compute_mask_ptr(mask_row.ctypes.data, mask_row.nbytes)
        if self._matcher.is_error():
            raise StepFailed(f"The grammar could not go on: {_first_line(self._matcher.get_error())}.")

    def accept(self, token_id: int) -> bool:
        """Advance by one token; True when the grammar is complete and nothing may follow.

        Raises StepFailed for a token that the grammar does not allow.
        """
        if not self._matcher.consume_token(token_id):
            raise StepFailed(f"Token {token_id} breaks the grammar: {_first_line(self._matcher.get_error())}.")
        return bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """True when the text so far is a whole sentence of the grammar."""
        return bool(self._matcher.is_accepting())


class GrammarCompiler:
    """Compiles grammars for one vocabulary; thread-safe, with a bounded cache.

    `tokenizer_json` gives the tokenizer as Hugging Face `tokenizer.json` text and is asked for at the first grammar
    only, since building the token trie takes up to about a second.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab = vocab
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._cache: OrderedDict[Grammar, Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> GrammarState:
        """A fresh state of `grammar`. Raises RequestError(param="response_format") if it cannot be used."""
        with self._lock:
            matcher = self._cache.get(grammar)
            if matcher is None:
                matcher = self._compile(grammar)
                self._cache[grammar] = matcher
                while len(self._cache) > _CACHED_GRAMMARS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(grammar)
            return GrammarState(matcher.deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher, LLTokenizer

        text = _grammar_text(grammar)
        if self._tokenizer is None:
            eos = sorted(self._eos_ids)
            self._tokenizer = LLTokenizer(self._tokenizer_json(), n_vocab=self._vocab, eos_token=eos or None)
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise _bad(grammar, matcher.get_error())
        return matcher


def _grammar_text(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.definition))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.definition))
    definition = grammar.definition if grammar.kind == "json_schema" else '{"type": "object"}'
    try:
        schema = json.loads(definition)
        if not isinstance(schema, dict | bool):
            raise ValueError("a JSON schema is an object or a boolean")
        return str(LLMatcher.grammar_from_json_schema(definition, overrides={"whitespace_pattern": _WHITESPACE}))
    except (ValueError, RecursionError) as error:
        raise _bad(grammar, str(error)) from None


def _bad(grammar: Grammar, reason: str) -> RequestError:
    return RequestError(
        f"The {grammar.kind.replace('_', ' ')} cannot be used: {_first_line(reason)}.",
        "Simplify it, or ask for json_object.",
        param="response_format",
    )


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip().rstrip(".")[:300] if lines else "no reason given"
