"""Sweeps: resumed after a kill, whole whatever the number of workers, and one bad point spoils no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from megalith.base.errors import ConfigError
from megalith.sim.samples import Distribution
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, Store, run_point, run_points
from megalith.sim.sweep_folder import define, open_folder
from megalith.sim.sweep_rows import curves, failure_table, make_rows, sweep_table
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.slo import parse_slo
from megalith.specs.workload_text import parse_workload

ROOT = Path(__file__).resolve().parents[2]
SLO = parse_slo("ttft=600ms,tpot=60ms@p90")


def point(rate: float, seed: int = 0, requests: int = 60, **more: object) -> Point:
    pool = PoolSpec(name="all", device="llumnix", count=2, kv_blocks=200)
    load = f"poisson:rate={rate},input=lognormal:200:1.0,output=lognormal:60:0.8,requests={requests}"
    workload = msgspec.structs.replace(parse_workload(load), max_input_tokens=1000, max_new=300)
    scenario = Scenario(
        model="llama-2-7b", fleet=FleetSpec(pools=(pool,)), workload=workload, timer="llumnix-7b", slo=SLO, seed=seed
    )
    scenario = msgspec.structs.replace(scenario, **more)
    return Point(labels={"fleet": "2", "policy": "default", "rate": f"{rate:g}", "seed": f"{seed}"}, scenario=scenario)


def points(requests: int = 60) -> list[Point]:
    return [point(rate, seed, requests) for rate in (2.0, 6.0) for seed in (0, 1, 2)]


def by_key(results: list[PointResult]) -> dict[str, PointResult]:
    found = {result.key: result for result in results}
    assert len(found) == len(results)
    return found


def quit_on_six(point: Point) -> PointResult:
    """Stands for a process that the machine kills when its memory is gone."""
    if point.labels["rate"] == "6" and point.labels["seed"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return run_point(point)


def stumble(point: Point) -> PointResult:
    """Stands for a fault of ours in one point."""
    if point.labels["seed"] == "1":
        raise ZeroDivisionError("by nobody")
    return run_point(point)


def test_one_worker_and_two_find_the_same() -> None:
    alone, together = list(run_points(points(), workers=1)), list(run_points(points(), workers=2))
    assert by_key(alone) == by_key(together)
    assert len({result.digest for result in alone}) == 6
    assert all(result.requests == 60 and not result.error for result in alone)


def test_what_is_stored_does_not_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    first = list(run_points(points()[:4], store, workers=1))
    seen: list[str] = []

    def count(point: Point) -> PointResult:
        seen.append(point.key)
        return run_point(point)

    again = list(run_points(points(), Store(tmp_path / "results.jsonl"), workers=1, run=count))
    assert again[:4] == first
    assert seen == [point.key for point in points()[4:]]


@pytest.mark.parametrize("cut", [1, 40])
def test_a_last_line_cut_short_is_run_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    whole = by_key(list(run_points(points()[:3], Store(path), workers=1)))
    kept = path.read_bytes()
    path.write_bytes(kept[:-cut])
    store = Store(path)
    assert len(store.known) == 2
    assert by_key(list(run_points(points()[:3], store, workers=1))) == whole
    assert by_key([msgspec.json.decode(line, type=PointResult) for line in path.read_bytes().splitlines()]) == whole


def test_a_damaged_line_costs_only_its_own_point(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    list(run_points(points()[:3], Store(path), workers=1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"key": "\xff\n' + lines[2])
    assert set(Store(path).known) == {points()[0].key, points()[2].key}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_point_that_cannot_be_is_reported_and_the_rest_goes_on(tmp_path: Path, workers: int) -> None:
    store = Store(tmp_path / "results.jsonl")
    bad = point(3.0, timer="analytic", model="llama-2-70b")  # no such device in the catalogue
    results = list(run_points([*points()[:2], bad, *points()[2:4]], store, workers))
    failed = [result for result in results if result.error]
    assert [result.key for result in failed] == [bad.key]
    assert "llumnix" in failed[0].error
    assert len(results) == 5
    assert bad.key not in store.known, "an error is tried again"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_ours_in_one_point_says_where(workers: int) -> None:
    results = list(run_points(points()[:3], workers=workers, run=stumble))
    failed = [result for result in results if result.error]
    assert [result.labels["seed"] for result in failed] == ["1"]
    assert "ZeroDivisionError at test_sweep.py:" in failed[0].error


def test_a_process_that_dies_takes_only_its_point_with_it() -> None:
    results = list(run_points(points(), workers=2, run=quit_on_six))
    failed = [result for result in results if result.error]
    assert [(result.labels["rate"], result.labels["seed"]) for result in failed] == [("6", "1")]
    assert "SIGKILL" in failed[0].error
    assert len(results) == 6


SCRIPT = """
import sys
from pathlib import Path
from megalith.sim.sweep import Store, run_points
from tests.sim.test_sweep import points
if __name__ == "__main__":
    for result in run_points(points(400), Store(Path(sys.argv[1])), workers=2):
        print(result.key, flush=True)
"""


def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path, script = tmp_path / "results.jsonl", tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(script), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    seen = [process.stdout.readline().strip() for _ in range(2)]
    workers = _children(process.pid)
    process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(map(_lives, workers)):
        assert time.monotonic() < deadline, "its workers live on"
        time.sleep(0.05)
    store = Store(path)
    assert set(seen) <= set(store.known)
    assert len(store.known) < 6
    resumed = by_key(list(run_points(points(400), store, workers=1)))
    assert resumed == by_key(list(run_points(points(400), workers=1)))


def _lives(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # dead, and nobody has asked how


def _children(process_id: int) -> list[int]:
    tasks = Path(f"/proc/{process_id}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_folder_takes_no_other_sweep(tmp_path: Path) -> None:
    words = {"rate": "2,6", "seeds": "3"}
    definition = define(words, points())
    open_folder(tmp_path / "a", definition).add(PointResult(key="k", labels={}))
    assert set(open_folder(tmp_path / "a", definition).known) == {"k"}
    other = define({"rate": "2,8", "seeds": "3"}, points()[:3])
    with pytest.raises(ConfigError, match=r"rate was 2,6 and is 2,8\. .*--restart"):
        open_folder(tmp_path / "a", other)
    with pytest.raises(ConfigError, match="a file that it names"):
        open_folder(tmp_path / "a", define(words, points()[:3]))
    assert open_folder(tmp_path / "a", other, restart=True).known == {}


def test_a_trace_with_other_contents_is_another_sweep(tmp_path: Path) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("at_s,input_tokens,output_tokens\n0,10,5\n1,10,5\n")
    one = point(2.0, workload=parse_workload(str(trace)))
    open_folder(tmp_path / "a", define({}, [one]))
    trace.write_text("at_s,input_tokens,output_tokens\n0,10,5\n1,10,6\n")
    with pytest.raises(ConfigError, match="the trace has other contents"):
        open_folder(tmp_path / "a", define({}, [one]))


def _result(seed: int, ttft_ns: int, good: float, rate: str = "2") -> PointResult:
    same = Distribution(
        count=9, mean=1, minimum=1, p50=ttft_ns, p90=2 * ttft_ns, p95=1, p99=3 * ttft_ns, maximum=1, error=0.0
    )
    return PointResult(
        key=f"{rate}{seed}", labels={"fleet": "f", "policy": "p", "rate": rate, "seed": str(seed)},
        latencies={"ttft_ns": same}, attained=good, kept=good >= 0.9, good_per_s=10.0 * good, devices=4,
        output_tokens_per_s=100.0, price_per_hour_usd=3.6,
    )  # fmt: skip


def test_rows_are_means_over_seeds_with_their_range() -> None:
    failed = PointResult(key="x", labels={"fleet": "f", "policy": "q"}, error="no")
    rows, failures = make_rows([_result(0, 100_000_000, 1.0), _result(1, 140_000_000, 0.8), failed])
    (row,) = rows
    ttft = row.figures["ttft_p50_ns"]
    assert ttft is not None
    assert (ttft.mean, ttft.minimum, ttft.maximum, ttft.seeds) == (1.2e8, 1e8, 1.4e8, 2)
    goodput, price = row.figures["good_per_s_device"], row.figures["price_per_million_tokens_usd"]
    assert goodput is not None
    assert price is not None
    assert goodput.mean == pytest.approx(2.25)
    assert price.mean == pytest.approx(10.0)
    assert (row.seeds, row.kept, row.figures["tpot_p99_ns"]) == (2, 1, None)
    shown = sweep_table(rows).to_markdown()
    assert "120 ms ±16.7%" in shown
    assert "1 of 2 seeds" in shown
    assert "TPOT" not in shown
    assert failures[0].error == "no"
    assert "policy q" in failure_table(failures).to_markdown()


def test_curves_are_at_the_percentile_of_the_bound() -> None:
    results = [_result(0, 100_000_000, 1.0), _result(1, 140_000_000, 0.8), _result(0, 300_000_000, 0.5, "4")]
    panels, limits = curves(results, parse_slo("ttft=500ms,attain=0.9"))
    assert panels["TTFT p90, ms"] == {"f": {2.0: [200.0, 280.0], 4.0: [600.0]}}
    assert limits == {"TTFT p90, ms": 500.0}
    assert panels["goodput/s per device"]["f"][4.0] == [1.25]
    assert curves(results)[0]["TTFT p99, ms"]["f"][4.0] == [900.0]
