from __future__ import annotations

import pytest

from megalith.base.errors import ConfigError
from megalith.policy.kv import IntegrityError, KvAccount, Opened, Short, SwappedIn, SwappedOut


def opened(kv: KvAccount, request_id: int, tokens: int, hashes: tuple[int, ...] = (), reserve: int = 0) -> Opened:
    result = kv.open(request_id, tokens, hashes, reserve)
    assert isinstance(result, Opened)
    kv.check_integrity()
    return result


def sealed(kv: KvAccount, request_id: int, tokens: int, hashes: tuple[int, ...]) -> Opened:
    """Open a table and seal its full blocks, as if they had been computed."""
    result = opened(kv, request_id, tokens, hashes)
    for block_hash in hashes[result.hit_blocks :]:
        kv.seal(result.table, block_hash)
    kv.check_integrity()
    return result


def test_open_covers_the_tokens_and_release_gives_all_back() -> None:
    kv = KvAccount(8, 4)
    assert opened(kv, 1, 9).table.held == 3
    assert (kv.used_blocks, kv.free_blocks) == (3, 5)
    kv.release(1)
    assert kv.free_blocks == 8


def test_open_refuses_with_numbers_and_changes_nothing() -> None:
    kv = KvAccount(4, 4)
    opened(kv, 1, 8)
    assert kv.open(2, 9, ()) == Short(needed=3, free=2)
    assert kv.open(2, 8, (), reserve=1) == Short(needed=3, free=2)
    kv.check_integrity()
    opened(kv, 2, 8)


def test_opening_twice_is_a_bug() -> None:
    kv = KvAccount(4, 4)
    opened(kv, 1, 1)
    with pytest.raises(ValueError, match="request 1"):
        kv.open(1, 1, ())


def test_grow_appends_one_block_until_none_is_left() -> None:
    kv = KvAccount(2, 4)
    table = opened(kv, 1, 4).table
    assert kv.grow(table)
    assert table.held == 2
    assert not kv.grow(table)
    assert table.held == 2


def test_prefix_hits_share_blocks() -> None:
    kv = KvAccount(8, 4)
    first = sealed(kv, 1, 10, (11, 12))
    second = opened(kv, 2, 12, (11, 12, 13))
    assert second.hit_blocks == 2
    assert kv.materialise(second.table)[:2] == kv.materialise(first.table)[:2]
    assert kv.materialise(second.table)[2] != kv.materialise(first.table)[2]
    assert kv.used_blocks == 4
    kv.release(1)
    kv.check_integrity()
    assert kv.used_blocks == 3


def test_a_hit_ends_at_the_first_unknown_hash() -> None:
    kv = KvAccount(8, 4)
    sealed(kv, 1, 12, (11, 12, 13))
    assert kv.match_blocks(100, (11, 99, 13)) == 1


def test_a_whole_prompt_is_never_a_hit() -> None:
    """The last token must be computed: its logits are wanted."""
    kv = KvAccount(8, 4)
    sealed(kv, 1, 8, (11, 12))
    assert kv.match_blocks(8, (11, 12)) == 1
    assert kv.match_blocks(9, (11, 12)) == 2
    again = opened(kv, 2, 8, (11, 12))
    assert again.hit_blocks == 1
    kv.seal(again.table, 12)
    kv.check_integrity()
    assert kv.match_blocks(9, (11, 12)) == 2


def test_a_duplicate_hash_keeps_the_older_block() -> None:
    kv = KvAccount(8, 4)
    older = kv.materialise(sealed(kv, 1, 4, (11,)).table)[0]
    newer = kv.open(2, 4, ())
    assert isinstance(newer, Opened)
    kv.seal(newer.table, 11)
    kv.check_integrity()
    assert kv.materialise(opened(kv, 3, 5, (11,)).table)[0] == older
    kv.release(2)
    kv.check_integrity()
    assert kv.idle_blocks == 0, "the duplicate is not cached"


def test_released_sealed_blocks_stay_cached_and_count_as_free() -> None:
    kv = KvAccount(4, 4)
    sealed(kv, 1, 9, (11, 12))
    kv.release(1)
    assert (kv.free_blocks, kv.idle_blocks) == (4, 2)
    assert opened(kv, 2, 9, (11, 12)).hit_blocks == 2


def test_an_idle_hit_is_not_free_twice() -> None:
    kv = KvAccount(3, 4)
    sealed(kv, 1, 8, (11, 12))
    kv.release(1)
    assert kv.free_blocks == 3
    assert kv.needed_blocks(16, (11, 12)) == 4
    assert kv.open(2, 16, (11, 12)) == Short(needed=4, free=3)
    opened(kv, 2, 12, (11, 12))
    assert kv.free_blocks == 0


def test_eviction_takes_the_least_recently_used_and_the_tail_first() -> None:
    kv = KvAccount(4, 4)
    sealed(kv, 1, 8, (11, 12))
    kv.release(1)
    sealed(kv, 2, 8, (21, 22))
    kv.release(2)
    opened(kv, 3, 4)
    assert kv.evictions == 1
    assert kv.match_blocks(100, (11, 12)) == 1, "12, the tail of the older prefix, went first"
    opened(kv, 4, 4)
    assert kv.match_blocks(100, (11, 12)) == 0
    assert kv.match_blocks(100, (21, 22)) == 2


def test_a_hit_renews() -> None:
    kv = KvAccount(2, 4)
    sealed(kv, 1, 4, (11,))
    kv.release(1)
    sealed(kv, 2, 4, (21,))
    kv.release(2)
    opened(kv, 3, 5, (11,))
    kv.release(3)
    assert kv.match_blocks(100, (21,)) == 0, "taking a second block evicted the older one that was not hit"
    assert kv.match_blocks(100, (11,)) == 1


def test_without_prefix_cache_nothing_is_kept() -> None:
    kv = KvAccount(4, 4, prefix_cache=False)
    sealed(kv, 1, 8, (11, 12))
    assert kv.match_blocks(100, (11, 12)) == 0
    kv.release(1)
    assert kv.idle_blocks == 0


def test_swap_out_copies_what_is_computed_and_swap_in_brings_it_back() -> None:
    kv = KvAccount(4, 4, num_host_blocks=3)
    table = opened(kv, 1, 16).table
    blocks = tuple(kv.materialise(table))
    out = kv.swap_out(1, tokens=9)
    assert isinstance(out, SwappedOut)
    assert out.device_blocks == blocks[:3]
    assert len(set(out.host_blocks)) == 3
    assert (kv.free_blocks, kv.free_host_blocks) == (4, 0)
    kv.check_integrity()
    back = kv.swap_in(1, 16, ())
    assert isinstance(back, SwappedIn)
    assert back.host_blocks == out.host_blocks
    assert back.device_blocks == tuple(kv.materialise(back.table)[:3])
    assert kv.free_host_blocks == 3
    kv.check_integrity()


def test_swap_in_needs_no_copy_for_what_the_prefix_cache_still_has() -> None:
    kv = KvAccount(4, 4, num_host_blocks=4)
    sealed(kv, 1, 10, (11, 12))
    out = kv.swap_out(1, tokens=10)
    assert isinstance(out, SwappedOut)
    back = kv.swap_in(1, 10, (11, 12))
    assert isinstance(back, SwappedIn)
    assert back.hit_blocks == 2
    assert back.host_blocks == out.host_blocks[2:]
    assert back.device_blocks == tuple(kv.materialise(back.table)[2:])
    kv.check_integrity()


def test_swapping_is_refused_with_numbers() -> None:
    kv = KvAccount(4, 4, num_host_blocks=1)
    opened(kv, 1, 8)
    assert kv.swap_out(1, tokens=8) == Short(needed=2, free=1)
    out = kv.swap_out(1, tokens=4)
    assert isinstance(out, SwappedOut)
    opened(kv, 2, 12)
    assert kv.swap_in(1, 8, ()) == Short(needed=2, free=1)
    kv.check_integrity()
    kv.release(1)
    assert kv.free_host_blocks == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"num_blocks": 0},
        {"block_tokens": 0},
        {"num_host_blocks": -1},
        {"watermark_blocks": 8},
        {"watermark_blocks": -1},
    ],
)
def test_impossible_sizes(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        KvAccount(**{"num_blocks": 8, "block_tokens": 4, **bad})


def lose_a_block(kv: KvAccount) -> None:
    kv._free.pop()


def forget_a_reference(kv: KvAccount) -> None:
    kv._references[kv.materialise(kv.table(1))[0]] = 0


def own_twice(kv: KvAccount) -> None:
    kv.materialise(kv.table(1)).append(kv._free[-1])


def free_twice(kv: KvAccount) -> None:
    kv._free[0] = kv._free[1]


def lose_a_hash(kv: KvAccount) -> None:
    kv._block_of.clear()


def hash_a_free_block(kv: KvAccount) -> None:
    kv._hash_of[kv._free[0]] = 77
    kv._block_of[77] = kv._free[0]


def lose_a_host_block(kv: KvAccount) -> None:
    kv._host_free.pop()


def be_in_two_places(kv: KvAccount) -> None:
    kv._host_tables[1] = [kv._host_free.pop()]


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_block,
        forget_a_reference,
        own_twice,
        free_twice,
        lose_a_hash,
        hash_a_free_block,
        lose_a_host_block,
        be_in_two_places,
    ],
)
def test_integrity_check_finds_damage(damage) -> None:  # type: ignore[no-untyped-def]
    kv = KvAccount(8, 4, num_host_blocks=2)
    sealed(kv, 1, 9, (11, 12))
    kv.open(2, 9, ())
    kv.materialise(kv.table(2))
    kv.release(2)  # three blocks that were used are free now
    kv.check_integrity()
    damage(kv)
    with pytest.raises(IntegrityError):
        kv.check_integrity()
