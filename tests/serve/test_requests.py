"""Bodies, fields, parameters, keys and bind rules, without a socket."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.config import convert
from megalith.base.errors import ConfigError, RequestError
from megalith.serve.body import UNSERVED, parse_body
from megalith.serve.config import ServerConfig, ServeRecipe
from megalith.serve.errors import ApiError, to_api_error
from megalith.serve.keys import KeyRing
from megalith.serve.sampling import chat_params, completion_params, split_choices
from megalith.serve.schema import ChatRequest, CompletionRequest

CONFIG = ServerConfig()
HELLO = [{"role": "user", "content": "hello"}]


def chat(config: ServerConfig = CONFIG, **fields: object) -> ChatRequest:
    return parse_body(msgspec.json.encode({"messages": HELLO, **fields}), ChatRequest, config)


def completion(**fields: object) -> CompletionRequest:
    return parse_body(msgspec.json.encode({"prompt": "a", **fields}), CompletionRequest, CONFIG)


def refused(**fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def test_every_sampling_parameter_reaches_the_engine() -> None:
    request = chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=-0.4, logit_bias={"5": 2, "6": -100.0}, seed=-3, max_completion_tokens=9, min_tokens=2,
        stop=["x", "yz"], stop_token_ids=[1, 2], ignore_eos=True, logprobs=True, top_logprobs=3,
        response_format={"type": "json_object"},
    )  # fmt: skip
    params = chat_params(request, vocab=10, max_context=100)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.3, -0.4)
    assert params.logit_bias == {5: 2.0, 6: -100.0}
    assert (params.seed, params.max_tokens, params.min_tokens) == (-3, 9, 2)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "yz"), (1, 2), True)
    assert params.logprobs == 3
    assert params.grammar is not None
    assert params.grammar.kind == "json_object"


def test_every_field_of_sampling_params_can_be_asked_for() -> None:
    """A parameter added to the engine must not be forgotten here."""
    from megalith.engine.params import SamplingParams

    asked = {"grammar": "response_format", "prompt_logprobs": "echo"}
    for name in SamplingParams.__struct_fields__:
        assert asked.get(name, name) in CompletionRequest.__struct_fields__, name


def test_null_means_not_given_and_ignored_fields_pass() -> None:
    request = chat(temperature=None, stop=None, user="u", metadata={"a": "b"}, store=False, service_tier="auto",
                   modalities=["text"], reasoning_effort=None, functions=None)  # fmt: skip
    assert request.temperature == 1.0


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_unserved_fields_are_refused_when_they_would_matter(name: str) -> None:
    error = refused(**{name: "high"})
    assert error.body.error.param == name
    assert error.body.error.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("wrong", "near"), [("max_tokns", "max_tokens"), ("temprature", "temperature"), ("top-k", "top_k")]
)
def test_unknown_field_names_the_nearest(wrong: str, near: str) -> None:
    error = refused(**{wrong: 1})
    assert f"`{near}`" in error.body.error.message
    assert error.body.error.param == wrong


def test_lenient_drops_unknown_fields_but_not_unserved_ones() -> None:
    lenient = ServerConfig(lenient=True)
    assert chat(lenient, max_tokns=1).max_tokens is None
    with pytest.raises(ApiError):
        chat(lenient, audio={"voice": "alloy"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": True}, "temperature"),
        ({"stop": [1]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0]"),
        ({"stream_options": {"include_usag": True}}, "stream_options"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"priority": 2**40}, "priority"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ],
)
def test_wrong_types_name_the_field(fields: dict, param: str) -> None:
    assert refused(**fields).body.error.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"temperature": -1},
        {"top_p": 0},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"10": 1}},
        {"logit_bias": {"1": 101}},
        {"seed": 2**64},
        {"max_tokens": 0},
        {"stop": ["a"] * 17},
        {"stop": [""]},
        {"stop_token_ids": [10]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
    ],
)
def test_impossible_parameters_are_refused(fields: dict) -> None:
    with pytest.raises((ApiError, RequestError)):
        chat_params(chat(**fields), vocab=10, max_context=100)


def test_completion_defaults_and_scoring() -> None:
    assert completion_params(completion(), 10, 100).max_tokens == 16
    assert completion_params(completion(max_tokens=10**30), 10, 100).max_tokens == 100
    scoring = completion_params(completion(max_tokens=0, echo=True, logprobs=1), 10, 100)
    assert (scoring.max_tokens, scoring.prompt_logprobs) == (1, True)
    with pytest.raises((ApiError, RequestError)):
        completion_params(completion(max_tokens=0), 10, 100)
    with pytest.raises(ApiError):
        completion_params(completion(best_of=2), 10, 100)


def test_grammars() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    text = msgspec.json.encode(schema).decode()
    for fields in ({"response_format": form}, {"guided_json": schema}, {"guided_json": text}):
        grammar = chat_params(chat(**fields), 10, 100).grammar
        assert grammar is not None
        assert (grammar.kind, msgspec.json.decode(grammar.definition)) == ("json_schema", schema)
    assert chat_params(chat(guided_regex="a+"), 10, 100).grammar == convert(
        {"kind": "regex", "definition": "a+"}, type(grammar), "test"
    )
    assert chat_params(chat(response_format={"type": "text"}), 10, 100).grammar is None


def test_choices_have_distinct_reproducible_seeds() -> None:
    params = completion_params(completion(seed=7), 10, 100)
    first = split_choices([[1], [2]], params, 3, CONFIG, "prompt")
    assert first == split_choices([[1], [2]], params, 3, CONFIG, "prompt")
    assert [(c.index, c.prompt_index) for c in first] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    seeds = [c.params.seed for c in first]
    assert seeds[0] == 7
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:]


@pytest.mark.parametrize(("prompts", "n"), [([[1]], 17), ([[1]] * 33, 2), ([[1], []], 1)])
def test_too_many_choices_or_empty_prompts(prompts: list[list[int]], n: int) -> None:
    with pytest.raises(ApiError):
        split_choices(prompts, completion_params(completion(), 10, 100), n, CONFIG, "prompt")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff", b'{"a":\xff}', b'{"messages":"\\ud800"}', b"\xef\xbb\xbf{}",
     b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70, b'{"messages": NaN}', b'{"seed": 1e999}', b"{}{}"],
)  # fmt: skip
def test_malformed_bodies(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(body, ChatRequest, CONFIG)
    assert caught.value.status == 400
    msgspec.json.decode(caught.value.encode())


def test_depth_limit_is_exact() -> None:
    config = ServerConfig(max_json_depth=4)
    deep = b'{"messages":[{"role":"user","content":"a"}],"tools":[{"a":%s}]}'
    assert parse_body(deep % b"{}", ChatRequest, config).tools == [{"a": {}}]
    with pytest.raises(ApiError, match="4 levels"):
        parse_body(deep % b'{"b":{}}', ChatRequest, config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(ChatRequest.__struct_fields__) | st.text(max_size=12), json_values, max_size=6))
def test_any_json_object_is_accepted_or_refused_cleanly(fields: dict) -> None:
    import json

    for kind, params in ((ChatRequest, chat_params), (CompletionRequest, completion_params)):
        try:
            params(parse_body(json.dumps(fields).encode(), kind, CONFIG), 10, 100)  # type: ignore[operator]
        except (ApiError, RequestError) as caught:
            refusal = to_api_error(caught, "id")
        else:
            continue
        assert refusal.status == 400
        assert msgspec.json.decode(refusal.encode())["error"]["message"]


def test_key_ring(tmp_path) -> None:
    path = tmp_path / "keys"
    secret = "c" * 32
    path.write_text(f"# ours\nsk-aaaaaaaaaaaaaaaaaaaa\nalice:bbbbbbbbbbbbbbbbbbbb\n"
                    f"bob:sha256:{hashlib.sha256(secret.encode()).hexdigest()}\n\n")  # fmt: skip
    ring = KeyRing.from_file(str(path))
    assert ring.find("Bearer sk-aaaaaaaaaaaaaaaaaaaa") == "key-1"
    assert ring.find("bearer bbbbbbbbbbbbbbbbbbbb") == "alice"
    assert ring.find(f"Bearer {secret}") == "bob"
    for wrong in (None, "", "Bearer", "Bearer ", "Basic bbbbbbbbbbbbbbbbbbbb", "Bearer alice", "Bearer \udcff", secret):
        assert ring.find(wrong) is None
    assert "aaaa" not in repr(vars(ring))


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", "alice:short\n", "\x00\n"], ids="abcde")
def test_bad_key_files(tmp_path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        KeyRing.from_file(str(path))
    assert "short" not in str(caught.value)
    with pytest.raises(ConfigError):
        KeyRing.from_file(str(tmp_path / "missing"))


def test_bind_rules() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        ServerConfig(host=host).check_bind()
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="API keys"):
            ServerConfig(host=host).check_bind()
        ServerConfig(host=host, insecure=True).check_bind()
        ServerConfig(host=host, api_key_file="k").check_bind()


def test_recipe_is_strict() -> None:
    data = {"engine": {"model": "m"}, "server": {"max_body_byts": 5}}
    with pytest.raises(ConfigError, match="max_body_bytes"):
        convert(data, ServeRecipe, "serve.toml")
    with pytest.raises(ConfigError, match="max_n"):
        ServerConfig(max_n=0)
