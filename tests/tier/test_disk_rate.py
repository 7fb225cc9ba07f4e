"""The rate of several direct readers: what it reads, and files that are too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalith.base.errors import TierError
from megalith.tier.disk import DirectFile
from megalith.tier.disk_rate import direct_rate

MIB = 1 << 20


def test_every_byte_of_the_sample_is_read_once_and_from_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10 * MIB))
    seen, read = [], DirectFile.read_into

    def noting(self: DirectFile, offset: int, view: memoryview) -> None:
        seen.append((offset, view.nbytes))
        read(self, offset, view)

    monkeypatch.setattr(DirectFile, "read_into", noting)
    rate = direct_rate(path, readers=3, read_bytes=MIB, most_bytes=6 * MIB, limit_ns=10**11)
    assert 1e6 < rate < 1e12
    assert sorted(seen) == [(at * MIB, MIB) for at in range(2, 8)]


def test_a_file_that_is_too_small_or_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(2 * MIB))
    with pytest.raises(TierError, match="too few for 3 reads"):
        direct_rate(path, readers=3, read_bytes=MIB)

    def broken(self: DirectFile, offset: int, view: memoryview) -> None:
        raise TierError("the disk failed")

    monkeypatch.setattr(DirectFile, "read_into", broken)
    with pytest.raises(TierError, match="the disk failed"):
        direct_rate(path, readers=2, read_bytes=MIB)
