"""What the load generator will send: prompts of given lengths."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from megalith.serve.load_workload import PromptMaker
from megalith.specs.shape import RequestShape
from megalith.specs.workload import open_workload
from megalith.specs.workload_text import parse_workload

from .command import megalith
from .paced_server import PacedApp, serving


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


def test_the_load_of_a_workload_is_what_the_simulator_would_see() -> None:
    text = "mooncake-conversation:rate=200,max_input=600,max_output=3"
    app = PacedApp(ttft_s=0.0, itl_s=0.0)
    with serving(app) as url:
        done = megalith("bench", "serve", "--url", url, "--workload", text, "--limit", "30", "--json", "--warmup", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["ok"] == 30
    shapes = list(itertools.islice(open_workload(parse_workload(text), 0), 30))
    sent = [request["prompt"] for request in app.requests]
    assert sorted(map(len, sent)) == sorted(s.input_tokens for s in shapes)
    system = {tuple(prompt[:512]) for prompt in sent if len(prompt) > 512}
    assert len(system) == 1, "the block that all conversations share"
