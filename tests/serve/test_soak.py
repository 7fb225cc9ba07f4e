"""2,000 mixed requests at the real engine through real HTTP: none is lost, no block leaks, the counts add up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from megalith.engine.service import LocalEngine
from megalith.model.open import OpenModel

from .running import Running, serve

REQUESTS = 2000
AT_ONCE = 64


def body_of(dice: random.Random) -> dict[str, Any]:
    prompt = " ".join(dice.choice(["tale", "star", "the", "sea", "of"]) for _ in range(dice.randint(1, 40)))
    body: dict[str, Any] = {"max_tokens": dice.randint(1, 24), "temperature": dice.choice([0, 1.0]), "stream": False}
    if dice.random() < 0.3:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = [prompt, prompt[::-1]] if dice.random() < 0.1 else prompt
    if dice.random() < 0.2:
        body["n"] = dice.randint(2, 3)
    if dice.random() < 0.3:
        body["seed"] = dice.randint(0, 99)
    if dice.random() < 0.2:
        body["stop"] = ["e", "zz"]
    if dice.random() < 0.1:
        body["priority"] = dice.randint(-3, 3)
    if dice.random() < 0.05:
        body["guided_regex"] = "[a-z]{4}"
    return body


async def whole(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> str:
    answer = await client.post(path, json=body)
    if answer.status_code == 429:
        assert int(answer.headers["retry-after"]) >= 1
        return "refused"
    assert answer.status_code == 200, answer.text
    found = answer.json()
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert len(found["choices"]) == prompts * body.get("n", 1)
    assert all(choice["finish_reason"] in ("stop", "length") for choice in found["choices"])
    assert found["usage"]["completion_tokens"] <= len(found["choices"]) * body["max_tokens"]
    return "answered"


async def streamed(client: httpx2.AsyncClient, path: str, body: dict[str, Any], leave_after: int | None) -> str:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", path, json=body) as answer:
        if answer.status_code == 429:
            return "refused"
        assert answer.status_code == 200
        lines = []
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                lines.append(line[6:])
                if leave_after is not None and len(lines) >= leave_after:
                    return "left"
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert not any("error" in event for event in events), events[-1]
    assert events.pop()["usage"]["completion_tokens"] >= 1
    ends = [c["finish_reason"] for event in events for c in event["choices"] if c["finish_reason"]]
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert len(ends) == prompts * body.get("n", 1)
    return "streamed"


async def wrong(client: httpx2.AsyncClient, path: str, dice: random.Random) -> str:
    content = dice.choice([b"{", b'{"prompt": 5}', b'{"messages": []}', b'{"prompt": "a", "top_p": 9}', b"\xff"])
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    return "wrong"


async def drive(server: Running) -> Counter[str]:
    dice = random.Random(2)
    gate = asyncio.Semaphore(AT_ONCE)
    async with server.async_client(timeout=300) as client:

        async def one() -> str:
            body = body_of(dice)
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            kind = dice.random()
            async with gate:
                if kind < 0.05:
                    return await wrong(client, path, dice)
                if kind < 0.20:
                    return await streamed(client, path, body, leave_after=dice.randint(1, 5))
                if kind < 0.60:
                    return await streamed(client, path, body, leave_after=None)
                return await whole(client, path, body)

        return Counter(await asyncio.gather(*(one() for _ in range(REQUESTS))))


@pytest.mark.slow
def test_soak(make_engine: Callable[..., LocalEngine], tiny_model: OpenModel) -> None:
    begin = time.monotonic()
    # Few blocks, so that requests are preempted; a short queue, so that some are refused.
    with serve(lambda: make_engine(mode="auto", num_blocks=96, max_waiting=96), tiny_model) as server:
        outcome = asyncio.run(drive(server))
        server.wait_idle(20)
        scheduler = server.engine._core.scheduler
        scheduler.check_integrity()
        stats = server.engine.stats()
        with server.client() as client:
            metrics = client.get("/metrics").text
            assert client.get("/health").json()["kv_blocks_used"] == 0
    took = time.monotonic() - begin
    print(
        f"soak: {dict(outcome)} in {took:.1f} s, {stats.generated_tokens} tokens, {stats.preemptions} preemptions, "
        f"{stats.steps} steps, {stats.step_ns / 1e9:.1f} s in the runner, {stats.python_ns / 1e9:.1f} s around it"
    )
    assert sum(outcome.values()) == REQUESTS
    assert outcome["answered"] > 500
    assert outcome["streamed"] > 500
    assert outcome["left"] > 100
    assert 'finished_reason="error",model_name="tiny"} 0.0' in metrics
