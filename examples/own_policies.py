"""A router and a controller of one's own, and the table of those that ship: what docs/guides/policies.md shows.

Run a simulation with them by `own_policies:BySize` and `own_policies:MakeRoom`, with this folder in PYTHONPATH.
"""

from __future__ import annotations

from typing import Any

from megalith.base.config import Config
from megalith.policy.cluster import Command, Defer, Event, Migrate, Placement, Route, View
from megalith.policy.facts import Request
from megalith.policy.registry import describe


class BySize:
    """Short prompts to one pool, long ones to another, there to the instance with the fewest requests."""

    name = "by-size"

    class Options(Config):
        short: str
        long: str
        border_tokens: int = 1000

    def __init__(self, options: Options, seed: int) -> None:  # noqa: ARG002
        self.options = options

    def route(self, request: Request, view: View) -> Placement:
        short = request.prompt_tokens < self.options.border_tokens
        pool = self.options.short if short else self.options.long
        here = [instance for instance in view.by_role("mixed") if instance.pool == pool]
        if not here:
            return Defer(request.id, view.now_ns + 100_000_000)
        return Route(request.id, min(here, key=lambda instance: instance.outstanding).id)


class MakeRoom:
    """When a request is preempted, move the shortest beside it to the instance with the most free blocks."""

    name = "make-room"
    listens = frozenset({"preempt"})
    period_ns: int | None = None

    def __init__(self, options: Config, seed: int) -> None:
        pass

    def act(self, event: Event, view: View) -> list[Command]:
        full = view.by_id(event.data["instance"])
        others = [instance for instance in view.by_role(full.role) if instance.id != full.id]
        movable = [request for request in full.requests() if request.decoding and not request.moving]
        if not others or not movable:
            return []
        emptiest = max(others, key=lambda instance: instance.free_blocks())
        shortest = min(movable, key=lambda request: request.known_tokens)
        return [Migrate(shortest.id, full.id, emptiest.id)]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value or "none") if value in (None, ()) else str(value)


def policies(kind: str) -> str:
    """The table of all that can be named, with their defaults. What every router has is left out."""
    common = {"retry_s", "patience_s"} if kind == "router" else set()
    lines = ["| name | rule | source | options |", "|---|---|---|---|"]
    for entry in describe():
        if entry.kind in (kind, "both" if kind == "router" else kind):
            options = [f"`{key}` {_value(value)}" for key, value in entry.options.items() if key not in common]
            lines.append(f"| `{entry.name}` | {entry.summary} | {entry.source} | {', '.join(options)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(policies("router"))
    print(policies("controller"))
