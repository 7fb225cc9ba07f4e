"""The simulator's inner modules, compiled: the same Python sources through mypyc, loaded in their place when they fit.

One source, two ways to run it. `build()` translates MODULES to C and compiles them into a folder named after the
sources, the interpreter and the machine; `install()` has Python take them from there. A source that was changed since
gives another name, so it runs as it is written until it is built again: nothing stale is ever loaded. Without a C
compiler, or with MEGALITH_PURE_PYTHON=1, everything runs as plain Python, slower, with the same results.

Knows files and names; must not know what the modules do. Standard library only, for the build hook of the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType

# What is imported here is imported by `import megalith`: nothing that takes milliseconds.
PACKAGE = Path(__file__).resolve().parents[1]
HOME = PACKAGE / "compiled"
"""Holds one folder for each state of the sources that was built."""
MODULES = (
    "cost.timer_operators",
    "cost.timer_phases",
    "policy.batching",
    "policy.cohort",
    "policy.draft",
    "policy.draft_prompts",
    "policy.facts",
    "policy.kv",
    "policy.pipelined",
    "policy.pooled_memory",
    "policy.roster",
    "policy.routing",
    "policy.scheduler",
    "policy.sequence",
    "sim.cluster",
    "sim.control",
    "sim.expert_instance",
    "sim.instance",
    "sim.kernel",
    "sim.live",
    "sim.gaps",
    "sim.pipelined",
    "sim.pooled_instance",
    "sim.record",
    "sim.run",
    "sim.series",
    "sim.transfer",
    "sim.view",
    "specs.replay",
    "specs.shape",
    "specs.trace_rows",
    "specs.trace_values",
)
"""What a simulated request goes through, below `megalith`."""
FLOORS = ("base", "cost", "policy", "report", "sim", "specs")
"""All that they import from: constants and types of those are compiled in, so a change in any of them counts."""
GROUP = "megalith_core"
LIBRARY = f"{GROUP}__mypyc"
"""What the compiled modules share; they import it by this name."""
PURE = "MEGALITH_PURE_PYTHON"


def folder() -> Path:
    """Where these modules lie once they are compiled: the name changes with every source, interpreter and machine."""
    import hashlib
    import sysconfig

    digest = hashlib.sha256(repr((MODULES, sys.version, sysconfig.get_platform())).encode())
    for floor in FLOORS:
        for path in sorted((PACKAGE / floor).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return HOME / f"core-{digest.hexdigest()[:16]}"


def source(name: str) -> Path:
    """The Python file of one of MODULES."""
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def active() -> bool:
    """Whether this process runs the compiled modules."""
    return any(isinstance(finder, Compiled) and finder.folder is not None for finder in sys.meta_path)


def install() -> None:
    """Have Python import the compiled modules, where they are and fit; what is imported already stays."""
    if not os.environ.get(PURE) and HOME.is_dir():
        sys.meta_path.insert(0, Compiled())


class Compiled:
    """A finder for `sys.meta_path`: MODULES in the folder of the compiled ones."""

    def __init__(self) -> None:
        self._names = frozenset(f"megalith.{name}" for name in MODULES) | {LIBRARY}
        self._looked = False
        self._folder: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, None when these sources were not compiled. The sources are read once, at the first import."""
        if not self._looked:
            self._looked = True
            wanted = folder()
            self._folder = wanted if wanted.is_dir() else None
        return self._folder

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - names that finders have
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        if fullname not in self._names or self.folder is None:
            return None
        file = str(self.folder.joinpath(*fullname.split("."))) + EXTENSION_SUFFIXES[0]
        spec = ModuleSpec(fullname, ExtensionFileLoader(fullname, file), origin=file)
        spec.has_location = True
        return spec
