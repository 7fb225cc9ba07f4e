"""Live: one request in the simulated cluster, with what only the world knows of it and what became of it.

Policies never see a Live; they see `request`. Executors read `output_tokens` to know when it ends.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from megalith.policy.cluster import InstanceId, TransferMode
from megalith.policy.facts import Request

Outcome = Literal["", "finished", "rejected", "failed"]
"""rejected: never begun. failed: begun, lost with its instance, and taken by nobody after that."""
NEVER = -1


class Live(msgspec.Struct, eq=False, gc=False):
    """One request from its arrival to its end. Times are nanoseconds of the virtual clock, or NEVER.

    A struct, because a simulation makes a million of them.
    """

    request: Request
    output_tokens: int
    """The true length of the answer."""
    scheduled_ns: int = NEVER
    """When the first step that it was in began."""
    first_ns: int = NEVER
    finish_ns: int = NEVER
    generated: int = 0
    """Tokens, as of the last time it stopped decoding or changed place."""
    preemptions: int = 0
    migrations: int = 0
    cached_tokens: int = 0
    """Prompt tokens that a prefix cache had."""
    transfer_ns: int = 0
    """Time without decoding while its KV was on the way."""
    instance: InstanceId = NEVER
    decode_instance: InstanceId = NEVER
    """Where it decodes, when that is not where its prompt runs."""
    transfer: TransferMode = "push"
    moving: bool = False
    """A migration of it is under way."""
    outcome: Outcome = ""
    finish_clock: int = NEVER
    """In the cohort of an instance: the clock at which it has its last token."""
