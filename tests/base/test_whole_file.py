"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalith.base.whole_file import write_whole


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").write_text("kept")
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a", b"body")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "b", b"body")
