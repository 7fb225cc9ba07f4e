"""ServerConfig: every limit and switch of the HTTP server in one struct, with units, and the check of the bind address.

Knows nothing of sockets or requests; it is data plus the rules that make it safe.
"""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.loopback import is_loopback
from megalith.base.units import MIB, NS_PER_S
from megalith.engine.api import EngineConfig


class ServerConfig(Config, frozen=True):
    """How the HTTP server listens, whom it lets in and where it draws its limits. Durations are integer nanoseconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free port (the ready line says which)."""
    served_names: tuple[str, ...] = ()
    """Names under which clients may ask for the model, the first one reported; empty: the model's own name."""
    api_key_file: str | None = None
    """One key a line, as `key`, `name:key` or `name:sha256:<hex>`; only hashes are kept in memory."""
    insecure: bool = False
    """Listen beyond loopback without API keys."""
    allowed_hosts: tuple[str, ...] = ()
    """Accepted `Host` names. Empty: loopback names when listening on loopback without keys, else any."""
    cors_origins: tuple[str, ...] = ()
    """Web origins that browsers may call from; empty: none; `*`: any."""
    lenient: bool = False
    """Drop unknown request fields instead of refusing them."""
    max_body_bytes: int = 2 * MIB
    max_json_depth: int = 64
    max_n: int = 16
    """Largest `n`."""
    max_choices: int = 64
    """Largest prompts * n of one request."""
    max_connections: int = 1024
    """Open connections; one more gets 503 at once."""
    header_timeout_ns: int = 10 * NS_PER_S
    """From the first byte of a connection (or of a further request) to complete headers."""
    body_timeout_ns: int = 30 * NS_PER_S
    """From complete headers to a complete body."""
    keep_alive_timeout_ns: int = 30 * NS_PER_S
    """How long an idle connection stays open between requests."""
    write_timeout_ns: int = 30 * NS_PER_S
    """How long a client may leave the write buffer full before its connection is cut."""
    request_timeout_ns: int = 600 * NS_PER_S
    """From a complete body to the last byte of the answer."""
    drain_timeout_ns: int = 30 * NS_PER_S
    """How long running requests may go on after SIGTERM or Ctrl-C."""
    stall_timeout_ns: int = 120 * NS_PER_S
    """/health turns 503 when requests run and no step has ended for this long."""
    sse_keep_alive_ns: int = 10 * NS_PER_S
    """Silence on a stream before a comment is sent, so that proxies and clients do not give up on a queued request."""
    write_buffer_bytes: int = 64 * 1024
    """Bytes that may wait for one client in this process before its stream is held back."""
    access_log: Literal["text", "json", "off"] = "text"
    limit_by: Literal["auto", "cgroup", "measure", "off"] = "auto"
    """How `engine.memory_bytes` is held, where it is given: by a control group of the kernel, or by samples taken from
    outside; auto: the first where the machine allows it; off: by the plan alone."""
    metrics_prefix: str = "megalith"
    """First part of every metric name; `vllm` makes dashboards of vLLM work unchanged where meanings are equal."""

    def __post_init__(self) -> None:
        """Check ranges. Raises ConfigError."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"Port {self.port} is outside 0 to 65535.", "Use --port 8000.")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.endswith(("_ns", "_bytes")) or name.startswith("max_"):
                low = 0 if name == "drain_timeout_ns" else 1
                if value < low:
                    raise ConfigError(f"server.{name} is {value} but must be at least {low}.")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def check_bind(self) -> None:
        """Refuse to listen beyond this machine without API keys. Raises ConfigError."""
        if self.on_loopback or self.api_key_file is not None or self.insecure:
            return
        raise ConfigError(
            f"Listening on {self.host} would let every machine that can reach this one use the model, and no API keys "
            "are set.",
            "Give --api-key-file FILE (one key a line), stay on 127.0.0.1, or say --insecure if that is what you want.",
        )

    def host_names(self) -> tuple[str, ...]:
        """The `Host` names to accept; empty means any.

        A page in a browser can make its own name resolve to 127.0.0.1 and then call an open server on it; checking
        the name stops that. With keys, or on an address that others use, the check adds nothing.
        """
        if self.allowed_hosts:
            return self.allowed_hosts
        if self.on_loopback and self.api_key_file is None:
            return ("localhost", "127.0.0.1", "[::1]", "::1", self.host)
        return ()


class ServeRecipe(Config, frozen=True):
    """What a `serve.toml` holds: an `[engine]` table and a `[server]` table."""

    engine: EngineConfig
    server: ServerConfig = ServerConfig()
