"""Which options of a pool do not go together: every pair that would be timed wrongly is refused, none is ignored.

Knows names of options; must not know what they do. What only one module can know, it checks itself.
"""

from __future__ import annotations

from megalith.base.errors import ConfigError
from megalith.specs.fleet import PoolSpec

_REASONS = {
    frozenset({"attention", "experts"}): "the copies of many models are not timed over the link of attention",
    frozenset({"attention", "overlap"}): "both say which operators of a step run side by side",
    frozenset({"attention", "padding"}): "padding counts the attention of devices that have none",
    frozenset({"attention", "borrowed layers"}): "one link would carry both",
    frozenset({"experts", "borrowed layers"}): "which of many models a layer belongs to is not known",
    frozenset({"experts", "lent KV"}): "models and KV would share memory that each counts as its own",
    frozenset({"attention", "lent KV"}): "KV already lies on devices of its own",
    frozenset({"overlap", "padding"}): "nano-batches are searched for rows that are not padded",
    frozenset({"overlap", "borrowed layers"}): "fetches would take links that the search gives to collectives",
}


def check_together(pool: PoolSpec, *, lends: bool = False) -> None:
    """Raise ConfigError for the first two options of a pool that do not go together."""
    used = {
        "attention": pool.attention is not None,
        "experts": pool.experts is not None,
        "overlap": pool.overlap != "none",
        "padding": pool.padding,
        "borrowed layers": bool(pool.peer_layers or pool.host_layers),
        "lent KV": lends,
    }
    there = {name for name, on in used.items() if on}
    for pair, why in _REASONS.items():
        if pair <= there:
            first, second = sorted(pair)
            raise ConfigError(f"Pool {pool.name!r} has {first} and {second}: {why}.", f"Leave out {second}.")
