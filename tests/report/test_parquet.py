"""Parquet files: what goes in comes out, in bounded memory, and a failure leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.report.parquet import ParquetColumn, ParquetWriter, check_parquet_path, read_parquet

duckdb = pytest.importorskip("duckdb")

COLUMNS = (
    ParquetColumn("id"),
    ParquetColumn("first_ns", never=-1),
    ParquetColumn("share", "float"),
    ParquetColumn("outcome", labels=("it's fine", "rejected")),
)


def rows(count: int, start: int = 0) -> dict[str, np.ndarray]:
    index = np.arange(start, start + count)
    return {"id": index, "first_ns": np.where(index % 7 == 0, -1, index * 3), "share": index / 8, "outcome": index % 2}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "it's.parquet"
    with ParquetWriter(path, COLUMNS, {"nature": "simulated", "settings": "it's {}"}) as writer:
        for start in range(0, 250_000, 2_500):
            writer.append(rows(2_500, start))
        assert not path.exists()
    assert writer.rows == 250_000
    found = read_parquet(path)
    index = np.arange(250_000)
    assert (found["id"] == index).all()
    assert (np.ma.getmaskarray(found["first_ns"]) == (index % 7 == 0)).all()
    assert (found["first_ns"].compressed() == (index * 3)[index % 7 != 0]).all()
    assert (found["share"] == index / 8).all()
    assert found["outcome"][:2].tolist() == ["it's fine", "rejected"]
    with duckdb.connect() as connection:
        quoted = str(path).replace("'", "''")
        metadata = dict(connection.execute(f"SELECT key, value FROM parquet_kv_metadata('{quoted}')").fetchall())
        groups = connection.execute(f"SELECT max(row_group_id) FROM parquet_metadata('{quoted}')").fetchone()
    assert metadata[b"nature"] == b"simulated"
    assert metadata[b"settings"] == b"it's {}"
    assert groups[0] >= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_an_empty_file_has_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    with ParquetWriter(path, COLUMNS):
        pass
    assert {name: len(column) for name, column in read_parquet(path).items()} == dict.fromkeys(
        ("id", "first_ns", "share", "outcome"), 0
    )


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    with ParquetWriter(path, COLUMNS) as writer:
        writer.append(rows(3))

    def interrupted() -> None:
        with ParquetWriter(path, COLUMNS) as writer:
            writer.append(rows(60_000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read_parquet(path)["id"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["runs.parquet"]


def test_refuses_ragged_and_missing_columns(tmp_path: Path) -> None:
    with ParquetWriter(tmp_path / "a.parquet", COLUMNS) as writer:
        with pytest.raises(ValueError, match=r"\['share'\] are missing"):
            writer.append({name: column for name, column in rows(3).items() if name != "share"})
        with pytest.raises(ValueError, match=r"columns of \[3, 4\]"):
            writer.append({**rows(3), "id": np.arange(4)})


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.parquet"):
        check_parquet_path(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="no folder"):
        check_parquet_path(tmp_path / "nowhere" / "a.parquet")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MachineError, match=r"megalith\[analysis\]"):
        ParquetWriter(tmp_path / "a.parquet", COLUMNS)


@pytest.mark.parametrize("limit", [1_000_000, 20_000_000])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files fails the write as a full disk does: while rows are held, or while copying."""
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from megalith.base.errors import MachineError
        from megalith.report.parquet import ParquetColumn, ParquetWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path(sys.argv[1]) / "a.parquet"
        rng = np.random.default_rng(0)
        try:
            with ParquetWriter(path, [ParquetColumn("id"), ParquetColumn("x", "float")]) as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
                for _ in range(60):
                    writer.append({{"id": rng.integers(0, 2**62, 50_000), "x": rng.random(50_000)}})
        except MachineError as error:
            print(error)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "a.parquet could not be written after" in run.stdout, run.stdout + run.stderr
    assert "are free in" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_memory_of_python_does_not_grow(tmp_path: Path) -> None:
    with ParquetWriter(tmp_path / "a.parquet", COLUMNS) as writer:
        for start in range(0, 100_000, 5_000):
            writer.append(rows(5_000, start))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for start in range(0, 500_000, 5_000):
            writer.append(rows(5_000, start))
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert after - before < 2_000_000
