"""What one instance accepts, and how far one of its requests is: what others read of a scheduler.

Knows numbers; must not know how they come about.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from megalith.base.config import Config
from megalith.policy.facts import PreemptMode

MANY: Final = 1 << 60
"""More repeats than any plan has."""


class Limits(Config, frozen=True):
    """What one instance accepts."""

    max_sequences: int
    """Requests that run at once."""
    max_waiting: int = 1024
    """Requests that may be off the device when a new one comes; preempted ones count, and are never refused."""
    preempt: PreemptMode = "recompute"
    """`swap` falls back to recompute, request by request, when host blocks are short."""


class Progress(NamedTuple):
    """How far one request is, in tokens."""

    computed: int
    """Tokens whose K and V are in the cache."""
    known: int
    """Prompt tokens and sampled ones."""
    cached: int
    """Prompt tokens that the prefix cache served when the request was first admitted."""
