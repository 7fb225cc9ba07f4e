"""The endpoints over real HTTP, with an engine whose output is known."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from megalith.engine.params import SamplingParams

from .running import Running, serve
from .scripted import ScriptedEngine, byte_model


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve(ScriptedEngine, byte_model(), served_names=("bytes", "alias")) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client
    server.wait_idle()


def sse(text: str) -> list[Any]:
    """The JSON events of a stream, which must end with [DONE]."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks if not block.startswith(":")]


def chat(text: str = "abc", **fields: Any) -> dict[str, Any]:
    return {"model": "bytes", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}


def post(client: httpx2.Client, path: str, body: dict[str, Any], status: int = 200, **kw: Any) -> httpx2.Response:
    answer = client.post(path, json=body, **kw)
    assert answer.status_code == status, answer.text
    if status >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    return answer


def test_chat(client: httpx2.Client) -> None:
    answer = post(client, "/v1/chat/completions", chat()).json()
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": " :tn", "refusal": None}
    assert choice["finish_reason"] == "length"
    prompt = len("user: abc\nassistant: ")
    assert answer["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_chat_stream(client: httpx2.Client) -> None:
    answer = post(client, "/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse(answer.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == " :tn"
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * 5 + ["length"]
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert len({e["id"] for e in events}) == 1
    assert all("usage" not in e for e in sse(post(client, "/v1/chat/completions", chat(stream=True)).text))


def test_content_parts_tools_and_roles(client: httpx2.Client, server: Running) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [],
         "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    post(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 1, "tools": tools, "tool_choice": "auto"})
    text = bytes(server.engine.seen[-1][0]).decode()
    assert text == "tools: 1\nsystem: be\nbrief\nassistant: \ntool: 2\nassistant: "
    post(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 1, "tools": tools, "tool_choice": "none"})
    assert "tools" not in bytes(server.engine.seen[-1][0]).decode()
    refused = post(client, "/v1/chat/completions", chat(tools=tools, tool_choice="required"), 400).json()
    assert refused["error"]["param"] == "tool_choice"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    refused = post(client, "/v1/chat/completions", chat(messages=image), 400).json()
    assert refused["error"]["param"] == "messages[0].content"


def test_n_choices_streamed_and_not(client: httpx2.Client, server: Running) -> None:
    body = chat("x" * 64, n=3, seed=5, temperature=1.0)
    answer = post(client, "/v1/chat/completions", body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == len("user: " + "x" * 64 + "\nassistant: ")
    seeds = [params.seed for _, params, _, _ in server.engine.seen[-3:]]
    assert len(set(seeds)) == 3
    assert 5 in seeds
    texts = {0: "", 1: "", 2: ""}
    finished = set()
    for event in sse(post(client, "/v1/chat/completions", {**body, "stream": True}).text):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            finished.add(choice["index"])
    assert finished == {0, 1, 2}
    assert [texts[c["index"]] for c in answer["choices"]] == [c["message"]["content"] for c in answer["choices"]]


def test_completion_prompts_of_all_kinds(client: httpx2.Client) -> None:
    def texts(prompt: Any, **fields: Any) -> list[str]:
        answer = post(client, "/v1/completions", {"prompt": prompt, "max_tokens": 2, **fields}).json()
        return [choice["text"] for choice in answer["choices"]]

    assert texts("abc") == ["cb"]
    assert texts(["abc", "de"]) == ["cb", "ed"]
    assert texts([97, 98, 99]) == ["cb"]
    assert texts([[97, 98], [99, 100]]) == ["ba", "dc"]
    assert texts([[97, 98], "cd"]) == ["ba", "dc"]
    assert texts("abc", echo=True) == ["abccb"]
    assert texts([97, 98], echo=True) == ["abba"]
    assert texts(["ab", "cd"], n=2) == ["ba", "ba", "dc", "dc"]
    for wrong in ("", [], [97, "a"], [300], [[]], [[97], 98], [-1], {"a": 1}, 5, [1.5], [[["a"]]]):
        post(client, "/v1/completions", {"prompt": wrong}, 400)


def test_completion_logprobs_echo_and_scoring(client: httpx2.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 1}
    choice = post(client, "/v1/completions", body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("abccb")
    assert logprobs["token_logprobs"] == [None, -2.0, -2.0, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    streamed = sse(post(client, "/v1/completions", {**body, "stream": True}).text)
    parts = [e["choices"][0] for e in streamed]
    assert "".join(p["text"] for p in parts) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for p in parts if p["logprobs"] for item in p["logprobs"][name]] == logprobs[name]
    scored = post(client, "/v1/completions", {**body, "max_tokens": 0}).json()
    assert scored["choices"][0]["text"] == "abc"
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == 3
    assert scored["usage"]["completion_tokens"] == 0


def test_stop_string_and_its_name(client: httpx2.Client) -> None:
    choice = post(client, "/v1/completions", {"prompt": "abc", "max_tokens": 9, "stop": "a"}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("cb", "stop", "a")


def test_extensions_reach_the_engine(client: httpx2.Client, server: Running) -> None:
    answer = post(client, "/v1/completions", {
        "prompt": "abc", "max_tokens": 2, "priority": 5, "min_p": 0.5, "ignore_eos": True, "guided_regex": "a*",
        "return_token_ids": True,
    }).json()  # fmt: skip
    _, params, priority, _ = server.engine.seen[-1]
    assert isinstance(params, SamplingParams)
    assert (priority, params.min_p, params.ignore_eos) == (5, 0.5, True)
    assert params.grammar is not None
    assert params.grammar.definition == "a*"
    assert answer["choices"][0]["token_ids"] == [99, 98]


def test_models(client: httpx2.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["bytes", "alias"]
    assert client.get("/v1/models/alias").json()["max_model_len"] == 512
    assert post(client, "/v1/completions", {"prompt": "a", "model": "alias"}).json()["model"] == "alias"
    for answer in (client.get("/v1/models/gpt-4"), client.post("/v1/completions", json={"prompt": "a", "model": "x"})):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_routers_own_refusals_have_our_shape(client: httpx2.Client) -> None:
    for answer, status in (
        (client.get("/"), 404),
        (client.get("/v1/chat/completions/"), 404),
        (client.get("/v1/chat/completions"), 405),
        (client.delete("/health"), 405),
        (client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (client.post("/v1/completions", json={"prompt": "a"}, headers={"content-encoding": "gzip"}), 415),
        (client.post("/v1/embeddings", json={"input": "a"}), 400),
        (client.post("/v1/embeddings", json={"input": {}}), 400),
        (client.post("/v1/embeddings", json={"input": "a", "model": "ada"}), 404),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "allow" in client.delete("/health").headers


def test_tokenize_and_back(client: httpx2.Client) -> None:
    tokens = post(client, "/tokenize", {"prompt": "hé"}).json()
    assert tokens == {"count": 3, "max_model_len": 512, "tokens": list("hé".encode())}
    assert post(client, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}
    assert post(client, "/tokenize", {"messages": chat()["messages"]}).json()["count"] == 21
    post(client, "/tokenize", {}, 400)
    post(client, "/detokenize", {"tokens": [999]}, 400)


def test_prompt_too_long(client: httpx2.Client) -> None:
    error = post(client, "/v1/completions", {"prompt": "a" * 600}, 400).json()["error"]
    assert error["code"] == "context_length_exceeded"
    post(client, "/v1/completions", {"prompt": "a" * 600, "stream": True}, 400)


def test_request_ids(client: httpx2.Client, server: Running) -> None:
    answer = post(client, "/v1/completions", {"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert server.engine.seen[-1][3] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    answer = client.get("/health", headers={"x-request-id": "x" * 200})
    assert len(answer.headers["x-request-id"]) == 24


def test_metrics_and_version(client: httpx2.Client) -> None:
    post(client, "/v1/completions", {"prompt": "abcd", "max_tokens": 3})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            lines[name] = float(value)
    assert lines['megalith:num_requests_running{model_name="bytes"}'] == 0
    assert lines['megalith:kv_cache_usage_perc{model_name="bytes"}'] == 0
    assert lines['megalith:generation_tokens_total{model_name="bytes"}'] >= 3
    assert lines['megalith:request_success_total{finished_reason="length",model_name="bytes"}'] >= 1
    ttft = lines['megalith:time_to_first_token_seconds_count{model_name="bytes"}']
    assert lines['megalith:e2e_request_latency_seconds_count{model_name="bytes"}'] <= ttft
    assert lines['megalith:request_generation_tokens_sum{model_name="bytes"}'] >= 3
    assert lines['megalith:http_requests_total{handler="/v1/completions",method="POST",status="200"}'] >= 1
    assert client.get("/version").json()["version"]


def test_health_tells_the_truth() -> None:
    with serve(ScriptedEngine, byte_model(), stall_timeout_ns=50_000_000) as server, server.client() as client:
        assert client.get("/health").json()["status"] == "ok"
        server.engine.set_stats(running=1)
        assert client.get("/health").status_code == 200
        time.sleep(0.06)
        assert "no step" in client.get("/health").json()["error"]["message"]
        server.engine.set_stats(running=0, healthy=False, detail="The step loop died: injected.")
        answer = client.get("/health")
        assert answer.status_code == 503
        assert "injected" in answer.json()["error"]["message"]


def test_no_chat_template_and_body_limit() -> None:
    with serve(ScriptedEngine, byte_model(chat=False), max_body_bytes=1000) as server, server.client() as client:
        assert "/v1/completions" in post(client, "/v1/chat/completions", chat(), 400).json()["error"]["message"]
        assert post(client, "/v1/completions", {"prompt": "a" * 2000}, 413).json()["error"]["code"] == "body_too_large"
        post(client, "/v1/completions", {"prompt": "a" * 100})


def test_keys(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:" + "k" * 20)
    with serve(ScriptedEngine, byte_model(), api_key_file=str(keys)) as server, server.client() as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic " + "k" * 20}):
            answer = post(client, "/v1/completions", {"prompt": "a"}, 401, headers=headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/nowhere", headers=headers).status_code == 401
        assert client.get("/health").status_code == 200
        good = {"authorization": "Bearer " + "k" * 20}
        post(client, "/v1/completions", {"prompt": "a"}, headers=good)
        assert client.get("/metrics", headers=good).status_code == 200


def test_cors_is_off_unless_asked_for() -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with serve(ScriptedEngine, byte_model()) as server, server.client() as client:
        assert client.options("/v1/completions", headers=ask).status_code == 405
        assert "access-control-allow-origin" not in client.get("/health", headers=ask).headers
    with serve(ScriptedEngine, byte_model(), cors_origins=("https://a.example",)) as server, server.client() as client:
        assert client.options("/v1/completions", headers=ask).headers["access-control-allow-origin"] == ask["origin"]
        answer = client.get("/nowhere", headers=ask)
        assert answer.headers["access-control-allow-origin"] == ask["origin"]
        other = {**ask, "origin": "https://b.example"}
        assert "access-control-allow-origin" not in client.get("/health", headers=other).headers


def test_only_names_of_this_machine(client: httpx2.Client) -> None:
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/health", headers={"host": "localhost:1"}).status_code == 200


def test_full_queue_is_429_with_retry_after() -> None:
    async def fill(server: Running) -> list[httpx2.Response]:
        async with server.async_client() as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json={"prompt": "ab"})) for _ in range(20)]
            while len([t for t in tasks if t.done()]) < 8:
                await asyncio.sleep(0.01)
            server.call(server.engine.gate.set)
            return await asyncio.gather(*tasks)

    def make() -> ScriptedEngine:
        engine = ScriptedEngine(max_running=4, max_waiting=12)
        engine.gate = asyncio.Event()
        return engine

    with serve(make, byte_model()) as server:
        answers = asyncio.run(fill(server))
        server.wait_idle()
    refused = [a for a in answers if a.status_code == 429]
    assert len(refused) == 8
    assert all(a.headers["retry-after"] == "3" and a.json()["error"]["code"] == "queue_full" for a in refused)
    assert all(a.status_code == 200 for a in answers if a not in refused)


def test_queued_stream_gets_comments_and_then_its_answer() -> None:
    def make() -> ScriptedEngine:
        engine = ScriptedEngine()
        engine.gate = asyncio.Event()
        return engine

    with serve(make, byte_model(), sse_keep_alive_ns=20_000_000) as server, server.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if text.count(": waiting\n\n") == 3:
                    server.call(server.engine.gate.set)
        assert text.count(": waiting") >= 3
        assert sse(text)[-1]["choices"][0]["finish_reason"] == "length"


def test_request_timeout_streamed_and_not() -> None:
    limit = {"request_timeout_ns": 150_000_000}
    with serve(lambda: ScriptedEngine(pause_s=0.02), byte_model(), **limit) as server, server.client() as client:
        body = {"prompt": "ab", "max_tokens": 400}
        answer = post(client, "/v1/completions", body, 504)
        assert answer.headers["x-should-retry"] == "false"
        server.wait_idle(1)
        events = sse(client.post("/v1/completions", json={**body, "stream": True}).text)
        assert events[-1]["error"]["code"] == "timeout"
        assert events[0]["choices"][0]["text"] == "b"
        server.wait_idle(1)


def test_engine_failure_hurts_one_request_only() -> None:
    def make() -> ScriptedEngine:
        engine = ScriptedEngine(pause_s=0.002)
        engine.fail_at = {b"bad": 3}
        return engine

    async def drive(server: Running) -> None:
        async with server.async_client() as client:

            async def ask(prompt: str, **kw: Any) -> httpx2.Response:
                return await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 50, **kw})

            good, bad, bad_stream, bad_n = await asyncio.gather(
                ask("good"), ask("bad"), ask("bad", stream=True), ask("bad", n=3)
            )
            assert good.status_code == 200
            assert good.json()["usage"]["completion_tokens"] == 50
            assert (bad.status_code, bad_n.status_code) == (500, 500)
            assert "injected" in bad.json()["error"]["message"]
            events = sse(bad_stream.text)
            assert [e["choices"][0]["text"] for e in events[:-1]] == ["d", "a", "b"]
            assert events[-1]["error"]["code"] == "engine_error"

    with serve(make, byte_model()) as server:
        asyncio.run(drive(server))
        server.wait_idle()


def test_a_bug_is_a_500_without_inner_details(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedEngine):
        def generate(self, *args: Any, **kw: Any) -> Any:
            raise ZeroDivisionError("secret detail")

    with serve(Broken, byte_model()) as server, server.client() as client:
        answer = post(client, "/v1/completions", {"prompt": "a"}, 500)
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.text
        assert client.get("/health").status_code == 200
    assert "ZeroDivisionError" in caplog.text


def test_a_refused_request_does_not_count_as_aborted(client: httpx2.Client) -> None:
    def aborted() -> str:
        name = 'megalith:request_success_total{finished_reason="abort",model_name="bytes"}'
        return next(line for line in client.get("/metrics").text.splitlines() if line.startswith(name))

    before = aborted()
    body = {"model": "bytes", "prompt": list(range(1, 200)) * 4, "max_tokens": 5}
    assert client.post("/v1/completions", json=body).status_code == 400
    assert aborted() == before
