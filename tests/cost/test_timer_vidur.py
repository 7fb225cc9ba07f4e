"""The step times of Vidur: how operators add up to a step, exact lines, and the fit against its source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.timer import Prompt
from megalith.cost.timer_vidur import TOKEN_OPERATORS, VidurModel, vidur, vidur_for, vidur_models
from megalith.cost.vidur_fit import fit, fit_operators, forms, read_rows

DATA = Path(__file__).parents[2] / "../shared/data/vidur"
NAME = "llama-2-70b/a100-80gb/a100_dgx/tp2"
PS = 1_000_000_000


def toy(**changed: object) -> VidurModel:
    """Every operator of a layer takes 1 ms and 1 us a token; attention 3 us a known token and 1 us a pair."""
    operators: dict[str, tuple[tuple[int, int, float], ...]] = dict.fromkeys(
        TOKEN_OPERATORS, ((0, 0, 1.0), (1, 0, 1e-3))
    )
    operators |= {"attn_decode": ((1, 1, 3e-3),), "attn_prefill": ((0, 1, 1e-3), (1, 0, 1e-2))}
    operators |= {"all_reduce": ((1, 0, 1e-3),), "send_recv": ((0, 0, 0.5),)}
    fields = {"model": "toy", "device": "toy", "network": "toy", "tensor_parallel": 2, "layers": 4}
    return VidurModel(**(fields | {"operators": operators} | changed))  # type: ignore[arg-type]


def test_a_layer_adds_up() -> None:
    # 5 + 30 tokens are rounded up to 40; 5 decodes with 100 known tokens on average count 128.
    layer = 10 * (1 + 0.040) + 2 * (0.040 + 0.02) + 5 * 128 * 3e-3 * 1.1 + (30**2 * 1e-3 + 64 * 1e-2)
    expected = round(layer * 4 * PS)
    timer = toy().timer()
    assert timer.step_ps([Prompt(30, 17, True)], 5, 495, 120) == pytest.approx(expected, abs=3)
    assert timer.stages_ps([Prompt(30, 17, True)], 5, 495, 120) == (timer.step_ps([Prompt(30, 17, True)], 5, 495, 120),)


def test_several_prompts_count_as_one_of_the_root_of_their_squares() -> None:
    one, two = toy().timer(), toy(batching=0.0).timer()
    rows = [Prompt(30, 0, True), Prompt(34, 0, False)]
    root = round((30**2 + 34**2) ** 0.5)
    dense = 10 * (1 + 0.064) + 2 * (0.064 + 0.02)
    assert two.step_ps(rows, 0, 0, 0) == pytest.approx((dense + root**2 * 1e-3) * 4 * PS, abs=3)
    assert one.step_ps(rows, 0, 0, 0) == pytest.approx((dense + root**2 * 1.1e-3) * 4 * PS, abs=3)


def test_a_pipeline_cuts_the_layers_and_sends_between_stages() -> None:
    whole, timer = toy().timer(1), toy().timer(4)
    stages = timer.stages_ps((), 3, 300, 100)
    assert stages == (stages[0],) * 3 + (stages[-1],)
    assert stages[0] - stages[-1] == round(0.5 * PS)
    assert sum(stages) == timer.step_ps((), 3, 300, 100)
    assert 4 * stages[-1] == pytest.approx(whole.step_ps((), 3, 300, 100), abs=4)
    with pytest.raises(ConfigError, match="4 layers"):
        toy().timer(3)


def test_tensor_parallel_one_sends_nothing() -> None:
    with_links, alone = toy().timer(), toy(tensor_parallel=1).timer()
    assert with_links.step_ps((), 8, 800, 100) - alone.step_ps((), 8, 800, 100) == round(2 * 0.028 * 4 * PS)


@given(st.sampled_from(sorted(vidur_models())), st.integers(1, 128), st.integers(1, 3000), st.sampled_from([1, 2, 4]))
def test_lines_are_what_steps_take(name: str, decodes: int, context: int, stages: int) -> None:
    timer = vidur(name).timer(stages)
    total = context * decodes + decodes // 2
    line = timer.decode_line(decodes, total, context)
    assert 1 <= line.steps <= 64
    for step in range(line.steps):
        assert timer.step_ps((), decodes, total + step * decodes, context + step) == line.first_ps
    assert timer.step_ps((), decodes, total + line.steps * decodes, context) != line.first_ps
    assert line.slope_ps == 0


def test_a_listed_decode_counts_as_a_decode() -> None:
    timer = vidur(NAME).timer(2)
    rows = [Prompt(1, 400, True), Prompt(1, 600, True)]
    assert timer.step_ps(rows, 0, 0, 0) == timer.step_ps((), 2, 1000, 600)


def test_lacking_operators_and_names() -> None:
    with pytest.raises(ConfigError, match="attn_decode"):
        toy(operators=dict.fromkeys(TOKEN_OPERATORS, ())).timer()
    with pytest.raises(ConfigError, match="a100_dgx"):
        vidur("llama-2-70b/a100/dgx/tp2")


def test_slower_timers_and_look_up() -> None:
    timer = vidur(NAME).timer(2)
    assert vidur_for("llama-2-70b", "a100-80gb", 2) is vidur(NAME)
    assert vidur_for("llama-2-70b", "a100-80gb", 2, "a100_pairwise_nvlink").network == "a100_pairwise_nvlink"
    with pytest.raises(ConfigError, match="a100_dgx"):
        vidur_for("llama-2-70b", "a100-80gb", 4)
    step = ([Prompt(512, 0, True)], 3, 300, 100)
    assert sum(timer.scaled(2.0).stages_ps(*step)) == pytest.approx(2 * timer.step_ps(*step), abs=3)
    half = timer.at_clock(0.5)
    assert half.step_ps(*step) == pytest.approx(2 * timer.step_ps(*step), abs=3)
    assert half.step_ps((), 3, 300, 100) < 1.2 * timer.step_ps((), 3, 300, 100)
    assert half.at_clock(1.0).step_ps(*step) == timer.step_ps(*step)
    with pytest.raises(ConfigError, match="no power"):
        timer.power_w()


def test_forms_are_those_of_a_polynomial_pipeline() -> None:
    # Centred: degrees 1 to 5. Not centred: the same with and without a constant.
    assert len(forms(1)) == 15
    assert len(forms(2)) == 18  # and one of products only, for each of the three
    assert max(len(form.powers) for form in forms(2)) == 21


def test_the_fit_finds_a_polynomial_that_is_there() -> None:
    x = np.arange(1.0, 200.0)
    terms = fit(x[:, None], 3.0 + 0.5 * x)
    values = [sum(factor * at**power for power, _, factor in terms) for at in (1.0, 77.0, 300.0)]
    assert values == pytest.approx([3.5, 41.5, 153.0], rel=1e-6)
    assert fit(x[:, None], 0.0 * x) == ()
    with pytest.raises(ConfigError, match="5 rows"):
        fit(x[:5, None], x[:5])


@pytest.mark.skipif(not DATA.exists(), reason="Vidur's data is not here")
def test_the_catalogue_holds_what_the_source_gives() -> None:
    # The copy has the medians alone, so other rows are equal to each other than in the full tables.
    def is_tp2(row: dict[str, str]) -> bool:
        return (row["device"], row["num_tensor_parallel_workers"]) == ("a100", "2")

    layer = [row for row in read_rows(DATA / "llama2-70b_mlp.csv.gz") if is_tp2(row)]
    attention = read_rows(DATA / "a100_llama2-70b_attention_tp2.csv.gz")
    network = [row for row in read_rows(DATA / "network_all_reduce_send_recv.csv.gz") if row["network"] == "a100_dgx"]
    found = fit_operators(layer, attention, network, 8192, 2)
    kept = vidur(NAME).operators
    assert found.keys() == kept.keys()
    for name, terms in found.items():
        assert [term[:2] for term in terms] == [term[:2] for term in kept[name]], name
        made, wanted = toy(operators=kept | {name: terms}).timer(2), toy(operators=dict(kept)).timer(2)
        for step in (([Prompt(512, 640, True)], 30, 30_000, 0), ((), 100, 90_000, 0)):
            assert made.stages_ps(*step) == pytest.approx(wanted.stages_ps(*step), rel=5e-4)
