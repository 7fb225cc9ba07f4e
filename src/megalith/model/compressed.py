"""A Hugging Face directory whose linear layers compressed-tensors has packed, read as if they were block formats.

Knows the names that the layout gives to the parts of a matrix. Refused, not guessed: zero points, reordered columns,
groups that no blocks of 32 fill, and every other way of quantising.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model.group_packed import FORMAT_OF_BITS, GROUP, join
from megalith.model.safetensors import SafetensorsModel
from megalith.model.tokenizer_hf import read_json

U8 = NDArray[np.uint8]
METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_HINT = "Read here: compressed-tensors' pack-quantized with 4 or 8 bits, symmetric, in groups of a multiple of 32."


class WeightFiles:
    """Tensors of a directory under their plain names, `stored` {name: (shape, format)}; packed ones are put together.

    Raises ModelFormatError for a quantisation that is not read.
    """

    def __init__(self, directory: Path) -> None:
        self._files = SafetensorsModel(directory)
        self.directory = directory
        _check_method(read_json(directory / "config.json").get("quantization_config"), directory)
        tensors = self._files.tensors
        self.stored: dict[str, tuple[tuple[int, ...], str]] = {}
        self._columns: dict[str, int] = {}
        for name, tensor in tensors.items():
            if name.endswith(_PACKED):
                stem = name.removesuffix(_PACKED)
                self.stored[f"{stem}.weight"] = self._packed(stem)
            elif not (name.endswith((_SCALE, _SHAPE)) and f"{name.rpartition('.')[0]}{_PACKED}" in tensors):
                self.stored[name] = (tensor.shape, tensor.dtype)

    def raw(self, name: str) -> U8:
        """The bytes of tensor `name` in the format that `stored` says: a view of the file, or blocks made from it."""
        columns = self._columns.get(name)
        if columns is None:
            return self._files.raw(name)
        stem = name.removesuffix(".weight")
        rows = self.stored[name][0][0]
        packed, scale = self._files.raw(stem + _PACKED), self._files.raw(stem + _SCALE)
        dtype = self._files.tensors[stem + _SCALE].dtype
        return join(packed.reshape(rows, -1), scale.reshape(rows, -1), dtype, columns, f"{self.directory}: {name}")

    def forget(self, *, cached: bool = True) -> None:
        """Let go of the pages that were read so far; see model.mapped."""
        self._files.forget(cached=cached)

    def _packed(self, stem: str) -> tuple[tuple[int, ...], str]:
        """Shape and format of a packed matrix, from its parts."""
        tensors, what = self._files.tensors, f"{self.directory}: {stem}{_PACKED}"
        packed, scale, size = (tensors.get(stem + part) for part in (_PACKED, _SCALE, _SHAPE))
        if packed is None or scale is None or size is None:
            raise ModelFormatError(f"{what} lacks {stem}{_SCALE if scale is None else _SHAPE}.")
        for part in ("weight_zero_point", "weight_g_idx"):
            if f"{stem}.{part}" in tensors:
                raise ModelFormatError(f"{what} comes with {part}, which is not supported.", _HINT)
        sound = size.dtype == "I64" and size.shape == (2,) and packed.dtype == "I32" and len(packed.shape) == 2
        rows, columns = (int(n) for n in self._files.raw(stem + _SHAPE).view("<i8")) if sound else (0, 0)
        words, groups = packed.shape[-1], scale.shape[-1] if len(scale.shape) == 2 else 0
        kind = FORMAT_OF_BITS.get(words * 32 // columns) if columns > 0 else None
        if kind is None or words * 32 % columns or columns % GROUP or packed.shape[0] != rows:
            raise ModelFormatError(f"{what} of shape {packed.shape} in {packed.dtype} is not read.", _HINT)
        if (
            groups < 1
            or scale.shape[0] != rows
            or columns % (GROUP * groups)
            or scale.dtype not in ("F16", "BF16", "F32")
        ):
            raise ModelFormatError(
                f"{what}: its {columns} columns have scales of shape {scale.shape} in {scale.dtype}.", _HINT
            )
        self._columns[f"{stem}.weight"] = columns
        return (rows, columns), kind


def _check_method(config: Any, directory: Path) -> None:
    if config is None:
        return
    fields = config if isinstance(config, dict) else {}
    method, layout = fields.get("quant_method"), fields.get("format")
    if method != METHOD or layout != LAYOUT:
        what = f"quantised by {method!r}" if method != METHOD else f"packed as {layout!r}"
        raise ModelFormatError(f"{directory} is {what}, which is not supported.", _HINT)
    groups = fields.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and group.get("input_activations") is not None:
            raise ModelFormatError(f"{directory} rounds activations, which is not supported.", _HINT)
