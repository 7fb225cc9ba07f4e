"""The report of a run: strict and stable JSON, tables that say `simulated`, figures that agree with one another."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import msgspec
import pytest
from rich.console import Console

from megalith.sim.report import FORMAT, RunFigures, machine_time, run_document, run_figures, run_tables
from megalith.sim.run import Run, SimResult, simulate
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.slo import parse_slo
from tests.sim.test_run import FLEETS, scenario


@pytest.fixture(scope="module")
def result() -> SimResult:
    return simulate(scenario(FLEETS["llumnix"], slo=parse_slo("ttft=5s,tpot=60ms,attain=0.9,e2e=30s@p99,itl=80ms@p99")))


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_the_document_is_strict_and_comes_back(result: SimResult) -> None:
    figures = run_figures(result, {"fleet": "3 A10", "policy": "llumnix"})
    text = run_document(figures)
    body = json.loads(text, parse_constant=refuse)
    assert (body["format"], body["nature"]) == (FORMAT, "simulated")
    assert body["settings"] == {"fleet": "3 A10", "policy": "llumnix"}
    assert body["scenario"]["seed"] == body["seed"] == result.scenario.seed
    assert msgspec.json.decode(text, type=RunFigures, strict=True) == figures


def test_two_runs_of_one_scenario_give_the_same_document(result: SimResult) -> None:
    again = simulate(result.scenario)
    assert run_document(run_figures(again)) == run_document(run_figures(result))
    other = simulate(msgspec.structs.replace(result.scenario, seed=5))
    assert run_document(run_figures(other)) != run_document(run_figures(result))


def test_what_the_machine_took_stands_apart(result: SimResult) -> None:
    machine = machine_time(result, 0.5)
    body = json.loads(run_document(run_figures(result), machine))
    assert body.pop("machine") == {
        "nature": "measured", "cpu_s": 0.5, "requests_per_cpu_s": result.requests / 0.5,
        "events_per_cpu_s": result.events / 0.5,
    }  # fmt: skip
    assert body == json.loads(run_document(run_figures(result)))


def test_figures_agree_with_one_another(result: SimResult) -> None:
    figures = run_figures(result)
    record, resources = figures.record, figures.resources
    assert record.finished + record.rejected + record.failed == result.requests
    assert resources.devices == 3
    ttft, e2e, slo = record.latencies["ttft_ns"], record.latencies["e2e_ns"], record.slo
    assert ttft is not None
    assert e2e is not None
    assert slo is not None
    assert ttft.count == record.finished
    span_s = (record.run.end_ns - record.run.start_ns) / 1e9
    assert record.run.mean_present == pytest.approx(e2e.mean * record.finished / 1e9 / span_s, rel=1e-6)
    assert record.run.output_tokens_per_s == pytest.approx(record.output_tokens / span_s)
    # A token comes from a step of decodes, or at the end of a prompt, which is computed again after a preemption.
    decoded = record.output_tokens - record.finished
    assert decoded - record.preemptions <= record.step_decode_tokens <= decoded
    assert resources.busy_share is not None
    assert record.busy_s == pytest.approx(resources.busy_share * 3 * result.end_ns / 1e9, rel=0.02)
    assert slo.good <= record.finished
    assert slo.binding in {verdict.bound for verdict in slo.verdicts}
    assert slo.margin == min(verdict.margin for verdict in slo.verdicts if verdict.margin is not None)


def test_tables_say_simulated_and_the_machine_measured(result: SimResult) -> None:
    tables = run_tables(run_figures(result, {"trace": "azure"}), machine_time(result, 0.5))
    assert list(tables) == ["requests", "rates", "latencies", "service_level", "resources", "machine"]
    for name, table in tables.items():
        natures = {column.nature for column in table.columns} - {"given"}
        assert natures == {"measured" if name == "machine" else "simulated"}
    out = io.StringIO()
    console = Console(file=out, width=200)
    for table in tables.values():
        console.print(table.to_rich())
    text = out.getvalue()
    for expected in ("Simulated run", "TTFT", "ITL", "steady", "binding:", result.digest, "seed 0"):
        assert expected in text, expected


def test_what_is_not_known_is_null_and_a_dash(result: SimResult) -> None:
    bare = simulate(scenario(FLEETS["mixed"], sample_s=0.0))
    bare.prefix_hit_share = math.nan
    figures = run_figures(bare)
    assert figures.prefix_hit_share is None
    assert figures.resources.busy_share is figures.resources.energy_j is figures.resources.kv_peak_share is None
    assert list(run_tables(figures)) == ["requests", "rates", "latencies", "resources"]
    body: Any = json.loads(run_document(figures), parse_constant=refuse)
    assert body["resources"]["energy_j"] is None


@pytest.mark.parametrize("policy", ["splitfuse", "prefill-first", "first-come"])
def test_gaps_add_up_to_the_time_from_first_to_last_token(policy: str) -> None:
    """With room for everybody no request pauses: all gaps of all requests are their decoding time, stalls included."""
    roomy = PoolSpec(name="all", device="llumnix", count=2, kv_blocks=4000, policy=policy)
    run = Run(scenario(FleetSpec(pools=(roomy,))))
    while run.advance():
        pass
    figures = run.result().figures
    totals, gaps = run.recorder.totals, run.recorder.gaps_ps
    assert figures.preemptions == 0
    assert gaps.count == figures.output_tokens - figures.finished
    assert gaps.total / 1000 == pytest.approx(totals.decode_span_ns, abs=2 * figures.finished)
    assert figures.paused_share < 1e-6
    itl, tpot = figures.latencies["itl_ns"], figures.latencies["tpot_ns"]
    assert itl is not None
    assert tpot is not None
    assert itl.maximum >= tpot.maximum
