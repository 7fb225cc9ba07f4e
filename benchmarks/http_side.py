"""The server comparison: each arm's OpenAI-compatible server on the pinned core, streaming clients on another.

The client is plain asyncio over sockets: it reads server-sent events and does little else, so that its core is never
the limit. Tokens are counted from the server's own usage figures where it gives them, else from events.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from arms import ArmSpec
from peers import driver

READY_TIMEOUT_S = 400.0
REQUEST_TIMEOUT_S = 300.0


@dataclass
class Stream:
    """What one client saw. Times are seconds since its own request went out."""

    tokens: int = 0
    events_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    error: str = ""


def server_command(arm: ArmSpec, port: int, batch: int, context: int) -> tuple[list[str], str]:
    """The command that starts an arm's server with one thread, and the model name that it answers to."""
    model = arm.install.get("models", {}).get(arm.model, "")
    if arm.server == "llama_cpp":
        tool = str(Path(arm.install["bin"]) / "llama-server")
        words = [tool, "-m", model, "-t", "1", "-tb", "1", "-c", str(batch * context), "-np", str(batch)]
        return [*words, "--host", "127.0.0.1", "--port", str(port), "--threads-http", "4"], "model"
    if arm.server == "vllm":
        words = [arm.install["python"], "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        words += ["--dtype", arm.settings["dtype"], "--max-model-len", "1024", "--max-num-seqs", "64"]
        words += ["--no-enable-prefix-caching", "--served-model-name", "model", "--disable-uvicorn-access-log"]
        return [*words, "--host", "127.0.0.1", "--port", str(port)], "model"
    words = [sys.executable, "-m", "megalith", "serve", "smollm2", "--threads", "1", "--port", str(port)]
    return words, "smollm2"


def run_http(specs: list[ArmSpec], case: dict[str, Any], core: int, repeats: int) -> list[dict[str, Any]]:
    """Start all servers, then go round them, repeat by repeat."""
    servers: list[tuple[ArmSpec, Server]] = []
    rows: list[dict[str, Any]] = []
    for arm in (a for a in specs if a.server):
        reason = arm.missing()
        server = None if reason else Server(arm, case, core)
        if server is None or not server.wait_ready():
            reason = reason or (server.failure if server else "")
            rows.append({"kind": "skipped", "arm": f"{arm.name} server", "reason": reason})
            print(f"{arm.name} server: {reason}", file=sys.stderr)
            continue
        servers.append((arm, server))
    samples: dict[str, list[dict[str, float]]] = {}
    others = {c for c in range(os.cpu_count() or 1) if c != core} or {core}
    os.sched_setaffinity(0, others)
    for repeat in range(-1, repeats):
        for arm, server in servers:
            answer = server.load({**case, "case": case["name"], "seed": repeat, "vocab": 49152}, warm_up=repeat < 0)
            print(f"{case['name']:24} {arm.name:24} {answer}", file=sys.stderr)
            if repeat >= 0:
                samples.setdefault(arm.name, []).append(answer)
    for arm, server in servers:
        server.stop()
        rows.append(_summary(case, arm, server, samples[arm.name]))
    return rows


def _summary(case: dict[str, Any], arm: ArmSpec, server: Server, samples: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": "http", "case": case["name"], "about": case["about"], "arm": arm.name, "peer": arm.peer, "threads": 1,
        "faithful": arm.faithful, "load_s": round(server.ready_s, 2), "samples": len(samples),
    }  # fmt: skip
    for name in samples[0]:
        row[name] = round(statistics.median(sample[name] for sample in samples), 4)
    rates = [sample["out_tok_s"] for sample in samples]
    return row | {"out_tok_s_spread": [round(min(rates), 1), round(max(rates), 1)]}


class Server:
    """One server process, pinned to one core."""

    def __init__(self, arm: ArmSpec, case: dict[str, Any], core: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        context = case["prompt_tokens"] + case["output_tokens"] + 16
        command, self.model = server_command(arm, self.port, case["batch"], context)
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core), "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the server)
        self._begin = time.perf_counter()
        self._process = subprocess.Popen(
            [*machine.pinned((core,)), *command], stdout=self._log, stderr=self._log, env=environment
        )
        self.ready_s, self.failure = 0.0, ""

    def wait_ready(self) -> bool:
        """Poll /health until it answers 200; `failure` says why it did not."""
        while time.perf_counter() - self._begin < READY_TIMEOUT_S:
            if self._process.poll() is not None:
                self._log.seek(0)
                tail = self._log.read()[-300:].decode(errors="replace")
                self.failure = f"ended with {self._process.returncode}: {tail}"
                return False
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        self.ready_s = time.perf_counter() - self._begin
                        return True
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.02)
        self.failure = f"not ready within {READY_TIMEOUT_S:.0f} s"
        self.stop()
        return False

    def load(self, case: dict[str, Any], warm_up: bool = False) -> dict[str, float]:
        """All clients at once; output tokens over wall time, TTFT and ITL percentiles in milliseconds."""
        prompts, made = driver.prompts(case), case["output_tokens"]
        if warm_up:
            prompts, made = prompts[:2], 4
        load, begin = machine.Load(), time.perf_counter()
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        streams = asyncio.run(self._clients(prompts, made))
        wall = time.perf_counter() - begin
        after = resource.getrusage(resource.RUSAGE_SELF)
        client_cpu_s = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        errors = [stream.error for stream in streams if stream.error]
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(streams)} streams failed: {errors[0]}")
        first = sorted(stream.events_s[0] for stream in streams)
        gaps = sorted(b - a for s in streams for a, b in zip(s.events_s, s.events_s[1:], strict=False))
        tokens = sum(stream.tokens for stream in streams)
        return {
            "out_tok_s": tokens / wall,
            "tokens": tokens,
            "ttft_ms_p50": 1e3 * first[len(first) // 2],
            "ttft_ms_max": 1e3 * first[-1],
            "itl_ms_p50": 1e3 * gaps[len(gaps) // 2] if gaps else 0.0,
            "itl_ms_p95": 1e3 * gaps[len(gaps) * 95 // 100] if gaps else 0.0,
            "events": sum(len(stream.events_s) for stream in streams),
            "client_cores": client_cpu_s / wall,
            "other_cores": load.other_cores(client_cpu_s + wall),
        }

    async def _clients(self, prompts: list[list[int]], made: int) -> list[Stream]:
        tasks = (self._client(ids, made) for ids in prompts)
        return await asyncio.wait_for(asyncio.gather(*tasks), REQUEST_TIMEOUT_S)

    async def _client(self, prompt: list[int], made: int) -> Stream:
        """One streaming completion with token ids as the prompt."""
        body = json.dumps(
            {
                "model": self.model, "prompt": prompt, "max_tokens": made, "temperature": 0, "stream": True,
                "ignore_eos": True, "stream_options": {"include_usage": True},
            }
        ).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        stream, begin = Stream(), time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            stream.error = (status + await reader.read(600)).decode(errors="replace")
            return stream
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            stream.end_s = time.perf_counter() - begin
            event = json.loads(line[6:])
            if event.get("usage"):
                stream.tokens = event["usage"]["completion_tokens"]
            if event.get("choices"):
                stream.events_s.append(stream.end_s)
        stream.tokens = stream.tokens or len(stream.events_s)
        writer.close()
        if stream.tokens != made:
            stream.error = f"{stream.tokens} tokens came, {made} were asked for"
        return stream

    def stop(self) -> None:
        """Ask it to end, then make it."""
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
