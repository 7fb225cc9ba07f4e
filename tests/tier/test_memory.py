import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import TierError
from megalith.tier.memory import HUGE_PAGE_BYTES, HugeBuffer, address_of


@pytest.mark.parametrize("num_bytes", [1, 4096, 3 * HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5])
def test_a_buffer_begins_at_a_huge_page_and_is_writable(num_bytes: int) -> None:
    with HugeBuffer(num_bytes) as buffer:
        assert buffer.address % HUGE_PAGE_BYTES == 0
        assert buffer.num_bytes == len(buffer.view) == num_bytes
        assert not any(buffer.view[-8:])
        buffer.view[-1] = 7
        assert ctypes.c_uint8.from_address(buffer.address + num_bytes - 1).value == 7


def test_a_closed_buffer_says_so_and_closing_again_is_no_error() -> None:
    buffer = HugeBuffer(100)
    buffer.close()
    buffer.close()
    with pytest.raises(TierError, match="after it was closed"):
        _ = buffer.view


def test_what_still_looks_at_a_closed_buffer_sees_its_bytes() -> None:
    """A tensor made of the memory must not become a pointer to nothing."""
    buffer = HugeBuffer(HUGE_PAGE_BYTES)
    slice_, array = buffer.view[:4], np.frombuffer(buffer.view, dtype=np.uint8)
    buffer.view[:4] = b"abcd"
    buffer.close()
    assert bytes(slice_) == b"abcd" == array[:4].tobytes()


@pytest.mark.parametrize("num_bytes", [0, -1, 1 << 60])
def test_a_buffer_that_cannot_be_is_refused_with_the_number(num_bytes: int) -> None:
    with pytest.raises(TierError, match=r"1048576\.00 TiB|bytes cannot be"):
        HugeBuffer(num_bytes)


def test_address_of_read_only_and_empty_views() -> None:
    body = b"abcdef"
    assert address_of(memoryview(body)[2:]) == address_of(memoryview(body)) + 2
    assert address_of(memoryview(b"")) == 0


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Of the mapping that holds `address`, how much is in huge pages."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span is not None:
            found = int(span[1], 16) <= address < int(span[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this machine gives no huge pages")
def test_a_buffer_is_in_huge_pages_once_it_is_touched() -> None:
    """A disk reads into them 3 times as fast as into ordinary ones."""
    with HugeBuffer(8 * HUGE_PAGE_BYTES) as buffer:
        buffer.view[::4096] = b"\1" * (8 * HUGE_PAGE_BYTES // 4096)
        assert huge_bytes(buffer.address) >= HUGE_PAGE_BYTES  # all of it, where memory is not in small pieces
