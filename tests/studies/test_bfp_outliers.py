"""The bfp-outliers study: arms differ in the order alone, bytes are the formula's, the order helps at 3 bits."""

from __future__ import annotations

import pytest

from megalith.base.errors import ModelNotFound
from megalith.model.source import resolve
from megalith.specs.kv_format import parse_kv_format
from megalith.studies import bfp_outliers, bfp_outliers_cases
from megalith.studies.bfp_outliers import STUDY
from megalith.studies.study import Case, Computed


@pytest.fixture(autouse=True, scope="module")
def packaged() -> None:
    try:
        resolve("smollm2")
    except ModelNotFound as error:
        pytest.skip(str(error))


def test_arms_differ_in_the_order_alone() -> None:
    for experiment in STUDY.experiments:
        for at in experiment.at:
            tasks = [experiment.task(Case(arm.name, at, 0, True)) for arm in experiment.arms]
            texts = []
            for task in tasks:
                assert isinstance(task, Computed)
                texts.append(bfp_outliers_cases._text_of(task.options))
            on, off = (parse_kv_format(text) for text in texts)
            assert on is not None
            assert off is not None
            assert (on.keys, on.values, on.reorder, off.reorder) == (off.keys, off.values, True, False)
    assert bfp_outliers_cases.kv_text(0, 8, 32, reorder=False) == ""


def test_the_order_brings_three_bits_nearer_to_float() -> None:
    """Of one window; in the study 3 bits lose about a third less. The real model, its real K."""
    options = {"bits": 3, "values": 8, "block": 32, "tokens": 512}
    on, off = (bfp_outliers_cases.quality({**options, "arm": arm.name}) for arm in bfp_outliers.ARMS)
    layers, heads = 30, 3
    assert on["bytes"] == off["bytes"] == layers * heads * 2 * ((1 + 12) + (1 + 32))
    assert on["kl"] is not None
    assert off["kl"] is not None
    assert 0.05 < on["kl"] < 0.95 * off["kl"]
