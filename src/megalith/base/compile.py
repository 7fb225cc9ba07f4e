"""Build the compiled modules (see base/compiled.py): mypyc makes C of them, the C compiler the rest.

    python -m megalith.base.compile

Takes about a minute, and nothing when they are there. Needs mypy and setuptools, but only now.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megalith.base.compiled import GROUP, MODULES, PACKAGE, folder, source
from megalith.base.toolchain import BuildFailed, build_once, run

_DEADLINE_S = 900.0
_FLAGS = ("--follow-imports=silent", "--ignore-missing-imports")
_SCRIPT = f"""
import sys
from mypyc.build import mypycify
from setuptools import setup

out, scratch, *arguments = sys.argv[1:]
extensions = mypycify(
    arguments, opt_level="3", debug_level="0", group_name={GROUP!r}, target_dir=scratch + "/c"
)
words = ["-q", "build_ext", "--build-lib", out, "--build-temp", scratch + "/o"]
setup(name={GROUP!r}, ext_modules=extensions, script_args=words)
"""


def build() -> Path:
    """Compile, unless that was done; the folder. Safe against other processes that do the same. Raises BuildFailed."""
    return build_once(folder(), ".lock", _compile)


def _compile(_compiler: list[str], scratch: Path) -> Path:
    made = scratch / "out"
    files = [str(source(name).relative_to(PACKAGE.parent)) for name in MODULES]
    words = [*_FLAGS, "--cache-dir", str(scratch / "cache"), *files]
    environment = {**os.environ, "MYPYPATH": str(PACKAGE.parent)}
    run([sys.executable, "-c", _SCRIPT, str(made), str(scratch), *words], _DEADLINE_S, PACKAGE.parent, environment)
    if not made.is_dir():
        raise BuildFailed("mypyc made nothing")
    return made


def main() -> int:
    """The command. Exit code 1 when it could not be built."""
    begun = time.monotonic()
    try:
        target = build()
    except (BuildFailed, OSError) as error:
        print(f"The simulator's modules were not compiled: {error}", file=sys.stderr)
        return 1
    print(f"{target} ({time.monotonic() - begun:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
