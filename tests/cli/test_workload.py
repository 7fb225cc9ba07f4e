"""What the load generator will send: distributions, due times, prompts, and recorded traces."""

from __future__ import annotations

import gzip
import itertools
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.serve.load_workload import (
    Lengths,
    PromptMaker,
    RequestShape,
    capped,
    parse_lengths,
    read_trace,
    synthetic,
)

EIGHT = Lengths("fixed", 8)


def test_poisson_gaps_are_exponential_with_the_right_rate() -> None:
    due = [s.at_ns for s in itertools.islice(synthetic((EIGHT, EIGHT), 20.0, "poisson", 3), 4000)]
    gaps = [(b - a) / 1e9 for a, b in itertools.pairwise(due)]  # type: ignore[operator]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    # The coefficient of variation of an exponential is 1, and a share of 1/e of it lies above the mean.
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(1, rel=0.07)
    assert sum(g > 1 / 20 for g in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


def test_same_seed_same_load() -> None:
    def load(seed: int) -> list[RequestShape]:
        lengths = (parse_lengths("normal:128:32"), parse_lengths("lognormal:64:0.5"))
        return list(itertools.islice(synthetic(lengths, 5.0, "poisson", seed), 50))

    assert load(1) == load(1)
    assert load(1) != load(2)


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [
        ("128", 128, 128, 128),
        ("64-256", 160, 64, 256),
        ("normal:200:30", 200, 50, 350),
        ("lognormal:100:0.5", 113.3, 5, 1000),
    ],
)
def test_lengths_have_the_distribution_that_is_asked(text: str, mean: float, low: int, high: int) -> None:
    lengths = parse_lengths(text)
    drawn = [lengths.draw(5, i) for i in range(4000)]
    assert statistics.mean(drawn) == pytest.approx(mean, rel=0.03)
    assert low <= min(drawn) <= max(drawn) <= high
    if text == "64-256":
        assert {min(drawn), max(drawn)} == {64, 256}


@pytest.mark.parametrize("text", ["", "0", "-5", "9-3", "normal:0:3", "gauss:1:2", "1.5", "12x"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_lengths(text)


@given(st.integers(0, 2**63), st.integers(1, 400), st.integers(0, 500), st.integers(0, 50))
def test_prompts_are_exact_and_share_only_what_they_should(seed: int, length: int, shared: int, index: int) -> None:
    maker = PromptMaker("ids", seed, (1000, 32_000), shared)
    first = maker.prompt(RequestShape(index, None, length, 1))
    second = maker.prompt(RequestShape(index + 1, None, length, 1))
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert len(first) == len(second) == length
    assert all(1000 <= token < 32_000 for token in first)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=True)))
    assert min(shared, length) <= common <= min(shared + 3, length)
    assert first == maker.prompt(RequestShape(index, None, length, 1))


def test_hashes_of_a_trace_become_equal_prefixes() -> None:
    maker = PromptMaker()
    a = maker.prompt(RequestShape(0, 0, 1200, 1, (5, 6, 7)))
    b = maker.prompt(RequestShape(1, 0, 1500, 1, (5, 6, 9)))
    assert (len(a), len(b)) == (1200, 1500)
    assert a[:1024] == b[:1024]
    assert a[1024:1200] != b[1024:1200]


def test_text_prompts_have_a_word_a_token() -> None:
    text = PromptMaker("text").prompt(RequestShape(0, None, 40, 1))
    assert isinstance(text, str)
    assert len(text.split()) == 40


def test_azure_csv(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv.gz"
    rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows += "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    path.write_bytes(gzip.compress(rows.encode()))
    first, second = read_trace(path)
    assert (first.at_ns, first.input_tokens, first.output_tokens) == (0, 374, 44)
    assert second.at_ns == pytest.approx(4_314_579_000, abs=200)
    assert [s.at_ns for s in read_trace(path, speedup=2.0)][1] == pytest.approx(2_157_289_500, abs=200)


def test_mooncake_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "moon.jsonl"
    path.write_text(
        '{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 4000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}\n'
    )
    first, second = read_trace(path)
    assert (first.at_ns, second.at_ns, second.prefix_ids) == (0, 3_000_000_000, (0, 14))
    cut = list(capped(read_trace(path), 1024, 64))
    assert [(s.input_tokens, s.output_tokens) for s in cut] == [(1024, 64)] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "at_s,input_tokens,output_tokens\n0.5,10,3\n1.5,11,4\n"),
        (
            "t.jsonl",
            '{"timestamp_ms":500,"input_tokens":10,"output_tokens":3}\n'
            '{"at_s":1.5,"input_tokens":11,"output_tokens":4}\n',
        ),
    ],
)
def test_generic_traces(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert [(s.at_ns, s.input_tokens, s.output_tokens) for s in read_trace(path)] == [
        (0, 10, 3),
        (1_000_000_000, 11, 4),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "when,tokens\n1,2\n"),
        ("t.csv", "at_s,input_tokens,output_tokens\nsoon,1,1\n"),
        ("t.jsonl", "[1, 2]\n"),
        ("t.jsonl", "{broken\n"),
        ("t.csv", "at_s,input_tokens,output_tokens\n0,-5,1\n"),
    ],
)
def test_a_broken_trace_names_its_line(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"Request 1|Line 1"):
        list(read_trace(path))


@pytest.mark.parametrize(("name", "data"), [("t.jsonl.gz", b"not gzip"), ("t.csv", b"at_s\xff\xfe\n1\n")])
def test_a_trace_that_is_not_text_is_refused_in_words(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_trace(tmp_path / name))


def test_a_missing_trace_and_a_stopped_clock() -> None:
    with pytest.raises(ConfigError, match="no trace"):
        list(read_trace(Path("nowhere.csv")))
    with pytest.raises(ConfigError, match="stops time"):
        list(read_trace(Path("nowhere.csv"), speedup=0))
