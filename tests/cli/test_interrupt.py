"""Ctrl-C: quiet, exit code 130, and what was measured so far is not lost."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .command import COMMAND, environment, start
from .paced_server import PacedApp, serving


def _wait_for(app: PacedApp, answers: int) -> None:
    deadline = time.monotonic() + 60
    while app.answers_ended < answers:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_load_run_prints_what_it_has() -> None:
    app = PacedApp(0.01, 0.002)
    with serving(app) as url:
        process = start("bench", "serve", "--url", url, "--duration", "300s", "--concurrency", "2", "--output", "4")
        _wait_for(app, 12)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "TTFT" in out
    assert "Interrupted" in errors
    assert "Traceback" not in errors


def test_a_load_run_with_json_is_still_one_document(tmp_path: Path) -> None:
    app = PacedApp(0.01, 0.002)
    with serving(app) as url:
        kept = tmp_path / "records.jsonl"
        process = start("bench", "serve", "--url", url, "--rate", "50", "--duration", "300s", "--json", "--output", "4",
                        "--out", str(kept))  # fmt: skip
        _wait_for(app, 20)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    report = json.loads(out)["report"]
    assert process.returncode == 130
    assert errors == ""
    assert report["ok"] >= 10
    assert report["ok"] + report["cancelled"] == report["issued"]
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sum(record["outcome"] == "ok" for record in records) == report["ok"]


@pytest.mark.parametrize("verb", ["complete", "chat"])
def test_an_answer_that_is_cut_off_leaves_quietly(verb: str) -> None:
    app = PacedApp(0.01, 0.05)
    with serving(app) as url:
        prompt = ["hello"] if verb == "complete" else ["--message", "hello"]
        process = start(verb, "--url", url, *prompt, "--max-tokens", "1000")
        deadline = time.monotonic() + 60
        while app.tokens_sent < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert app.answers_dropped == 1
    assert (process.returncode, errors) == (130, "")
    assert out.startswith(" é é é")


class Terminal:
    """A chat in a pseudo-terminal, driven by keys and read like a screen."""

    def __init__(self, *arguments: str) -> None:
        self._keys, screen = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=screen, stdout=screen, stderr=screen,
            env=environment(TERM="xterm"), start_new_session=True,
        )  # fmt: skip
        os.close(screen)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._keys, text.encode())

    def interrupt(self, then: str = "") -> None:
        self.process.send_signal(signal.SIGINT)
        self.type(then)

    def until(self, text: str) -> str:
        """Read until `text` appears after what was already consumed; give everything up to its end."""
        deadline = time.monotonic() + 60
        while text not in self._seen:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {self._seen!r}"
            if select.select([self._keys], [], [], left)[0]:
                self._seen += os.read(self._keys, 65536).decode("utf-8", "replace")
        end = self._seen.index(text) + len(text)
        taken, self._seen = self._seen[:end], self._seen[end:]
        return taken

    def end(self) -> int:
        try:
            return self.process.wait(timeout=30)
        finally:
            os.close(self._keys)


def test_a_conversation(tmp_path: Path) -> None:
    app = PacedApp(0.01, 0.02)
    saved = tmp_path / "talk.json"
    with serving(app) as url:
        chat = Terminal("chat", "--url", url, "--max-tokens", "200", "--system", "be brief")
        chat.until("> ")
        chat.type("first\n")
        chat.until(" é é é")
        chat.interrupt()
        chat.until("stopped")
        chat.until("> ")
        chat.type("/clera\n")
        chat.until("Did you mean /clear?")
        chat.type("second\n")
        assert "200 out" in chat.until("tok/s")
        chat.type(f"/save {saved}\n")
        chat.until("saved 4 turns")
        chat.type("/clear\n")
        chat.until("cleared")
        chat.type("third\n")
        chat.until("tok/s")
        chat.type("/exit\n")
        assert chat.end() == 0
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    sent = [[message["content"] for message in request["messages"]] for request in app.requests]
    assert sent[0] == ["be brief", "first"]
    assert sent[1][:2] == ["be brief", "first"]
    assert sent[1][2].startswith(" é é é")
    assert sent[1][2].count("é") < 200
    assert sent[1][3] == "second"
    assert sent[2] == ["be brief", "third"]


def test_two_interrupts_at_the_prompt_leave() -> None:
    with serving(PacedApp()) as url:
        chat = Terminal("chat", "--url", url)
        # The empty line wakes a readline that the signal hit on its way into its wait.
        chat.until("> ")
        chat.interrupt(then="\n")
        chat.until("Ctrl-C again")
        chat.until("> ")
        chat.interrupt(then="\n")
        assert chat.end() == 130


def test_a_missing_trace_is_one_paragraph() -> None:
    with serving(PacedApp(0.0, 0.0)) as url:
        process = start("bench", "serve", "--url", url, "--trace", "nowhere.csv")
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "There is no trace at nowhere.csv" in errors
    assert "Traceback" not in errors
