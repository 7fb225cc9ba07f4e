"""/openapi.json describes what the server does: Schemathesis finds no 5xx and no answer outside the description."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CheckFunction, load_all_checks
from schemathesis.specs.openapi import checks

from megalith.serve.answers import ChatChunk, Completion
from megalith.serve.openapi import OPERATIONS, describe

from .running import Running, serve
from .scripted import ScriptedEngine, byte_model

load_all_checks()
EXAMPLES = 15
CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve(lambda: ScriptedEngine(max_running=16), byte_model()) as running:
        yield running
        running.wait_idle()


schema = schemathesis.openapi.from_dict(describe())


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_no_5xx_and_nothing_undescribed(case: schemathesis.Case, server: Running) -> None:
    # Long generations add nothing here.
    if isinstance(case.body, dict) and case.path in ("/v1/completions", "/v1/chat/completions"):
        case.body["max_tokens"] = 2
        case.body.pop("max_completion_tokens", None)
    case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=20)


def test_description_is_whole() -> None:
    text = json.dumps(describe())
    components = describe()["components"]["schemas"]
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in components
    assert {"ChatRequest", "CompletionRequest", "ErrorAnswer"} <= set(components)
    assert components["ChatRequest"]["additionalProperties"] is False
    assert components["ChatRequest"]["properties"]["top_k"]
    assert len({(op.method, op.path) for op in OPERATIONS}) == len(OPERATIONS)
    assert ChatChunk.__name__ in components
    assert Completion.__name__ in components
