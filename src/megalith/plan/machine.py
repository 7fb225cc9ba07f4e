"""This machine as a profile: its processor and free memory, and what `probe` and `bench` have stored about it.

Reads /proc, /sys and the files under the Megalith home. Measures nothing itself (that is `engine.probe`).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError, MachineError
from megalith.base.home import home_dir
from megalith.base.units import GIB, MIB, NS_PER_S
from megalith.base.whole_file import write_whole
from megalith.cost.profile import Band, Power, Profile, Rates, RunnerKind, from_device
from megalith.specs import catalog

T = TypeVar("T")


class MachineFacts(Config, kw_only=True):
    """What `megalith probe` measured, with what it measured it on."""

    machine: str
    date: str
    threads: int
    figures: dict[str, float]
    """Names end in their unit, such as `memory_read_1_bytes_per_s`."""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the processor; empty where the kernel does not say."""
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def machine_name() -> str:
    """Processor, family and usable cores: what must be equal for a stored profile to count as this machine's."""
    details = dict(line.split(":", 1) for line in _read_lines("/proc/cpuinfo")[:30] if ":" in line)
    ids = {key.strip(): value.strip() for key, value in details.items()}
    family = f" family {ids['cpu family']} model {ids['model']}" if "cpu family" in ids and "model" in ids else ""
    return f"{cpu_model()}{family}, {cores()} cores"


def total_memory_bytes() -> int:
    """Memory of this machine, or of the control group around us where that is smaller."""
    return min([_meminfo("MemTotal"), *_group_limits()])


def available_memory_bytes() -> int:
    """Memory that can still be had: what the kernel says is available, cut by the control group's limit."""
    available = _meminfo("MemAvailable")
    for limit, used in _group_limits_and_use():
        available = min(available, max(limit - used, 0))
    return available


def _meminfo(key: str) -> int:
    for line in _read_lines("/proc/meminfo"):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    pages = os.sysconf("SC_AVPHYS_PAGES" if key == "MemAvailable" else "SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _group_limits() -> list[int]:
    return [limit for limit, _ in _group_limits_and_use()]


def _group_limits_and_use() -> list[tuple[int, int]]:
    """(limit, bytes in use) of the memory control group, version 2 or 1; empty where there is none."""
    found = []
    for limit_file, use_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, use = _read_lines(limit_file), _read_lines(use_file)
        if limit and limit[0].isdigit() and int(limit[0]) < 1 << 60:
            found.append((int(limit[0]), int(use[0]) if use and use[0].isdigit() else 0))
    return found


def profiles_dir() -> Path:
    """Where stored profiles live."""
    return home_dir() / "profiles"


def facts_path() -> Path:
    """The file that `probe` writes."""
    return profiles_dir() / "machine.json"


def profile_path(kind: str, threads: int) -> Path:
    """The file that `bench` writes for one kind of runner and thread count."""
    return profiles_dir() / f"here-{kind}-{threads}.json"


def stored_facts() -> MachineFacts | None:
    """What `probe` has stored about this very machine, if it has."""
    facts = _load(facts_path(), MachineFacts)
    return facts if facts is not None and facts.machine == machine_name() else None


def stored_profile(kind: RunnerKind, threads: int | None = None) -> Profile | None:
    """What `bench` has stored for a kind of runner and a thread count on this very machine, if it has."""
    profile = _load(profile_path(kind, threads or cores()), Profile)
    return profile if profile is not None and profile.name == machine_name() else None


def _load(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def store(path: Path, value: Config) -> Path:
    """Write a profile or facts file as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, msgspec.json.format(msgspec.json.encode(value), indent=1))
    return path


def here(kind: RunnerKind, threads: int | None = None) -> Profile:
    """The best profile known of this machine: calibrated by `bench`, else from `probe`, else guessed from its name."""
    if kind == "cuda":
        return cuda_profile()
    stored = stored_profile(kind, threads)
    if stored is not None:
        return stored
    return uncalibrated(kind, threads or cores(), stored_facts())


def uncalibrated(kind: RunnerKind, threads: int, facts: MachineFacts | None) -> Profile:
    """The profile from probed rates, or without them from the processor's name; its band is wide on purpose."""
    flags = cpu_flags()
    number, macs_per_ns = _instruction_rate(flags, kind)
    figures = facts.figures if facts else {}
    read = figures.get("memory_read_all_bytes_per_s", min(threads * 15e9, 40e9))
    measured = figures.get(f"linear_{kind.replace('-', '_')}_macs_per_s")
    mac_ns = NS_PER_S / measured if measured else 1.0 / (macs_per_ns * threads)
    source = (
        f"memory and matrix rates measured by `megalith probe`, {facts.date}" if facts
        else "guess from the processor's instruction sets; run `megalith probe` or `megalith bench`"
    )  # fmt: skip
    byte_ns = NS_PER_S / read
    rates = Rates(
        step_ns=200_000.0 if kind == "native" else 2_000_000.0,
        op_ns=2_000.0 if kind == "native" else 60_000.0,
        row_value_ns=0.05 / threads,
        weight_byte_ns=byte_ns, mac_ns=mac_ns, logit_mac_ns=mac_ns,
        kv_byte_ns=2.0 * byte_ns, pair_mac_ns=3.0 * mac_ns, combine=1.0,
    )  # fmt: skip
    wide = facts is None
    band = Band(
        low=0.3 if wide else 0.5, high=3.0 if wide else 2.0,
        source=("default for a guessed profile" if wide else "default for a probed profile")
        + "; `megalith bench` replaces it by measured residuals",
    )  # fmt: skip
    return Profile(
        name=machine_name(), kind=kind, memory_bytes=total_memory_bytes(), rates=rates, number=number, band=band,
        power=cpu_power(threads), source=source, date=facts.date if facts else time.strftime("%Y-%m-%d"), raw=figures,
        versions={"threads": str(threads)},
    )  # fmt: skip


def _instruction_rate(flags: frozenset[str], kind: str) -> tuple[str, float]:
    """(number type, multiply-adds a nanosecond on one core in practice) for a kind of runner: assumptions at 3 GHz."""
    if kind == "native":
        return "int8", 250.0 if "avx512_vnni" in flags else 90.0 if "avx2" in flags else 8.0
    if "amx_bf16" in flags:
        return "bf16", 600.0
    if "avx512_bf16" in flags:
        return "bf16", 150.0
    return "fp32", 50.0 if "avx512f" in flags else 30.0


def cpu_power(threads: int) -> Power:
    """Power of the cores that we use: an assumption with a wide band, for virtual machines rarely show a meter."""
    return Power(
        idle_w=1.5 * threads, peak_w=5.0 * threads, memory_share=0.8, error=0.5,
        source="assumption: a server core draws 1.5 W idle and 5 W busy, its share of memory included",
    )  # fmt: skip


def cuda_profile(weight_format: str = "bf16") -> Profile:
    """The catalogue profile of the first CUDA device of this machine, found through nvidia-smi. Raises MachineError."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise MachineError("This machine has no nvidia-smi, so no CUDA device was found.", "Use --device cpu.")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        name, memory = answer.splitlines()[0].rsplit(",", 1)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise MachineError(f"nvidia-smi gave no device: {error}.", "Use --device cpu.") from None
    memory_bytes = int(memory) * MIB
    return msgspec.structs.replace(_closest_gpu(name, memory_bytes, weight_format), memory_bytes=memory_bytes)


def _closest_gpu(name: str, memory_bytes: int, weight_format: str) -> Profile:
    """The catalogue device that a driver's name means, the one of nearest capacity where several fit."""
    wanted = name.lower().replace("-", " ").split()
    scored = []
    for device in catalog.devices().values():
        label = device.title.lower().replace("-", " ").split()
        common = len([word for word in wanted if any(word in other or other in word for other in label)])
        scored.append((common, -abs(device.memory_bytes - memory_bytes), device))
    best = max(scored, key=lambda item: (item[0], item[1]))
    if best[0] < 2:
        raise ConfigError(f"{name.strip()} ({memory_bytes / GIB:.0f} GiB) is not in the catalogue.", "Name a --device.")
    return from_device(best[2], weight_format)
