"""Writing a model as a Hugging Face directory: plain tensors, and linear layers in 8 or 4 bits as others read them.

Knows which format takes which form in safetensors (`group_packed`) and what config.json must say of it. The same
recipe gives the same values here and in GGUF; only embedding and head differ by default, because compressed-tensors
packs linear layers alone and leaves the head out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megalith.base.errors import ConfigError
from megalith.model.checkpoint import Checkpoint, hf_name, open_checkpoint
from megalith.model.compressed import LAYOUT, METHOD
from megalith.model.gguf_write import NewTensor
from megalith.model.group_packed import BITS, GROUP, split
from megalith.model.hf_metadata import metadata_files
from megalith.model.open import open_model
from megalith.model.quantize import EXACT, FALLBACK, TABLES, U8, Advance, Job, Outcome, Recipe, encoded, outcome_of
from megalith.model.safetensors_write import Stored, write_directory
from megalith.model.source import ModelFiles

_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def directory_recipe(recipe: Recipe) -> Recipe:
    """`recipe` with F16 for embedding and head where it would pack them. Raises ConfigError for what has no place."""
    here = (*EXACT, *BITS)
    for name in (recipe.to, *recipe.keep.values()):
        if name not in here:
            raise ConfigError(
                f"{name} has no place in safetensors that other tools read.",
                f"There: {', '.join(here)}; or give --out a name that ends in .gguf.",
            )
    for part in TABLES:
        if recipe.keep.get(part) in BITS:
            raise ConfigError(
                f"{part} cannot be {recipe.keep[part]} in safetensors: only linear layers inside the model are packed.",
                "Take F16, BF16 or F32 for it, or --out with a name that ends in .gguf.",
            )
    plain = recipe.to if recipe.to in EXACT else FALLBACK
    return replace(recipe, keep={**dict.fromkeys(TABLES, plain), **recipe.keep})


def total_bytes(files: ModelFiles, recipe: Recipe) -> int:
    """Bytes of tensor data that `quantize_directory` will tell `advance` of."""
    return sum(job.new.num_bytes for job in _jobs(open_checkpoint(files), directory_recipe(recipe)))


def quantize_directory(
    files: ModelFiles, recipe: Recipe, path: Path, *, force: bool = False, advance: Advance | None = None
) -> Outcome:
    """Write the model at `files` to the directory `path`. Raises what its parts raise; never leaves half of one."""
    if path.exists() and files.path.resolve() in (path.resolve(), *(child.resolve() for child in path.glob("*"))):
        raise ConfigError(f"{path} is, or holds, the model that is being read.", "Give another name.")
    model = open_model(str(files.path))
    recipe.check_used(model.checkpoint.names())
    recipe = directory_recipe(recipe)
    jobs = _jobs(model.checkpoint, recipe)
    tensors = [stored for job in jobs for stored in _stored(job.new)]
    dtype = _DTYPES.get(recipe.to, "float16")
    beside = metadata_files(model, dtype, _quantization(jobs, recipe))
    size = write_directory(path, tensors, _pieces(jobs, advance), beside, force=force)
    return outcome_of(path, size, jobs, recipe)


def _jobs(checkpoint: Checkpoint, recipe: Recipe) -> list[Job]:
    """All tensors under Hugging Face's names, in its row order."""
    spec, jobs = checkpoint.spec, []
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        new = NewTensor(hf_name(name, "model.", spec.post_norms), shape, recipe.format_of(name, shape))
        vector = len(shape) == 1
        less_one = np.float32(spec.family == "gemma3" and name.split(".")[-2].endswith("norm"))

        def raw(name: str = name, vector: bool = vector, less_one: np.float32 = less_one) -> U8:
            tensor = checkpoint.tensor(name)
            return (tensor.float32() - less_one).view(np.uint8) if vector else tensor.raw

        jobs.append(Job(new, "F32" if vector else checkpoint.stored_format(name), raw))
    return jobs


def _stored(new: NewTensor) -> list[Stored]:
    if new.format not in BITS:
        return [Stored(new.name, new.format, new.shape, new.num_bytes)]
    rows, columns = new.shape
    words, groups = columns * BITS[new.format] // 32, columns // GROUP
    return [
        Stored(f"{new.name}_packed", "I32", (rows, words), rows * words * 4),
        Stored(f"{new.name}_scale", "F16", (rows, groups), rows * groups * 2),
        Stored(f"{new.name}_shape", "I64", (2,), 16),
    ]


def _pieces(jobs: list[Job], advance: Advance | None) -> Iterator[U8]:
    """Bytes in the order of `_stored`; a packed matrix is held whole, because its scales come after it."""
    for job in jobs:
        if job.new.format in BITS:
            parts = [split(piece, job.new.format) for piece in encoded(job)]
            yield np.concatenate([packed for packed, _ in parts])
            yield np.concatenate([scales for _, scales in parts])
            yield np.frombuffer(struct.pack("<2q", *job.new.shape), np.uint8)
            if advance is not None:
                advance(job.new.num_bytes)
            continue
        for piece in encoded(job):
            yield piece
            if advance is not None:
                advance(piece.size)


def _quantization(jobs: list[Job], recipe: Recipe) -> dict[str, Any] | None:
    """config.json's quantization_config: a group for each format, by class where it is the rule, else by name."""
    linear = {job.new.name.removesuffix(".weight"): job.new.format for job in jobs if len(job.new.shape) == 2}
    linear = {name: kind for name, kind in linear.items() if not name.endswith("embed_tokens")}
    used = sorted(set(linear.values()) & BITS.keys(), key=lambda kind: kind != recipe.to)
    if not used:
        return None
    groups = {}
    for i, kind in enumerate(used):
        targets = ["Linear"] if kind == recipe.to else [name for name, found in linear.items() if found == kind]
        weights = {
            "num_bits": BITS[kind], "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
            "dynamic": False, "actorder": None,
        }  # fmt: skip
        groups[f"group_{i}"] = {"targets": targets, "weights": weights, "input_activations": None}
    plain = sorted({name for name, kind in linear.items() if kind not in BITS} | {"lm_head"})
    return {
        "quant_method": METHOD, "format": LAYOUT, "quantization_status": "compressed", "config_groups": groups,
        "ignore": plain,
    }  # fmt: skip
