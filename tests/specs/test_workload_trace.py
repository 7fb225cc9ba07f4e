"""Recorded traces: formats, column mappings, clocks, and everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.specs.trace import KNOWN, TraceColumns
from megalith.specs.trace_file import read_rows
from megalith.specs.trace_rows import TraceRow
from megalith.specs.trace_values import clock, parse_ids
from megalith.specs.workload import TraceSource, WorkloadSpec, open_workload, read_trace
from megalith.specs.workload_text import parse_workload

TRACES = Path(__file__).parents[2].parent / "shared" / "data" / "traces"
needs_recordings = pytest.mark.skipif(not TRACES.is_dir(), reason="needs the recorded public traces")


def rows_of(path: Path, text: str, columns: TraceColumns | None = None) -> list[TraceRow]:
    path.write_text(text)
    return list(read_rows(path, columns))


def test_azure_csv(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv.gz"
    rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows += "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    path.write_bytes(gzip.compress(rows.encode()))
    first, second = read_trace(path)
    assert (first.at_ns, first.input_tokens, first.output_tokens) == (0, 374, 44)
    assert second.at_ns == 4_314_579_000
    assert [s.at_ns for s in read_trace(path, speedup=2.0)][1] == 2_157_289_500


def test_mooncake_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "moon.jsonl"
    path.write_text(
        '{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 4000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}\n'
    )
    first, second = read_trace(path)
    assert (first.at_ns, second.at_ns, second.prefix_ids) == (0, 3_000_000_000, (0, 14))


@pytest.mark.parametrize("columns", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_known_formats_are_recognised(columns: TraceColumns, form: str, tmp_path: Path) -> None:
    times = ["2024-01-01 00:00:00.5", "2024-01-01 00:00:02"] if columns.unit == "iso" else ["0.5", "2.0"]
    names = [columns.arrival, columns.input, columns.output]
    rows = [[times[0], "10", "3"], [times[1], "11", "4"]]
    if form == "csv":
        text = "\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n"
    else:
        text = "\n".join(json.dumps(dict(zip(names, [r[0], int(r[1]), int(r[2])], strict=True))) for r in rows)
    read = rows_of(tmp_path / f"t.{form}", text)
    assert [(r.input_tokens, r.output_tokens) for r in read] == [(10, 3), (11, 4)]
    assert read[1].at_ns - read[0].at_ns == (1_500_000 if columns.unit == "ms" else 1_500_000_000)


MAPPING = TraceColumns(
    arrival="when", unit="us", input="prompt size", output="answer", hashes="blocks", priority="urgent"
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'id,when,answer,prompt size,urgent,blocks\na,5,7,900,1,"3 4"\nb,6.5,8,901,0,[3; 5]\n'),
        ("t.tsv", "id\twhen\tanswer\tprompt size\turgent\tblocks\na\t5\t7\t900\t1\t3,4\nb\t6.5\t8\t901\t0\t3|5\n"),
        (
            "t.jsonl",
            '{"when":5,"answer":7,"prompt size":900.0,"urgent":1,"blocks":[3,4],"more":{"x":[1]}}\n'
            '{"blocks":["3","5"],"when":"6.5","answer":8,"prompt size":901,"urgent":0}\n',
        ),
    ],
)
def test_any_columns_can_be_mapped(name: str, text: str, tmp_path: Path) -> None:
    first, second = rows_of(tmp_path / name, text, MAPPING)
    assert first[1:] == (5_000, 900, 7, (3, 4), 1)
    assert second[1:] == (6_500, 901, 8, (3, 5), 0)
    spec = WorkloadSpec(trace=TraceSource(path=str(tmp_path / name), columns=MAPPING))
    assert [(s.at_ns, s.prefix_ids, s.priority) for s in open_workload(spec)] == [(0, (3, 4), 1), (1_500, (3, 5), 0)]


def test_ids_of_contents_are_chained(tmp_path: Path) -> None:
    columns = TraceColumns(arrival="t", input="i", output="o", hashes="h", hash_kind="content")
    a, b, c = rows_of(tmp_path / "t.csv", "t,i,o,h\n0,1,1,a b c\n1,1,1,x b c\n2,1,1,a b d\n", columns)
    assert a.prefix_ids[:2] == c.prefix_ids[:2]
    assert a.prefix_ids[2] != c.prefix_ids[2]
    assert not set(a.prefix_ids) & set(b.prefix_ids), "the same block behind another beginning is another prefix"


def test_names_of_blocks_are_ids_wherever_they_stand() -> None:
    assert parse_ids("12 a3f") == (12, parse_ids("a3f")[0])
    assert parse_ids(["a3f"]) == parse_ids("[a3f]")
    assert parse_ids("") == parse_ids("[]") == ()
    assert 0 <= parse_ids("a3f")[0] < 2**59


@pytest.mark.parametrize(
    ("text", "unit", "ns"),
    [
        ("2023-11-16 18:15:46.6805900", "iso", 1_700_158_546_680_590_000),
        ("2023-11-16T18:15:46Z", "iso", 1_700_158_546_000_000_000),
        ("2023-11-16T20:15:46.25+02:00", "iso", 1_700_158_546_250_000_000),
        ("2023-11-16 13:15:46-0500", "iso", 1_700_158_546_000_000_000),
        ("1700158546.680590123", "s", 1_700_158_546_680_590_123),
        ("0.1", "s", 100_000_000),
        ("1e-3", "s", 1_000_000),
        (".5", "ms", 500_000),
        ("7", "ns", 7),
        ("12.3456789", "us", 12_345),
    ],
)
def test_clocks_are_exact(text: str, unit: str, ns: int) -> None:
    assert clock(unit)(text) == ns  # type: ignore[arg-type]


@given(st.integers(0, 2**62))
def test_whole_nanoseconds_survive_every_unit(ns: int) -> None:
    for unit, digits in (("s", 9), ("ms", 6), ("us", 3)):
        whole, rest = divmod(ns, 10**digits)
        assert clock(unit)(f"{whole}.{rest:0{digits}d}") == ns  # type: ignore[arg-type]


GOOD = "at_s,input_tokens,output_tokens\n0,1,1\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "when,tokens\n1,2\n", "Line 1 of .* columns when, tokens"),
        ("t.csv", GOOD + "soon,1,1\n", "Line 3 of .*'soon' is not a number"),
        ("t.csv", GOOD + "\n1,-5,1\n", "Line 4 of .*-5 prompt tokens"),
        ("t.csv", GOOD + "1,5,nan\n", "Line 3 of .*'nan' is not a token count"),
        ("t.csv", GOOD + "nan,5,5\n", "Line 3 of .*the arrival is nan"),
        ("t.csv", GOOD + "inf,5,5\n", "Line 3 of .*the arrival is inf"),
        ("t.csv", GOOD + "-3,5,5\n", "Line 3 of .*before zero"),
        ("t.csv", GOOD + "1,5.5,5\n", "Line 3 of .*5.5.* is not a token count"),
        ("t.csv", GOOD + "1,5,99999999999\n", "Line 3 of .*99999999999 output"),
        ("t.csv", GOOD + "5,1,1\n4.5,1,1\n", r"Line 4 of .* arrives 0.5 s before line 3. Sort"),
        ("t.csv", GOOD + "1,5\n", "Line 3 of .*2 of 3 columns"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1,1\n", "Line 2 of .*'XXX' is not a timestamp"),
        ("t.csv", "at_s,input_tokens,output_tokens\n", "has no requests"),
        ("t.csv", "", "has no requests"),
        ("t.jsonl", "", "has no requests"),
        ("t.jsonl", "[1, 2]\n", "Line 1 of"),
        ("t.jsonl", "{broken\n", "Line 1 of"),
        ("t.jsonl", '{"at_s":0,"input_tokens":1,"output_tokens":1}\n{"at_s":1}\n', "Line 2 of .*input_tokens"),
        ("t.jsonl", '{"at_s":0,"input_tokens":"x","output_tokens":1}\n', "Line 1 of .*'x' is not a token count"),
        ("t.jsonl", '{"at_s":0,"input_tokens":1,"output_tokens":NaN}\n', "Line 1 of"),
    ],
)
def test_a_broken_trace_names_its_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        rows_of(tmp_path / name, text)
    assert error.value.hint
    assert "\n" not in str(error.value)


def test_a_mapping_that_is_not_there_names_the_nearest_column(tmp_path: Path) -> None:
    columns = TraceColumns(arrival="arival", input="in", output="out")
    with pytest.raises(ConfigError, match=r"no column 'arival'. Did you mean 'arrival'"):
        rows_of(tmp_path / "t.csv", "arrival,in,out\n1,1,1\n", columns)


def test_zero_tokens_become_one(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "t.csv", "at_s,input_tokens,output_tokens\n0,0,0\n")
    assert (row.input_tokens, row.output_tokens) == (1, 1)


@pytest.mark.parametrize(("name", "data"), [("t.jsonl.gz", b"not gzip"), ("t.csv", b"at_s\xff\xfe\n1\n")])
def test_a_trace_that_is_not_text_is_refused_in_words(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_trace(tmp_path / name))


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_gzip_says_how_far_it_went(name: str, damage: str, tmp_path: Path) -> None:
    if ".csv" in name:
        lines = ["at_s,input_tokens,output_tokens", *(f"{i},{i * 37 % 1009},5" for i in range(20_000))]
    else:
        lines = [f'{{"at_s":{i},"input_tokens":{i * 37 % 1009},"output_tokens":5}}' for i in range(20_000)]
    data = gzip.compress("\n".join(lines).encode())
    bad = data[: len(data) // 2] if damage == "cut" else data[:-5] + bytes([data[-5] ^ 255]) + data[-4:]
    (tmp_path / name).write_bytes(bad)
    with pytest.raises(ConfigError, match=r"cannot be read after line \d+ .*fetch it again"):
        list(read_rows(tmp_path / name))


def test_a_missing_trace_and_a_stopped_clock() -> None:
    with pytest.raises(ConfigError, match="no trace"):
        list(read_trace(Path("nowhere.csv")))
    with pytest.raises(ConfigError, match="speedup is 0"):
        read_trace(Path("nowhere.csv"), speedup=0)


def test_reading_starts_before_the_file_ends(tmp_path: Path) -> None:
    """Streamed: the first request is there though the end of the file is broken."""
    path = tmp_path / "t.csv"
    path.write_text("at_s,input_tokens,output_tokens\n" + "".join(f"{i},1,1\n" for i in range(100_000)) + "broken\n")
    stream = read_trace(path)
    assert next(stream).index == 0
    stream.close()  # type: ignore[attr-defined]


@needs_recordings
@pytest.mark.parametrize(
    ("name", "requests", "last_ns", "prompt_tokens", "answer_tokens"),
    [
        ("azure2023_conv.csv.gz", 19_366, 3_501_721_937_000, 22_361_870, 4_088_665),
        ("azure2023_code.csv.gz", 8_819, 3_435_948_056_000, 18_059_974, 245_896),
    ],
)
def test_recorded_azure_hours(name: str, requests: int, last_ns: int, prompt_tokens: int, answer_tokens: int) -> None:
    began = time.process_time()
    shapes = list(read_trace(TRACES / name))
    spent_s = time.process_time() - began
    assert (len(shapes), shapes[-1].at_ns) == (requests, last_ns)
    assert sum(s.input_tokens for s in shapes) == prompt_tokens
    assert sum(s.output_tokens for s in shapes) == answer_tokens
    assert spent_s < 0.5, "0.1 s on one core of 2024"


@needs_recordings
def test_recorded_mooncake_hour_has_its_published_reuse() -> None:
    seen: set[int] = set()
    blocks = reused = 0
    for shape in read_trace(TRACES / "mooncake_fast25_conversation.jsonl.gz"):
        assert len(shape.prefix_ids) == -(-shape.input_tokens // 512)
        blocks += len(shape.prefix_ids)
        reused += sum(i in seen for i in shape.prefix_ids)
        seen.update(shape.prefix_ids)
    assert (blocks, len(seen)) == (288_500, 182_790)
    assert reused / blocks == pytest.approx(0.366, abs=0.001)


@needs_recordings
@pytest.mark.parametrize("resample", ["none", "joint"])
def test_distserves_filter_leaves_the_lengths_that_are_known(resample: str) -> None:
    """Azure conversation with at most 2,048 tokens in all: 754 prompt and 232 output tokens on average."""
    text = f"{TRACES}/azure2023_conv.csv.gz:max_total=2048,resample={resample}"
    if resample == "joint":
        text += ",arrivals=poisson,rate=10,requests=50000"
    shapes = list(open_workload(parse_workload(text)))
    assert sum(s.input_tokens for s in shapes) / len(shapes) == pytest.approx(754, rel=0.01)
    assert sum(s.output_tokens for s in shapes) / len(shapes) == pytest.approx(232, rel=0.01)
