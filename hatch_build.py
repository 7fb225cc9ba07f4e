"""Build hook: compile what is compiled in Megalith while the package is installed or its wheel is made.

That is the native CPU backend (seconds) and the simulator's inner modules (a minute). It never fails an installation:
without a C compiler it says what is lost, and everything runs, slower.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = "src"


class CompileHook(BuildHookInterface[Any]):
    """Puts what it builds beside the sources and, for a wheel, into it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is put together; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        sys.path.insert(0, str(root / SOURCES))
        library, core = self._native(), self._core()
        if version == "editable" or (library is None and core is None):
            return
        made = [
            *([library] if library else []),
            *([file for file in core.rglob("*") if file.is_file()] if core else []),
        ]
        build_data["artifacts"].extend(str(file.relative_to(root)) for file in made)
        build_data["pure_python"] = False
        # The backend is loaded through ctypes by any Python, the modules by the one that they were compiled for.
        python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"{python}-{python}-{platform}" if core else f"py3-none-{platform}"

    def _native(self) -> Path | None:
        try:
            from megalith.engine.native import build

            return build.build(build.HERE)
        except Exception as error:
            self._lost("The native CPU backend", "The torch path serves instead, slower.", error)
            return None

    def _core(self) -> Path | None:
        try:
            from megalith.base import compile as core

            return core.build()
        except Exception as error:
            self._lost("The simulator's inner modules", "They run as plain Python, slower.", error)
            return None

    def _lost(self, what: str, instead: str, error: Exception) -> None:
        self.app.display_warning(f"{what} could not be compiled: {error}")
        self.app.display_warning(instead)
