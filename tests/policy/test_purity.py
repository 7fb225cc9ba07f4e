"""policy/ is pure: it imports nothing but the standard library and the floors below, and of these no clock or dice."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megalith.policy

FILES = sorted(Path(megalith.policy.__file__).parent.glob("*.py"))
FORBIDDEN = {"time", "datetime", "random", "secrets", "os", "socket", "threading", "asyncio", "subprocess", "io"}
ALLOWED_FLOORS = ("megalith.base", "megalith.specs", "megalith.cost", "megalith.policy")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path: Path) -> None:
    for name in imported(path):
        top = name.partition(".")[0]
        if top == "megalith":
            assert name.startswith(ALLOWED_FLOORS), name
        else:
            assert top in ("msgspec", "mypy_extensions") or top in sys.stdlib_module_names, name
            assert top not in FORBIDDEN, name


def test_importing_all_of_policy_pulls_no_torch_and_no_numpy() -> None:
    modules = ", ".join(f"megalith.policy.{path.stem}" for path in FILES if path.stem != "__init__")
    code = f"import sys, {modules}; print(sorted({{'torch', 'numpy'}} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
