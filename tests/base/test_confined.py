"""A limit from outside: imposed where the machine allows it, sampled elsewhere; always reported, always cleaned up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalith.base.confined import Confinement, LimitBy, Peak, run_confined
from megalith.base.errors import ConfigError, LimitExceeded
from megalith.base.memory_group import V2, MemoryGroup, Place, clear_stale, find_place
from megalith.base.memory_sample import MemorySampler, cached_bytes, drop_cached
from megalith.base.units import MIB

PLACE = find_place()
with_group = pytest.mark.skipif(isinstance(PLACE, str), reason=f"no memory group here: {PLACE}")
LIMIT_BYTES = 64 * MIB
SRC = str(Path(__file__).resolve().parents[2] / "src")


def groups() -> set[Path]:
    assert isinstance(PLACE, Place)
    return set(PLACE.folder.glob("megalith-*"))


def confined(script: str, *arguments: str, limit_by: LimitBy, files: tuple[Path, ...] = ()) -> tuple[int, list[Peak]]:
    peaks: list[Peak] = []
    code = run_confined(
        [sys.executable, "-S", "-c", script, *arguments], Confinement(LIMIT_BYTES, limit_by, files), peaks.append
    )
    return code, peaks


@pytest.fixture
def big_file(tmp_path: Path) -> Iterator[Path]:
    """Three times the limit, on disk, not in the page cache."""
    path = tmp_path / "big"
    with path.open("wb") as file:
        for number in range(3):
            file.write(bytes([number]) * LIMIT_BYTES)
        file.flush()
        os.fsync(file.fileno())
    drop_cached([path])
    yield path
    path.unlink()


READ = "import sys; f = open(sys.argv[1], 'rb', buffering=0); b = bytearray(1 << 20)\nwhile f.readinto(b): pass"
GRAB = "held = bytearray(200 << 20)\nfor i in range(0, len(held), 4096): held[i] = 1\nimport time; time.sleep(30)"


@with_group
def test_the_page_cache_counts_and_stays_within_the_limit(big_file: Path) -> None:
    code, peaks = confined(READ, str(big_file), limit_by="cgroup")
    assert code == 0
    assert [peak.event for peak in peaks] == ["exit"]
    assert 0.9 * LIMIT_BYTES < peaks[0].peak_bytes <= LIMIT_BYTES
    assert cached_bytes(big_file) <= LIMIT_BYTES


@with_group
def test_what_is_cached_before_is_dropped_or_said(big_file: Path) -> None:
    """Pages are charged to who touched them first: without dropping them, the group would seem to read for free."""
    big_file.read_bytes()
    assert cached_bytes(big_file) > 2 * LIMIT_BYTES
    _, peaks = confined(READ, str(big_file), limit_by="cgroup", files=(big_file,))
    assert peaks[0].peak_bytes + peaks[0].held_elsewhere_bytes > 0.9 * LIMIT_BYTES
    assert peaks[0].held_elsewhere_bytes == 0


@with_group
def test_too_much_is_ended_by_the_kernel_and_said_with_numbers() -> None:
    before = groups()
    with pytest.raises(LimitExceeded, match=r"limit of 64\.00 MiB.*kernel"):
        confined(GRAB, limit_by="cgroup")
    assert groups() == before


def test_too_much_is_ended_by_samples_elsewhere() -> None:
    with pytest.raises(LimitExceeded, match=r"sampled from outside.*limit of 64\.00 MiB"):
        confined(GRAB, limit_by="measure")


def test_samples_count_the_page_cache_and_shrink_it_first(big_file: Path) -> None:
    """A file three times the limit passes through: its clean pages are dropped, the run goes on."""
    code, peaks = confined(READ + "\nimport time; time.sleep(0.3)", str(big_file), limit_by="measure")
    assert code == 0
    assert "sampled, not imposed" in str(peaks[-1])
    sampler = MemorySampler(1 << 40, (big_file,))
    big_file.read_bytes()
    assert sampler.sample(os.getpid()) > 3 * LIMIT_BYTES


@pytest.mark.parametrize("limit_by", [pytest.param("cgroup", marks=with_group), "measure"])
def test_exit_codes_and_what_the_command_says(limit_by: LimitBy) -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); from megalith.base.confined import tell, is_confined\n"
    script += "assert is_confined(); tell(planned_bytes=5 << 20); assert is_confined(); tell(ready=True)\n"
    script += "import os, subprocess; assert 'MEGALITH_WATCHER' not in os.environ; sys.exit(7)"
    code, peaks = confined(script, SRC, limit_by=limit_by)
    assert code == 7
    assert [peak.event for peak in peaks] == ["ready", "exit"]
    assert all(peak.planned_bytes == 5 * MIB for peak in peaks)
    assert 0 < peaks[0].peak_bytes <= peaks[1].peak_bytes <= LIMIT_BYTES
    assert "planned 5.00 MiB" in str(peaks[0])


@pytest.mark.parametrize("limit_by", [pytest.param("cgroup", marks=with_group), "measure"])
def test_signals_are_passed_on(limit_by: LimitBy, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
    script += "pathlib.Path(sys.argv[1]).touch(); time.sleep(30)"

    def ask() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask)
    asking.start()
    code, _ = confined(script, str(ready), limit_by=limit_by)
    asking.join(5)
    assert code == 3
    assert signal.getsignal(signal.SIGTERM) == before


@with_group
def test_a_killed_command_leaves_no_group() -> None:
    before = groups()
    script = "import os, subprocess, signal; subprocess.Popen(['sleep', '60']); os.kill(os.getpid(), signal.SIGKILL)"
    code, _ = confined(script, limit_by="cgroup")
    assert code == 128 + signal.SIGKILL
    assert groups() == before


@with_group
def test_groups_of_dead_watchers_are_cleared_and_others_left() -> None:
    assert isinstance(PLACE, Place)
    script = "import sys; sys.path.insert(0, sys.argv[1])\n"
    script += "from megalith.base.memory_group import *; g = MemoryGroup(find_place(), 1 << 26); print(g.folder)\n"
    script += "import os; sys.stdout.flush(); os._exit(9)"
    died = subprocess.run([sys.executable, "-c", script, SRC], capture_output=True, text=True, timeout=20)
    left = Path(died.stdout.strip())
    mine = MemoryGroup(PLACE, LIMIT_BYTES)
    try:
        assert left.is_dir()
        assert clear_stale(PLACE) >= 1
        assert not left.exists()
        assert mine.folder.is_dir()
    finally:
        mine.close()
    mine.close()
    assert not mine.folder.exists()


def test_a_delegated_version_2_group_is_found_above_ours(tmp_path: Path) -> None:
    """The folders of a user's systemd session, as files; a real one is not on every machine."""
    mount, proc = tmp_path / "cgroup", tmp_path / "proc" / "self"
    own = mount / "user.slice" / "app.slice" / "shell.scope"
    own.mkdir(parents=True)
    proc.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("")
    (own.parent / "cgroup.subtree_control").write_text("memory pids\n")
    (proc / "cgroup").write_text("0::/user.slice/app.slice/shell.scope\n")
    (proc / "mountinfo").write_text(f"30 23 0:26 / {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n")
    found = find_place(proc.parent)
    assert isinstance(found, str), "an ordinary folder has no memory.max, so it is not taken for a group"
    assert str(own.parent) in found
    assert V2.limit in found


def test_without_a_memory_controller_it_says_so(tmp_path: Path) -> None:
    assert find_place(tmp_path) == "the kernel shows no memory control group"


def test_an_unknown_means_is_refused() -> None:
    with pytest.raises(ConfigError, match="magic"):
        run_confined(["true"], Confinement(1 << 30, "magic"), print)  # type: ignore[arg-type]
