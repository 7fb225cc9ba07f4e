"""Runs an app on a socket until it is told to stop: signals, drain, exit code.

Knows uvicorn and the operating system; knows nothing of what the app serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator

import uvicorn
from starlette.applications import Starlette

from megalith.base.errors import ConfigError, MachineError
from megalith.base.units import NS_PER_S
from megalith.serve.config import ServerConfig
from megalith.serve.protocol import DeadlineProtocol, protocol_class
from megalith.serve.state import AppState

logger = logging.getLogger("megalith.serve")
_BACKLOG = 2048
_PORT_HINT = "Choose another with --port, or 0 for any free one."
# After the engine has drained, answers still have to reach their clients.
_FLUSH_S = 2


def bind(config: ServerConfig) -> socket.socket:
    """The server's socket, bound but not yet listening, so that a taken port is known before a model is loaded.

    Raises ConfigError for an unsafe or unknown address, MachineError when it cannot be had.
    """
    config.check_bind()
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"The host {config.host!r} cannot be resolved: {error.strerror}.", "Use 127.0.0.1.") from None
    found = socket.socket(family, kind, proto)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        hint = _PORT_HINT if error.errno == errno.EADDRINUSE else ""
        raise MachineError(f"Port {config.port} on {config.host} cannot be used: {error.strerror}.", hint) from None
    return found


def url_of(sock: socket.socket) -> str:
    """The base URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def configure_logging(style: str) -> None:
    """Send our loggers to stderr. JSON access lines go out bare, so that each is one object."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    access = logging.StreamHandler(sys.stderr)
    access.setFormatter(logging.Formatter("%(message)s" if style == "json" else "%(asctime)s %(message)s"))
    for name, chosen, level in (
        ("megalith", handler, logging.INFO),
        ("uvicorn", handler, logging.ERROR),
        ("megalith.access", access, logging.INFO),
    ):
        found = logging.getLogger(name)
        found.handlers = [chosen]
        found.setLevel(level)
        found.propagate = False


class SweepingServer(uvicorn.Server):
    """uvicorn's server that looks at its connections' deadlines, and leaves signals to us."""

    _ticks = 0

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self._sweep()
        return await super().on_tick(counter)

    def _sweep(self) -> None:
        now_ns = time.monotonic_ns()
        for connection in list(self.server_state.connections):
            if isinstance(connection, DeadlineProtocol):
                connection.check(now_ns)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Ours are on the event loop."""
        yield


class Runner:
    """One run of one app."""

    def __init__(self, app: Starlette, config: ServerConfig, sock: socket.socket) -> None:
        self._state: AppState = app.state.megalith
        self._config = config
        self._sock = sock
        self._server = SweepingServer(
            uvicorn.Config(
                app,
                http=protocol_class(config),
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, config.keep_alive_timeout_ns // NS_PER_S),
                backlog=_BACKLOG,
            )
        )
        self._drain: asyncio.Task[None] | None = None
        self.exit_code = 0

    async def run(self, on_ready: Callable[[str], None]) -> int:
        """Serve until a signal (or `stop`) ends it. Returns the exit code: 0 when every request was finished.

        Raises MachineError when another server has begun to listen on our port since it was bound.
        """
        try:
            self._sock.listen(_BACKLOG)
        except OSError as error:
            raise MachineError(f"{url_of(self._sock)} cannot be used: {error.strerror}.", _PORT_HINT) from None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: somebody else handles signals
                loop.add_signal_handler(number, self.stop, number)
        serving = asyncio.create_task(self._server.serve([self._sock]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.005)
        if self._server.started:
            on_ready(url_of(self._sock))
        await serving
        if self._server.force_exit:  # uvicorn skips this then, and cancelling its task prints a traceback
            await self._server.lifespan.shutdown()
        if self._drain is not None:
            await self._drain
        return self.exit_code

    def stop(self, number: int = signal.SIGTERM) -> None:
        """The first call drains, the second stops at once."""
        if self._drain is None:
            self._state.draining = True
            self._drain = asyncio.get_running_loop().create_task(self._drain_then_exit())
        else:
            logger.warning("stopping at once")
            self.exit_code = 128 + number
            self._drain.cancel()
            self._server.force_exit = self._server.should_exit = True

    async def _drain_then_exit(self) -> None:
        stats = self._state.engine.stats()
        deadline_ns = self._config.drain_timeout_ns
        logger.info(
            "draining: %d running, %d waiting, at most %g s; the same signal again stops at once",
            stats.running, stats.waiting, deadline_ns / NS_PER_S,
        )  # fmt: skip
        begin_ns = time.monotonic_ns()
        try:
            await self._state.engine.drain(deadline_ns)
        except asyncio.CancelledError:
            await self._state.engine.stop()
            return
        if time.monotonic_ns() - begin_ns >= deadline_ns and stats.running + stats.waiting:
            logger.warning("the drain deadline passed; what still ran was stopped")
            self.exit_code = 1
        self._server.config.timeout_graceful_shutdown = _FLUSH_S
        self._server.should_exit = True


def run_server(app: Starlette, config: ServerConfig, sock: socket.socket, on_ready: Callable[[str], None]) -> int:
    """Serve `app` on `sock` until a signal ends it; the exit code. Blocks; call it from the main thread."""
    return asyncio.run(Runner(app, config, sock).run(on_ready))
