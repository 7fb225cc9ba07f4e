"""What can be set on the routers, checked when it is read.

Knows numbers and words; must not know instances.
"""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config
from megalith.policy.cluster import TransferMode


def require(condition: bool, message: str) -> None:
    """For checks of options: what is wrong becomes part of the ConfigError that names the policy."""
    if not condition:
        raise ValueError(message)


class RouterOptions(Config):
    """What every router has."""

    transfer: TransferMode = "push"
    """How the KV gets from the prefill to the decode instance."""
    retry_s: float = 0.1
    """When no instance accepts: how long to wait before asking again."""
    patience_s: float = 60.0
    """When no instance has accepted for this long since the arrival: reject."""

    def __post_init__(self) -> None:
        require(self.retry_s > 0 and self.patience_s >= 0, "retry_s must be above 0 and patience_s at least 0")


class TwoChoicesOptions(RouterOptions):
    """Which load the two are compared by."""

    by: Literal["outstanding", "tokens"] = "outstanding"


class PrefixAwareOptions(RouterOptions):
    """The exchange rate between what is not computed again and load."""

    overlap_weight: float = 1.0
    """Blocks in use that a block of prompt to compute is worth. 0 ignores the prefix; large values look at it alone."""


class PrefixThresholdOptions(RouterOptions):
    """When the prefix decides and when the load does."""

    match: float = 0.3
    """Share of the prompt that has to be cached for the prefix to decide."""
    imbalance: int = 64
    """Load decides once the most and the fewest outstanding requests differ by more than this,"""
    imbalance_ratio: float = 1.5
    """and by more than this factor."""


class ShortestQueueOptions(RouterOptions):
    """As in DistServe, KV is fetched when the decode side has room, so that the prefill side is the burst buffer."""

    transfer: TransferMode = "pull"
