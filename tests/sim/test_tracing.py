"""A run as a trace: slices follow one another, requests nest, counters and faults stand where they belong."""

from pathlib import Path

from megalith.sim.series import InstanceSample
from megalith.sim.tracing import RunTrace
from tests.report.test_trace_events import check, load
from tests.sim.test_record import draw


def test_a_run_is_a_valid_trace(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    lives = draw(50)
    lives[3].outcome, lives[3].first_ns, lives[3].finish_ns = "rejected", None, None
    with RunTrace(path, {"seed": "1"}) as trace:
        trace.instance(0, "prefill 0 (h100)")
        at_ps = 123_456_789
        for i in range(40):
            line = (20_000_000_333, 12_345, 1 + i)
            trace.steps(i % 2, at_ps, line, 8)
            at_ps += line[2] * line[0] + line[1] * (line[2] * (line[2] - 1) // 2)
            trace.prompt_step(i % 2, at_ps, 50_000_000_777, 2048, 3)
            at_ps += 50_000_000_777
        for one in lives:
            trace.finished(one)
        trace.moved(5, 0, 1, 10**6, 2 * 10**6, "migration")
        trace.sample(10**9, [InstanceSample(i, 3, 1, 0.5, 0.0, 0.0, 1.0, 250.0) for i in range(2)])
        trace.command(10**9, "Scale prefill +1", "refused", "no room")
        trace.fault(2 * 10**9, 1, "down")
    found = load(path)
    check(found)
    assert found["otherData"] == {"nature": "simulated", "seed": "1"}
    names = {e["pid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "process_name"}
    assert names == {0: "cluster (simulated)", 1: "prefill 0 (h100)", 2: "instance 1"}
    spans = [e for e in found["traceEvents"] if e["ph"] == "b" and e["cat"] == "request" and e["id"] == 4]
    assert [span["name"] for span in spans] == ["request 4", "waiting", "prompt", "decode"]
    assert any(e["ph"] == "i" and e["name"] == "request 3 rejected" for e in found["traceEvents"])
    power = [e["args"]["power"] for e in found["traceEvents"] if e["ph"] == "C" and e["name"] == "power W"]
    assert power == [250, 250, 500]
