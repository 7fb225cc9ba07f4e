"""Draws by the thousand: the same words as one by one, and functions as exact as the C library's on any machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.specs import draws
from megalith.specs.arrivals import ClosedLoop, GammaArrivals, OnOffArrivals
from megalith.specs.workload import TraceSource, WorkloadSpec
from megalith.specs.workload_catalog import workload
from megalith.specs.workload_rate import at_rate, mean_rate
from megalith.specs.workload_text import parse_workload

ROOT = Path(__file__).resolve().parents[2]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_words_are_those_of_the_scalar_generator(stream: int, first: int, count: int) -> None:
    assert draws.words(stream, first, count).tolist() == [splitmix64(stream, first + i) for i in range(count)]


def test_shares_lie_inside_zero_and_one() -> None:
    ends = draws.as_shares(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < ends[0] < ends[1] < 1
    assert draws.shares(3, 0, 100_000).mean() == pytest.approx(0.5, abs=0.005)


@given(st.floats(1e-300, 1e300))
def test_log(value: float) -> None:
    assert float(draws.log(np.array([value]))[0]) == pytest.approx(math.log(value), rel=1e-15, abs=1e-16)


@given(st.floats(-700, 700))
def test_exp(value: float) -> None:
    assert float(draws.exp(np.array([value]))[0]) == pytest.approx(math.exp(value), rel=1e-15)


def test_exp_far_out() -> None:
    assert draws.exp(np.array([-1e6, -746.0, 0.0])).tolist() == [0.0, 0.0, 1.0]
    assert math.isfinite(float(draws.exp(np.array([1e6]))[0]))


@given(st.floats(1e-300, 1, exclude_max=True))
def test_normal_quantile(share: float) -> None:
    exact = NormalDist().inv_cdf(share)
    assert float(draws.normal_quantile(np.array([share]))[0]) == pytest.approx(exact, rel=1e-14, abs=1e-15)


DIGEST = """
import itertools
from megalith.specs.workload import open_workload
from megalith.specs.workload_catalog import workloads
from hashlib import blake2b
state = blake2b(digest_size=8)
for name, entry in workloads().items():
    for s in itertools.islice(open_workload(entry.spec, 7), 3000):
        state.update(repr(s).encode())
print(state.hexdigest())
"""


def test_requests_do_not_depend_on_the_vector_units_of_the_machine() -> None:
    """NumPy picks loops by the machine's instruction sets; with all optional ones off the requests are the same."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not found:
        pytest.skip("NumPy found nothing to switch off here")
    results = []
    for disabled in ("", " ".join(found)):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NPY_DISABLE_CPU_FEATURES": disabled}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        results.append(done.stdout)
    assert results[0] == results[1]


def test_rates_of_drawn_workloads() -> None:
    plain = workload("azure-conv")
    assert mean_rate(plain) == 5.53
    twice = at_rate(plain, 11.06)
    assert twice.arrivals == GammaArrivals(rate_per_s=11.06, cv=1.09)
    assert mean_rate(twice) == 11.06
    bursty = workload("azure-code")
    faster = at_rate(bursty, 25.7).arrivals
    assert isinstance(faster, OnOffArrivals)
    assert isinstance(bursty.arrivals, OnOffArrivals)
    assert faster.cv == pytest.approx(bursty.arrivals.cv, rel=1e-12), "ten times as fast, as bursty as before"
    assert parse_workload("azure-code:rate=25.7").arrivals == faster


def test_rates_of_recordings(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("at_s,input_tokens,output_tokens\n" + "".join(f"{100 + i / 4},1,1\n" for i in range(9)))
    spec = WorkloadSpec(trace=TraceSource(path=str(path)), speedup=2.0)
    assert mean_rate(spec) == pytest.approx(8.0)
    slow = at_rate(spec, 1.0)
    assert (slow.speedup, mean_rate(slow)) == (pytest.approx(0.25), pytest.approx(1.0))
    with pytest.raises(ConfigError, match="1 requests at one time"):
        mean_rate(WorkloadSpec(trace=TraceSource(path=str(path)), requests=1))
    with pytest.raises(ConfigError, match="closed loop"):
        at_rate(WorkloadSpec(trace=TraceSource(path=str(path)), arrivals=ClosedLoop(clients=3)), 5.0)
    with pytest.raises(ConfigError, match="rate of 0"):
        at_rate(workload("azure-code"), 0.0)
