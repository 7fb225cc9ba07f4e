import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalith.base.errors import PoolFull, TierError
from megalith.base.units import MIB
from megalith.tier.disk import ALIGN
from megalith.tier.memory import HugeBuffer
from megalith.tier.mover import Move, Mover
from megalith.tier.pool import Pool
from megalith.tier.store import Store
from megalith.tier.throttle import TokenBucket


@pytest.fixture
def mover() -> Iterator[Mover]:
    with Mover() as mover:
        mover.add_link("disk")
        yield mover


@pytest.fixture
def store(tmp_path: Path, mover: Mover) -> Iterator[Store]:
    with Store(tmp_path / "blocks", mover, Pool("host", 8 * MIB)) as store:
        yield store


def body_of(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(num_bytes + seed).randbytes(num_bytes)


def put(store: Store, name: str, body: bytes) -> None:
    store.put("m", name, "raw", memoryview(body)).wait()


@pytest.mark.parametrize("num_bytes", [0, 5, ALIGN, 3 * MIB + 11])
def test_a_block_comes_back_and_outlives_its_store(store: Store, num_bytes: int) -> None:
    put(store, "layer/0 ü", body_of(num_bytes))
    with store.fetch("m/layer/0 ü") as fetched:
        assert bytes(fetched.wait()) == body_of(num_bytes)
    assert store.resident() == ["m/layer/0 ü"]
    store.close()
    assert store.host.used_bytes == 0
    with Store(store.folder, store.mover, store.host) as again:
        assert again.keys() == ["m/layer/0 ü"]
        assert again.disk.used_bytes == num_bytes + ALIGN == sum(p.stat().st_size for p in again.folder.glob("*.block"))
        again.verify("m/layer/0 ü")
        with again.fetch("m/layer/0 ü") as fetched:
            assert bytes(fetched.wait()) == body_of(num_bytes)


def test_a_block_there_is_shared_and_one_in_use_is_not_evicted(store: Store) -> None:
    put(store, "a", body_of(100))
    first, second = store.fetch("m/a"), store.fetch("m/a")
    assert first.wait().obj is second.wait().obj
    reads = store.mover.stats()["disk"].moves
    first.release()
    first.release()
    with pytest.raises(TierError, match="m/a is in use by 1"):
        store.evict("m/a")
    second.release()
    with store.fetch("m/a") as third:
        third.wait()
    assert store.mover.stats()["disk"].moves == reads, "no second read"
    assert store.evict("m/a")
    assert not store.evict("m/a")
    assert store.host.used_bytes == 0
    with pytest.raises(TierError, match="after it was released"):
        third.wait()


def test_the_host_cap_holds(store: Store) -> None:
    """8 MiB: four blocks of 2 MiB, whatever is asked for; room comes only from evicting."""
    for name in "abcde":
        put(store, name, body_of(2 * MIB, ord(name)))
    held = [store.fetch(f"m/{name}") for name in "abcd"]
    with pytest.raises(PoolFull, match=r"m asked for 2\.00 MiB of the host pool, which has 0 B of 8\.00 MiB free"):
        store.fetch("m/e")
    held[0].wait()
    held[0].release()
    store.evict("m/a")
    with store.fetch("m/e") as fetched:
        assert bytes(fetched.wait()) == body_of(2 * MIB, ord("e"))
    for other in held:
        other.release()
    assert store.host.peak_bytes == 8 * MIB


@pytest.mark.parametrize("place", [0, ALIGN, ALIGN + 12345, -1])
def test_a_corrupted_block_is_named_and_the_others_can_be_read(store: Store, place: int) -> None:
    put(store, "good", body_of(50_000))
    put(store, "bad", body_of(50_000, 1))
    path = store.folder / "m%2Fbad.block"
    store.close()
    body = bytearray(path.read_bytes())
    body[place] ^= 0x10
    path.write_bytes(body)
    with Store(store.folder, store.mover, store.host) as again:
        with pytest.raises(TierError, match=r"Block m/bad .*corrupted.*m%2Fbad\.block"):
            again.fetch("m/bad").wait()
        with pytest.raises(TierError, match=r"Block m/bad .*corrupted"):
            again.verify("m/bad")
        with again.fetch("m/good") as fetched:
            assert bytes(fetched.wait()) == body_of(50_000)
        put(again, "bad", body_of(50_000, 1))
        again.verify("m/bad")


def test_a_block_corrupted_while_the_store_is_open_does_not_stay_in_memory(store: Store) -> None:
    put(store, "a", body_of(9000))
    path = store.folder / "m%2Fa.block"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    fetched = store.fetch("m/a")
    with pytest.raises(TierError, match=r"m%2Fa\.block: got 8999"):
        fetched.wait()
    fetched.release()
    assert store.host.used_bytes == 0
    path.write_bytes(good)
    with store.fetch("m/a") as fetched:
        assert bytes(fetched.wait()) == body_of(9000)


def test_a_cancelled_fetch_gives_its_bytes_back(store: Store) -> None:
    """Queued: at once. Mid-move: when the move ends; somebody who wants the block meanwhile gets it all the same."""
    put(store, "a", body_of(100_000))
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert gate.wait(5)

    store.mover.submit(Move("disk", 1, hold, priority=-9))
    assert begun.wait(5)
    store.fetch("m/a").release()
    assert store.host.used_bytes == 0
    assert store.mover.waiting == 0
    gate.set()

    real, gate, begun = store._load, threading.Event(), threading.Event()

    def slow(block: object, buffer: object) -> None:
        hold()
        real(block, buffer)  # type: ignore[arg-type]

    store._load = slow  # type: ignore[method-assign]
    first = store.fetch("m/a")
    assert begun.wait(5)
    first.release()
    assert store.host.used_bytes == 2 * MIB, "the disk still writes to it"
    second = store.fetch("m/a")
    gate.set()
    assert bytes(second.wait()) == body_of(100_000)
    assert store.host.used_bytes == 2 * MIB
    second.release()
    assert store.evict("m/a")
    assert store.host.used_bytes == 0


def test_bytes_balance_when_the_mover_is_closed_under_the_store(tmp_path: Path) -> None:
    mover = Mover()
    mover.add_link("disk", TokenBucket(100_000))
    host, disk = Pool("host", 8 * MIB), Pool("disk", 10 * MIB)
    store = Store(tmp_path, mover, host, disk)
    put_ticket = store.put("m", "a", "raw", memoryview(body_of(1000)))
    put_ticket.wait()
    fetched = store.fetch("m/a")
    assert bytes(fetched.wait()) == body_of(1000)
    writes = [store.put("m", name, "raw", memoryview(body_of(1000))) for name in "bc"]
    mover.close()
    with pytest.raises(TierError, match="closed"):
        store.put("m", "c", "raw", memoryview(b"x"))
    with pytest.raises(TierError, match="closed"):
        writes[1].wait()
    fetched.release()
    store.evict("m/a")
    with pytest.raises(TierError, match="closed"):
        store.fetch("m/a")
    store.close()
    assert host.used_bytes == disk.used_bytes == 0


def test_two_writers_of_a_block_and_unknown_blocks_are_refused(store: Store) -> None:
    with pytest.raises(TierError, match="There is no block m/x"):
        store.fetch("m/x")
    put(store, "a", b"abc")
    with store.fetch("m/a") as fetched:
        view = fetched.wait()
        with pytest.raises(TierError, match="m/a is in host memory at another place"):
            store.put("m", "a", "raw", memoryview(b"xyz"))
        view[:] = b"xyz"  # Changed in place and written back: an optimizer's state.
        store.put("m", "a", "raw", view).wait()
    store.verify("m/a")
    store.evict("m/a")
    with store.fetch("m/a") as fetched:
        assert bytes(fetched.wait()) == b"xyz"
    store.delete("m/a")
    assert store.keys() == []
    assert store.disk.used_bytes == 0


def test_a_second_process_may_not_open_the_folder(store: Store) -> None:
    with pytest.raises(TierError, match="Another process has the blocks"):
        Store(store.folder, store.mover, store.host)


def test_a_full_disk_leaves_the_old_block(tmp_path: Path, mover: Mover) -> None:
    """A real one where a small file system can be mounted, which needs root."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]).returncode:
        pytest.skip("this machine lets no file system be mounted")
    try:
        with Store(tmp_path / "blocks", mover, Pool("host", 8 * MIB)) as store:
            put(store, "a", body_of(300_000))
            with pytest.raises(TierError, match=r"no room \(ENOSPC"):
                put(store, "a", body_of(900_000))
            assert not list(store.folder.glob(".*.partial"))
            with store.fetch("m/a") as fetched:
                assert bytes(fetched.wait()) == body_of(300_000)
            assert store.disk.used_bytes == 300_000 + ALIGN
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_pool_at_its_cap_refuses_before_writing(tmp_path: Path, mover: Mover) -> None:
    with Store(tmp_path, mover, Pool("host", 8 * MIB), Pool("disk", 10_000)) as store:
        with pytest.raises(PoolFull, match="disk pool"):
            store.put("m", "a", "raw", memoryview(bytes(8_000)))
        put(store, "a", bytes(5_000))
    with pytest.raises(PoolFull, match="disk pool"):
        Store(tmp_path, mover, Pool("host", 8 * MIB), Pool("disk", 100))
    with Store(tmp_path, mover, Pool("host", 8 * MIB)) as store:
        assert store.keys() == ["m/a"], "a failed opening left the folder free"


def test_a_process_killed_while_it_writes_leaves_whole_blocks_only(tmp_path: Path, mover: Mover) -> None:
    """kill -9 at several moments of endless rewriting: what is there verifies, and nothing else is there."""
    script = (
        "import sys; from pathlib import Path\n"
        "from megalith.tier.mover import Mover; from megalith.tier.pool import Pool\n"
        "from megalith.tier.store import Store\n"
        "mover = Mover(); mover.add_link('disk')\n"
        "store = Store(Path(sys.argv[1]), mover, Pool('host', 1 << 30))\n"
        "n = 0\n"
        "while True:\n"
        "    store.put('m', str(n % 3), 'raw', memoryview(bytes([n % 256]) * (3 << 20))).wait(); n += 1\n"
        "    print(n, flush=True)\n"
    )
    cleared = 0
    for pause_s in (0.0, 0.004, 0.009):
        command = [sys.executable, "-c", script, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(pause_s)
        deadline = time.monotonic() + 2
        while not list(tmp_path.glob(".*.partial")) and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        with Store(tmp_path, mover, Pool("host", 8 * MIB)) as store:
            cleared += store.cleared
            assert {path.suffix for path in tmp_path.iterdir()} <= {".block", ""}
            assert not store.damaged
            assert store.keys()
            for key in store._blocks:
                store.verify(key)
    assert cleared, "at least one was killed in the middle of a file"


@contextmanager
def only_refused() -> Iterator[None]:
    """No room just now, or in use by another thread; anything else is a failure."""
    try:
        yield
    except (PoolFull, TierError) as error:
        if "host pool" not in error.what and "in use" not in error.what:
            raise


def test_threads_that_fetch_and_evict_at_random_see_only_right_bytes(store: Store) -> None:
    names = "abcdef"
    for name in names:
        put(store, name, body_of(10_000, ord(name)))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(60):
                name = draw.choice(names)
                with only_refused():
                    with store.fetch(f"m/{name}") as fetched:
                        if draw.random() < 0.7:
                            assert bytes(fetched.wait()) == body_of(10_000, ord(name))
                    store.evict(f"m/{name}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert store.host.peak_bytes <= 8 * MIB
    deadline = time.monotonic() + 5
    while store.mover.waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    store.close()
    assert store.host.used_bytes == 0


def test_a_buffer_is_not_given_back_under_a_reader() -> None:
    with HugeBuffer(8) as buffer:
        view = buffer.view
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
