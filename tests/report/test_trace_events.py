"""The trace against the rules of the Chrome trace-event format, its bound, and a full disk."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.report.trace_events import TraceWriter, check_trace_path

FACTS = {"nature": "simulated"}


def load(path: Path) -> dict[str, Any]:
    text = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    return json.loads(text, parse_float=Decimal)


def check(trace: dict[str, Any]) -> None:
    """What the format demands of each phase."""
    assert set(trace) == {"displayTimeUnit", "traceEvents", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    opened: Counter[tuple[object, ...]] = Counter()
    flows: dict[int, list[dict[str, Any]]] = {}
    slices: dict[tuple[int, int], list[tuple[Decimal, Decimal]]] = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            assert set(event["args"]) <= {"name", "sort_index"}
            continue
        assert event["ts"] == int(event["ts"] * 1000) / Decimal(1000)
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
            case "b" | "e":
                opened[(event["cat"], event["id"], event["name"])] += 1 if event["ph"] == "b" else -1
            case "s" | "f":
                assert event["ph"] == "s" or event["bp"] == "e"
                flows.setdefault(event["id"], []).append(event)
            case "C":
                assert all(not isinstance(value, str) for value in event["args"].values())
            case "i":
                assert event["s"] in ("g", "p", "t")
            case phase:
                pytest.fail(f"phase {phase}")
    assert not any(opened.values())
    for pair in flows.values():
        assert [event["ph"] for event in pair] == ["s", "f"]
        assert pair[0]["ts"] <= pair[1]["ts"]
        assert (pair[0]["name"], pair[0]["cat"]) == (pair[1]["name"], pair[1]["cat"])
    for found in slices.values():
        ends: list[Decimal] = []
        for start, end in sorted(found, key=lambda one: (one[0], -one[1])):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1], "slices of one thread cross"
            ends.append(end)


def draw(writer: TraceWriter, steps: int = 5) -> None:
    writer.process(1, 'instance "0" \\ prefill')
    writer.thread(1, 1, "steps")
    for i in range(steps):
        writer.slice(1, 1, "decode", 1001 * i, 1001 * (i + 1), {"decodes": 3, "note": None})
        writer.span(0, ("request", i), "life", 7 * i, 10**15 + 1 + i, {"prompt": 5})
        writer.counter(1, "KV", 1001 * i, {"used": 0.25})
    writer.arrow("moved", (1, 1, 10), (1, 1, 2000))
    writer.instant(1, "fault", 77)
    writer.instant(0, "Scale", 78, {"outcome": "done"}, everywhere=True)


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_follows_the_format_and_keeps_every_nanosecond(tmp_path: Path, name: str) -> None:
    with TraceWriter(tmp_path / name, FACTS) as writer:
        draw(writer)
        assert not (tmp_path / name).exists()
    trace = load(tmp_path / name)
    check(trace)
    assert trace["otherData"] == FACTS
    events = [event for event in trace["traceEvents"] if event["ph"] != "M"]
    assert len(events) == writer.events == 5 * 4 + 2 + 2
    lives = [event for event in events if event["ph"] == "e"]
    assert [event["ts"] for event in lives] == [Decimal(10**15 + 1 + i) / 1000 for i in range(5)]
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ['instance "0" \\ prefill']
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_is_bounded_and_says_what_is_missing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.json", FACTS, most_events=101) as writer:
        draw(writer, steps=10_000)
    trace = load(tmp_path / "a.json")
    check(trace)
    assert writer.events <= 101
    assert writer.events + writer.left_out == 10_000 * 4 + 4
    note = f"Cut at {writer.events} events; {writer.left_out:,} later ones are left out."
    assert trace["otherData"]["note"] == note
    assert trace["traceEvents"][-1]["name"] == note
    assert len([event for event in trace["traceEvents"] if event["ph"] != "M"]) == writer.events + 1


def test_an_empty_trace_is_one(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.json", FACTS):
        pass
    check(load(tmp_path / "a.json"))


def test_refuses_what_goes_back_in_time(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.json", FACTS) as writer:
        with pytest.raises(ValueError, match="before it starts"):
            writer.slice(0, 0, "x", 5, 4)
        with pytest.raises(ValueError, match="before it starts"):
            writer.span(0, ("x", 1), "x", 5, 4)
        with pytest.raises(ValueError, match="back in time"):
            writer.arrow("x", (0, 0, 5), (0, 0, 4))
    check(load(tmp_path / "a.json"))


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TraceWriter(tmp_path / "a.json.gz", FACTS) as writer:
            draw(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from megalith.base.errors import MachineError
        from megalith.report.trace_events import TraceWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with TraceWriter(Path(sys.argv[1]), {}) as writer:
                for i in range(200_000):
                    writer.slice(1, 1, f"step {i * i}", 3 * i, 3 * i + 2)
        except MachineError as error:
            print(error)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / name)], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"{name} could not be written after" in run.stdout, run.stdout + run.stderr
    assert "Exception ignored" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_says_what_is_wrong_with_the_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.json or \.json\.gz"):
        check_trace_path(tmp_path / "a.perfetto")
    with pytest.raises(ConfigError, match="no folder"):
        TraceWriter(tmp_path / "nowhere" / "a.json", FACTS)
    (tmp_path / f".a.json.{os.getpid()}.partial").mkdir()
    with pytest.raises(MachineError, match="could not be written"):
        TraceWriter(tmp_path / "a.json", FACTS)
