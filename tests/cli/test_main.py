"""The command as a whole: help, exit codes, error paragraphs, what is imported and how fast."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from megalith import __version__
from megalith.cli.main import VERBS

from .command import COMMAND, environment, megalith


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there_and_its_help_has_an_example(verb: str) -> None:
    result = megalith(verb, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: megalith {verb}")
    examples = result.stdout.partition("Examples:")[2]
    assert f"megalith {verb}" in examples, "help shows how it is used"


def test_help_of_the_load_generator() -> None:
    result = megalith("bench", "serve", "--help")
    assert "megalith bench serve --rate" in result.stdout.partition("Examples:")[2]
    assert "serve" in megalith("bench", "--help").stdout.partition("Commands")[2]


def test_help_lists_all_verbs_in_their_order() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        result = megalith(*arguments)
        assert result.returncode == 0
        places = [result.stdout.index(f"│ {verb} ") for verb in VERBS]
        assert places == sorted(places)


def test_version() -> None:
    for flag in ("--version", "-V"):
        assert megalith(flag).stdout == f"megalith {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serv"], "Did you mean `megalith serve`?"),
        (["--verbose"], "`megalith` has no flag `--verbose`"),
        (["models", "shwo", "x"], "Did you mean `megalith models show`?"),
        (["doctor", "now"], "has no use for `now`"),
        (["models", "--jsn"], "Did you mean `--json`?"),
        (["bench", "serve", "--concurency", "3"], "Did you mean `--concurrency`?"),
        (["bench", "serve", "--rate", "fast"], 'unable to convert "fast" into float'),
        (["bench", "serve", "--rate", "2", "--concurrency", "2"], "different kinds of load"),
        (["bench", "serve", "--slo", "tfft=3ms"], "Write ttft=200ms"),
        (["bench", "serve", "--url", "http://example.com/v1"], "--allow-remote"),
        (["bench", "serve", "--plot", "x.doc"], "End the name in .png"),
        (["complete", "--temperature"], "requires an argument"),
        (["complete", "x", "y", "--mode", "fast"], "Take auto, native, bf16 or float32"),
        (["chat", "-m", " "], "nothing to answer"),
    ],
)
def test_a_command_line_that_cannot_be_used_is_one_paragraph_and_exit_2(arguments: list[str], expected: str) -> None:
    result = megalith(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_expected_failure_is_one_paragraph_and_with_json_one_object() -> None:
    plain = megalith("models", "show", "smolm3")
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr.startswith("error: There is no model 'smolm3'")
    assert "smollm2" in plain.stderr
    told = megalith("models", "show", "smolm3", "--json")
    assert (told.returncode, told.stderr) == (1, "")
    error = json.loads(told.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == ("ModelNotFound", 1)
    assert "smollm2" in error["hint"]


def test_a_reader_who_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert errors == ""


def _modules_after(*arguments: str) -> set[str]:
    """What a verb has imported at its end. The deadline is for `doctor`, which may have a library to compile."""
    script = (
        "import sys, io, contextlib\n"
        "from megalith.cli.main import run\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        f"    run({list(arguments)!r})\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=280, env=environment()
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "serve", "llama-2-7b", "--device", "a100-80"],
        ["models"],
        ["doctor"],
        ["bench", "serve", "--url", "http://127.0.0.1:9/v1"],
    ],
    ids=" ".join,
)
def test_no_verb_pays_for_another(arguments: list[str]) -> None:
    loaded = _modules_after(*arguments)
    assert not loaded & {"torch", "starlette", "uvicorn", "transformers", "matplotlib"}
    if arguments == ["--help"]:
        assert not loaded & {"numpy", *(f"megalith.cli.{verb}" for verb in VERBS)}


def test_help_is_fast() -> None:
    """Processor time, best of five: what a person waits on a machine that has a core for it."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert megalith("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.4
