import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import TierError
from megalith.tier.block import Block, checksum

SIZES = st.sampled_from([1, 7, 8, 9, 8191, 8192, 8193, 262_144, 300_001])


def body_of(num_bytes: int) -> bytearray:
    return bytearray(np.random.default_rng(num_bytes).bytes(num_bytes))


@given(SIZES, st.data())
def test_any_changed_bit_changes_the_checksum(num_bytes: int, data: st.DataObject) -> None:
    body = body_of(num_bytes)
    before = checksum(memoryview(body))
    assert before == checksum(memoryview(bytes(body))), "the bytes count, not where they are"
    body[data.draw(st.integers(0, num_bytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(memoryview(body)) != before


@given(st.integers(0, 7), st.integers(0, 7), st.sets(st.integers(0, 4095), min_size=2, max_size=4))
def test_the_same_bit_changed_in_several_words_is_noticed(byte: int, bit: int, words: set[int]) -> None:
    """A stuck line of a bus; the top bits would cancel out in a plain sum modulo 2**64."""
    body = body_of(32_768)
    before = checksum(memoryview(body))
    for word in words:
        body[8 * word + byte] ^= 1 << bit
    assert checksum(memoryview(body)) != before


@given(st.integers(0, 80), st.integers(0, 80))
def test_exchanged_pages_are_noticed(first: int, second: int) -> None:
    body = body_of(81 * 4096)
    before = checksum(memoryview(body))
    a, b = slice(first * 4096, first * 4096 + 4096), slice(second * 4096, second * 4096 + 4096)
    body[a], body[b] = body[b], body[a]
    assert (checksum(memoryview(body)) == before) == (first == second)


def test_zeros_added_or_cut_off_are_noticed() -> None:
    sums = {checksum(memoryview(bytes(num_bytes))) for num_bytes in range(1000)}
    assert len(sums) == 1000


def test_the_checksum_is_the_same_on_every_machine() -> None:
    """It is on disks: a change of it is a change of the format."""
    assert checksum(memoryview(bytes(range(256)) * 2000)) == 0x75FF22A7E23FA036
    assert checksum(memoryview(b"")) == 0x0


def test_a_corrupted_block_is_named() -> None:
    block = Block(owner="llama", name="layer.3", format="bf16", num_bytes=4, checksum=checksum(memoryview(b"abcd")))
    block.verify(memoryview(b"abcd"), "memory")
    for wrong in (b"abce", b"abcde"):
        with pytest.raises(TierError, match=r"Block llama/layer\.3 in memory is corrupted"):
            block.verify(memoryview(wrong), "memory")
