"""The bipolar-int study: its line is a line, its arms are what they say; timings are the study's own to judge."""

from __future__ import annotations

import pytest

from megalith.engine.native import build
from megalith.studies import bipolar_int, bipolar_int_cases
from megalith.studies.bipolar_int import FITTED, PAIRS, STUDY, line, planes
from megalith.studies.study import Case

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


def test_the_line_is_found_and_pairs_are_read() -> None:
    assert [planes(at) for at in (1.1, 2.4, 4.8, 8.8)] == [1, 8, 32, 64]
    a, b = line({at: 0.2 + 0.11 * planes(at) for at in FITTED})
    assert (a, b) == pytest.approx((0.2, 0.11))
    assert set(FITTED) < set(PAIRS)


def test_arms_are_what_they_say() -> None:
    assert bipolar_int_cases.kind_of("planes", 3.8) == ("BIPOLAR3", 8)
    assert bipolar_int_cases.kind_of("planes", 2.4) == ("BIPOLAR2", 4)
    assert bipolar_int_cases.kind_of("all-planes", 2.4) == ("BIPOLAR8", 8)


def test_more_planes_take_longer_and_fewer_less_than_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 pairs of planes against one: a factor of about ten, asserted as two so that a busy machine may measure it."""
    monkeypatch.setattr(bipolar_int_cases, "TURN_NS", 2_000_000)
    on, off = (
        bipolar_int_cases.product(bipolar_int._product(Case(arm, 1.1, 0, True)).options)
        for arm in ("planes", "all-planes")
    )
    assert on["over_q8_0"] is not None
    assert off["over_q8_0"] is not None
    assert on["over_q8_0"] < off["over_q8_0"] / 2


def test_a_served_step_has_the_bytes_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bipolar_int_cases, "TURN_NS", 1_000_000)
    found = {at: bipolar_int_cases.serve({"arm": "planes", "at": at, "layers": 1}) for at in (1.1, 5.1)}
    assert found[1.1]["mib"] is not None
    assert found[5.1]["mib"] is not None
    weights = 3_538_944  # of a layer of SmolLM2 135M
    assert (found[5.1]["mib"] - found[1.1]["mib"]) * 2**20 == 4 * weights / 8
    assert STUDY.claim("decode").published == 6.7
