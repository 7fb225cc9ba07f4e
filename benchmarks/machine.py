"""The machine under a benchmark: what it is, what else runs on it, and what one core of it can do at most."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
TIMEOUT_S = 120


def describe() -> dict[str, Any]:
    """CPU model, cores, the instruction sets that matter here, memory, kernel."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        info[key.strip()] = value.strip()
    have = info.get("flags", "").split()
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": f"{info.get('model name', '?')} (family {info.get('cpu family', '?')}, model {info.get('model', '?')})",
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in have],
        "memory_gib": round(memory_kb / 2**20, 1),
        "kernel": os.uname().release,
    }


def commit() -> str:
    """The commit of the code under test, with a + when the package differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../src") else "")


def busy_s() -> float:
    """CPU seconds that all processes together have used since boot (all cores, steal not counted)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq = ticks[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Load:
    """CPU time that others took over an interval: `other_cores` is their CPU seconds a second of wall time."""

    def __init__(self) -> None:
        self._busy_s, self._begin = busy_s(), time.perf_counter()

    def other_cores(self, own_cpu_s: float) -> float:
        wall = time.perf_counter() - self._begin
        return max(0.0, busy_s() - self._busy_s - own_cpu_s) / max(wall, 1e-9)


def raise_priority() -> str:
    """Put this process (and its children) into a session of its own with a higher share; say what was possible.

    With scheduler autogrouping a session gets one share of a core whatever its nice level, so the group's own level is
    what counts.
    """
    if os.getpid() == os.getpgrp():  # a group leader cannot start a session: let a child go on in its place
        child = os.fork()
        if child:
            os._exit(_outcome(child))
    with contextlib.suppress(OSError):
        os.setsid()
    if os.getsid(0) != os.getpid():
        return "priority unchanged: no session of its own"
    try:
        Path("/proc/self/autogroup").write_text("-20")
    except OSError:
        return "priority unchanged"
    return "session priority raised"


def _outcome(child: int) -> int:
    """Exit code of `child`, to which an interrupt of this process is passed on."""
    while True:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
        except KeyboardInterrupt:
            os.kill(child, signal.SIGINT)


def limits(core: int) -> dict[str, float]:
    """Memory read rate and multiply-add rates of one core, by `limits.c`; empty without a C compiler or AVX2."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or "avx2" not in describe()["flags"]:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        build = [compiler, "-O2", "-march=native", str(HERE / "limits.c"), "-o", program]
        subprocess.run(build, check=True, timeout=TIMEOUT_S)
        best: dict[str, float] = {}
        for _ in range(3):
            command = [*pinned((core,)), program]
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
            for name, value in json.loads(run.stdout).items():
                best[name] = max(value, best.get(name, 0.0))
    return best


def pinned(cores: tuple[int, ...]) -> list[str]:
    """The words before a command that keep it on `cores`."""
    taskset = shutil.which("taskset")
    return [taskset, "-c", ",".join(map(str, cores))] if taskset else []
