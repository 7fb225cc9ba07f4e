"""The hand-built stream bytes equal what the structs say; usage and finish reasons add up."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.engine.api import Delta, TokenLogprob
from megalith.engine.params import SamplingParams
from megalith.serve.answers import ChatChunk, ChatCompletion, Completion
from megalith.serve.logprobs import MIN_LOGPROB, LogprobWriter
from megalith.serve.sampling import Choice
from megalith.serve.shapes import ChatShaper, CompletionShaper, Head, Tally, count_usage

from .scripted import ByteTokenizer

WRITER = LogprobWriter(ByteTokenizer())  # type: ignore[arg-type]
NAMES = st.sampled_from(["m", "?", '"?"', '"index":0', "a/b c", "ü"])


def head(name: str = "m", usage: bool = False, top: int | None = None, ids: bool = False) -> Head:
    return Head("id", name, WRITER, top, usage, ids)


def events(data: bytes) -> list[bytes]:
    parts = data.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") for part in parts)
    return [part[6:] for part in parts]


def choice(index: int = 0, prompt: int = 0, ids: tuple[int, ...] = (97,)) -> Choice:
    return Choice(index, prompt, list(ids), SamplingParams())


@given(st.text(min_size=1), st.integers(0, 3), NAMES, st.booleans())
def test_chat_bytes_are_the_struct(text: str, index: int, name: str, usage: bool) -> None:
    shaper = ChatShaper(head(name, usage), 4)
    (raw,) = events(shaper.delta_events(index, Delta(text, (1,))))
    chunk = msgspec.json.decode(raw, type=ChatChunk)
    assert msgspec.json.encode(chunk) == raw
    assert (chunk.choices[0].index, chunk.choices[0].delta.content, chunk.model) == (index, text, name)
    assert chunk.choices[0].finish_reason is None
    assert (b'"usage":null' in raw) == usage


@given(st.text(min_size=1), st.integers(0, 3), NAMES)
def test_completion_bytes_are_the_struct(text: str, index: int, name: str) -> None:
    shaper = CompletionShaper(head(name), [choice(i) for i in range(4)], None, False)
    (raw,) = events(shaper.delta_events(index, Delta(text, (1,))))
    chunk = msgspec.json.decode(raw, type=Completion)
    assert msgspec.json.encode(chunk) == raw
    assert (chunk.choices[0].index, chunk.choices[0].text, chunk.model) == (index, text, name)


def test_half_characters_send_nothing_and_the_end_is_its_own_event() -> None:
    shaper = ChatShaper(head(), 1)
    assert shaper.delta_events(0, Delta("", (1,))) == b""
    text, end = events(shaper.delta_events(0, Delta("x", (2,), "stop", stop_reason="END")))
    assert msgspec.json.decode(text)["choices"][0]["delta"] == {"content": "x"}
    last = msgspec.json.decode(end)["choices"][0]
    assert (last["delta"], last["finish_reason"], last["stop_reason"]) == ({}, "stop", "END")


def test_logprobs_are_sent_even_without_text() -> None:
    shaper = ChatShaper(head(top=1, ids=True), 1)
    entry = TokenLogprob(0xE2, float("-inf"), ((0xE2, -0.1),))
    (raw,) = events(shaper.delta_events(0, Delta("", (0xE2,), logprobs=(entry,))))
    found = msgspec.json.decode(raw)["choices"][0]
    assert found["token_ids"] == [0xE2]
    token = found["logprobs"]["content"][0]
    assert (token["token"], token["bytes"], token["logprob"]) == ("bytes:\\xe2", [0xE2], MIN_LOGPROB)
    assert token["top_logprobs"][0]["logprob"] == -0.1


def test_completion_offsets_run_over_prompt_and_output() -> None:
    ids = tuple("hé".encode())
    shaper = CompletionShaper(head(top=0), [choice(ids=ids)], ["hé"], False)
    prompt = (None, *(TokenLogprob(i, -1.0) for i in ids[1:]))
    first = shaper.delta_events(0, Delta("a", (97,), logprobs=(TokenLogprob(97, -1.0),), prompt_logprobs=prompt))
    echo, text = (msgspec.json.decode(raw)["choices"][0] for raw in events(first))
    assert echo["text"] == "hé"
    assert echo["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert (text["text"], text["logprobs"]["text_offset"]) == ("a", [2])
    tally = Tally(["a"], [97], [TokenLogprob(97, -1.0)], prompt, Delta("", (), "length"))
    whole = CompletionShaper(head(top=0), [choice(ids=ids)], ["hé"], False)
    usage = count_usage([choice()], [Delta("", (), "length", prompt_tokens=3, completion_tokens=1)])
    answer = msgspec.json.decode(whole.answer([tally], usage), type=Completion)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "héa"
    assert logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.token_logprobs) == 4


def test_scoring_leaves_the_extra_token_out() -> None:
    shaper = CompletionShaper(head(), [choice()], ["a"], True)
    raw = b"".join(shaper.delta_events(0, delta) for delta in (Delta("z", (1,)), Delta("", (), "stop", stop_reason=3)))
    texts = [msgspec.json.decode(part)["choices"][0] for part in events(raw)]
    assert [part["text"] for part in texts] == ["a", ""]
    assert texts[-1]["finish_reason"] == "length"


def test_usage_counts_prompts_once_and_outputs_all() -> None:
    choices = [choice(0, 0), choice(1, 0), choice(2, 1), choice(3, 1)]
    finals = [Delta("", (), "stop", prompt_tokens=p, cached_tokens=c, completion_tokens=o)
              for p, c, o in ((10, 0, 1), (10, 8, 2), (20, 16, 3), (20, 16, 4))]  # fmt: skip
    usage = count_usage(choices, finals)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (30, 10, 40)
    assert usage.prompt_tokens_details.cached_tokens == 16


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_chat_answer(reason: str) -> None:
    last = Delta("", (), reason, prompt_tokens=1, completion_tokens=2)  # type: ignore[arg-type]
    usage = count_usage([choice()], [last])
    raw = ChatShaper(head(), 1).answer([Tally(["a", "b"], [1, 2], last=last)], usage)
    answer = msgspec.json.decode(raw, type=ChatCompletion)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("ab", reason)
    assert answer.choices[0].logprobs is None
