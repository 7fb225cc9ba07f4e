"""What all endpoints of one app share: the engine, the model, its readers and writers, and whether it is draining.

Knows how to send a JSON answer; knows nothing of any one endpoint.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.types import Send

from megalith.base.units import NS_PER_S
from megalith.engine.api import AsyncEngine, EngineStats
from megalith.serve.config import ServerConfig
from megalith.serve.errors import ApiError
from megalith.serve.keys import KeyRing
from megalith.serve.logprobs import LogprobWriter
from megalith.serve.metrics import ServerMetrics
from megalith.serve.prompts import PromptReader

if TYPE_CHECKING:
    from megalith.model.open import OpenModel


class AppState:
    """One app's shared parts. Raises ConfigError when the key file cannot be used."""

    def __init__(self, engine: AsyncEngine, model: OpenModel, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.served_names = config.served_names or (model.files.name,)
        self.vocab = model.spec.vocab
        self.created = int(time.time())
        self.draining = False
        self.keys = KeyRing.from_file(config.api_key_file) if config.api_key_file is not None else None
        self.metrics = ServerMetrics(engine, self.served_names[0], config.metrics_prefix)
        self.prompts = PromptReader(model)
        self.logprobs = LogprobWriter(model.tokenizer)
        self._still: tuple[int, int] | None = None
        """(steps, when that count was first seen) while requests run."""

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served. Raises ApiError 404."""
        if name is None or name in self.served_names:
            return
        served = ", ".join(f"`{served}`" for served in self.served_names)
        raise ApiError(
            404, f"The model `{name[:128]}` is not served here. Served: {served}.", param="model",
            code="model_not_found",
        )  # fmt: skip

    def trouble(self, stats: EngineStats) -> str | None:
        """Why this server cannot serve now, or None. A loop that stands still while requests run is trouble too."""
        if self.draining:
            return "The server is shutting down."
        if not stats.healthy:
            return stats.detail or "The engine is not healthy."
        now_ns = time.monotonic_ns()
        if not stats.running:
            self._still = None
            return None
        if self._still is None or self._still[0] != stats.steps:
            self._still = (stats.steps, now_ns)
        still_ns = now_ns - self._still[1]
        if still_ns > self.config.stall_timeout_ns:
            return f"{stats.running} requests run but no step has ended for {still_ns / NS_PER_S:.0f} s."
        return None

    async def send_json(
        self, send: Send, payload: bytes, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """One complete JSON answer."""
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(payload)).encode()),
                    *((name.encode(), value.encode("latin-1")) for name, value in headers),
                ],
            }
        )
        await send({"type": "http.response.body", "body": payload, "more_body": False})
