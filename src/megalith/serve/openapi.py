"""/openapi.json, assembled from the very structs that requests are checked with and answers are made of.

Knows the list of endpoints; knows nothing of how they work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from megalith import __version__
from megalith.serve import answers, schema
from megalith.serve.errors import ErrorAnswer

_REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint as the description shows it. `content` is its answer's media type where that is not JSON."""

    method: str
    path: str
    summary: str
    request: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    statuses: tuple[int, ...] = ()
    content: str = "application/json"
    streams: type[msgspec.Struct] | None = None


_GENERATION = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
_READ = (401, 403)
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Continue a conversation.", schema.ChatRequest, answers.ChatCompletion,
              _GENERATION, streams=answers.ChatChunk),
    Operation("post", "/v1/completions", "Continue a text.", schema.CompletionRequest, answers.Completion,
              _GENERATION, streams=answers.Completion),
    Operation("post", "/v1/embeddings", "Refused: decoder-only models serve no embeddings.", schema.EmbeddingRequest,
              None, (400, 401, 403, 404, 408, 413, 415, 503)),
    Operation("get", "/v1/models", "The served models.", None, answers.ModelList, _READ),
    Operation("get", "/v1/models/{id}", "One served model.", None, answers.ModelCard, (401, 403, 404)),
    Operation("post", "/tokenize", "Token ids of a text or a conversation.", schema.TokenizeRequest, answers.Tokens,
              (400, 401, 403, 404, 408, 413, 415, 503)),
    Operation("post", "/detokenize", "The text of token ids.", schema.DetokenizeRequest, answers.DetokenizedText,
              (400, 401, 403, 404, 408, 413, 415, 503)),
    Operation("get", "/health", "200 while the engine can serve, else 503 with the reason.", None, answers.Health,
              (403, 503)),
    Operation("get", "/metrics", "Prometheus metrics.", None, None, _READ, "text/plain"),
    Operation("get", "/version", "The version of the server.", None, answers.Version, _READ),
    Operation("get", "/openapi.json", "This description.", None, None, _READ, "application/json"),
)  # fmt: skip


def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 description of the server."""
    kinds: list[type[msgspec.Struct]] = [ErrorAnswer]
    for operation in OPERATIONS:
        kinds += [kind for kind in (operation.request, operation.answer, operation.streams) if kind is not None]
    unique = list(dict.fromkeys(kinds))
    refs, components = msgspec.json.schema_components(unique, ref_template=_REF)
    by_kind = dict(zip(unique, refs, strict=True))
    for operation in OPERATIONS:
        if operation.request is not None:
            # Unknown top-level fields are refused, which the struct alone does not say.
            components[operation.request.__name__]["additionalProperties"] = False
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Megalith",
            "version": __version__,
            "description": "OpenAI-compatible. A top-level null in a request means that the field is not given.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation, refs: dict[type[msgspec.Struct], dict[str, Any]]) -> dict[str, Any]:
    error = {"application/json": {"schema": refs[ErrorAnswer]}}
    responses: dict[str, Any] = {
        str(status): {"description": "Refused or failed.", "content": error} for status in operation.statuses
    }
    content: dict[str, Any] = {
        operation.content: {"schema": refs[operation.answer] if operation.answer is not None else {}}
    }
    if operation.streams is not None:
        name = operation.streams.__name__
        text = f"JSON: a {name}, or an ErrorAnswer when the stream fails. The last event holds [DONE] instead."
        data = {"type": "string", "description": text}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    if operation.path != "/v1/embeddings":
        responses["200"] = {"description": "The answer.", "content": content}
    found: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.request is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[operation.request]}}}
    if "{id}" in operation.path:
        found["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return found
