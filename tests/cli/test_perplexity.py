"""`megalith perplexity` as a person or a script runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalith.engine.perplexity import TEXT
from tests.engine.tiny import write_tiny_llama

from .command import megalith
from .test_interrupt import Terminal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


def test_native_against_float32(tiny: str) -> None:
    done = megalith("perplexity", tiny, "--context", "64", "--tokens", "640", "--against", "float32", "--json")
    found = json.loads(done.stdout)
    assert (found["windows"], found["tokens"], found["reference"]) == (10, 310, "float32")
    assert found["reference_runner"] == "torch-cpu-float32"
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.1)  # random weights, 12 nats
    assert 0 <= found["mean_kl_nats"] < 0.03
    assert found["top1_agreement"] > 0.9


def test_a_figure_says_what_it_is(tiny: str, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("naïve café, " * 100)
    done = megalith("perplexity", tiny, "--context", "64", "--text", str(text))
    assert done.returncode == 0, done.stderr
    assert " ± " in done.stdout
    assert "measured" in done.stdout
    assert "windows of 64" in done.stdout


def test_errors_are_one_paragraph(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    for arguments, message in (
        (["--text", str(tmp_path / "latin.txt")], "byte 3"),
        (["--text", str(tmp_path / "absent.txt")], "No such file"),
        (["--tokens", "30"], "30 tokens"),
        (["--context", "4"], "at least 16"),
        (["--context", "64", "--against", "tinny"], "tinny"),
    ):
        done = megalith("perplexity", tiny, *arguments)
        assert (done.returncode in (1, 2), done.stdout) == (True, ""), arguments
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_control_c_leaves_quietly(tiny: str, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT.read_text() * 10)
    shown = Terminal("perplexity", tiny, "--context", "64", "--text", str(text))
    shown.until("scoring")
    shown.interrupt()
    assert shown.end() == 130
