"""The guide to workloads: its Python runs, its workloads parse, its table is that of the catalogue."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megalith.specs.arrivals import ClosedLoop
from megalith.specs.workload import open_workload
from megalith.specs.workload_catalog import workloads
from megalith.specs.workload_text import parse_workload

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "workloads.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_python_runs(code: str) -> None:
    exec(compile(code, "workloads.md", "exec"), {})


def test_every_workload_that_it_writes_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i * 30},{100 + i},5\n" for i in range(60))
    (tmp_path / "plain.csv").write_text("at_s,input_tokens,output_tokens\n" + rows)
    (tmp_path / "own.csv").write_text("when,prompt,answer,blocks,urgency\n0,600,5,1 2,0\n5,600,5,1 3,1\n")
    with (tmp_path / "plain.csv").open("rb") as plain:
        import gzip

        with gzip.open(tmp_path / "hour.csv.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
    texts = re.findall(r"(?:`|^)((?:hour\.csv\.gz|own\.csv)(?::[^`\s]+)?)(?:`|$)", PAGE, re.MULTILINE)
    texts += re.findall(r"--workload (\S+)", PAGE)
    assert len(texts) >= 9
    for text in texts:
        spec = parse_workload(text)
        assert next(open_workload(spec, 1)).input_tokens > 0
        assert not isinstance(spec.arrivals, ClosedLoop)


def test_it_names_every_built_in_workload() -> None:
    table = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE)
    assert set(workloads()) <= set(table)
