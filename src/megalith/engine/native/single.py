"""Single kernels of the C library by themselves: packed matrices, quantising, sampling one row (c/single.c).

For packing files, tests and micro-benchmarks; a step goes through binding.NativeModel.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import StepFailed
from megalith.engine.batch import F32, SamplingBatch, StepResult
from megalith.engine.native.binding import (
    FORMATS,
    NO_TOKEN,
    OK,
    Array,
    Library,
    ResultBuffers,
    sampling_struct,
)


class PackedMatrix:
    """One weight matrix in panels: for tests and micro-benchmarks of the kernels a model uses."""

    def __init__(self, library: Library, format_name: str, raw: Array, shape: tuple[int, int]) -> None:
        self._c = library.c
        self.outputs, self.inputs = shape
        raw = np.ascontiguousarray(raw)
        handle = ctypes.c_void_p()
        code = self._c.native_matrix_create(
            FORMATS.index(format_name), raw.ctypes.data, raw.nbytes, *shape, ctypes.addressof(handle)
        )
        if code != OK:
            raise ValueError(f"a {format_name} matrix of shape {shape} cannot have {raw.nbytes} bytes (code {code})")
        self._handle = handle.value

    def num_bytes(self) -> int:
        """Bytes of the panels."""
        return int(self._c.native_matrix_bytes(self._handle))

    def row(self, index: int) -> F32:
        """One row as floats, from the panels."""
        out = np.empty(self.inputs, np.float32)
        if self._c.native_matrix_row(self._handle, index, out.ctypes.data) != OK:
            raise IndexError(f"row {index} of {self.outputs}")
        return out

    def multiply(self, x_MK: F32, isa: str | None = None) -> F32:
        """Quantise the rows of x to 8 bits and multiply: [M, outputs]."""
        x_MK = np.ascontiguousarray(x_MK, np.float32)
        rows = x_MK.shape[0]
        y = np.empty((rows, -(-self.outputs // 16) * 16), np.float32)
        name = None if isa is None else isa.encode()
        code = self._c.native_matrix_multiply(self._handle, name, x_MK.ctypes.data, rows, y.ctypes.data)
        if code != OK:
            raise ValueError(f"multiply of {rows} rows with {isa} failed with code {code}")
        return y[:, : self.outputs]

    def multiply_planes(self, planes: NDArray[np.uint32], scale: F32, isa: str | None = None) -> F32:
        """What `quantize_planes` gives times this bipolar matrix: [M, outputs]."""
        rows, groups, bits = planes.shape[:3]
        wanted = (rows, self.inputs // 64, bits, 2, 2)
        if planes.shape != wanted or self.inputs % 64 or scale.shape != (rows, groups):
            raise ValueError(f"planes {planes.shape} and scales {scale.shape} for {self.inputs} inputs: want {wanted}")
        planes, scale = np.ascontiguousarray(planes, np.uint32), np.ascontiguousarray(scale, np.float32)
        y = np.empty((rows, -(-self.outputs // 16) * 16), np.float32)
        name = None if isa is None else isa.encode()
        code = self._c.native_multiply_planes(
            self._handle, name, planes.ctypes.data, scale.ctypes.data, bits, rows, y.ctypes.data
        )
        if code != OK:
            raise ValueError(f"multiply of {rows} rows in {bits} bit planes with {isa} failed with code {code}")
        return y[:, : self.outputs]

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self._c.native_matrix_destroy(self._handle)


def quantize(library: Library, x_MK: F32, isa: str | None = None) -> tuple[NDArray[np.int8], F32, F32]:
    """Rows of x as 8-bit activations: values, and scale and scale * sum of each group of 32."""
    rows, inputs = x_MK.shape
    a = np.empty((rows, inputs), np.int8)
    scale, total = np.empty((rows, inputs // 32), np.float32), np.empty((rows, inputs // 32), np.float32)
    name = None if isa is None else isa.encode()
    pointers = (a.ctypes.data, scale.ctypes.data, total.ctypes.data)
    code = library.c.native_quantize(name, np.ascontiguousarray(x_MK).ctypes.data, rows, inputs, *pointers)
    if code != OK:
        raise ValueError(f"quantize of {rows} x {inputs} with {isa} failed with code {code}")
    return a, scale, total


def quantize_planes(library: Library, x_MK: F32, bits: int, isa: str | None = None) -> tuple[NDArray[np.uint32], F32]:
    """Rows of x as bipolar activations: planes [M, K / 64, bits, 2, 2] (c/matrix.h), scales [M, K / 64]."""
    rows, inputs = x_MK.shape
    planes, scale = np.empty((rows, inputs // 64, bits, 2, 2), np.uint32), np.empty((rows, inputs // 64), np.float32)
    name = None if isa is None else isa.encode()
    x_MK = np.ascontiguousarray(x_MK, np.float32)
    code = library.c.native_quantize_planes(
        name, x_MK.ctypes.data, rows, inputs, bits, planes.ctypes.data, scale.ctypes.data
    )
    if code != OK:
        raise ValueError(f"{rows} x {inputs} values as {bits} bit planes with {isa} failed with code {code}")
    return planes, scale


def sample(library: Library, logits_V: F32, sampling: SamplingBatch, isa: str | None = None) -> StepResult:
    """Sample one row of logits. Raises StepFailed when there is no token to give, ValueError for bad arguments."""
    logits_V = np.ascontiguousarray(logits_V, np.float32)
    s, out = sampling_struct(sampling, 1), ResultBuffers.make(1, sampling.num_logprobs_N)
    name = None if isa is None else isa.encode()
    code = library.c.native_sample(
        name, logits_V.ctypes.data, logits_V.size, ctypes.addressof(s), ctypes.addressof(out.struct)
    )
    if code == NO_TOKEN:
        raise StepFailed("No token can be sampled.")
    if code != OK:
        raise ValueError(f"sampling failed with code {code}")
    return out.result


def packed_bytes(library: Library, format_name: str, outputs: int, inputs: int) -> int:
    """Bytes of the panels of a matrix. Raises ValueError for one that cannot be."""
    size = int(library.c.native_packed_bytes(FORMATS.index(format_name), outputs, inputs))
    if size < 0:
        raise ValueError(f"a {format_name} matrix of {outputs} x {inputs} cannot be packed")
    return size


def pack_into(library: Library, format_name: str, raw: Array, inputs: int, to: Array) -> None:
    """Pack `raw`, uint8 [rows, row bytes], into `to`, uint8. A matrix may be packed 16 n rows at a time."""
    raw = np.ascontiguousarray(raw)
    code = library.c.native_pack(
        FORMATS.index(format_name), raw.ctypes.data, raw.nbytes, raw.shape[0], inputs, to.ctypes.data, to.nbytes
    )
    if code != OK:
        raise ValueError(f"{raw.shape} bytes of {format_name} do not pack into {to.nbytes} (code {code})")


def panel_row(library: Library, format_name: str, panel: Array, column: int, scale: float, out: F32) -> None:
    """One column of a panel as floats, times `scale`, into `out`."""
    code = library.c.native_panel_row(
        FORMATS.index(format_name), out.size, panel.ctypes.data, column, scale, out.ctypes.data
    )
    if code != OK:
        raise ValueError(f"column {column} of a {format_name} panel of {out.size} inputs (code {code})")
