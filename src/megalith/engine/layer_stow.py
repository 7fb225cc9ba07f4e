"""The weights of layers as runs of bytes: taken out of their parameters, and put back.

A layer's parameters lie one behind the other in one run of whole pages, so that one move brings them all. Parameters
without memory keep their shape. Knows parameters and bytes; must not know which layers are near, or when.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from megalith.base.errors import ConfigError
from megalith.engine.layer_far import Far
from megalith.tier.disk import ALIGN
from megalith.tier.memory import HugeBuffer

_ALIGN = 64


class Piece(NamedTuple):
    """A parameter and where in its layer's bytes it is."""

    parameter: nn.Parameter
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    counts: bool
    """Whether torch counts its versions; never for what was made in inference mode, whose weights do not change."""

    @property
    def version(self) -> int:
        """How often the parameter was written to."""
        return self.parameter._version if self.counts else 0


@dataclass(slots=True)
class Layer:
    """A module whose weights come and go."""

    module: nn.Module
    pieces: list[Piece] = field(default_factory=list)
    num_bytes: int = 0
    """A whole number of 4 KiB."""
    versions: list[int] = field(default_factory=list)
    """Of the parameters when they came near; empty while they are not."""
    forward: Callable[..., Any] | None = None
    """What `forward` of the instance was before the window, where it had one of its own."""
    handles: list[Any] = field(default_factory=list)

    def attach(self, data: Tensor) -> None:
        """Parameters are now in `data`, [num_bytes or more] uint8."""
        for piece in self.pieces:
            raw = data[piece.offset : piece.offset + piece.num_bytes].view(piece.dtype)
            piece.parameter.data = raw.as_strided(piece.shape, piece.stride, raw.storage_offset())
        self.versions = [piece.version for piece in self.pieces]

    def detach(self) -> None:
        """Parameters without memory: their shape over one value that is no number, and that cannot be written to."""
        with torch.inference_mode(False):
            for piece in self.pieces:
                parameter = piece.parameter
                floating = piece.dtype.is_floating_point or piece.dtype.is_complex
                nothing = torch.full((), float("nan") if floating else 0, dtype=piece.dtype, device=parameter.device)
                parameter.data = nothing.expand(piece.shape)
                if piece.counts:
                    increment_version([parameter])  # What autograd saved past our hooks is noticed, not misread.
        self.versions = []

    @property
    def changed(self) -> bool:
        """Whether somebody wrote to a parameter since it came near, as torch's version counters say."""
        return bool(self.versions) and self.versions != [piece.version for piece in self.pieces]


class LayerStow:
    """Layers put into a far tier one by one as they are made, so that they never are in memory all at once."""

    def __init__(self, far: Far) -> None:
        self.far = far
        self.layers: list[Layer] = []
        self.device: torch.device | None = None
        """Where the parameters are when they are near."""

    def add(self, module: nn.Module, shared: frozenset[int] = frozenset()) -> None:
        """Write a layer's parameters to the far tier and free them; those of `shared` storages stay.

        Raises ConfigError for parameters on several devices, TierError and PoolFull as the far tier does.
        """
        layer, at = Layer(module), 0
        for parameter in dict.fromkeys(module.parameters()):
            if id_of_storage(parameter) in shared or not _dense(parameter):
                continue
            self.device = self.device or parameter.device
            if parameter.device != self.device or parameter.device.type not in ("cpu", "cuda"):
                raise ConfigError(
                    f"Parameters of a window are on {self.device} and {parameter.device}.", "Put them on one device."
                )
            size = parameter.numel() * parameter.element_size()
            layer.pieces.append(
                Piece(parameter, at, size, parameter.dtype, parameter.shape, parameter.stride(),
                      not parameter.is_inference())
            )  # fmt: skip
            at += -(-size // _ALIGN) * _ALIGN
        layer.num_bytes = -(-at // ALIGN) * ALIGN
        if at:
            with _staged(layer.num_bytes) as (view, flat):
                for piece in layer.pieces:
                    raw = piece.parameter.detach().as_strided((piece.parameter.numel(),), (1,)).view(torch.uint8)
                    flat[piece.offset : piece.offset + piece.num_bytes].copy_(raw)
                self.far.write(len(self.layers), view)
        self.layers.append(layer)
        layer.detach()
        _trim()

    def restore(self, part: int) -> None:
        """Have a layer's parameters in memory of their own again."""
        layer = self.layers[part]
        if not layer.pieces:
            return
        with _staged(layer.num_bytes) as (view, flat), torch.inference_mode(False):
            self.far.read_into(part, view)
            for piece in layer.pieces:
                raw = flat[piece.offset : piece.offset + piece.num_bytes].clone().to(piece.parameter.device)
                piece.parameter.data = raw.view(piece.dtype).as_strided(piece.shape, piece.stride)


def _trim() -> None:
    """Have the C library give free memory back: torch's aligned blocks leave gaps in its heap that nobody fills."""
    with suppress(OSError, AttributeError):  # Only glibc has it, and only glibc needs it.
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _staged(num_bytes: int) -> Iterator[tuple[memoryview, Tensor]]:
    """The same aligned memory as a view and as a tensor, for as long as the block lasts."""
    with HugeBuffer(num_bytes) as buffer, torch.inference_mode(False):
        flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
        yield buffer.view, flat
        del flat


def version_of(tensor: Tensor) -> int:
    """How often it was written to; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def id_of_storage(tensor: Tensor) -> int:
    """The same for tensors that share bytes."""
    return int(tensor.untyped_storage()._cdata)


def shared_storages(module: nn.Module, layers: list[nn.Module]) -> frozenset[int]:
    """Storages that more than one layer, or one and the rest of the module, or two of its tensors, look at."""
    owners: dict[int, set[int]] = {}
    tensors: dict[int, set[int]] = {}
    for number, layer in enumerate(layers):
        for tensor in (*layer.parameters(), *layer.buffers()):
            owners.setdefault(id_of_storage(tensor), set()).add(number)
            tensors.setdefault(id_of_storage(tensor), set()).add(id(tensor))
    shared = {storage for storage, who in owners.items() if len(who) > 1 or len(tensors[storage]) > 1}
    windowed, waiting, seen = {id(layer) for layer in layers}, [module], set[int]()
    while waiting:  # All modules that are reached without going through a layer.
        outside = waiting.pop()
        if id(outside) in windowed or id(outside) in seen:
            continue
        seen.add(id(outside))
        waiting += outside.children()
        own = (*outside.parameters(recurse=False), *outside.buffers(recurse=False))
        shared |= {id_of_storage(tensor) for tensor in own}
    return frozenset(shared)


def _dense(tensor: Tensor) -> bool:
    """Whether it is all of a run of bytes, in whatever order of its dimensions, of a plain parameter."""
    if type(tensor) is not nn.Parameter or tensor.layout is not torch.strided or not tensor.numel():
        return False
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return span == tensor.numel() and whole and not tensor.is_conj() and not tensor.is_neg()
