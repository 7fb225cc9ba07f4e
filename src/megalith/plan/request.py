"""ServeRequest: what is to be planned, and how many bytes that takes.

Knows memory only. Speed and advice are in `serve` and `remedies`.
"""

from __future__ import annotations

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.borrow import BorrowingCostModel, loans, resident
from megalith.cost.compute import CostModel
from megalith.cost.memory import MemoryRequest, WeightBytes, Workspace, blocks_for, device_block_bytes, itemise
from megalith.cost.profile import Profile
from megalith.cost.streaming import DiskRate, StreamingCostModel, disk_rate, windowed
from megalith.specs.model import ModelSpec
from megalith.specs.plan import MemoryLine

DEVICE_SHARE = 0.9
"""Part of an accelerator's memory that a plan may fill when no limit was given."""
SMALLEST_CONTEXT = 256
"""A context that nobody asked for is never derived shorter than this."""


class ServeRequest(Config, kw_only=True):
    """What is to be planned. Sizes in bytes are of one device."""

    model: str
    spec: ModelSpec
    weights: WeightBytes
    profile: Profile
    limit_bytes: int
    limit_source: str
    context: int
    """Tokens of prompt and output of each sequence."""
    batch: int = 1
    """Sequences at once, each with its full context."""
    speed_context: int | None = None
    """Context of the speed predictions; None: `context`, the slowest."""
    prompt_tokens: int | None = None
    """Prompt of the TTFT prediction; None: half the context, at most 512."""
    kv_format: str = "bf16"
    block_tokens: int = 16
    rows: int = 256
    """Token budget of a step."""
    outputs: int | None = None
    """Rows of logits at once; None: the batch, at most the token budget."""
    devices: int = 1
    num_blocks: int | None = None
    """None: what the batch at full context needs."""
    num_host_blocks: int = 0
    peer_layers: int = 0
    """Layers that lie in the memory of a peer device and are fetched a layer ahead (cost.borrow)."""
    host_layers: int = 0
    """Layers that lie in host memory, likewise."""
    host_bytes_per_s: float = 25e9
    """Between one device and host memory: what copies reach over PCIe 4.0 x16 (32e9 on paper)."""

    window_bytes: int | None = None
    """Weights are streamed from disk through so much memory; None: they stay in memory."""
    stream_bytes: int = 0
    """What a step then reads from the disk, or a CUDA device from host memory."""
    disk: DiskRate | None = None
    """Measured at the start; None: what `probe` measured, else an assumption."""

    def disk_rate(self) -> DiskRate:
        """What streaming gets of the disk, or a CUDA device of host memory."""
        if self.profile.kind == "cuda":
            return DiskRate(bytes_per_s=self.host_bytes_per_s, source="assumed for PCIe 4.0 x16")
        return self.disk or disk_rate(self.profile)

    def cost(self) -> CostModel:
        """What steps of the plan take."""
        cost = CostModel(self.spec, self.profile, self.weights, self.kv_format, self.devices)
        if self.window_bytes is not None:
            return StreamingCostModel(cost, self.stream_bytes, self.disk_rate().bytes_per_s)
        if not self.peer_layers and not self.host_layers:
            return cost
        return BorrowingCostModel(
            cost,
            loans(self.weights, self.spec.num_layers, self.devices, self.profile, self.peer_layers, self.host_layers,
                  self.host_bytes_per_s),
        )  # fmt: skip

    def memory_request(self, num_blocks: int) -> MemoryRequest:
        """The memory question for a pool of `num_blocks` blocks."""
        return MemoryRequest(
            kind=self.profile.kind, kv_format=self.kv_format, block_tokens=self.block_tokens, num_blocks=num_blocks,
            work=Workspace(
                self.rows, min(self.outputs or self.batch, self.rows), self.context,
                int(self.profile.versions.get("threads", "1")), 8 if "bipolar" in self.weights.format else 0,
            ),
            devices=self.devices, num_host_blocks=self.num_host_blocks,
        )  # fmt: skip

    def wanted_blocks(self) -> int:
        """Blocks for every sequence at full context, unless the caller said how many."""
        if self.num_blocks is not None:
            return self.num_blocks
        return self.batch * blocks_for(self.context, self.block_tokens)


def check(request: ServeRequest) -> None:
    """Refuse sizes that mean nothing. Raises ConfigError."""
    for name in ("context", "batch", "rows", "block_tokens", "devices", "limit_bytes"):
        if getattr(request, name) < 1:
            raise ConfigError(f"{name} is {getattr(request, name)} but must be at least 1.")
    if request.context > request.spec.max_context:
        raise ConfigError(
            f"A context of {request.context:,} tokens is more than {request.model} was made for "
            f"({request.spec.max_context:,}).",
            f"Use --context {request.spec.max_context} or less.",
        )
    if request.peer_layers < 0 or request.host_layers < 0:
        raise ConfigError(f"{min(request.peer_layers, request.host_layers)} layers cannot be borrowed.")
    if request.devices > 1 and request.spec.num_heads % request.devices:
        raise ConfigError(f"{request.spec.num_heads} heads cannot be cut over {request.devices} devices evenly.")


def need_bytes(request: ServeRequest, num_blocks: int) -> tuple[tuple[MemoryLine, ...], int]:
    """The memory lines of one device for a pool of `num_blocks` blocks, and their sum."""
    stay = resident(request.weights, request.spec.num_layers, request.peer_layers + request.host_layers)
    if request.window_bytes is not None:
        stay = windowed(request.weights, request.window_bytes)
    lines = itemise(request.spec, stay, request.memory_request(num_blocks))
    return lines, sum(line.num_bytes for line in lines)


def blocks_that_fit(request: ServeRequest) -> int:
    """The largest pool that fits beside everything else; 0 when even none does."""
    block = device_block_bytes(request.spec, request.memory_request(1))
    without = need_bytes(request, 0)[1]
    if without > request.limit_bytes:
        return 0
    blocks = (request.limit_bytes - without) // block
    while blocks > 0 and need_bytes(request, blocks)[1] > request.limit_bytes:
        over = need_bytes(request, blocks)[1] - request.limit_bytes
        blocks -= max(1, over // (2 * block))
    return int(blocks)
