"""The C compiler of this machine, and what building with it needs: a lock, a deadline, the compiler's words on failure.

Standard library only: the build hook of the package uses it before anything that Megalith depends on is installed.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCK_S = 300.0
"""Deadline of waiting for another process that builds the same."""
_KEEP_S = 3600.0
"""What was built from older sources stays this long: a process may be about to read it."""


class BuildFailed(Exception):
    """Something could not be built; the message says why, with the compiler's words."""


def find_compiler() -> list[str] | None:
    """The command of the C compiler: $CC, else cc, gcc or clang; None if there is none."""
    asked = os.environ.get("CC")
    for candidate in [asked] if asked else ["cc", "gcc", "clang"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]) is not None:
            return command
    return None


def require_compiler() -> list[str]:
    """find_compiler(), or BuildFailed."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed(f"no C compiler: {os.environ.get('CC') or 'none of cc, gcc and clang'} is not installed")
    return compiler


def build_once(target: Path, lock: str, make: Callable[[list[str], Path], Path]) -> Path:
    """`target` (KIND-DIGEST, a file or a folder), made now unless it is there: `make` gets the compiler and a scratch
    folder, and what it returns is moved into place. Safe against other processes that do the same. Raises BuildFailed.
    """
    if target.exists():
        return target
    compiler, folder, kind = require_compiler(), target.parent, target.name.partition("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / lock), tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=folder) as scratch:
        if not target.exists():
            os.replace(make(compiler, Path(scratch)), target)
            _remove_old(target, kind)
    return target


def _remove_old(keep: Path, kind: str) -> None:
    """What was built from older sources. A process that has it loaded keeps it."""
    for old in keep.parent.glob(f"{kind}-*{keep.suffix}"):
        if old == keep or time.time() - old.stat().st_mtime <= _KEEP_S:
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; wait for at most LOCK_S."""
    deadline = time.monotonic() + LOCK_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildFailed(f"another process has held {path} for {LOCK_S:.0f} s") from None
                time.sleep(0.05)
        yield


def run(
    command: Sequence[str], timeout_s: float, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Run a step of a build. Raises BuildFailed with the end of what it said."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=folder, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} did not finish: {error}") from None
    if result.returncode != 0:
        said = result.stderr.strip() or result.stdout.strip()
        raise BuildFailed(f"{' '.join(command)} failed:\n{said[-2000:]}")
