"""Live: one request in the simulated cluster, with what only the world knows of it and what became of it.

Policies never see a Live; they see `request`. Executors read `output_tokens` to know when it ends.
"""

from __future__ import annotations

from typing import Final, Literal

from megalith.policy.cluster import InstanceId, TransferMode
from megalith.policy.facts import Request

Outcome = Literal["", "finished", "rejected", "failed"]
"""rejected: never begun. failed: begun, lost with its instance, and taken by nobody after that."""
NEVER: Final = -1


class Live:
    """One request from its arrival to its end. Times are nanoseconds of the virtual clock, or NEVER."""

    __slots__ = (
        "cached_tokens", "decode_instance", "finish_clock", "finish_ns", "first_ns", "generated", "instance",
        "migrations", "moving", "outcome", "output_tokens", "preemptions", "request", "scheduled_ns", "transfer",
        "transfer_ns",
    )  # fmt: skip

    def __init__(self, request: Request, output_tokens: int) -> None:
        self.request = request
        self.output_tokens = output_tokens
        """The true length of the answer."""
        self.scheduled_ns = NEVER
        """When the first step that it was in began."""
        self.first_ns = NEVER
        self.finish_ns = NEVER
        self.generated = 0
        """Tokens, as of the last time it stopped decoding or changed place."""
        self.preemptions = 0
        self.migrations = 0
        self.cached_tokens = 0
        """Prompt tokens that a prefix cache had."""
        self.transfer_ns = 0
        """Time without decoding while its KV was on the way."""
        self.instance: InstanceId = NEVER
        self.decode_instance: InstanceId = NEVER
        """Where it decodes, when that is not where its prompt runs."""
        self.transfer: TransferMode = "push"
        self.moving = False
        """A migration of it is under way."""
        self.outcome: Outcome = ""
        self.finish_clock = NEVER
        """In the cohort of an instance: the clock at which it has its last token."""
