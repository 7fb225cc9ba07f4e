"""Choice by choice the same as splitwise-sim: its recorded runs say where each request went, and when it left again.

From these times the facts that its scheduler had at each arrival are put together afresh, and our routers are asked.
"""

from __future__ import annotations

import csv
import gzip
from bisect import insort
from pathlib import Path
from typing import Any

import pytest

from megalith.policy.cluster import Role, Route
from megalith.policy.facts import Request
from megalith.policy.pools import SplitwiseOptions, SplitwisePools
from megalith.policy.router_options import RouterOptions
from megalith.policy.routing import LeastTokens

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "splitwise-sim"
CAPACITY_TOKENS = 10**6
"""Memory was never short in these runs."""


class Instance:
    """What one instance of the recorded run had to do at one moment."""

    home: Role
    accepting, headroom_blocks, block_tokens, kv_blocks, clock, pool, device = (
        True,
        0.0,
        1,
        CAPACITY_TOKENS,
        1.0,
        "",
        "",
    )

    def __init__(self, index: int, role: Role) -> None:
        self.id, self.role, self.home = index, role, role
        self.outstanding = self.pending_tokens = self.promised_tokens = 0
        self.queued = 0
        """Prompts that have come and not started."""

    def waiting(self) -> int:
        return self.queued


class View:
    def __init__(self, roles: list[Role]) -> None:
        self.instances: Any = [Instance(index, role) for index, role in enumerate(roles)]
        self.roles: dict[Role, Any] = {role: [one for one in self.instances if one.role == role] for role in set(roles)}
        self.now_ns = self.as_of_ns = 0

    def by_role(self, role: Role) -> Any:
        return self.roles.get(role, [])

    def by_id(self, instance: int) -> Any:
        return self.instances[instance]

    def power_w(self, domain: str) -> float:
        return float("nan")


def table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        pytest.skip(f"needs {path.name} of the shared data")
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def agreement(run: str, trace: str, roles: list[Role], router: Any) -> float:
    """Share of the requests for which both ends are those of the recorded run. Takes the recorded choice over."""
    arrivals = {row["request_id"]: row for row in table(DATA / "inputs" / f"{trace}.csv.gz")}
    rows = sorted(table(DATA / "outputs" / f"{run}.csv.gz"), key=lambda row: int(row["request_ids"]))
    view, same = View(roles), 0
    due: list[tuple[float, int, Any, dict[str, int]]] = []
    """Changes that are to come: time, order, instance, by how much."""
    for order, row in enumerate(rows):
        arrival = arrivals[row["request_ids"]]
        now_s = float(arrival["arrival_timestamp"])
        while due and due[0][0] <= now_s:
            _, _, instance, changes = due.pop(0)
            for name, change in changes.items():
                setattr(instance, name, getattr(instance, name) + change)
        prompt, output = int(row["prompt_sizes"]), int(row["token_sizes"])
        placed = router.route(Request(order, 0, prompt, output), view)
        assert isinstance(placed, Route)
        one, two = (view.instances[int(row[end].rpartition("_")[2])] for end in ("prompt_runner", "token_runner"))
        chosen = placed.instance if placed.decode_instance is None else placed.decode_instance
        same += (placed.instance, chosen) == (one.id, two.id)
        one.pending_tokens += prompt
        one.queued += 1
        two.outstanding += 1
        two.promised_tokens += prompt + output
        insort(due, (float(row["prompt_start"]), 3 * order, one, {"queued": -1}), key=lambda change: change[:2])
        insort(
            due, (float(row["prompt_completion"]), 3 * order + 1, one, {"pending_tokens": -prompt}), key=lambda x: x[:2]
        )
        left = {"outstanding": -1, "promised_tokens": -prompt - output}
        insort(due, (float(row["token_completion"]), 3 * order + 2, two, left), key=lambda change: change[:2])
    return same / len(rows)


@pytest.mark.parametrize("run", ["L_bl_conv70", "B_bl_conv70"])
def test_least_tokens_is_token_jsq(run: str) -> None:
    roles: list[Role] = ["mixed"] * 40
    assert agreement(run, "rr_conv_70_120s", roles, LeastTokens(RouterOptions())) > 0.999


@pytest.mark.parametrize("run", ["L_hh_conv70", "B_hh_conv70"])
def test_splitwise_is_mixed_pool(run: str) -> None:
    roles: list[Role] = ["prefill"] * 25 + ["decode"] * 15
    assert agreement(run, "rr_conv_70_120s", roles, SplitwisePools(SplitwiseOptions())) > 0.999
