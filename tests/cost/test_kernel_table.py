"""The kernel-table timer: what a step is made of, exact lines, files that are wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.kernel_attention import Attention
from megalith.cost.kernel_profile import read_profile
from megalith.cost.kernel_table import KernelTable
from megalith.cost.timer import Prompt
from megalith.specs import catalog
from megalith.specs.fleet import LinkSpec
from tests.cost.kernel_tables import attention_us, write

PS = 1_000_000
MODEL = catalog.model("llama-3.1-8b")
SKEW = {
    f"{chunk},n<={n},sr<={rate}%,kvB<={big},kp{context}": round(
        0.01 * n / 8 + 0.001 * rate + (0.2 if big == "4k" else 0), 4
    )
    for chunk in (0, 16, 256)
    for n in (2, 8, 32)
    for rate in (5, 15, 40, 70)
    for big in ("1k", "4k")
    for context in ("=0", "<=512")
}
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "llmservingsim" / "kernel_profiles"


def timer(folder: Path, tensor_parallel: int = 1, host_ns: int = 0, **tables: Any) -> KernelTable:
    return KernelTable.load(write(folder, **tables), MODEL, tensor_parallel, host_ns)


def fixed_us(tokens: int, requests: int) -> float:
    """Everything but attention, in the formulas of the test tables, for `tokens` that are not padded."""
    return 2 * (10 + tokens) + MODEL.num_layers * 3 * (10 + tokens) + 100 + requests


def test_a_step_is_the_sum_of_its_kernels(tmp_path: Path) -> None:
    table = timer(tmp_path, host_ns=7_000)
    alone = table.step_ps((), 8, 8 * 300, 300)
    assert alone == (7 + fixed_us(8, 8) + MODEL.num_layers * attention_us(0, 0, 8, 300)) * PS
    mixed = table.step_ps([Prompt(56, 100, True)], 8, 8 * 300, 300)
    assert mixed == pytest.approx((7 + fixed_us(64, 9) + MODEL.num_layers * attention_us(56, 100, 8, 300)) * PS, abs=10)
    prompt = table.step_ps([Prompt(64, 0, False)], 0, 0, 0)
    assert prompt == pytest.approx((7 + fixed_us(64, 1) + MODEL.num_layers * attention_us(64, 0, 0, 0)) * PS, abs=10)


def test_batches_are_padded_to_what_has_a_graph(tmp_path: Path) -> None:
    table = timer(tmp_path)
    three, four = table.step_ps((), 3, 300, 100), table.step_ps((), 4, 400, 100)
    attention = MODEL.num_layers * (attention_us(0, 0, 4, 100) - attention_us(0, 0, 3, 100))
    assert four - three == pytest.approx((attention + 1) * PS, abs=10)  # and one more row of logits


def test_a_listed_row_of_one_token_is_a_decode(tmp_path: Path) -> None:
    table = timer(tmp_path, skew=SKEW)
    assert table.step_ps([Prompt(1, 900, True)], 7, 2100, 300) == table.step_ps((), 8, 3000, 900)
    assert table.step_ps([Prompt(1, 0, True)], 7, 2100, 300) != table.step_ps((), 8, 2100, 300)


def test_several_chunks_are_one_with_as_many_pairs(tmp_path: Path) -> None:
    table = timer(tmp_path)
    # 40 tokens after 200 and 24 after none see 40 * 220 + 24 * 12 keys; so do 64 after 110.
    several = table.step_ps([Prompt(40, 200, True), Prompt(24, 0, False)], 4, 400, 100)
    assert several - table.step_ps([Prompt(64, 110, True)], 4, 400, 100) == PS  # the row of logits


def test_uneven_contexts_go_a_share_of_the_way_to_the_longest(tmp_path: Path) -> None:
    even, uneven = timer(tmp_path / "even"), timer(tmp_path / "uneven", skew=SKEW)
    mean, longest = even.step_ps((), 8, 8 * 300, 300), even.step_ps((), 8, 8 * 900, 900)
    # 300 of 900 is a rate of 33 %, so below 40 %; 8 decodes and a longest of 900 are in buckets that end at 8 and 1k.
    share = 0.01 + 0.04
    assert uneven.step_ps((), 8, 8 * 300, 900) == pytest.approx(mean + share * (longest - mean), rel=1e-9)
    assert uneven.step_ps((), 8, 8 * 300, 300) == mean
    both = [table.step_ps([Prompt(64, 0, True)], 8, 8 * 300, 900) for table in (even, uneven)]
    longest = even.step_ps([Prompt(64, 0, True)], 8, 8 * 900, 900)
    assert both[1] == pytest.approx(both[0] + share * (longest - both[0]), rel=1e-9)


def test_a_fit_that_its_makers_switched_off_is_not_used(tmp_path: Path) -> None:
    off, none = timer(tmp_path / "off", skew=SKEW, enabled=False), timer(tmp_path / "none")
    assert off.step_ps((), 8, 2400, 900) == none.step_ps((), 8, 2400, 900)


def test_buckets_without_samples_take_the_default(tmp_path: Path) -> None:
    table = timer(tmp_path, skew={"0,n<=8,sr<=70%,kvB<=1k,kp=0": 0.0, "16,n<=32,sr<=5%,kvB<=4k,kp=0": 0.0})
    even = timer(tmp_path / "even")
    # A rate of 1 % is in the bucket that ends at 5 %, for which chunk 0 has no samples: 0.25.
    mean, longest = even.step_ps((), 8, 8 * 9, 9), even.step_ps((), 8, 8 * 900, 900)
    assert table.step_ps((), 8, 72, 900) == pytest.approx(mean + 0.25 * (longest - mean), rel=1e-9)


@st.composite
def batches(draw: st.DrawFn, most: int = 9_000) -> tuple[int, int, int]:
    decodes = draw(st.integers(1, 70))
    longest = draw(st.integers(1, most))
    total = draw(st.integers(longest + decodes - 1, longest * decodes)) if decodes > 1 else longest
    return decodes, total, longest


def _holds(table: KernelTable, batch: tuple[int, int, int], inside: list[float]) -> None:
    decodes, total, longest = batch
    line = table.decode_line(decodes, total, longest)
    assert line.first_ps > 0
    assert line.steps >= 1
    last = min(line.steps - 1, 100_000)
    for j in {0, last, *(round(share * last) for share in inside)}:
        expected = table.step_ps((), decodes, total + j * decodes, longest + j)
        assert line.first_ps + j * line.slope_ps == expected


@pytest.fixture(scope="module", params=["even", "skew"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KernelTable:
    return timer(tmp_path_factory.mktemp(request.param), skew=SKEW if request.param == "skew" else None, host_ns=3)


@settings(max_examples=300, deadline=None)
@given(batch=batches(), inside=st.lists(st.floats(0, 1), max_size=3))
def test_a_line_is_the_steps(table: KernelTable, batch: tuple[int, int, int], inside: list[float]) -> None:
    _holds(table, batch, inside)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the measured kernel tables beside the project")
@settings(max_examples=300, deadline=None)
@given(batch=batches(20_000), inside=st.lists(st.floats(0, 1), max_size=2))
def test_a_line_is_the_steps_on_measured_tables(batch: tuple[int, int, int], inside: list[float]) -> None:
    _holds(_measured(), batch, inside)


_KEPT: list[KernelTable] = []


def _measured() -> KernelTable:
    if not _KEPT:
        _KEPT.append(KernelTable.load(SHARED / "RTXPRO6000_Llama-3.1-8B", MODEL))
    return _KEPT[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the measured kernel tables beside the project")
def test_measured_tables_are_met_at_their_own_points() -> None:
    profile = read_profile(SHARED / "RTXPRO6000_Llama-3.1-8B")
    attention = Attention(profile._replace(skew={}), 1)
    for (chunk, decodes), plane in itertools.islice(profile.attention.items(), 0, None, 7):
        for context, (sizes, times) in plane.items():
            for size, time in list(zip(sizes, times, strict=True))[::3]:
                if chunk:
                    assert attention.mixed_ps(chunk, context, decodes, decodes * size, size) == pytest.approx(
                        time, abs=2
                    )
                else:
                    assert attention.decode_piece(decodes, decodes * size, size)[0] == time


def test_lines_are_long_between_grid_points(tmp_path: Path) -> None:
    table = timer(tmp_path)
    assert table.decode_line(8, 8 * 256, 256).steps == 2048 - 256
    assert table.decode_line(8, 8 * 255, 255).steps == 1
    assert table.decode_line(8, 8 * 5_000, 5_000).steps > 1_000_000


def test_both_layouts_give_the_same(tmp_path: Path) -> None:
    flat, nested = read_profile(write(tmp_path / "flat", skew=SKEW, experts=True)), write(tmp_path / "b", nested=True)
    assert read_profile(nested).attention == flat.attention
    assert flat.experts[2][0] == [1, 256]


def test_experts_count_those_that_are_awake(tmp_path: Path) -> None:
    folder = write(tmp_path, experts=True)
    moe = catalog.model("llama-3.1-8b").__class__(
        **{name: getattr(MODEL, name) for name in MODEL.__struct_fields__} | {"num_experts": 8, "experts_per_token": 2}
    )
    plain, routed = KernelTable.load(folder, MODEL), KernelTable.load(folder, moe)
    for decodes, awake in ((1, 2), (2, 4), (8, 8), (32, 8)):
        extra = routed.step_ps((), decodes, decodes * 50, 50) - plain.step_ps((), decodes, decodes * 50, 50)
        assert extra == MODEL.num_layers * (decodes + 10 * awake) * PS
    link = LinkSpec(bytes_per_s=1e30)
    halves = [KernelTable(read_profile(folder), model, 2, 0, link).step_ps((), 8, 400, 50) for model in (MODEL, moe)]
    assert halves[1] - halves[0] == MODEL.num_layers * (4 + 10 * 4) * PS


def test_tensor_parallel_pays_two_rings_a_layer(tmp_path: Path) -> None:
    folder = write(tmp_path)
    profile = read_profile(folder)
    link = LinkSpec(bytes_per_s=16e9, latency_s=20e-6)
    one, two = KernelTable(profile, MODEL), KernelTable(profile, MODEL, 2, 0, link)
    extra_s = (two.step_ps((), 8, 800, 100) - one.step_ps((), 8, 800, 100)) / 1e12
    assert extra_s == pytest.approx(MODEL.num_layers * 2 * 2 * (20e-6 + 8 * 4096 * 2 / 2 / 16e9), rel=1e-9)
    with pytest.raises(ConfigError, match="no link is given"):
        KernelTable(profile, MODEL, 2)


def test_a_straggler_takes_its_factor_and_keeps_exact_lines(table: KernelTable) -> None:
    slow = table.scaled(2.0)
    for prompts, batch in (((), (8, 2_400, 900)), ([Prompt(64, 16, True)], (3, 300, 200))):
        assert slow.step_ps(prompts, *batch) == pytest.approx(2 * table.step_ps(prompts, *batch), rel=1e-9)
    assert slow.scaled(0.5).step_ps((), 8, 2_400, 900) == table.step_ps((), 8, 2_400, 900)
    _holds(slow.at_clock(0.7), (9, 4_000, 1_200), [0.3, 0.6])


def test_a_lower_clock_slows_prompts_more_than_decodes(table: KernelTable) -> None:
    low = table.at_clock(0.5)
    decode = low.step_ps((), 2, 300, 200) / table.step_ps((), 2, 300, 200)
    prompt = low.step_ps([Prompt(256, 0, True)], 0, 0, 0) / table.step_ps([Prompt(256, 0, True)], 0, 0, 0)
    assert 1.1 < decode < 1.4 < 1.9 < prompt < 2.0
    assert low.at_clock(1.0).step_ps((), 2, 300, 200) == table.step_ps((), 2, 300, 200)
    assert low.power_w().idle_w != low.power_w().idle_w  # nan: the tables know no watts


def test_what_is_missing_or_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tables at all"):
        read_profile(tmp_path)
    write(tmp_path)
    with pytest.raises(ConfigError, match="tables for tensor parallelism 1"):
        read_profile(tmp_path, 2)
    (tmp_path / "tp1_dense.csv").write_text("layer,tokens,time_us\nqkv_proj,8,fast\n")
    with pytest.raises(ConfigError, match="line 2: could not convert"):
        read_profile(tmp_path)
    (tmp_path / "tp1_dense.csv").write_text("layer,tokens\nqkv_proj,8\n")
    with pytest.raises(ConfigError, match="no column 'time_us'"):
        read_profile(tmp_path)
    (tmp_path / "tp1_dense.csv").unlink()
    (tmp_path / "tp1_skew_fit.csv").write_text(
        "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha\n0,about 8,sr<=5%,kvB<=1k,kp=0,0.1\n"
    )
    with pytest.raises(ConfigError, match="no label of a bucket"):
        read_profile(tmp_path)
