"""The server over the real engine and a tiny real model: what comes out over HTTP is what the engine says, and nothing
is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from megalith.engine.batch import SamplingBatch, StepBatch, StepResult
from megalith.engine.params import SamplingParams
from megalith.engine.service import LocalEngine
from megalith.model.open import OpenModel

from .running import Running, serve
from .test_endpoints import sse

PROMPTS = [f"The {word} of the north is {'very ' * i}far" for i, word in enumerate(("sea", "star", "tale", "rose"))]


@pytest.fixture(scope="module")
def server(make_engine: Callable[..., LocalEngine], tiny_model: OpenModel) -> Iterator[Running]:
    with serve(make_engine, tiny_model) as running:
        yield running
        running.wait_idle()
        running.engine._core.scheduler.check_integrity()


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client
    server.wait_idle()


def complete(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"temperature": 0, "max_tokens": 12, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_http_says_what_the_engine_says(
    client: httpx2.Client, make_engine: Callable[..., LocalEngine], tiny_model: OpenModel
) -> None:
    async def direct() -> list[str]:
        engine = make_engine()
        await engine.start()
        texts = []
        for prompt in PROMPTS:
            ids = tiny_model.tokenizer.encode(prompt)
            stream = engine.generate(ids, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
            async with contextlib.aclosing(stream) as deltas:  # type: ignore[type-var]
                texts.append("".join([delta.text async for delta in deltas]))
        await engine.stop()
        return texts

    expected = asyncio.run(direct())
    assert len(set(expected)) > 1
    alone = [complete(client, prompt=prompt, ignore_eos=True)["choices"][0]["text"] for prompt in PROMPTS]
    together = [c["text"] for c in complete(client, prompt=PROMPTS, ignore_eos=True)["choices"]]
    streamed = []
    for prompt in PROMPTS:
        body = {"prompt": prompt, "ignore_eos": True, "temperature": 0, "max_tokens": 12, "stream": True}
        events = sse(client.post("/v1/completions", json=body).text)
        streamed.append("".join(e["choices"][0]["text"] for e in events))
    assert alone == together == streamed == expected


def test_chat_template_and_token_ids(client: httpx2.Client, tiny_model: OpenModel) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body).json()
    prompt = tiny_model.tokenizer.encode("<|im_start|>hello<|im_end|>", add_bos=False)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert client.post("/tokenize", json={"messages": body["messages"]}).json()["tokens"] == prompt
    choice = answer["choices"][0]
    assert len(choice["token_ids"]) == 5
    assert tiny_model.tokenizer.decode(choice["token_ids"]) == choice["message"]["content"]


def test_seeds_n_and_sampling(client: httpx2.Client) -> None:
    fields: dict[str, Any] = {"prompt": PROMPTS[0], "temperature": 1.5, "n": 3, "seed": 11, "ignore_eos": True}
    first, second = complete(client, **fields), complete(client, **fields)
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert len(set(texts)) == 3
    assert complete(client, **{**fields, "n": 1})["choices"][0]["text"] == texts[0]


def test_prefix_cache_is_told(client: httpx2.Client) -> None:
    prompt = "once upon a time there was a long prompt that fills blocks of sixteen tokens, twice " * 2
    complete(client, prompt=prompt, max_tokens=1)
    usage = complete(client, prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 16
    again = complete(client, prompt=prompt + "x", n=2, temperature=1.0)["usage"]
    assert again["prompt_tokens"] == len(client.post("/tokenize", json={"prompt": prompt + "x"}).json()["tokens"])


def test_stop_logprobs_and_echo(client: httpx2.Client) -> None:
    free = complete(client, prompt=PROMPTS[1], ignore_eos=True, logprobs=3, echo=True, return_token_ids=True)
    choice = free["choices"][0]
    logprobs = choice["logprobs"]
    count = free["usage"]["total_tokens"]
    assert choice["text"].startswith(PROMPTS[1])
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert len(logprobs[name]) == count
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    # Greedy: the chosen token is the most likely one.
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    for token, value, top in list(rows)[-12:]:
        assert top[token] == value == max(top.values())
    text = choice["text"][len(PROMPTS[1]) :]
    stop = text[3:5]
    cut = complete(client, prompt=PROMPTS[1], ignore_eos=True, stop=[stop])["choices"][0]
    assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (text[: text.index(stop)], "stop", stop)


def test_constrained_output(client: httpx2.Client) -> None:
    choice = complete(client, prompt="a", guided_regex="[ab]{3}-[0-9]{2}", max_tokens=40, temperature=1.0)["choices"][0]
    assert re.fullmatch("[ab]{3}-[0-9]{2}", choice["text"])
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": form, "max_tokens": 60, "seed": 1}
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert isinstance(json.loads(content)["ok"], bool)
    for wrong in ({"guided_regex": "(["}, {"guided_json": {"type": "nonsense"}}, {"guided_grammar": "???"}):
        answer = client.post("/v1/completions", json={"prompt": "a", **wrong})
        assert answer.status_code == 400, answer.text


def test_impossible_requests_are_400(client: httpx2.Client) -> None:
    for fields in ({"prompt": "a" * 5000}, {"prompt": "a", "max_tokens": 3, "min_tokens": 5}, {"prompt": ""}):
        answer = client.post("/v1/completions", json=fields)
        assert answer.status_code == 400, (fields, answer.text)
        assert client.post("/v1/completions", json={**fields, "stream": True}).status_code == 400


def test_vanishing_clients_leave_no_block(server: Running) -> None:
    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        prompt = "tell me a tale " * (1 + number % 7)
        body = json.dumps({"prompt": prompt, "max_tokens": 300, "stream": True, "ignore_eos": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        await writer.drain()
        if number % 3:
            await reader.read(100)
        writer.transport.abort() if number % 2 else writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def everyone() -> None:
        gate = asyncio.Semaphore(50)

        async def bounded(number: int) -> None:
            async with gate:
                await asyncio.wait_for(one(number), 120)

        await asyncio.gather(*(bounded(number) for number in range(500)))

    asyncio.run(everyone())
    server.wait_idle(60)
    server.engine._core.scheduler.check_integrity()


def test_one_broken_step_fails_one_request(make_engine: Callable[..., LocalEngine], tiny_model: OpenModel) -> None:
    poison = 299

    def make() -> LocalEngine:
        engine = make_engine(prefix_cache=False)
        runner = engine._core.runner
        whole_step = runner.step

        def step(batch: StepBatch, sampling: SamplingBatch) -> StepResult:
            if poison in batch.tokens_M:
                raise ValueError("injected")
            return whole_step(batch, sampling)

        runner.step = step  # type: ignore[method-assign]
        return engine

    async def drive(server: Running) -> None:
        async with server.async_client() as client:

            async def ask(prompt: list[int]) -> httpx2.Response:
                fields = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logit_bias": {str(poison): -100}}
                return await client.post("/v1/completions", json={"prompt": prompt, **fields})

            answers = await asyncio.gather(*(ask([5 + i, 6, 7] + [poison] * (i == 3)) for i in range(8)))
            assert [a.status_code for a in answers] == [200, 200, 200, 500, 200, 200, 200, 200], answers[3].text
            assert set(answers[3].json()["error"]) == {"message", "type", "param", "code"}
            assert all(a.json()["usage"]["completion_tokens"] == 24 for i, a in enumerate(answers) if i != 3)
            assert (await client.get("/health")).status_code == 200

    with serve(make, tiny_model) as server:
        asyncio.run(drive(server))
        server.wait_idle()
