"""The torch runner: the exact float32 path, the portable bf16 path, and the CUDA path, through one Transformer.

Knows tensors and one step; knows neither requests nor scheduling. In float32 it is the oracle that the native backend
is held against.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megalith.base.errors import EngineError, MachineError, StepFailed, TierError
from megalith.engine.attention_option import HERE, AttentionOption
from megalith.engine.attention_workers import KvElsewhere, KvShape, open_attention
from megalith.engine.batch import F32, I32, SamplingBatch, StepBatch, StepResult
from megalith.engine.block_float_kv import BlockFloatKv
from megalith.engine.sampling import plain_rows, sample
from megalith.engine.torch_attention import PagedKv, StepAttention
from megalith.engine.torch_graphs import StaticDecodes
from megalith.engine.torch_linear import PackedLinear, cpu_has_bf16
from megalith.engine.torch_residence import HeldModel, Residence
from megalith.model.checkpoint import Checkpoint
from megalith.model.transformer import Attend
from megalith.specs.kv_format import KvFormat
from megalith.specs.model import ModelSpec

log = logging.getLogger(__name__)

IN_MEMORY = Residence()
DTypeName = Literal["float32", "bf16"]


class TorchRunner:
    """Implements engine.batch.Runner.

    dtype float32: weights, activations and KV in float32. bf16: all in bfloat16; on a CPU without bfloat16 instructions
    weights and activations are float32 and only KV is bfloat16 (`widen`): emulated products take ten times as long.
    `residence`: what of the weights is in memory, if not all. Linear layers of windows are
    then torch's own, for packed ones are opaque: logits may differ in the last bits from those with all in memory.
    `attention` elsewhere: KV lies in other processes (engine.attention_workers), and there is nothing to swap.
    `kv_form`: KV here is in block floating point, on a CPU.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: DTypeName = "float32",
        block_tokens: int = 16,
        num_blocks: int,
        num_host_blocks: int = 0,
        threads: int | None = None,
        widen: bool | None = None,
        attention: AttentionOption = HERE,
        residence: Residence = IN_MEMORY,
        kv_form: KvFormat | None = None,
    ) -> None:
        self._device = open_device(device)
        on_cpu = self._device.type == "cpu"
        if on_cpu and threads is not None:
            torch.set_num_threads(threads)
        compute, kv_type = working_types(dtype, on_cpu=on_cpu, widen=widen)
        self.name = f"torch-{self._device.type}-{dtype}"
        self.vocab = spec.vocab
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self._spec = spec
        self._windows = [spec.layer_window(layer) for layer in range(spec.num_layers)]
        self.elsewhere: KvElsewhere | None = None
        """Where KV is, when it is not here."""
        if attention.elsewhere:
            shape = KvShape(spec, block_tokens, num_blocks, compute, kv_type)
            self.elsewhere = open_attention(attention, shape, threads or 1)
            self.num_blocks = self.elsewhere.num_blocks
            num_blocks = num_host_blocks = self.num_host_blocks = 0
        with torch.inference_mode():
            self.held = HeldModel(checkpoint, compute, self._device, residence)
            self._model, self.streamed = self.held.model, self.held.streamed
            layout, room = (spec.num_layers, spec.num_kv_heads, spec.head_dim), (num_blocks, num_host_blocks)
            self._kv: PagedKv
            if kv_form is not None:
                self.name += f"-bfp{kv_form.keys.bits}"
                self._kv = BlockFloatKv(layout, kv_form, blocks=room, block_tokens=block_tokens)
            else:
                self._kv = PagedKv(layout, blocks=room, block_tokens=block_tokens, dtype=kv_type, device=self._device)
        self.block_bytes = self._kv.block_bytes
        static = not on_cpu and self.elsewhere is None and not self.held.streams
        self._graphs = StaticDecodes(self._model, self._kv, self._windows, capture=True) if static else None
        self._closed = False

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        """Run the rows, write their K and V, sample the output rows. Raises StepFailed."""
        with torch.inference_mode():
            begin_ns, read = time.perf_counter_ns(), self.held.read_bytes
            try:
                logits_NV = self._forward(batch)
            except TierError as error:
                raise StepFailed(f"Weights could not be brought into memory: {error.what}", error.hint) from error
            if self.held.streams:
                self.streamed.note(batch, time.perf_counter_ns() - begin_ns, self.held.read_bytes - read)
            if self._device.type != "cpu" and _bare(sampling):
                return StepResult(_greedy(logits_NV))
            return sample(logits_NV.cpu().numpy(), sampling)

    def logits(self, batch: StepBatch) -> F32:
        """Run the rows and return the float32 logits [N, V] of the output rows."""
        with torch.inference_mode():
            values: F32 = self._forward(batch).cpu().numpy()
            return values.copy()

    def swap_out(self, device_blocks: I32, host_blocks: I32) -> None:
        """Copy device blocks to host blocks, pair by pair."""
        with torch.inference_mode():
            self._kv.swap_out(device_blocks, host_blocks)

    def swap_in(self, host_blocks: I32, device_blocks: I32) -> None:
        """Copy host blocks to device blocks, pair by pair."""
        with torch.inference_mode():
            self._kv.swap_in(host_blocks, device_blocks)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held between steps, itemised; torch holds no activations then."""
        if self._closed:
            return {"weights": 0, "kv": 0, "activations": 0}
        packed = sum(m.weight_bytes for m in self._model.modules() if isinstance(m, PackedLinear))
        if self.held.window is not None:
            return {"weights": self.held.window.held_bytes, "kv": self._kv.num_bytes(), "activations": 0}
        away = self.elsewhere.num_bytes() if self.elsewhere is not None else 0
        packed += self.held.neurons.num_bytes() if self.held.neurons is not None else 0
        return {"weights": self._model.weight_bytes() + packed, "kv": self._kv.num_bytes() + away, "activations": 0}

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if not self._closed:
            self._closed = True
            self.held.close()
            del self._model, self._kv
            self._graphs = None
            if self.elsewhere is not None:
                self.elsewhere.close()

    def _forward(self, batch: StepBatch) -> Tensor:
        """Logits [N, V] of the output rows, on the device."""
        if self._closed:
            raise EngineError("This runner has been closed.")
        if self._graphs is not None and self._graphs.takes(batch):
            return self._graphs.run(batch)
        if self.elsewhere is not None:
            attend: Attend = self.elsewhere.step(batch)
        else:
            attend = StepAttention(self._kv, batch, self._windows, self._spec.attention_scale)
        tokens_M = torch.from_numpy(batch.tokens_M.astype(np.int64)).to(self._device)
        positions_M = torch.from_numpy(batch.positions_M.astype(np.int64)).to(self._device)
        hidden_MD = self._model.embed(tokens_M)
        self._announce(batch, hidden_MD)
        hidden_MD = self._model.run(hidden_MD, positions_M, attend)
        if batch.output_rows_N.size == 0:
            return torch.empty((0, self.vocab), dtype=torch.float32)
        rows_N = torch.from_numpy(batch.output_rows_N.astype(np.int64)).to(self._device)
        return self._model.head(hidden_MD[rows_N])

    def _announce(self, batch: StepBatch, hidden_MD: Tensor) -> None:
        """For who runs a step together with others: before the layers run."""


def working_types(dtype: DTypeName, *, on_cpu: bool, widen: bool | None = None) -> tuple[torch.dtype, torch.dtype]:
    """(of weights and activations, of KV)."""
    if dtype == "float32":
        return torch.float32, torch.float32
    if widen is None:
        widen = on_cpu and not cpu_has_bf16()
        if widen:
            log.info("this processor has no bfloat16 instructions: weights stay float32, KV is bfloat16")
    return torch.float32 if widen else torch.bfloat16, torch.bfloat16


def open_device(name: str) -> torch.device:
    """The torch device of that name. Raises MachineError when this machine does not have it."""
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise MachineError(f"This machine has no device {name} that torch can use.", "Use --device cpu.")
    return device


def _bare(sampling: SamplingBatch) -> bool:
    """Whether every row is a plain arg-max without log probabilities."""
    return sampling.num_logprobs_N.size > 0 and bool((sampling.num_logprobs_N < 0).all() and plain_rows(sampling).all())


def _greedy(logits_NV: Tensor) -> I32:
    """Arg-max on the device, lowest id on a tie (torch.argmax does not promise which). Raises StepFailed on NaN."""
    vocab = logits_NV.shape[1]
    ids_V = torch.arange(vocab, device=logits_NV.device, dtype=torch.int32)
    best_N1 = logits_NV.amax(dim=1, keepdim=True)
    tokens: I32 = torch.where(logits_NV == best_N1, ids_V, vocab).amin(dim=1).cpu().numpy().astype(np.int32)
    if (tokens == vocab).any():
        raise StepFailed("The logits of a row hold no finite maximum.")
    return tokens
