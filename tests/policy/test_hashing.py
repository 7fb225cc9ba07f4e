from __future__ import annotations

import statistics
import time
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.policy.hashing import BlockHasher, block_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_known_value() -> None:
    """The chain as documented, spelled out."""
    key = (3).to_bytes(8, "little")
    first = blake2b(b"".join(t.to_bytes(4, "little") for t in (5, 6)), digest_size=8, key=key).digest()
    second = blake2b(first + b"".join(t.to_bytes(4, "little") for t in (7, 8)), digest_size=8, key=key).digest()
    expected = (int.from_bytes(first, "little"), int.from_bytes(second, "little"))
    assert block_hashes([5, 6, 7, 8, 9], 2, salt=3) == expected


@given(TOKENS, st.integers(1, 7))
def test_one_hash_for_each_full_block(tokens: list[int], block_tokens: int) -> None:
    assert len(block_hashes(tokens, block_tokens)) == len(tokens) // block_tokens


@given(TOKENS, TOKENS, TOKENS)
def test_equal_hash_means_equal_prefix(common: list[int], left: list[int], right: list[int]) -> None:
    a, b = block_hashes(common + left, 3), block_hashes(common + right, 3)
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        end = 3 * (index + 1)
        assert (x == y) == ((common + left)[:end] == (common + right)[:end])


def test_a_block_hash_depends_on_what_came_before() -> None:
    assert block_hashes([1, 2, 9, 9], 2)[1] != block_hashes([1, 3, 9, 9], 2)[1]


def test_salt_separates_caches() -> None:
    assert block_hashes([1, 2], 2, salt=1) != block_hashes([1, 2], 2, salt=2)


@given(TOKENS, st.lists(st.integers(0, 5), max_size=20), st.integers(1, 5))
def test_feeding_in_pieces_gives_the_same(tokens: list[int], cuts: list[int], block_tokens: int) -> None:
    hasher, hashes, start = BlockHasher(block_tokens), [], 0
    for cut in [*cuts, len(tokens)]:
        hashes += hasher.feed(tokens[start : start + cut])
        start += cut
    assert tuple(hashes) == block_hashes(tokens, block_tokens)


@pytest.mark.parametrize("bad", [[-1], [2**32]])
def test_token_ids_out_of_range(bad: list[int]) -> None:
    with pytest.raises(OverflowError):
        block_hashes(bad, 1)


def test_block_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        block_hashes([1], 0)


def test_a_2000_token_prompt_costs_well_under_a_millisecond() -> None:
    """Measured 0.16 ms; the bound leaves room for a loaded machine."""
    tokens = list(range(2000))
    times = []
    for _ in range(15):
        start = time.thread_time()
        block_hashes(tokens, 16)
        times.append(time.thread_time() - start)
    assert statistics.median(times) < 2e-3
