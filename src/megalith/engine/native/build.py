"""Compile the C library with this machine's compiler, once, into a file named after its sources and flags.

Imports the standard library and floor 0 only: the build hook of the package runs it before what Megalith depends on is
installed. Knows compilers and files; knows nothing about models.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megalith.base.home import home_dir
from megalith.base.toolchain import BuildFailed, build_once, find_compiler, run

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "c"
_KERNEL_FILES = ("gemm", "bipolar", "rows", "attention", "sample", "table")
_COMMON_FILES = ("pool", "pack", "model", "check", "step", "products", "window", "isa", "single")
_FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra",
)  # fmt: skip
_COMPILE_S = 120.0
"""Deadline of one compiler run."""

VARIANTS: dict[str, tuple[str, ...]] = {
    # No -march of one processor: its list may hold instructions that others with AVX-512 VNNI lack.
    "avx512vnni": ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
    "emulated": ("-mavx2", "-mfma", "-mf16c", "-DMEGALITH_EMULATE_AVX512", "-O1"),
}
"""Instruction set: flags. `emulated` is the AVX-512 code with its dot products done lane by lane, for tests."""


@dataclass(frozen=True, slots=True)
class BuildStatus:
    """What `doctor` says about the native library."""

    compiler: str | None
    library: Path | None
    built: tuple[str, ...] = ()
    """Instruction sets in the library, best first."""
    chosen: str | None = None
    """The one that a model gets here."""
    lost: str = ""
    """What is worse for it, in a sentence; empty when nothing is."""
    problems: tuple[str, ...] = field(default=())


def default_variants() -> tuple[str, ...]:
    """The instruction sets worth building for this kind of processor, best first."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ("avx512vnni", "avx2", "portable")
    return ("portable",)


def library_name(variants: Sequence[str]) -> str:
    """The file name of the library with these variants: it changes with every source and flag."""
    digest = hashlib.sha256(repr((_FLAGS, [(v, VARIANTS[v]) for v in variants], platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".c", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"native-{digest.hexdigest()[:16]}.so"


def home_folder() -> Path:
    """Where the library goes when the package folder cannot be written."""
    return home_dir() / "native"


def find_library() -> Path | None:
    """The built library, if there is one for these sources."""
    name = library_name(default_variants())
    return next((folder / name for folder in (HERE, home_folder()) if (folder / name).is_file()), None)


def ensure_built() -> Path | None:
    """The library, built now if it is missing and can be; None when it cannot: `status()` says why."""
    found = find_library()
    if found is not None:
        return found
    try:
        return build(HERE if os.access(HERE, os.W_OK) else home_folder())
    except (BuildFailed, OSError):
        return None


def build(folder: Path, variants: Sequence[str] | None = None) -> Path:
    """Compile and link into `folder`, unless it is there. Safe against other processes that do the same.

    A variant that the compiler does not know is left out; without `portable` the build fails. Raises BuildFailed.
    """
    variants = tuple(default_variants() if variants is None else variants)
    target = folder / library_name(variants)
    return build_once(target, ".native.lock", lambda compiler, scratch: _compile_and_link(compiler, scratch, variants))


def status() -> BuildStatus:
    """What is there, after building it if need be and possible."""
    compiler = find_compiler()
    name = " ".join(compiler) if compiler else None
    library = ensure_built()
    if library is None:
        lost = "the native CPU backend is missing: the torch path serves instead, several times slower"
        problem = _why_not_built() if compiler else "no C compiler (cc, gcc or clang) and no $CC"
        return BuildStatus(name, None, lost=lost, problems=(problem,))
    built, usable = _isas(library)
    chosen = os.environ.get("MEGALITH_NATIVE_ISA") or usable[0]
    problems = () if chosen in usable else (f"MEGALITH_NATIVE_ISA is {chosen}, but usable here: {', '.join(usable)}",)
    lost = "plain C kernels: this processor lacks AVX2, and batches run slower" if chosen == "portable" else ""
    return BuildStatus(name, library, built, chosen, lost, problems)


def _why_not_built() -> str:
    try:
        build(home_folder())
    except (BuildFailed, OSError) as error:
        return str(error)
    return ""


def _isas(library: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    handle = ctypes.CDLL(str(library))
    handle.native_isas.restype = ctypes.c_char_p
    return tuple(handle.native_isas(0).decode().split(",")), tuple(handle.native_isas(1).decode().split(","))


def _compile_and_link(compiler: list[str], scratch: Path, variants: tuple[str, ...]) -> Path:
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
        jobs = {v: [workers.submit(_compile, compiler, scratch, f, v) for f in _KERNEL_FILES] for v in variants}
        objects: dict[str, list[Path]] = {}
        failures = []
        for variant, futures in jobs.items():
            try:
                objects[variant] = [future.result() for future in futures]
            except BuildFailed as error:
                failures.append(error)
        if failures and (not objects or "portable" not in objects):
            raise failures[0]
        have = [f"-DMEGALITH_HAVE_{variant.upper()}" for variant in objects]
        common = list(workers.map(lambda f: _compile(compiler, scratch, f, None, have), _COMMON_FILES))
    made = scratch / "library.so"
    files = [str(path) for paths in [*objects.values(), common] for path in paths]
    run([*compiler, "-shared", "-o", str(made), *files, "-lm", "-pthread"], _COMPILE_S)
    return made


def _compile(compiler: list[str], scratch: Path, file: str, variant: str | None, have: Sequence[str] = ()) -> Path:
    made = scratch / f"{variant or 'common'}-{file}.o"
    flags = [*_FLAGS, *have]
    if variant is not None:
        flags += [*VARIANTS[variant], f"-DMEGALITH_ISA={variant}"]
    run([*compiler, *flags, "-c", str(SOURCES / f"{file}.c"), "-o", str(made)], _COMPILE_S)
    return made
