"""Cluster policies by name: what a FleetSpec says becomes an object, with strict options.

Knows every router and controller that ships. A name or option that does not exist is a ConfigError with the nearest
one that does. Anybody's own policy needs no entry here: `module:Class` is imported from where Python finds modules. Its
class is called with (options, seed); `options` is the class's own `Options`, a Config, or an empty one.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError
from megalith.policy import (
    autoscale,
    by_priority,
    capping,
    expert_routing,
    freeness,
    pooled_kv,
    pools,
    posterior,
    router_options,
    routing,
)
from megalith.policy.cluster import Controller, Router
from megalith.specs.fleet import PolicySpec

PolicyT = TypeVar("PolicyT", covariant=True)


class _Make(Protocol[PolicyT]):
    """What a policy class is called with."""

    def __call__(self, options: Any, seed: int = 0) -> PolicyT: ...


class Entry(NamedTuple, Generic[PolicyT]):
    """One policy that can be named."""

    make: _Make[PolicyT]
    options: type[Config]
    summary: str
    """One line for people who choose."""
    source: str
    """Where the rule comes from."""


class Description(NamedTuple):
    """One policy as `--help` and the guide show it."""

    name: str
    kind: str
    """`router`, `controller` or `both`."""
    summary: str
    source: str
    options: Mapping[str, Any]
    """Names of the options and their defaults."""


ROUTERS: dict[str, Entry[Router]] = {
    "round-robin": Entry(routing.RoundRobin, router_options.RouterOptions, "one after the other", "-"),
    "random": Entry(routing.RandomChoice, router_options.RouterOptions, "any, with equal chances", "-"),
    "least-outstanding": Entry(
        routing.LeastOutstanding, router_options.RouterOptions, "fewest unfinished requests", "jsq of splitwise-sim"
    ),
    "least-tokens": Entry(
        routing.LeastTokens,
        router_options.RouterOptions,
        "fewest waiting prompt tokens plus unfinished requests",
        "token_jsq of splitwise-sim",
    ),
    "power-of-two": Entry(
        routing.TwoChoices, router_options.TwoChoicesOptions, "the less loaded of two drawn ones", "Mitzenmacher 2001"
    ),
    "least-kv": Entry(
        routing.LeastKv, router_options.RouterOptions, "most free blocks after those that wait have come in", "-"
    ),
    "prefix-aware": Entry(
        routing.PrefixAware,
        router_options.PrefixAwareOptions,
        "least of weight * prompt blocks to compute + blocks in use",
        "KV router of NVIDIA Dynamo",
    ),
    "prefix-threshold": Entry(
        routing.PrefixThreshold,
        router_options.PrefixThresholdOptions,
        "longest cached prefix while loads are even, else fewest requests",
        "cache_aware of SGLang",
    ),
    "shortest-queue": Entry(
        routing.ShortestQueue,
        router_options.ShortestQueueOptions,
        "shortest prompt queue, decode where most memory is unpromised, KV fetched",
        "DistServe, OSDI 2024",
    ),
    "freeness": Entry(
        freeness.FreenessRouter,
        freeness.FreenessOptions,
        "most free blocks for each request, with headroom for priorities",
        "Llumnix, OSDI 2024",
    ),
    "expert-affinity": Entry(
        expert_routing.ExpertAffinity,
        expert_routing.ExpertAffinityOptions,
        "one home for each model while loads are even, else fewest requests",
        "rendezvous hashing (Thaler and Ravishankar 1998)",
    ),
    "splitwise": Entry(
        pools.SplitwisePools,
        pools.SplitwiseOptions,
        "prompt, token and mixed pool; borrowed instances return when idle",
        "Splitwise, ISCA 2024; mixed_pool of splitwise-sim",
    ),
    "by-priority": Entry(
        by_priority.ByPriority,
        by_priority.ByPriorityOptions,
        "low and high priority on pools of their own, there any with equal chances",
        "POLCA, ASPLOS 2024",
    ),
}

_PARTS = {"router": ("name", "route"), "controller": ("name", "listens", "period_ns", "act")}

CONTROLLERS: dict[str, Entry[Controller]] = {
    "rebalance": Entry(
        freeness.Rebalance,
        freeness.RebalanceOptions,
        "move running requests from instances short of room to those with most",
        "Llumnix, OSDI 2024",
    ),
    "pooled-kv": Entry(
        pooled_kv.PooledKv,
        pooled_kv.PooledKvOptions,
        "let others hold KV of the longest requests, where that lets more run",
        "Infinite-LLM, arXiv:2401.02669",
    ),
    "freeness-scaling": Entry(
        autoscale.FreenessScaling,
        autoscale.FreenessScalingOptions,
        "start below a mean freeness, drain and stop above another",
        "Llumnix, OSDI 2024",
    ),
    "threshold-scaling": Entry(
        autoscale.ThresholdScaling,
        autoscale.ThresholdScalingOptions,
        "start above and stop below a utilisation or queue, with cool-downs",
        "-",
    ),
    "target-scaling": Entry(
        posterior.TargetScaling,
        posterior.TargetScalingOptions,
        "as many as bring a figure to its target, fewer after a while",
        "HorizontalPodAutoscaler of Kubernetes",
    ),
    "posterior-scaling": Entry(
        posterior.PosteriorScaling,
        posterior.PosteriorScalingOptions,
        "fewest that a posterior of the load allows, as far ahead as a start takes",
        "HARMONY",
    ),
    "polca": Entry(
        capping.Polca,
        capping.PolcaOptions,
        "two power thresholds, low priority slowed first",
        "POLCA, ASPLOS 2024",
    ),
    "single-threshold": Entry(
        capping.SingleThreshold,
        capping.SingleThresholdOptions,
        "one power threshold that slows everybody",
        "baseline of POLCA",
    ),
    "no-cap": Entry(
        capping.NoCap,
        capping.ScopeOptions,
        "nothing but the power brake",
        "baseline of POLCA",
    ),
}


def router(spec: PolicySpec, seed: int) -> Router:
    """The router of that name, fresh. Raises ConfigError for an unknown name or option."""
    return _make(spec, seed, "router", ROUTERS, CONTROLLERS)


def controller(spec: PolicySpec, seed: int) -> Controller:
    """The controller of that name, fresh. Raises ConfigError for an unknown name or option."""
    return _make(spec, seed, "controller", CONTROLLERS, ROUTERS)


def describe() -> list[Description]:
    """All of them, routers first, in the order of the tables above."""
    routers = [
        _description(name, "both" if hasattr(entry.make, "act") else "router", entry) for name, entry in ROUTERS.items()
    ]
    return routers + [_description(name, "controller", entry) for name, entry in CONTROLLERS.items()]


def _make(
    spec: PolicySpec, seed: int, kind: str, known: Mapping[str, Entry[PolicyT]], others: Mapping[str, Entry[Any]]
) -> PolicyT:
    entry = _own(spec.name, kind) if ":" in spec.name else known.get(spec.name)
    if entry is None:
        if spec.name in others:
            other = "controller" if kind == "router" else "router"
            both = other == "router" and hasattr(others[spec.name].make, "act")
            raise ConfigError(
                f"{spec.name} is a {other}, not a {kind}.{' It acts as a controller by itself.' if both else ''}",
                f"The {kind}s are: {', '.join(known)}.",
            )
        near = difflib.get_close_matches(spec.name, list(known), n=1, cutoff=0.0)
        raise ConfigError(
            f"There is no {kind} `{spec.name}`.",
            f"Did you mean `{near[0]}`? The {kind}s are: {', '.join(known)}." if near else "",
        )
    options = convert(spec.options, entry.options, f"Options of the {kind} {spec.name}")
    policy = entry.make(options, seed)
    missing = [attribute for attribute in _PARTS[kind] if not hasattr(policy, attribute)]
    if missing:
        raise ConfigError(
            f"{spec.name} is no {kind}: it has no {', '.join(missing)}.",
            "See docs/guides/policies.md for what a policy has.",
        )
    return policy


def _own(name: str, kind: str) -> Entry[Any]:
    """A policy of somebody's own, by module and class."""
    module_name, _, class_name = name.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(
            f"The {kind} {name} cannot be imported: {error}.",
            "Name it module:Class, with the folder of the module in PYTHONPATH.",
        ) from None
    except AttributeError:
        raise ConfigError(f"The module {module_name} has no {class_name}.", "Name a class of it.") from None
    return Entry(made, getattr(made, "Options", Config), "", name)


def _description(name: str, kind: str, entry: Entry[Any]) -> Description:
    defaults = entry.options()
    options = {key: getattr(defaults, key) for key in entry.options.__struct_fields__}
    return Description(name, kind, entry.summary, entry.source, options)
