"""Build hook: compile the native CPU backend while the package is installed or its wheel is made.

It takes seconds and never fails an installation: without a C compiler it says what is lost, and Megalith compiles on
first use should a compiler turn up later.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/megalith/engine/native")


def _load_builder(root: Path) -> ModuleType:
    """The build module, by path: importing it as part of Megalith would need Megalith's dependencies."""
    spec = importlib.util.spec_from_file_location("megalith_native_build", root / NATIVE / "build.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{NATIVE / 'build.py'} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NativeBuildHook(BuildHookInterface[Any]):
    """Puts the library beside its sources and, for a wheel, into it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is put together; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        try:
            root = Path(self.root)
            library: Path = _load_builder(root).build(root / NATIVE)
        except Exception as error:
            self.app.display_warning(f"The native CPU backend was not built: {error}")
            self.app.display_warning(
                "The torch path serves instead, slower. With a C compiler it is built on first use."
            )
            return
        if version != "editable":
            build_data["artifacts"].append(str(NATIVE / library.name))
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
