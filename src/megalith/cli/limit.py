"""`--memory` held from outside: a verb runs itself again as a child inside the limit, and the peak is printed.

Knows how peaks are shown; `base.confined` knows how they are held.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megalith.base.confined import Confinement, LimitBy, Peak, is_confined, run_confined
from megalith.base.errors import MegalithError
from megalith.cli import command_line

if TYPE_CHECKING:
    from megalith.engine.api import EngineConfig

_FLOOR_BYTES = 192 << 20
"""Below this an interpreter may not live long enough to say why it cannot serve, so the plan is checked before."""


def held_from_outside(config: EngineConfig, limit_by: LimitBy) -> bool:
    """Whether this process has to start a child for the limit. Memory of a GPU is held by the plan and the runner."""
    return config.memory_bytes is not None and limit_by != "off" and config.device == "cpu" and not is_confined()


def run_again_inside(config: EngineConfig, limit_by: LimitBy, *, as_json: bool) -> int:
    """Run this very command line in the limit; its exit code. Raises LimitExceeded, MachineError or DoesNotFit."""
    memory_bytes = config.memory_bytes
    assert memory_bytes is not None
    if memory_bytes < _FLOOR_BYTES:
        from megalith.plan.fit import check_fits

        check_fits(config)
    command = [sys.executable, "-m", "megalith", *command_line.tokens.get()]
    sys.stdout.flush()

    def on_peak(peak: Peak) -> None:
        if as_json:
            import dataclasses
            import json

            line = {**dataclasses.asdict(peak), "event": f"peak at {peak.event}", "nature": "measured"}
            print(json.dumps(line), file=sys.stderr, flush=True)
        else:
            print(f"at {peak.event}: {peak}", file=sys.stderr, flush=True)

    return run_confined(command, Confinement(memory_bytes, limit_by, _files_of(config.model)), on_peak)


def _files_of(model: str) -> tuple[Path, ...]:
    """The files of a model; empty where it cannot be found: the child says so."""
    from megalith.model.source import resolve

    with contextlib.suppress(MegalithError, OSError):
        path = resolve(model).path
        if path.is_dir():
            return tuple(path.glob("*.safetensors"))
        if "-of-" in path.name:
            return tuple(path.parent.glob(f"{path.name.rsplit('-', 3)[0]}-*{path.suffix}"))
        return (Path(os.path.realpath(path)),)
    return ()
