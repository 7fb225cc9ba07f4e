import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megalith.base.errors import TierError
from megalith.base.units import MIB
from megalith.tier import disk
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HugeBuffer

UNALIGNED = [(1, 0, ALIGN), (ALIGN, 3, 5), (ALIGN, 0, ALIGN + 1), (0, 1, 2)]
FAILURES = [(errno.ENOSPC, "there is no room .ENOSPC, .* free"), (errno.EIO, "the disk failed .EIO")]


@pytest.fixture(params=["direct", "page cache"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "page cache":
        monkeypatch.setattr(disk, "_DIRECT", 0)
    return tmp_path


def body_of(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


@pytest.mark.parametrize("num_bytes", [0, 1, ALIGN, 3 * ALIGN + 17, 9 * MIB])
def test_what_is_written_is_read_back(folder: Path, num_bytes: int) -> None:
    body = body_of(num_bytes)
    with HugeBuffer(num_bytes + 1) as buffer, DirectFile(folder / "a", "w") as file:
        buffer.view[:num_bytes] = body
        file.write_from(0, buffer.view[:num_bytes])
        file.sync()
        assert file.size == num_bytes
    with HugeBuffer(num_bytes + 1) as buffer, DirectFile(folder / "a") as file:
        file.read_into(0, buffer.view[:num_bytes])
        assert bytes(buffer.view[:num_bytes]) == body


@pytest.mark.parametrize(
    ("offset", "shift", "num_bytes"), [(1, 0, ALIGN), (ALIGN, 3, 5), (ALIGN, 0, ALIGN + 1), (0, 1, 2)]
)
def test_ranges_that_are_not_aligned_are_right_too(folder: Path, offset: int, shift: int, num_bytes: int) -> None:
    (folder / "a").write_bytes(body_of(4 * ALIGN))
    with HugeBuffer(4 * ALIGN) as buffer, DirectFile(folder / "a", "rw") as file:
        view = buffer.view[shift : shift + num_bytes]
        file.read_into(offset, view)
        assert bytes(view) == body_of(4 * ALIGN)[offset : offset + num_bytes]
        view[:] = bytes(num_bytes)
        file.write_from(offset, view)
    expected = bytearray(body_of(4 * ALIGN))
    expected[offset : offset + num_bytes] = bytes(num_bytes)
    assert (folder / "a").read_bytes() == expected


def test_a_file_that_ends_before_names_itself_the_place_and_both_numbers(folder: Path) -> None:
    (folder / "short").write_bytes(body_of(ALIGN + 100))
    with HugeBuffer(4 * ALIGN) as buffer, DirectFile(folder / "short") as file:
        with pytest.raises(TierError, match=rf"Reading {4 * ALIGN} bytes at 0 of .*short.*: got {ALIGN + 100}, "):
            file.read_into(0, buffer.view)
        with pytest.raises(TierError, match="got 0, "):
            file.read_into(8 * ALIGN, buffer.view)


def test_short_calls_are_looped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than it was asked for, and even stop between two aligned places."""
    body, real_read, real_write = body_of(20 * ALIGN), os.preadv, os.pwritev
    draw = random.Random(5)

    def some(view: memoryview) -> memoryview:
        return view[: draw.choice([1000, ALIGN, 2 * ALIGN + 7])]

    with HugeBuffer(len(body)) as buffer, DirectFile(folder / "a", "rw") as file:
        buffer.view[:] = body
        monkeypatch.setattr(os, "pwritev", lambda handle, views, at: real_write(handle, [views[0][:ALIGN]], at))
        file.write_from(0, buffer.view)
        buffer.view[:] = bytes(len(body))

        def short_read(handle: int, views: list[memoryview], at: int) -> int:
            with HugeBuffer(views[0].nbytes) as whole:
                count = real_read(handle, [whole.view], at)
                kept = some(whole.view[:count])
                views[0][: kept.nbytes] = kept
                return kept.nbytes

        monkeypatch.setattr(os, "preadv", short_read)
        file.read_into(0, buffer.view)
        assert bytes(buffer.view) == body


@pytest.mark.parametrize(("code", "words"), FAILURES)
def test_a_failing_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    with HugeBuffer(2 * ALIGN) as buffer, DirectFile(folder / "a", "rw") as file:
        file.write_from(0, buffer.view)

        def fail(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pwritev", fail)
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(TierError, match=rf"Writing 8192 bytes at 0 of .*, 0 done: {words}"):
            file.write_from(0, buffer.view)
        with pytest.raises(TierError, match=rf"Reading .*{words}"):
            file.read_into(0, buffer.view)


def test_a_file_at_its_limit_is_a_tier_error(tmp_path: Path) -> None:
    """A real refusal by the system, in a process of its own: no file may grow above 1 MiB."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from megalith.tier.disk import DirectFile; from megalith.tier.memory import HugeBuffer\n"
        "from megalith.base.errors import TierError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: DirectFile(Path(sys.argv[1]), 'w').write_from(0, HugeBuffer(2 << 20).view)\n"
        "except TierError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Writing 2097152 bytes at 0" in out.stdout, out.stderr
    assert "1048576 done: there is no room (EFBIG" in out.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_is_a_tier_error(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets no file system be mounted")
    try:
        full = pytest.raises(TierError, match=r"there is no room \(ENOSPC, 0 B free\)")
        with HugeBuffer(2 * MIB) as buffer, DirectFile(tmp_path / "a", "w") as file, full:
            file.write_from(0, buffer.view)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_missing_closed_and_leaked_files(folder: Path) -> None:
    with pytest.raises(TierError, match=r"Opening .*nothing: .*ENOENT"):
        DirectFile(folder / "nothing")
    before = len(os.listdir("/proc/self/fd"))
    file = DirectFile(folder / "a", "w")
    file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(TierError, match="after it was closed"):
        _ = file.size


def test_direct_reads_leave_no_pages_behind(folder: Path) -> None:
    """Neither way keeps a file in the page cache, which a memory limit would count."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.skip("the files of this file system are the page cache")
    num_bytes = 8 * MIB
    with HugeBuffer(num_bytes) as buffer, DirectFile(folder / "a", "w") as file:
        buffer.view[:] = body_of(num_bytes)
        file.write_from(0, buffer.view)
        file.sync()
    with HugeBuffer(num_bytes) as buffer, DirectFile(folder / "a") as file:
        file.read_into(0, buffer.view)
        assert _cached_bytes(folder / "a") <= num_bytes // 8


def _cached_bytes(path: Path) -> int:
    """Resident bytes of a file's pages, by mincore(2)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        first = ctypes.c_char.from_buffer(pages)
        pages_held = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(pages)), pages_held)
        del first
        assert result == 0
        return sum(held & 1 for held in pages_held) * mmap.PAGESIZE
