"""What MODEL on the command line means: a catalogue name, a GGUF file, a Hugging Face directory or an installed model.

Reads headers and configuration only, never weights. Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.base.errors import ModelNotFound
from megalith.cost.memory import WeightBytes, default_head_format, mac_times, packed_bytes, weight_bytes
from megalith.cost.parameters import count, expert_weights
from megalith.plan import shapes
from megalith.specs import catalog
from megalith.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model as the planner sees it: its shape and how its weights are stored."""

    name: str
    spec: ModelSpec
    stored: dict[str, dict[str, int]]
    """{part: {file format: elements}}; parts: layers, experts, head, tables, vectors. Empty for a catalogue model."""
    origin: str

    def weights(self, kind: str, name: str | None) -> WeightBytes:
        """Bytes of the weights under a runner kind, in format `name`, or as stored where `name` is None.

        native packs the stored formats into panels; torch-cpu and cuda hold bf16 unless told otherwise.
        """
        if kind != "native":
            return weight_bytes(self.spec, name or "bf16")
        if name is not None or not self.stored:
            return native_bytes(weight_bytes_by_part(self.spec, name or "bf16"), "formula")
        return native_bytes(self.stored, f"tensors of {self.origin}")


def weight_bytes_by_part(spec: ModelSpec, name: str) -> dict[str, dict[str, int]]:
    """{part: {format: elements}} of a model whose matrices all come in format `name`."""

    parameters, head = count(spec), default_head_format(spec, name)
    parts = {
        "layers": {name: parameters.attention + parameters.ffn + parameters.router},
        "head": {head: spec.vocab * spec.hidden},
        "vectors": {"f32": parameters.vectors},
    }
    if spec.num_experts:
        parts["experts"] = {name: spec.num_layers * spec.num_experts * expert_weights(spec)}
    if not spec.tied_embeddings or parameters.positions:
        parts["tables"] = {head: parameters.positions + (0 if spec.tied_embeddings else parameters.embedding)}
    return parts


def native_bytes(parts: dict[str, dict[str, int]], source: str) -> WeightBytes:
    """Bytes that the native backend holds: all matrices and tables in panels, vectors in float32."""
    packed = {
        part: sum(packed_bytes(elements, name) for name, elements in parts.get(part, {}).items())
        for part in ("layers", "experts", "head", "tables")
    }
    layers = parts.get("layers", {})
    stored = "+".join(sorted({name for part in ("layers", "head") for name in parts.get(part, {})}))
    return WeightBytes(
        format=f"{stored} packed",
        **packed,
        vectors=4 * sum(parts.get("vectors", {}).values()),
        source=source,
        mac_times=sum(n * mac_times(name) for name, n in layers.items()) / max(1, sum(layers.values())),
    )


def resolve(name: str) -> PlannedModel:
    """The model called `name`. Raises ModelNotFound with the nearest names, or ModelFormatError for a broken file."""
    if shapes.is_shape(name):
        return PlannedModel(name, shapes.hypothetical(name), {}, "hypothetical")
    path = Path(name).expanduser()
    if path.exists():
        return _from_path(path, path.stem, path.name)
    local = _installed(name)
    if local is not None:
        return local
    found = catalog.find_model(name)
    if found is not None:
        return PlannedModel(found.spec.name, found.spec, {}, "catalogue")
    if path.suffix == ".gguf" or name.count("/") > 1:
        raise ModelNotFound(f"There is no file {name}.", "Give a GGUF file, a Hugging Face directory or a known name.")
    return PlannedModel(name, catalog.entry(name).spec, {}, "catalogue")


def _installed(name: str) -> PlannedModel | None:
    """A model whose weights are installed on this machine under a short name, if there is one called `name`."""
    from megalith.model import source

    if name not in {files.name for files in source.list_local()}:
        return None
    files = source.resolve(name)
    return _from_path(files.path, files.name, files.origin)


def _from_path(path: Path, name: str, origin: str) -> PlannedModel:
    from megalith.model import describe

    if path.is_dir():
        spec = describe.spec_from_hf(path)
        return PlannedModel(name, spec, _packed_parts(path, spec), origin)
    from megalith.model.gguf import GgufFile

    file = GgufFile(path)
    return PlannedModel(name, describe.spec_from_gguf(file), stored_parts(file.tensors), origin)


def _packed_parts(path: Path, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """What a directory with packed weights stores; empty for any other, whose weights bf16 describes."""
    from megalith.model.checkpoint import gguf_name, open_checkpoint
    from megalith.model.describe import RUNNABLE
    from megalith.model.gguf import GgufTensor
    from megalith.model.source import ModelFiles
    from megalith.model.tokenizer_hf import read_json

    packed = read_json(path / "config.json").get("quantization_config") is not None
    if not packed or spec.family not in RUNNABLE or not any(path.glob("*.safetensors")):
        return {}
    c = open_checkpoint(ModelFiles(path.name, "hf", path, "path"))
    return stored_parts({gguf_name(n): GgufTensor(n, c.shape(n), c.stored_format(n), 0, 0) for n in c.names()})


def stored_parts(tensors: dict[str, Any]) -> dict[str, dict[str, int]]:
    """{part: {format: elements}} of the tensors of a GGUF file."""
    parts: dict[str, dict[str, int]] = {}
    tied = "output.weight" not in tensors
    for name, tensor in tensors.items():
        elements = 1
        for size in tensor.shape:
            elements *= size
        for part in _parts_of(name, len(tensor.shape), tied):
            formats = parts.setdefault(part, {})
            key = tensor.type.lower() if part != "vectors" else "f32"
            formats[key] = formats.get(key, 0) + elements
    return parts


def _parts_of(name: str, dimensions: int, tied: bool) -> tuple[str, ...]:
    if dimensions == 1:
        return ("vectors",)
    if name.startswith("blk."):
        return ("layers", "experts") if "_exps." in name else ("layers",)
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        return ("head",)
    return ("tables",)
