"""The comparison of simulators: traces in the peers' forms, who sits out and why, and the table."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,1396,109
2023-11-16 18:15:51.2224670,879,0
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT))
    import simulator_peers

    yield simulator_peers
    for name in set(sys.modules) - before:
        if str(ROOT) in str(getattr(sys.modules[name], "__file__", "")):
            sys.modules.pop(name)


def test_a_trace_in_both_forms(bench: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "small.csv.gz"
    trace.write_bytes(gzip.compress(AZURE.encode()))
    mooncake, vidur = bench.write(trace, tmp_path)
    lines = [json.loads(line) for line in mooncake.read_text().splitlines()]
    assert [line["input_length"] for line in lines] == [374, 1396, 879]
    assert [line["output_length"] for line in lines] == [44, 109, 1]
    assert [line["timestamp"] for line in lines] == pytest.approx([0, 4314.579, 4541.877], abs=0.01)
    assert [line["hash_ids"] for line in lines] == [[0], [1, 2, 3], [4, 5]]
    table = vidur.read_text().splitlines()
    assert table[0] == "arrived_at,num_prefill_tokens,num_decode_tokens"
    assert len(bench.shortened(vidur, 2).read_text().splitlines()) == 3
    assert bench.shortened(vidur, None) == vidur


def test_blocks_of_a_recorded_prefix_stay_as_they_are(bench: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "small.jsonl.gz"
    row = {"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}
    trace.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    assert list(bench.read(trace)) == [(27.482, 600, 52, [46, 47])]


def test_who_sits_out_says_why(bench: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "small.csv.gz"
    trace.write_bytes(gzip.compress(AZURE.encode()))
    peers = {"vidur": {"python": "python", "folder": str(tmp_path), "model": "m"}}
    assert "not installed" in bench.command("dynosim", bench.CASES["azure-1"], trace, peers, tmp_path)
    assert "prefix cache" in bench.command("vidur", bench.CASES["mooncake-16"], trace, peers, tmp_path)
    words, where = bench.command("vidur", bench.CASES["azure-16"], trace, peers, tmp_path)
    assert where == tmp_path
    assert words[-2:] == ["m", "1"]


def test_the_table(bench: ModuleType) -> None:
    import history
    import simulator_table

    assert simulator_table.section([], history.markdown) == ""
    head = {"kind": "simulator", "case": "azure-1", "date": "2026-11-23T14:00:00+00:00", "version": "v"}
    rows = [
        {**head, "arm": "megalith", "requests_cpu_s": 9000.0, "other_cores": 0.5},
        {**head, "arm": "dynosim", "requests_cpu_s": 4500.0, "other_cores": 0.7},
        {**head, "arm": "vidur", "reason": "it has no prefix cache"},
    ]
    text = simulator_table.section(rows, history.markdown)
    assert "| azure-1 | 9,000 | 4,500 (2.0 x) | it has no prefix cache | 0.7 | 2026-11-23 |" in text
