"""The compiled modules: taken only where they fit, equal to the sources they were made of, built or refused clearly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalith.base import compile as building
from megalith.base import compiled
from megalith.base.toolchain import BuildFailed, find_compiler

RUN = """
import json, sys
from megalith.sim import instance, run
from megalith.sim.scenario import Scenario
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.workload_text import parse_workload

pools = (
    PoolSpec(name="p", device="h100-sxm", count=2, role="prefill"),
    PoolSpec(name="d", device="h100-sxm", count=2, role="decode", kv_blocks=900),
    PoolSpec(name="m", device="h100-sxm", count=2, kv_blocks=900),
)
words = "azure-conv:rate=60,requests=600"
for fleet in (
    FleetSpec(pools=pools[:2], router=PolicySpec(name="splitwise")),
    FleetSpec(pools=pools[2:], router=PolicySpec(name="freeness"), controllers=(PolicySpec(name="rebalance"),)),
):
    result = run.simulate(Scenario(model="llama-3.1-8b", fleet=fleet, workload=parse_workload(words)))
    print(json.dumps([instance.__file__, result.digest, result.events, result.end_ns, result.migrations.done]))
"""


def simulated(**environment: str) -> list[list[object]]:
    result = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_compiled_and_plain_decide_the_same() -> None:
    if not compiled.folder().is_dir():
        pytest.skip("the inner modules are not compiled for these sources")
    plain, fast = simulated(MEGALITH_PURE_PYTHON="1"), simulated(MEGALITH_PURE_PYTHON="")
    for one, other in zip(plain, fast, strict=True):
        assert str(one[0]).endswith("instance.py")
        assert str(other[0]).startswith(str(compiled.folder()))
        assert one[1:] == other[1:]


def test_plain_python_passes_the_tests_of_leaping() -> None:
    """Whoever has no compiler runs these very sources."""
    if not compiled.active():
        pytest.skip("everything here runs as plain Python anyway")
    here = Path(__file__).parents[1]
    files = [str(here / name) for name in ("policy/test_leaping.py", "sim/test_leaping.py", "specs/test_workload.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "MEGALITH_PURE_PYTHON": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]


def test_a_changed_source_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "megalith"
    for floor in compiled.FLOORS:
        (package / floor).mkdir(parents=True)
        (package / floor / "one.py").write_text("A = 1\n")
    monkeypatch.setattr(compiled, "PACKAGE", package)
    before = compiled.folder()
    assert before == compiled.folder()
    (package / "specs" / "one.py").write_text("A = 2\n")
    assert before != compiled.folder()
    (package / "specs" / "one.py").write_text("A = 1\n")
    assert before == compiled.folder()


def test_only_its_own_modules_are_found_and_only_when_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "HOME", tmp_path)
    assert compiled.Compiled().find_spec("megalith.policy.kv") is None
    compiled.folder().mkdir()
    finder = compiled.Compiled()
    found = finder.find_spec("megalith.policy.kv")
    assert found is not None
    assert found.origin is not None
    assert found.origin.startswith(str(compiled.folder() / "megalith" / "policy" / "kv."))
    assert finder.find_spec("megalith.policy.registry") is None
    assert finder.find_spec("json") is None


def test_every_module_is_there() -> None:
    assert [name for name in compiled.MODULES if not compiled.source(name).is_file()] == []
    assert {name.partition(".")[0] for name in compiled.MODULES} <= set(compiled.FLOORS)


def test_no_compiler_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "HOME", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert building.main() == 1
    assert "no-such-compiler is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
def test_what_the_compiler_says_comes_through_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "megalith"
    for floor in compiled.FLOORS:
        (package / floor).mkdir(parents=True)
    (package / "policy" / "kv.py").write_text("def broken(: pass\n")
    for module in (compiled, building):
        monkeypatch.setattr(module, "PACKAGE", package)
        monkeypatch.setattr(module, "MODULES", ("policy.kv",))
    monkeypatch.setattr(compiled, "HOME", tmp_path / "out")
    with pytest.raises(BuildFailed, match=r"kv\.py:1: error"):
        building.build()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
