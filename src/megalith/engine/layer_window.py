"""Any torch module with a window of its layers in memory, the others on a far tier; results are the same bits.

Superpipeline (arXiv:2410.08791) over modules that know nothing of it. Each layer's `forward` first asks for its own
weights; the policy (`policy/residency.LayerWindow`) says which go and which come, the mover brings them. What autograd
saves of a layer's weights is a note, not the tensor: the backward asks for the layer again when it needs it. So
forward walks up, backward walks down, and activation checkpoints work. A layer that changed while it was near (an
optimizer, told by torch's version counters) is written back before it goes.

Stays in memory: whatever is in no layer, is shared by two layers or with the rest of the module, and buffers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megalith.base.errors import ConfigError, TierError
from megalith.engine.layer_far import Far, FarMemory
from megalith.engine.layer_ring import Ring, Slot
from megalith.engine.layer_stow import Layer, LayerStow, shared_storages, version_of
from megalith.policy.residency import Change, Part
from megalith.policy.residency import LayerWindow as Policy
from megalith.tier.mover import Mover
from megalith.tier.pool import Pool

LINK = "window"
"""Of a window's own mover."""


class Residence(Protocol):
    """Which of a window's layers are near."""

    cap: int
    """The most that are near at once."""
    turns: bool
    """Whether backward walks down again."""

    def need(self, *parts: Part) -> Change: ...  # noqa: D102


class _Saved(NamedTuple):
    """A tensor in a slot as autograd keeps it."""

    part: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """In the slot, in elements."""


class _Other(NamedTuple):
    """Any other tensor: itself and its version, or what hooks outside of ours made of it."""

    value: Any
    version: int | None
    unpack: Callable[[Any], Tensor] | None


class ModuleWindow:
    """`k` of `layers` of `module` are near; when `k_prime` have run, those go and as many come.

    A context: at its end the layers are in memory again, as they were or as they were trained. Layers in `keep` stay
    near. `far` is where the others are (default: host memory), `mover` and its `link` bring them (default: a mover of
    its own, no throttle), `pool` counts the bytes that are near. `stowed` layers are in their far tier already. The
    window closes the far tier. `policy(layers, turns)` says which are near in place of k and k_prime. From one thread
    at a time; a second derivative is refused.

    Raises ConfigError for windows and layers that cannot be, TierError for bytes that cannot be moved.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[nn.Module],
        k: int,
        k_prime: int = 1,
        *,
        keep: Iterable[int] = (),
        far: Far | None = None,
        mover: Mover | None = None,
        link: str = LINK,
        pool: Pool | None = None,
        stowed: LayerStow | None = None,
        policy: Callable[[int, bool], Residence] | None = None,
    ) -> None:
        self.module = module
        self.wait_ns = self.moves = self.read_bytes = 0
        """Time that layers waited for their weights, layers that were brought, and their bytes."""
        unique = list({id(layer): layer for layer in layers}.values())
        if not unique:
            raise ConfigError("A window over no layers cannot be.", "Name the layers of the module.")
        taken = next((n for n, layer in enumerate(unique) if _is_ours(layer)), None)
        if taken is not None:
            raise ConfigError(f"Layer {taken} has a window already.", "Close that one first.")
        kept = frozenset(keep)
        self._new_policy = policy or (lambda count, turns: Policy(count, k, k_prime, kept, turns=turns))
        self._count = len(unique)
        self._policy = self._new_policy(self._count, False)
        self._lock = threading.RLock()
        self._running: list[int] = []
        self._near: dict[int, Slot] = {}
        self._closed = self._backward_seen = False
        self._ring: Ring | None = None
        self._guard: Any = None
        self._stow = stowed or LayerStow(FarMemory() if far is None else far)
        self.layers = self._stow.layers
        self._mover, self._own_mover = mover or Mover(workers=2), mover is None
        if self._own_mover:
            self._mover.add_link(link)
        try:
            self._take_over(unique)
            self.pool = Pool("near", self.cap_bytes) if pool is None else pool
            self._ring = Ring(self._policy.cap, max(layer.num_bytes for layer in self.layers), self._stow, self._mover,
                              link, self.pool)  # fmt: skip
        except BaseException:
            self._let_go(restore=True)
            raise

    @property
    def num_bytes(self) -> int:
        """Of all weights that the window moves."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def cap_bytes(self) -> int:
        """The most bytes of them that are near at once."""
        return sum(sorted((layer.num_bytes for layer in self.layers), reverse=True)[: self._policy.cap])

    @property
    def held_bytes(self) -> int:
        """Of memory: the ring, and the module's parameters that are in no window."""
        moved = {id(piece.parameter) for layer in self.layers for piece in layer.pieces}
        rest = {p.data_ptr(): p.nbytes for p in self.module.parameters() if id(p) not in moved}
        ring = 0 if self._ring is None else self._ring.slot_bytes * len(self._ring.slots)
        return ring + sum(rest.values())

    def expect(self, modules: Iterable[nn.Module]) -> None:
        """These layers run next, in this order: as many as the window holds are asked for. Raises TierError.

        For policies that take several at once.
        """
        with self._lock:
            if self._running or self._closed:
                return
            try:
                self._bring(self._policy.need(*[self._parts[id(module)] for module in modules][: self._policy.cap]))
            except BaseException:
                self._begin_anew(self._policy.turns)
                raise

    def visit(self) -> Iterator[nn.Module]:
        """Each layer in turn while it is near: for an optimizer's step of its parameters, for one."""
        for part, layer in enumerate(self.layers):
            with self._lock:
                self._need(part, self._policy.turns)
                self._running.append(part)
            try:
                yield layer.module
            finally:
                self._running.remove(part)

    def _take_over(self, unique: list[nn.Module]) -> None:
        shared = shared_storages(self.module, unique)
        for number, module in enumerate(unique):
            if number >= len(self.layers):
                self._stow.add(module, shared)
            elif self.layers[number].module is not module:
                raise ConfigError(f"Layer {number} was stowed as another one.", "Stow layers in their order.")
        self._parts = {id(layer.module): part for part, layer in enumerate(self.layers)}
        for part, layer in enumerate(self.layers):
            self._wrap(part, layer)
        self._guard = self.module.register_state_dict_pre_hook(_refuse_state)  # type: ignore[no-untyped-call]

    def _wrap(self, part: int, layer: Layer) -> None:
        module = layer.module
        layer.forward = module.__dict__.get("forward")
        inner = module.forward

        # No forward hook: modules with fused paths (nn.TransformerEncoderLayer) take slower ones where there are hooks,
        # and then results would not be the same bits.
        def forward(*given: Any, **named: Any) -> Any:
            grad = torch.is_grad_enabled()
            with self._lock:
                self._need(part, grad and (self.module.training or self._backward_seen))
                self._running.append(part)
            try:
                if not grad:
                    return inner(*given, **named)
                # Only the innermost hooks are asked: ours pass on what is not ours (activation checkpoints).
                outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
                with saved_tensors_hooks(lambda tensor: self._pack(tensor, outer), self._unpack):
                    return inner(*given, **named)
            finally:
                self._running.remove(part)

        forward._layer_window = True  # type: ignore[attr-defined]
        module.forward = forward
        for piece in layer.pieces:
            if piece.parameter.requires_grad:
                parameter: Any = piece.parameter
                layer.handles.append(parameter.register_hook(self._before_gradient(part, parameter)))

    def _before_gradient(self, part: int, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            # Who steps an optimizer in a post-accumulate hook needs the parameter itself, even where no gradient did.
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                with self._lock:
                    self._need(part, turns=True)

        return hook

    def _need(self, part: int, turns: bool) -> None:
        """Have a layer near, and those that the policy wants on their way. Raises TierError; the next call may work."""
        if self._closed or self._ring is None:
            raise TierError("A layer window was used after it was closed.")
        if turns != self._policy.turns:
            self._begin_anew(turns)
        layer = self.layers[part]
        try:
            self._bring(self._policy.need(part), part)
            if layer.pieces and not layer.versions:
                slot = self._near[part]
                assert slot.ticket is not None
                begin_ns = time.perf_counter_ns()
                slot.ticket.wait()
                self.wait_ns += time.perf_counter_ns() - begin_ns
                layer.attach(slot.data)
        except BaseException:
            self._begin_anew(turns)
            raise

    def _bring(self, change: Change, *parts: int) -> None:
        for gone in change.drop:
            self._drop(gone)
        for other in (*change.load, *parts):
            if other not in self._near and self.layers[other].pieces:
                self._fill(other)

    def _fill(self, part: int) -> None:
        assert self._ring is not None
        if self._ring.full:  # The policy knows nothing of layers that ran while the window began anew.
            for other in [other for other in self._near if other not in self._running][:1]:
                self._drop(other)
        self._near[part] = self._ring.fill(part, self.layers[part].num_bytes)
        self.moves += 1
        self.read_bytes += self.layers[part].num_bytes

    def _drop(self, part: int) -> None:
        if part in self._running:
            raise TierError(
                f"Layer {part} is running and would have to leave the window of {self._policy.cap}.",
                "Run the module from one thread at a time, and give the window room for layers inside layers.",
            )
        slot, layer = self._near.get(part), self.layers[part]
        if slot is not None and self._ring is not None:
            self._ring.drain(slot, layer.num_bytes, save=layer.changed)
            del self._near[part]
            layer.detach()

    def _begin_anew(self, turns: bool) -> None:
        """Empty the window of what does not run; a new policy knows of nothing that is near."""
        self._policy = self._new_policy(self._count, turns)
        for part in [part for part in self._near if part not in self._running]:
            self._drop(part)

    def _pack(self, tensor: Tensor, outer: Any) -> _Saved | _Other:
        found = self._slot_of(tensor)
        if found is not None:
            if tensor.is_conj() or tensor.is_neg():  # A bit that strides do not tell: keep a copy.
                return _Other(tensor.resolve_conj().resolve_neg(), None, None)
            slot, offset = found
            assert slot.part is not None
            return _Saved(slot.part, tensor.dtype, tensor.shape, tensor.stride(), offset)
        if outer is not None:
            return _Other(outer[0](tensor), None, outer[1])
        # Detached: an operation's own result would hold on to the operation, and that to it. The version is shared.
        return _Other(tensor.detach(), version_of(tensor), None)

    def _unpack(self, saved: _Saved | _Other) -> Tensor:
        if isinstance(saved, _Other):
            tensor: Tensor = saved.value if saved.unpack is None else saved.unpack(saved.value)
            if saved.version not in (None, version_of(tensor)):  # Torch does not look where there are hooks.
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(tensor.shape)} is at version {version_of(tensor)}, expected {saved.version}"
                )
            return tensor
        if torch.is_grad_enabled():
            raise TierError(
                "A second derivative through a layer window would use weights that have left it.",
                "Call backward without create_graph, or close the window.",
            )
        with self._lock:
            self._backward_seen = True
            self._need(saved.part, turns=True)
            whole = self._near[saved.part].data.view(saved.dtype)
        return whole.as_strided(saved.shape, saved.stride, whole.storage_offset() + saved.offset)

    def _slot_of(self, tensor: Tensor) -> tuple[Slot, int] | None:
        assert self._ring is not None
        with suppress(RuntimeError, NotImplementedError):  # Tensors without a storage of their own are in no slot.
            return self._ring.find(
                tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.element_size()
            )
        return None

    def close(self, *, restore: bool = True) -> None:
        """Give the window back. With `restore` all layers are in memory afterwards; else they are gone. Idempotent.

        Raises TierError where a layer cannot be read or written back; everything else is given back all the same.
        """
        with self._lock:
            if self._closed:
                return
            try:
                self._begin_anew(turns=False)
            finally:
                self._let_go(restore=restore)

    def _let_go(self, *, restore: bool) -> None:
        self._closed = True
        for layer in self.layers:
            _unwrap(layer)
        if self._guard is not None:
            self._guard.remove()
        try:
            if self._ring is not None:
                self._ring.close()
            for part in range(len(self.layers) if restore else 0):
                self._stow.restore(part)
        finally:
            if self._own_mover:
                self._mover.close()
            self._stow.far.close()

    def __enter__(self) -> ModuleWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_ours(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("forward"), "_layer_window")


def _unwrap(layer: Layer) -> None:
    for handle in layer.handles:
        handle.remove()
    layer.handles.clear()
    if _is_ours(layer.module):
        del layer.module.forward
        if layer.forward is not None:
            layer.module.forward = layer.forward


def _refuse_state(module: nn.Module, prefix: str, keep: bool) -> None:
    del module, prefix, keep
    raise TierError("Most layers of a windowed module are not in memory.", "Close the window, then take its state.")
