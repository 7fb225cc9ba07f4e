"""NativeRunner: the Runner that gives every step to the C library in one call.

Knows a ModelSpec, a Checkpoint and the binding. Must not import torch: this path starts in under
two seconds.
"""

from __future__ import annotations

import ctypes
import time

import numpy as np

from megalith.base.errors import MachineError
from megalith.cost.memory import packed_bytes
from megalith.engine.batch import F32, I32, SamplingBatch, StepBatch, StepResult
from megalith.engine.native import binding
from megalith.engine.streamed import StreamTally
from megalith.engine.weight_window import WeightWindow
from megalith.model.bipolar import BITS_OF
from megalith.model.checkpoint import Checkpoint
from megalith.model.rope import inverse_frequencies
from megalith.specs.model import ModelSpec

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def supports(spec: ModelSpec, checkpoint: Checkpoint) -> str | None:
    """Why the native backend cannot run this model on this machine, in a sentence; None when it can."""
    reason = unsupported_spec(spec) or unsupported_formats(checkpoint)
    if reason is not None:
        return reason
    try:
        library = binding.load()
    except MachineError as error:
        return str(error)
    asked = binding.chosen_isa()
    if asked is not None and asked not in library.isas():
        return f"MEGALITH_NATIVE_ISA asks for {asked}, but usable here: {', '.join(library.isas())}."
    return None


def unsupported_spec(spec: ModelSpec) -> str | None:
    """What in the model's shape has no kernel, or None."""
    checks = (
        (spec.family in FAMILIES, f"the {spec.family} family is not one of {', '.join(FAMILIES)}"),
        (spec.norm == "rms", "layer norms have no kernel"),
        (spec.position == "rope", f"{spec.position} positions have no kernel"),
        (spec.activation in _ACTIVATIONS, f"the activation {spec.activation} has no kernel"),
        (spec.gated_ffn, "an FFN without a gate has no kernel"),
        (spec.num_experts == 0, "mixtures of experts have no kernel"),
        (not spec.linear_bias, "biases beyond q, k and v have no kernel"),
        (not spec.embedding_norm, "a norm after the embedding has no kernel"),
        (spec.hidden % 32 == 0, f"hidden is {spec.hidden}, and activations are quantised in groups of 32"),
        (spec.ffn % 32 == 0, f"ffn is {spec.ffn}, and activations are quantised in groups of 32"),
        (spec.head_dim % 16 == 0, f"head_dim is {spec.head_dim}, and heads are handled 16 dimensions at a time"),
        (spec.num_heads * spec.head_dim % 32 == 0, "query heads x head_dim is not a multiple of 32"),
        (spec.num_heads % spec.num_kv_heads == 0, f"{spec.num_heads} heads do not share {spec.num_kv_heads} KV heads"),
    )
    return next((why for good, why in checks if not good), None)


def unsupported_formats(checkpoint: Checkpoint) -> str | None:
    """A weight format that the packer does not read, or None."""
    strange = sorted(set(checkpoint.formats()) - set(binding.FORMATS))
    return f"weights in {', '.join(strange)} cannot be packed" if strange else None


class NativeRunner:
    """Packed weights and KV blocks in memory of the C library.

    Matrices keep their file's exact values where groups of 32 have one scale (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K,
    Q5_K); Q6_K, F16, BF16 and F32 are rounded to 8 bits a group (within 1/254 of the group's largest weight).
    Activations are 8 bits with one scale for each row and group of 32; K and V are bfloat16. A row's result is the same
    bits alone, in any batch, chunked or not, with any number of threads.

    Raises MachineError if the library cannot be built or the memory cannot be had.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        *,
        block_tokens: int,
        num_blocks: int,
        num_host_blocks: int,
        max_rows: int,
        threads: int,
        window: WeightWindow | None = None,
        activation_bits: int = 8,
    ) -> None:
        """`window` gives the matrices, if they do not stay in memory; close() closes it.

        `activation_bits` is what bipolar matrices are multiplied with; a model without one does not look at it.
        """
        reason = supports(spec, checkpoint)
        if reason is not None:
            raise MachineError(f"The native backend cannot run {spec.name}: {reason}.")
        self.vocab = spec.vocab
        self.block_tokens, self.num_blocks, self.num_host_blocks = block_tokens, num_blocks, num_host_blocks
        self.max_rows, self.threads = max_rows, threads
        bipolar = checkpoint.formats().keys() & BITS_OF.keys()
        self._model = self._create(spec, activation_bits if bipolar else 0)
        self.name = f"native-{self._model.isa()}"
        self.block_bytes = self._model.block_bytes()
        self.window = window
        self.streamed = StreamTally("disk")
        if window is None:
            _load_weights(self._model, spec, checkpoint)
        else:
            _attach_weights(self._model, checkpoint, window)

    def _create(self, spec: ModelSpec, activation_bits: int) -> binding.NativeModel:
        windows = np.array([spec.layer_window(i) or 0 for i in range(spec.num_layers)], np.int32)
        local = spec.rope_local if spec.rope_local is not None else spec.rope
        ropes = np.array([int(window > 0) for window in windows], np.int32)
        frequencies = np.array([inverse_frequencies(r, spec.head_dim) for r in (spec.rope, local)], np.float32)
        isa = binding.chosen_isa()
        config = binding.Config(
            num_layers=spec.num_layers, hidden=spec.hidden, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim, ffn=spec.ffn, vocab=spec.vocab, activation=_ACTIVATIONS[spec.activation],
            tied_embeddings=int(spec.tied_embeddings), qk_norm=int(spec.qk_norm), post_norms=int(spec.post_norms),
            qkv_bias=int(spec.attention_bias), norm_eps=spec.norm_eps, attention_scale=spec.attention_scale,
            embedding_scale=spec.embedding_scale, windows=windows.ctypes.data, ropes=ropes.ctypes.data,
            rope_frequencies=frequencies.ctypes.data,
            max_context=min(spec.max_context, self.num_blocks * self.block_tokens), block_tokens=self.block_tokens,
            num_blocks=self.num_blocks, num_host_blocks=self.num_host_blocks, max_rows=self.max_rows,
            threads=self.threads, activation_bits=activation_bits,
            isa=None if isa is None else ctypes.c_char_p(isa.encode()),
        )  # fmt: skip
        return binding.NativeModel(binding.load(), config)

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        """As Runner says."""
        if self.window is None:
            return self._model.step(batch, sampling)
        begin_ns = time.perf_counter_ns()
        result = self._model.step(batch, sampling)
        self.streamed.note(batch, time.perf_counter_ns() - begin_ns, self.window.step_bytes)
        return result

    def logits(self, batch: StepBatch) -> F32:
        """As Runner says."""
        return self._model.logits(batch, self.vocab)

    def swap_out(self, device_blocks: I32, host_blocks: I32) -> None:
        """As Runner says."""
        self._model.swap(True, device_blocks, host_blocks)

    def swap_in(self, host_blocks: I32, device_blocks: I32) -> None:
        """As Runner says."""
        self._model.swap(False, device_blocks, host_blocks)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: weights, kv, host_kv and activations. KV and activations become resident as they are used."""
        held = self._model.memory()
        return held if self.window is None else held | {"weights": held["weights"] + self.window.num_bytes}

    def phase_ns(self, reset: bool = False) -> dict[str, int]:
        """Nanoseconds of each phase of the steps since the last reset; see binding.PHASES."""
        return self._model.phase_ns(reset)

    def close(self) -> None:
        """Join the threads and give the memory back. Idempotent."""
        self._model.close()
        if self.window is not None:
            self.window.close()


def _load_weights(model: binding.NativeModel, spec: ModelSpec, checkpoint: Checkpoint) -> None:
    def load(layer: int, name: str, tensor: str) -> None:
        found = checkpoint.tensor(name)
        if len(found.shape) == 2:
            model.load(layer, tensor, found.format, found.raw, found.shape)
        else:
            model.load(layer, tensor, "F32", found.float32(), found.shape)

    load(-1, "embed.weight", "embed")
    layer = -1
    for name in checkpoint.names():
        parts = name.split(".")
        if parts[0] == "layers":
            if int(parts[1]) != layer:
                layer = int(parts[1])
                checkpoint.forget(cached=False)  # What is packed need not stay resident twice.
            load(layer, name, parts[2] if parts[3] == "weight" else f"{parts[2]}.bias")
    load(-1, "final_norm.weight", "final_norm")
    if not spec.tied_embeddings:
        load(-1, "head.weight", "head")
    model.ready()
    checkpoint.forget(cached=False)


def _attach_weights(model: binding.NativeModel, checkpoint: Checkpoint, window: WeightWindow) -> None:
    """Vectors are loaded; matrices are where the window says."""
    for name in checkpoint.names():
        parts = name.split(".")
        top = parts[0] != "layers"
        part = parts[0] if top else parts[2] if parts[3] == "weight" else f"{parts[2]}.bias"
        if part in binding.MATRICES:
            continue
        found = checkpoint.tensor(name)
        model.load(-1 if top else int(parts[1]), part, "F32", found.float32(), found.shape)
    for matrix in window.matrices:
        for span in matrix.spans:
            model.attach(matrix.layer, matrix.tensor, matrix.format, span.piece, span.first_panel, span.offset)
    model.set_window(window)
    model.ready()


def packed_weight_bytes(spec: ModelSpec, formats: dict[str, str]) -> int:
    """Bytes that the weights of `spec` take in panels, before anything is loaded.

    `formats` maps canonical tensor names to file formats; norms and biases are float32 whatever it says.
    """
    d, q, kv = spec.hidden, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (spec.ffn, d), "up": (spec.ffn, d)}
    shapes |= {"down": (d, spec.ffn), "embed": (spec.vocab, d), "head": (spec.vocab, d)}
    vectors = {"q_norm": spec.head_dim, "k_norm": spec.head_dim, "q.bias": q, "k.bias": kv, "v.bias": kv}
    total = 0
    for name, kind in formats.items():
        part = name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("layers.") else name.split(".")[0]
        if part in shapes:
            outputs, inputs = shapes[part]
            total += packed_bytes(-(-outputs // 16) * 16 * inputs, kind)
        else:
            total += 4 * vectors.get(part, d)
    return total


__all__ = ["NativeRunner", "packed_weight_bytes", "supports"]
