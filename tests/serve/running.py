"""A real server on loopback for tests: its own thread and event loop, any free port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2

from megalith.serve.app import build_app
from megalith.serve.config import ServerConfig
from megalith.serve.run import Runner, bind


class Running:
    """A server that runs until its context ends."""

    def __init__(self, url: str, engine: Any, runner: Runner, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.engine = engine
        self.runner = runner
        self.loop = loop

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **kw: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, trust_env=False, **kw)

    def async_client(self, **kw: Any) -> httpx2.AsyncClient:
        kw.setdefault("limits", httpx2.Limits(max_connections=None, max_keepalive_connections=100))
        kw.setdefault("timeout", 60)
        return httpx2.AsyncClient(base_url=self.url, trust_env=False, **kw)

    def call(self, work: Callable[[], Any]) -> None:
        self.loop.call_soon_threadsafe(work)

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Wait until no request runs or waits and no block is held; fail when that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.engine.stats()
            if not (stats.running or stats.waiting or stats.swapped or stats.kv_blocks_used):
                return
            assert time.monotonic() < deadline, f"not idle after {seconds} s: {stats}"
            time.sleep(0.01)


@contextlib.contextmanager
def serve(make_engine: Callable[[], Any], model: Any, **config: Any) -> Iterator[Running]:
    """Serve until the block ends, then drain; fail when the server does not end."""
    settings = ServerConfig(**{"port": 0, "access_log": "off", "drain_timeout_ns": 10**9, **config})
    sock = bind(settings)
    ready: threading.Event = threading.Event()
    box: dict[str, Any] = {}

    async def main() -> None:
        engine = make_engine()
        runner = Runner(build_app(engine, model, settings), settings, sock)

        def on_ready(url: str) -> None:
            box["running"] = Running(url, engine, runner, asyncio.get_running_loop())
            ready.set()

        box["exit_code"] = await runner.run(on_ready)

    def thread_main() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            box["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=thread_main, daemon=True)
    thread.start()
    assert ready.wait(240), "the server did not start"
    if "error" in box:
        raise box["error"]
    running = box["running"]
    try:
        yield running
    finally:
        with contextlib.suppress(RuntimeError):
            running.loop.call_soon_threadsafe(running.runner.stop)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        if "error" in box:
            raise box["error"]
