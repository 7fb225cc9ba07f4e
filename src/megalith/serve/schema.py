"""The requests that clients send, as msgspec structs. They are also what /openapi.json is made of.

Knows OpenAI's field names and ours; knows nothing of HTTP, prompts or engines. A value of null means "not given" for
every top-level field (the body reader drops nulls). Ranges live in SamplingParams, so that they are checked once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

TokenIds: TypeAlias = list[Annotated[int, Meta(ge=0, lt=2**31)]]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Send one more chunk, last, with the usage."""
    include_obfuscation: bool = False
    """Accepted; we add no padding."""


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named JSON schema."""

    schema: dict[str, Any]
    name: str = "schema"
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text can be read."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """Passed to the template, which may use or drop it."""
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    annotations: list[Any] | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions have in common. The lower half are extensions to OpenAI's fields."""

    model: str | None = None
    """The served model; it may be left out, there is only one."""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: Annotated[int, Meta(ge=1)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Accepted, not used."""

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    """Higher goes first."""
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    """A Lark grammar."""
    return_token_ids: bool = False


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    """`none` hides the tools from the template, `auto` shows them; calls are not parsed out of the text."""
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | TokenIds]
    """A text, token ids, or a list of either."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Annotated[int, Meta(ge=1)] | None = None
    """Must equal `n`."""
    add_special_tokens: bool | None = None
    """Whether to put the model's begin-of-text token first; null: as the model wants it."""


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: str | list[str | int | TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: TokenIds
    model: str | None = None
