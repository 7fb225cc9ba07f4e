"""From request fields to SamplingParams, and from one request to its n choices.

Knows OpenAI's field names and the engine's; knows nothing of HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from megalith.base.random import splitmix64
from megalith.engine.params import Grammar, SamplingParams
from megalith.serve.config import ServerConfig
from megalith.serve.errors import ApiError
from megalith.serve.schema import ChatRequest, CompletionRequest, GenerationRequest


@dataclass(frozen=True, slots=True)
class Choice:
    """One engine request: answer number `index` of the HTTP request, to prompt number `prompt_index`."""

    index: int
    prompt_index: int
    prompt_ids: list[int]
    params: SamplingParams


def chat_params(request: ChatRequest, vocab: int, max_context: int) -> SamplingParams:
    """SamplingParams of a chat request. Raises ApiError or RequestError (400)."""
    if request.top_logprobs is not None and not request.logprobs:
        raise _bad("top_logprobs", "`top_logprobs` needs `logprobs: true`.")
    limits = (request.max_tokens, request.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise _bad("max_tokens", f"max_tokens is {limits[0]} and max_completion_tokens {limits[1]}; send one of them.")
    limit = limits[1] if limits[1] is not None else limits[0]
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, vocab, max_tokens=_cap(limit, max_context), logprobs=logprobs)


def completion_params(request: CompletionRequest, vocab: int, max_context: int) -> SamplingParams:
    """SamplingParams of a completion. Raises ApiError or RequestError (400).

    With `echo`, `max_tokens` may be 0 (scoring of the prompt): the engine is asked for one token, which the answer
    leaves out. OpenAI's default of 16 tokens holds here.
    """
    if request.best_of is not None and request.best_of != request.n:
        raise _bad("best_of", f"best_of is {request.best_of} but only n = {request.n} is served; leave it out.")
    limit = 16 if request.max_tokens is None else request.max_tokens
    if limit == 0 and request.echo:
        limit = 1
    return _params(
        request,
        vocab,
        max_tokens=_cap(limit, max_context),
        logprobs=request.logprobs,
        prompt_logprobs=request.echo and request.logprobs is not None,
    )


def split_choices(
    prompts: list[list[int]], params: SamplingParams, n: int, config: ServerConfig, param: str
) -> list[Choice]:
    """The engine requests of one HTTP request: prompt p has choices p * n to p * n + n - 1.

    Choice 0 of a prompt has the request's own seed, the others seeds derived from it, so that they differ from each
    other and are still reproducible.
    """
    if n > config.max_n:
        raise _bad("n", f"n is {n} but must be at most {config.max_n}.")
    if len(prompts) * n > config.max_choices:
        raise _bad(param, f"{len(prompts)} prompts with n = {n} are more than {config.max_choices} choices.")
    if any(not ids for ids in prompts):
        raise _bad(param, "The prompt is empty. Send at least one token.")
    choices = []
    for prompt_index, ids in enumerate(prompts):
        for j in range(n):
            mine = params
            if j and params.seed is not None:
                mine = msgspec.structs.replace(params, seed=splitmix64(params.seed, j))
            choices.append(Choice(prompt_index * n + j, prompt_index, ids, mine))
    return choices


def _params(request: GenerationRequest, vocab: int, **extra: Any) -> SamplingParams:
    stop = request.stop
    for token_id in request.stop_token_ids:
        if not 0 <= token_id < vocab:
            raise _bad("stop_token_ids", f"Token id {token_id} is outside the vocabulary of {vocab}.")
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k) if request.top_k == -1 else request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias, vocab),
        seed=request.seed,
        min_tokens=request.min_tokens,
        stop=() if stop is None or stop == "" else (stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        grammar=_grammar(request),
        **extra,
    )


def _cap(limit: int | None, max_context: int) -> int | None:
    """No request can have more tokens than the context; a huge number must not become a huge allocation."""
    return None if limit is None else min(limit, max_context)


def _logit_bias(bias: dict[str, float], vocab: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab):
            raise _bad("logit_bias", f"logit_bias has the key {key[:32]!r}, which is no token id below {vocab}.")
        found[int(key)] = value
    return found


def _grammar(request: GenerationRequest) -> Grammar | None:
    found: list[tuple[str, Grammar]] = []
    form = request.response_format
    if form is not None and form.type == "json_object":
        found.append(("response_format", Grammar(kind="json_object")))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise _bad("response_format", "A response_format of type json_schema needs `json_schema`.")
        found.append(("response_format", _schema(form.json_schema.schema)))
    if request.guided_json is not None:
        found.append(("guided_json", _schema(request.guided_json)))
    if request.guided_regex is not None:
        found.append(("guided_regex", Grammar(kind="regex", definition=request.guided_regex)))
    if request.guided_grammar is not None:
        found.append(("guided_grammar", Grammar(kind="lark", definition=request.guided_grammar)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise _bad(found[1][0], f"{names} exclude each other; send one.")
    return found[0][1] if found else None


def _schema(schema: dict[str, Any] | str) -> Grammar:
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Grammar(kind="json_schema", definition=text)


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
