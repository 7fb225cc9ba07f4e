"""Set-ups by name: the router, controllers and batch policy that make a fleet work as a published system does.

Knows names of policies and their constants; must not know how they work.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from megalith.base.errors import ConfigError
from megalith.specs.fleet import FleetSpec, HandoffSpec, PolicySpec


class Setup(NamedTuple):
    """What a published system adds to a fleet."""

    summary: str
    source: str
    router: PolicySpec
    controllers: tuple[PolicySpec, ...] = ()
    handoff: HandoffSpec = HandoffSpec()
    batch: str | None = None
    """Batch policy of its instances; None leaves that of the pools."""
    split: bool = False
    """It needs pools of the roles prefill and decode."""


SETUPS: Mapping[str, Setup] = {
    "splitwise": Setup(
        "prompt, token and mixed pools; KV sent layer by layer",
        "Splitwise, ISCA 2024",
        PolicySpec(name="splitwise"),
        batch="splitwise",
        split=True,
    ),
    "distserve": Setup(
        "shortest prompt queue, decode side fetches KV when it has room",
        "DistServe, OSDI 2024",
        PolicySpec(name="shortest-queue"),
        split=True,
    ),
    "llumnix": Setup(
        "dispatch by freeness, live migration of running requests",
        "Llumnix, OSDI 2024",
        PolicySpec(name="freeness"),
        (PolicySpec(name="rebalance"),),
    ),
    "infinite": Setup(
        "instances lend each other KV memory; one request's KV on several of them",
        "Infinite-LLM, arXiv:2401.02669",
        PolicySpec(name="least-kv"),
        (PolicySpec(name="pooled-kv"),),
    ),
}


def apply(name: str, fleet: FleetSpec) -> FleetSpec:
    """The fleet with the router, controllers and hand-off of a set-up. Raises ConfigError."""
    if name not in SETUPS:
        near = difflib.get_close_matches(name.lower(), SETUPS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"There is no set-up {name!r}.", f"Did you mean {near!r}? Known: {', '.join(SETUPS)}.")
    setup = SETUPS[name]
    roles = {pool.role for pool in fleet.pools}
    if setup.split and not {"prefill", "decode"} <= roles:
        raise ConfigError(
            f"{name} needs instances of the roles prefill and decode; this fleet has only {', '.join(sorted(roles))}.",
            "Write the fleet like prefill=2xh100-sxm,decode=2xh100-sxm.",
        )
    pools = fleet.pools
    if setup.batch is not None:
        pools = tuple(msgspec.structs.replace(pool, policy=setup.batch) for pool in pools)
    return msgspec.structs.replace(
        fleet, pools=pools, router=setup.router, controllers=setup.controllers, handoff=setup.handoff
    )
