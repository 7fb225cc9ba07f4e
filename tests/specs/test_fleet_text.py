"""Fleets as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.specs.fleet import FleetSpec
from megalith.specs.fleet_text import parse_fleet, parse_policy, render_pool


def test_one_pool_with_short_options() -> None:
    (pool,) = parse_fleet("4xh100-sxm:tp2:pp4").pools
    assert (pool.name, pool.device, pool.count, pool.role) == ("mixed", "h100-sxm", 4, "mixed")
    assert (pool.tensor_parallel, pool.pipeline_parallel, pool.devices) == (2, 4, 32)
    assert render_pool(pool) == "4xh100-sxm tp2 pp4"


def test_pools_by_role_and_name_with_any_key() -> None:
    first, second = "prefill:a=2xh100-sxm:policy=prefill-first", "prefill:b=1xa100-80gb:kv_blocks=99:prefix_cache=false"
    text = f"{first}, {second},decode=3xh200"
    pools = parse_fleet(text).pools
    assert [(pool.name, pool.role, pool.count) for pool in pools] == [
        ("a", "prefill", 2), ("b", "prefill", 1), ("decode", "decode", 3),
    ]  # fmt: skip
    assert (pools[0].policy, pools[1].kv_blocks, pools[1].prefix_cache) == ("prefill-first", 99, False)


def test_a_fleet_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('heartbeat_s = 0.5\n[[pools]]\nname = "all"\ndevice = "h200"\ncount = 3\n')
    fleet = parse_fleet(str(path))
    assert (fleet.heartbeat_s, fleet.pools[0].device, fleet.pools[0].count) == (0.5, "h200", 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no pool"),
        ("h100", "is no pool"),
        ("0xh100-sxm", "no devices"),
        ("prefil=2xh100-sxm", "'prefill'"),
        ("2xh100-sxm:tp0", "no devices"),
        ("2xh100-sxm:tensr_parallel=2", "tensor_parallel"),
        ("2xh100-sxm:fast", "is no option"),
        ("prefill=1xa,prefill=2xb", "same name"),
        ("/nowhere/fleet.toml", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(text)
    assert says in str(caught.value)


def test_a_policy_with_options() -> None:
    policy = parse_policy("rebalance:threshold=10:balanced=true:request=shortest")
    assert (policy.name, policy.options) == ("rebalance", {"threshold": 10, "balanced": True, "request": "shortest"})
    with pytest.raises(ConfigError, match="no option"):
        parse_policy("rebalance:threshold")


POOL = {"name": "a", "device": "h100-sxm", "count": 1}


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"pools": []}, "without a pool"),
        ({"pools": [POOL, POOL]}, "same name"),
        ({"pools": [POOL | {"count": 0}]}, "A count of 0 of pool 'a'"),
        ({"pools": [POOL | {"count": 10**20}]}, "count"),
        ({"pools": [POOL | {"block_tokens": 0}]}, "block_tokens of 0"),
        ({"pools": [POOL | {"watermark": float("nan")}]}, "watermark of nan"),
        ({"pools": [POOL], "heartbeat_s": 1e-12}, "heartbeat_s"),
        ({"pools": [POOL], "faults": {"repair_s": float("nan")}}, "repair_s of nan"),
        ({"pools": [POOL], "handoff": {"hidden": 2.0}}, "hidden of 2"),
    ],
)
def test_fleets_that_cannot_be_are_refused(table: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        convert(table, FleetSpec, "a.toml")
