"""`megalith simulate blocks`: figures as JSON and as a table, and what is refused."""

from __future__ import annotations

import json
import shlex

import pytest

from megalith.cli.main import run


def test_figures_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    line = "simulate blocks --trace poisson:rate=20,input=64,output=4,requests=12 --requests 12"
    assert run(shlex.split(f"{line} --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"]["requests"] == 12
    assert run(shlex.split(f"{line} --sharing model --kv pinned")) == 0
    assert "simulated" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["--sharing bloks", "--kv never", "--servers two", "--blocks 9", "--bases nothing"])
def test_what_cannot_be_is_one_paragraph(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(f"simulate blocks --requests 5 {change}")) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
