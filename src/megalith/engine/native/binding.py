"""The C interface of c/api.h in Python: structs, calls, and checks of every array before its address is handed over.

Knows arrays and addresses; knows nothing about model files. ctypes releases the GIL for the length of each call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import MachineError, StepFailed
from megalith.engine.batch import F32, I32, MAX_LOGPROBS, SamplingBatch, StepBatch, StepResult
from megalith.engine.native import build
from megalith.model.bipolar import BITS_OF

Array = NDArray[Any]
FORMATS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
    *BITS_OF,
)  # fmt: skip
TENSORS = (
    "q", "k", "v", "o", "gate", "up", "down", "embed", "head", "attn_norm", "ffn_norm", "post_attn_norm",
    "post_ffn_norm", "q_norm", "k_norm", "q.bias", "k.bias", "v.bias", "final_norm",
)  # fmt: skip
MATRICES = TENSORS[:9]
PHASES = (
    "embed", "norm", "qkv", "rope", "attention", "out", "gate_up", "activation", "down", "head", "sample",
    "wait",
)  # fmt: skip
OK, BAD_ARGUMENT, NO_MEMORY, NO_TOKEN, NO_ISA, NO_WEIGHTS = range(6)
_MESSAGE_BYTES = 256
_I32, _I64, _F32, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _struct(name: str, fields: Sequence[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_SAMPLING_ARRAYS = (
    "temperature top_k top_p min_p repetition presence frequency seed draw seen_starts seen_ids seen_counts "
    "bias_starts bias_ids bias_values mask_rows masks targets num_logprobs"
)
Config: Any = _struct("Config", [
    *_all(_I32, "num_layers hidden num_heads num_kv_heads head_dim ffn vocab activation tied_embeddings qk_norm"
                " post_norms qkv_bias"),
    *_all(_F32, "norm_eps attention_scale embedding_scale"),
    *_all(_P, "windows ropes rope_frequencies"),
    *_all(_I32, "max_context block_tokens num_blocks num_host_blocks max_rows threads activation_bits"),
    ("isa", ctypes.c_char_p),
])  # fmt: skip
_Batch: Any = _struct("_Batch", [
    *_all(_I32, "num_rows num_sequences num_outputs table_width"),
    *_all(_P, "tokens positions row_starts block_tables output_rows"),
])  # fmt: skip
_Sampling: Any = _struct("_Sampling", [
    *_all(_P, _SAMPLING_ARRAYS), *_all(_I32, "num_seen num_bias num_masks mask_words"),
])  # fmt: skip
_Result: Any = _struct("_Result", _all(_P, "tokens logprobs top_ids top_logprobs"))
_Memory: Any = _struct("_Memory", _all(_I64, "weights kv host_kv activations"))
_Acquire = ctypes.CFUNCTYPE(_P, _I32)
_Release = ctypes.CFUNCTYPE(None, _I32)
_Embed = ctypes.CFUNCTYPE(_I32, _P, _I32, _P)
_Window: Any = _struct("_Window", [("acquire", _Acquire), ("release", _Release), ("embed", _Embed)])


class Library:
    """The loaded library. Raises MachineError if the file is not the one that this module was written for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.native_isas.restype = ctypes.c_char_p
        for name, arguments in {
            "native_create": (_P, _P, _P),
            "native_load": (_P, _I32, _I32, _I32, _P, _I64, _I32, _I32),
            "native_attach": (_P, _I32, _I32, _I32, _I32, _I32, _I64),
            "native_set_window": (_P, _P),
            "native_packed_bytes": (_I32, _I32, _I32),
            "native_pack": (_I32, _P, _I64, _I32, _I32, _P, _I64),
            "native_panel_row": (_I32, _I32, _P, _I32, _F32, _P),
            "native_ready": (_P,),
            "native_step": (_P, _P, _P, _P),
            "native_logits": (_P, _P, _P),
            "native_swap": (_P, _I32, _P, _P, _I32),
            "native_message": (_P,),
            "native_isa": (_P,),
            "native_block_bytes": (_P,),
            "native_memory_bytes": (_P, _P),
            "native_phase_ns": (_P, _P, _I32),
            "native_destroy": (_P,),
            "native_matrix_create": (_I32, _P, _I64, _I32, _I32, _P),
            "native_matrix_destroy": (_P,),
            "native_matrix_bytes": (_P,),
            "native_matrix_row": (_P, _I32, _P),
            "native_matrix_multiply": (_P, ctypes.c_char_p, _P, _I32, _P),
            "native_quantize": (ctypes.c_char_p, _P, _I32, _I32, _P, _P, _P),
            "native_quantize_planes": (ctypes.c_char_p, _P, _I32, _I32, _I32, _P, _P),
            "native_multiply_planes": (_P, ctypes.c_char_p, _P, _P, _I32, _I32, _P),
            "native_sample": (ctypes.c_char_p, _P, _I32, _P, _P),
        }.items():
            getattr(self.c, name).argtypes = arguments
        for name in ("native_message", "native_isa"):
            getattr(self.c, name).restype = ctypes.c_char_p
        for name in ("native_block_bytes", "native_matrix_bytes", "native_packed_bytes"):
            getattr(self.c, name).restype = _I64
        sizes = (ctypes.c_int32 * 8)()
        count = self.c.native_struct_sizes(sizes, 8)
        expected = [ctypes.sizeof(s) for s in (Config, _Batch, _Sampling, _Result, _Memory, _Window)]
        if list(sizes[:count]) != expected:
            raise MachineError(f"{path} was built for another version: its structs are {list(sizes[:count])} bytes.")

    def isas(self, usable: bool = True) -> tuple[str, ...]:
        """Instruction sets in the library, best first; only those this machine can run if `usable`."""
        names: str = self.c.native_isas(int(usable)).decode()
        return tuple(names.split(","))


_loaded: dict[Path, Library] = {}


def load() -> Library:
    """The library of this installation, built now if need be. Raises MachineError when it cannot be."""
    path = build.ensure_built()
    if path is None:
        raise MachineError(
            f"The native CPU backend is not built: {'; '.join(build.status().problems)}.",
            "Install a C compiler (apt install gcc), or use --mode bf16.",
        )
    if path not in _loaded:
        _loaded[path] = Library(path)
    return _loaded[path]


def chosen_isa() -> str | None:
    """What $MEGALITH_NATIVE_ISA asks for; None: the best there is."""
    return os.environ.get("MEGALITH_NATIVE_ISA") or None


def address(name: str, array: Array, dtype: Any, size: int) -> int:
    """Where `array` lies, after checking that C may read `size` elements of `dtype` there. Raises StepFailed."""
    if array.dtype != dtype or array.size != size or not array.flags.c_contiguous:
        raise StepFailed(
            f"{name} must be {size} contiguous {np.dtype(dtype).name}, but is {array.size} {array.dtype.name}"
            f"{'' if array.flags.c_contiguous else ', not contiguous'}."
        )
    where: int = array.ctypes.data
    return where


def batch_struct(batch: StepBatch) -> Any:
    """The C view of `batch`, which must outlive it."""
    rows, outputs = batch.tokens_M.size, batch.output_rows_N.size
    sequences, width = batch.row_starts_S1.size - 1, batch.block_tables_SW.shape[-1]
    i32 = np.int32
    return _Batch(
        rows, sequences, outputs, width,
        address("tokens_M", batch.tokens_M, i32, rows),
        address("positions_M", batch.positions_M, i32, rows),
        address("row_starts_S1", batch.row_starts_S1, i32, sequences + 1),
        address("block_tables_SW", batch.block_tables_SW, i32, sequences * width),
        address("output_rows_N", batch.output_rows_N, i32, outputs),
    )  # fmt: skip


def sampling_struct(s: SamplingBatch, outputs: int) -> Any:
    """The C view of `s` for `outputs` rows; `s` must outlive it."""
    i32, f32, u64 = np.int32, np.float32, np.uint64
    seen, bias = s.seen_ids.size, s.bias_ids.size
    mask_rows, mask_words = s.masks.shape if s.masks.ndim == 2 else (0, 0)
    return _Sampling(
        address("temperature_N", s.temperature_N, f32, outputs),
        address("top_k_N", s.top_k_N, i32, outputs),
        address("top_p_N", s.top_p_N, f32, outputs),
        address("min_p_N", s.min_p_N, f32, outputs),
        address("repetition_N", s.repetition_N, f32, outputs),
        address("presence_N", s.presence_N, f32, outputs),
        address("frequency_N", s.frequency_N, f32, outputs),
        address("seed_N", s.seed_N, u64, outputs),
        address("draw_N", s.draw_N, u64, outputs),
        address("seen_starts_N1", s.seen_starts_N1, i32, outputs + 1),
        address("seen_ids", s.seen_ids, i32, seen),
        address("seen_counts", s.seen_counts, i32, seen),
        address("bias_starts_N1", s.bias_starts_N1, i32, outputs + 1),
        address("bias_ids", s.bias_ids, i32, bias),
        address("bias_values", s.bias_values, f32, bias),
        address("mask_rows_N", s.mask_rows_N, i32, outputs),
        address("masks", s.masks, np.uint32, mask_rows * mask_words),
        address("targets_N", s.targets_N, i32, outputs),
        address("num_logprobs_N", s.num_logprobs_N, i32, outputs),
        seen, bias, mask_rows, mask_words,
    )  # fmt: skip


@dataclass(slots=True)
class ResultBuffers:
    """Arrays that C writes a StepResult into."""

    result: StepResult
    struct: Any

    @staticmethod
    def make(outputs: int, num_logprobs_N: I32) -> ResultBuffers:
        """Room for `outputs` tokens, and for log probabilities where any row asks for them."""
        result = StepResult(np.zeros(outputs, np.int32))
        struct = _Result(tokens=result.tokens_N.ctypes.data)
        if outputs and int(num_logprobs_N.max()) >= 0:
            result.logprobs_N = np.zeros(outputs, np.float32)
            result.top_ids_NK = np.zeros((outputs, MAX_LOGPROBS), np.int32)
            result.top_logprobs_NK = np.full((outputs, MAX_LOGPROBS), -np.inf, np.float32)
            struct.logprobs = result.logprobs_N.ctypes.data
            struct.top_ids = result.top_ids_NK.ctypes.data
            struct.top_logprobs = result.top_logprobs_NK.ctypes.data
        return ResultBuffers(result, struct)


class WeightSource(Protocol):
    """Who holds the weights of a model between and during its steps, piece by piece (struct native_window)."""

    error: Exception | None
    """What broke the step that ended last, until it is reported."""

    @property
    def hidden(self) -> int:
        """Values of a row of x."""
        ...

    def acquire(self, piece: int) -> int:
        """The address of a piece, which stays there until released."""
        ...

    def release(self, piece: int) -> None:
        """The step needs it no more."""
        ...

    def embed(self, tokens_M: I32, x_MD: F32) -> None:
        """Put the scaled embedding of each token into its row."""
        ...


def window_struct(source: WeightSource) -> Any:
    """The C view of `source`. Nothing may be raised through C: an error is kept, and the step ends."""

    def acquire(piece: int) -> int | None:
        try:
            return source.acquire(piece)
        except Exception as error:
            source.error = error
            return None

    def release(piece: int) -> None:
        try:
            source.release(piece)
        except Exception as error:
            source.error = error

    def embed(tokens: int, rows: int, x: int) -> int:
        try:
            tokens_M = np.ctypeslib.as_array((ctypes.c_int32 * rows).from_address(tokens))
            hidden = source.hidden
            x_MD = np.ctypeslib.as_array((ctypes.c_float * (rows * hidden)).from_address(x)).reshape(rows, hidden)
            source.embed(tokens_M, x_MD)
            return 1
        except Exception as error:
            source.error = error
            return 0

    return _Window(acquire=_Acquire(acquire), release=_Release(release), embed=_Embed(embed))


class NativeModel:
    """Owns one `native_model`. Every failure of a step is StepFailed with the library's own words."""

    def __init__(self, library: Library, config: Any) -> None:
        self._c = library.c
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        handle = ctypes.c_void_p()
        code = self._c.native_create(ctypes.addressof(config), ctypes.addressof(handle), ctypes.addressof(message))
        if code != OK:
            raise MachineError(f"The native backend cannot hold this model: {message.value.decode()}.")
        self._handle: int | None = handle.value
        self._source: WeightSource | None = None
        self._struct: Any = None

    @property
    def handle(self) -> int:
        """The address of the model. Raises StepFailed after close()."""
        if self._handle is None:
            raise StepFailed("The native runner is closed.")
        return self._handle

    def load(self, layer: int, tensor: str, format_name: str, raw: Array, shape: tuple[int, ...]) -> None:
        """Pack one tensor. `raw` is what the file holds, uint8 and contiguous. Raises MachineError."""
        raw = np.ascontiguousarray(raw)
        outputs, inputs = (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 0)
        self._check_load(
            self._c.native_load(
                self.handle, layer, TENSORS.index(tensor), FORMATS.index(format_name),
                raw.ctypes.data, raw.nbytes, outputs, inputs,
            )
        )  # fmt: skip

    def attach(self, layer: int, tensor: str, format_name: str, piece: int, first_panel: int, offset: int) -> None:
        """Instead of load: panels from `first_panel` on lie at `offset` of a piece. Raises MachineError."""
        at = (layer, TENSORS.index(tensor), FORMATS.index(format_name), piece, first_panel, offset)
        self._check_load(self._c.native_attach(self.handle, *at))

    def set_window(self, window: WeightSource) -> None:
        """Have steps ask `window` for weights. What it raises ends the step. Raises MachineError."""
        self._source = window
        self._struct = window_struct(window)
        self._check_load(self._c.native_set_window(self.handle, ctypes.addressof(self._struct)))

    def ready(self) -> None:
        """To be called after the last tensor. Raises MachineError if one is missing."""
        self._check_load(self._c.native_ready(self.handle))

    def _check_load(self, code: int) -> None:
        if code != OK:
            raise MachineError(f"The native backend cannot load this model: {self._message()}.")

    def _message(self) -> str:
        text: str = self._c.native_message(self.handle).decode()
        return text

    def _check_step(self, code: int) -> None:
        if code == NO_WEIGHTS and self._source is not None and self._source.error is not None:
            error, self._source.error = self._source.error, None
            raise StepFailed(f"The step has no weights: {error}") from error
        if code != OK:
            raise StepFailed(f"The step was refused: {self._message()}.")

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        """One step. Raises StepFailed."""
        rows = batch.output_rows_N.size
        b, s = batch_struct(batch), sampling_struct(sampling, rows)
        out = ResultBuffers.make(rows, sampling.num_logprobs_N)
        at = ctypes.addressof
        self._check_step(self._c.native_step(self.handle, at(b), at(s), at(out.struct)))
        return out.result

    def logits(self, batch: StepBatch, vocab: int) -> F32:
        """One step whose logits are given instead of sampled. Raises StepFailed."""
        b = batch_struct(batch)
        out = np.empty((batch.output_rows_N.size, vocab), np.float32)
        self._check_step(self._c.native_logits(self.handle, ctypes.addressof(b), out.ctypes.data))
        return out

    def swap(self, to_host: bool, device_blocks: I32, host_blocks: I32) -> None:
        """Copy blocks pair by pair. Raises StepFailed."""
        count = device_blocks.size
        device = address("device_blocks", device_blocks, np.int32, count)
        host = address("host_blocks", host_blocks, np.int32, count)
        self._check_step(self._c.native_swap(self.handle, int(to_host), device, host, count))

    def isa(self) -> str:
        """The instruction set that was chosen."""
        name: str = self._c.native_isa(self.handle).decode()
        return name

    def block_bytes(self) -> int:
        """Bytes of one KV block: K and V of all layers."""
        return int(self._c.native_block_bytes(self.handle))

    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""
        m = _Memory()
        self._c.native_memory_bytes(self.handle, ctypes.addressof(m))
        return {"weights": m.weights, "kv": m.kv, "host_kv": m.host_kv, "activations": m.activations}

    def phase_ns(self, reset: bool = False) -> dict[str, int]:
        """Nanoseconds spent in each phase of all steps since the last reset."""
        ns = (ctypes.c_int64 * len(PHASES))()
        self._c.native_phase_ns(self.handle, ctypes.addressof(ns), int(reset))
        return dict(zip(PHASES, ns, strict=True))

    def close(self) -> None:
        """Join the threads and give the memory back. Idempotent."""
        if self._handle is not None:
            self._c.native_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()
