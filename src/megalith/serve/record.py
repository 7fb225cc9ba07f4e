"""What is remembered of one HTTP request for its access log line, and how that line is written.

Knows nothing of engines; never holds a prompt, an answer or a key.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field

import msgspec

from megalith.serve.answers import Usage

logger = logging.getLogger("megalith.access")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request, from its arrival to its last byte."""

    request_id: str
    client: str
    method: str
    path: str
    handler: str = "other"
    """The route, from a bounded set: what metrics may be labelled with."""
    arrival_ns: int = field(default_factory=time.monotonic_ns)
    status: int = 0
    """499: the client left before the answer."""
    key_name: str | None = None
    usage: Usage | None = None
    finish: str | None = None

    def fields(self) -> dict[str, object]:
        """What the log line says."""
        found: dict[str, object] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration_ms": round((time.monotonic_ns() - self.arrival_ns) / 1e6, 2),
        }
        if self.key_name is not None:
            found["key"] = self.key_name
        if self.usage is not None:
            found["prompt_tokens"] = self.usage.prompt_tokens
            found["cached_tokens"] = self.usage.prompt_tokens_details.cached_tokens
            found["completion_tokens"] = self.usage.completion_tokens
        if self.finish is not None:
            found["finish"] = self.finish
        return found

    def log(self, style: str) -> None:
        """Write the line: `text` is for people, `json` one object a line."""
        if style == "off" or not logger.isEnabledFor(logging.INFO):
            return
        fields = self.fields()
        if style == "json":
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            logger.info("%s", msgspec.json.encode({"time": stamp, **fields}).decode())
            return
        head = f'{fields.pop("client")} "{fields.pop("method")} {fields.pop("path")}" {fields.pop("status")}'
        logger.info("%s %s", head, " ".join(f"{name}={value}" for name, value in fields.items()))


def choose_request_id(offered: bytes | None) -> str:
    """The client's `x-request-id` when it is short and plain, else a new one."""
    if offered is not None and _REQUEST_ID.fullmatch(offered):
        return offered.decode("ascii")
    return secrets.token_hex(12)
