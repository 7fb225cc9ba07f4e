"""Set-ups by name: the router, controllers and batch policy that make a fleet work as a published system does.

Knows names of policies and their constants; must not know how they work.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from megalith.base.errors import ConfigError
from megalith.policy.batching import POLICY_NAMES
from megalith.policy.registry import CONTROLLERS, ROUTERS
from megalith.specs.fleet import FleetSpec, HandoffSpec, PolicySpec
from megalith.specs.fleet_text import parse_policy


class Setup(NamedTuple):
    """What a published system adds to a fleet."""

    summary: str
    source: str
    router: PolicySpec | None
    """None: it is put on top of another set-up, whose router and hand-off stay."""
    controllers: tuple[PolicySpec, ...] = ()
    handoff: HandoffSpec = HandoffSpec()
    batch: str | None = None
    """Batch policy of its instances; None leaves that of the pools."""
    split: bool = False
    """It needs pools of the roles prefill and decode."""
    pools: Mapping[str, object] = {}
    """Keys of every pool that it sets."""


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
    "nanoflow": Setup(
        "compute, memory and links of a device side by side, in nano-batches; on top of another set-up",
        "NanoFlow, OSDI 2025",
        None,
        pools={"overlap": "nanoflow"},
    ),
    "infinite": Setup(
        "instances lend each other KV memory; one request's KV on several of them",
        "Infinite-LLM, arXiv:2401.02669",
        PolicySpec(name="least-kv"),
        (PolicySpec(name="pooled-kv"),),
    ),
}


def with_policies(fleet: FleetSpec, names: Sequence[str]) -> FleetSpec:
    """The fleet under a set-up, a batch policy, a router, controllers, or several of these. Raises ConfigError.

    Options follow the name: those of a set-up are its router's (`splitwise:lengths=predicted`).
    """
    for name in sorted(names, key=_rank):
        first, options, _ = name.partition(":")
        if first in SETUPS:
            fleet = apply(first, fleet)
            if options and SETUPS[first].router is None:
                raise ConfigError(f"{first} has no router that {options!r} could be for.", "Write it without options.")
            if options:
                router = PolicySpec(name=fleet.router.name, options=parse_policy(name).options)
                fleet = replace(fleet, router=router)
        elif name in POLICY_NAMES:
            fleet = replace(fleet, pools=tuple(replace(pool, policy=name) for pool in fleet.pools))
        elif first in ROUTERS:
            fleet = replace(fleet, router=parse_policy(name))
        elif first in CONTROLLERS:
            fleet = replace(fleet, controllers=(*fleet.controllers, parse_policy(name)))
        else:
            known = list(dict.fromkeys([*SETUPS, *POLICY_NAMES, *ROUTERS, *CONTROLLERS]))
            near = difflib.get_close_matches(first, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"There is no policy {name!r}.", f"Did you mean {near!r}? Known: {', '.join(known)}.")
    return fleet


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
    changes = {**setup.pools, **({} if setup.batch is None else {"policy": setup.batch})}
    pools = tuple(replace(pool, **changes) for pool in fleet.pools) if changes else fleet.pools
    if setup.router is None:
        return replace(fleet, pools=pools, controllers=(*fleet.controllers, *setup.controllers))
    return replace(fleet, pools=pools, router=setup.router, controllers=setup.controllers, handoff=setup.handoff)


def _rank(name: str) -> int:
    """A set-up says all but the batch policy, so it goes first; one that is put on top follows it."""
    setup = SETUPS.get(name.partition(":")[0])
    return 2 if setup is None else 0 if setup.router is not None else 1
