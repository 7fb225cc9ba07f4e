"""Workloads as text for the command line, from files, and the errors of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.specs.arrivals import ClosedLoop, GammaArrivals, OnOffArrivals, PoissonArrivals, SteadyArrivals
from megalith.specs.lengths import FixedLength, LognormalLength, QuantileLength, UniformLength
from megalith.specs.trace import TraceColumns
from megalith.specs.workload import WorkloadSpec, open_workload
from megalith.specs.workload_catalog import workload
from megalith.specs.workload_text import parse_workload


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("poisson:rate=5,input=10,output=5-9", PoissonArrivals(rate_per_s=5)),
        ("gamma:rate=5,cv=4,input=10,output=5-9", GammaArrivals(rate_per_s=5, cv=4)),
        ("onoff:rate=5,on=20s,off=1m,input=10,output=5-9", OnOffArrivals(rate_per_s=5, on_s=20, off_s=60)),
        ("fixed:rate=0.5,input=10,output=5-9", SteadyArrivals(rate_per_s=0.5)),
        ("closed:clients=16,think=200ms,input=10,output=5-9", ClosedLoop(clients=16, think_s=0.2)),
        ("closed:clients=16,input=10,output=5-9", ClosedLoop(clients=16)),
    ],
)
def test_synthetic_workloads(text: str, arrivals: Any) -> None:
    expected = WorkloadSpec(
        name=text, input=FixedLength(tokens=10), output=UniformLength(low=5, high=9), arrivals=arrivals
    )
    assert parse_workload(text) == expected


def test_limits_and_conversations() -> None:
    text = (
        "poisson:rate=5,input=lognormal:700:1.0,output=8,requests=1000,duration=10m,speedup=2,priority=0.1,max_new=64"
    )
    spec = parse_workload(
        text + ",max_total=2048,max_input=1000,max_output=50,continue=0.3,turn=40,pause=20s,shared=512"
    )
    assert spec.input == LognormalLength(median=700, sigma=1.0)
    assert (spec.requests, spec.duration_s, spec.speedup, spec.priority_share, spec.max_new) == (1000, 600, 2, 0.1, 64)
    assert (spec.max_total_tokens, spec.max_input_tokens, spec.max_output_tokens) == (2048, 1000, 50)
    assert spec.conversations is not None
    assert (spec.conversations.continue_share, spec.conversations.pause_s) == (0.3, 20)
    assert len({s.prefix_ids[:1] for s in open_workload(spec) if s.input_tokens > 512}) == 1
    assert parse_workload("poisson:rate=5,input=9,output=8,max_new=true").oracle


def test_built_in_workloads_and_changes_to_them() -> None:
    plain = workload("azure-conv")
    assert parse_workload("azure-conv") == plain
    assert parse_workload("Azure_Conv") == msgspec.structs.replace(plain, name="Azure_Conv")
    faster = parse_workload("azure-conv:rate=10,requests=500")
    assert faster.arrivals == GammaArrivals(rate_per_s=10, cv=1.09)
    assert (faster.requests, faster.input) == (500, plain.input)
    poisson = parse_workload("azure-conv:arrivals=poisson,rate=10,input=128")
    assert (poisson.arrivals, poisson.input) == (PoissonArrivals(rate_per_s=10), FixedLength(tokens=128))
    assert isinstance(poisson.output, QuantileLength)
    assert parse_workload("azure-conv:duration=60s").requests is None
    closed = parse_workload("mooncake-conversation:arrivals=closed,clients=4")
    assert (closed.arrivals, closed.conversations) == (ClosedLoop(clients=4), None)
    talk = parse_workload("mooncake-conversation:continue=0.9").conversations
    assert talk is not None
    assert talk.continue_share == 0.9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hour.csv").write_text("at_s,input_tokens,output_tokens\n0,10,3\n1,11,4\n")
    (tmp_path / "own.csv").write_text("when,p,g\n1000,10,3\n3000,11,4\n")
    (tmp_path / "my.toml").write_text('requests = 1\n[trace]\npath = "hour.csv"\n')
    return tmp_path


def test_traces(folder: Path) -> None:
    plain = parse_workload(f"{folder}/hour.csv")
    assert [s.at_ns for s in open_workload(plain)] == [0, 1_000_000_000]
    fast = parse_workload(f"{folder}/hour.csv:speedup=2,requests=2,end=10s")
    assert [s.at_ns for s in open_workload(fast)] == [0, 500_000_000]
    own = parse_workload(f"{folder}/own.csv:at=when,unit=ms,input=p,output=g")
    assert own.trace is not None
    assert own.trace.columns == TraceColumns(arrival="when", unit="ms", input="p", output="g")
    assert [s.at_ns for s in open_workload(own)] == [0, 2_000_000_000]
    drawn = parse_workload(
        f"{folder}/own.csv:at=none,input=p,output=g,arrivals=poisson,rate=3,resample=joint,requests=9"
    )
    assert len(list(open_workload(drawn))) == 9
    assert drawn.nature == "resampled"


def test_a_file_with_a_spec(folder: Path) -> None:
    assert len(list(open_workload(parse_workload(f"{folder}/my.toml")))) == 1
    assert len(list(open_workload(parse_workload(f"{folder}/my.toml:requests=2")))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no workload"),
        ("azure-cnv", "no built-in workload 'azure-cnv' .*Did you mean azure-conv"),
        ("{folder}/hours.csv", "no trace at .*Did you mean .*hour.csv"),
        ("{folder}/nothing/like.csv", "no trace at .*built-in"),
        ("{folder}/hour.csv:rate=5", "has its own times.* arrivals=poisson"),
        ("{folder}/hour.csv:cv=5", "cv, which do not apply"),
        ("{folder}/hour.csv:at=when", "input, output missing"),
        ("{folder}/hour.csv:resample=jiont", "resample=jiont is not known. Did you mean joint"),
        ("{folder}/other.toml", "cannot be read"),
        ("poisson:rate=5,input=10", "needs output lengths"),
        ("poisson:input=10,output=5", "need rate"),
        ("gamma:rate=5,input=10,output=5", "need cv"),
        ("poisson:rate=5,input=10,output=5,cv=3", "cv, which do not apply"),
        ("poisson:rate=5,input=10,output=5,request=3", "'request' .* Did you mean requests"),
        ("poisson:rate=5,rate=6,input=10,output=5", "twice"),
        ("poisson:rate=5,input,output=5", "'input' .* not KEY=VALUE"),
        ("poisson:rate=fast,input=1,output=5", "rate=fast is not a number"),
        ("poisson:rate=nan,input=1,output=5", "rate of nan"),
        ("poisson:rate=5,input=1,output=5,requests=1.5", "not a whole number"),
        ("poisson:rate=5,input=1,output=5,max_new=all", "context, true or a number"),
        ("poisson:rate=5,input=1,output=5,duration=long", "not a duration"),
        ("poisson:rate=5,input=1,output=lognorm:4:1", "Did you mean lognormal"),
        ("azure-conv:arrivals=posson,rate=4", "Did you mean poisson"),
        ("azure-conv:clients=4", "clients, which do not apply"),
    ],
)
def test_errors_name_what_works(text: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_workload(text.format(folder=folder))
    assert error.value.hint
    assert "\n" not in str(error.value)


@given(st.text(max_size=40))
def test_any_text_is_a_workload_or_a_config_error(text: str) -> None:
    try:
        spec = parse_workload(text)
    except ConfigError:
        return
    assert isinstance(spec, WorkloadSpec)


@given(
    st.sampled_from(["poisson", "azure-conv", "gamma"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["rate", "cv", "input", "output", "requests", "speedup", "priority", "turn", "continue", "end"]
            ),
            st.text(alphabet="0123456789.:-einfalognrm", min_size=1, max_size=12),
        ),
        max_size=4,
    ),
)
def test_any_options_are_a_workload_or_a_config_error(source: str, options: list[tuple[str, str]]) -> None:
    try:
        spec = parse_workload(f"{source}:" + ",".join(f"{key}={value}" for key, value in options))
    except ConfigError:
        return
    if spec.requests is None or spec.requests > 50:
        spec = msgspec.structs.replace(spec, requests=50)
    assert len(list(open_workload(spec))) <= 50
