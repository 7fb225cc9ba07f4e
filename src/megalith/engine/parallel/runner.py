"""Tensor parallel serving: the torch runner as rank 0, and its other ranks.

Rank 0 is the engine: tokens, embedding, its share of every layer, head, sampling. It sends a step's rows as hidden
states, and all ranks run the same Transformer over their shares, with a sum after every o and down. Exact but for the
order of additions: in float32 logits differ from one process's by rounding (tests hold 1e-4 of the largest).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megalith.base.errors import StepFailed
from megalith.base.home import home_dir
from megalith.engine.batch import StepBatch
from megalith.engine.parallel.collectives import PeerLost, Ranks
from megalith.engine.parallel.group import RankLink, named, start_ranks
from megalith.engine.parallel.option import ParallelOption
from megalith.engine.parallel.ports import Port
from megalith.engine.parallel.shard import ShardCheckpoint
from megalith.engine.parallel.share import Layers
from megalith.engine.parallel.wire import STEP, RankSetup, encode_step
from megalith.engine.torch_residence import Residence
from megalith.engine.torch_runner import DTypeName, TorchRunner, working_types
from megalith.engine.worker_process import WorkerGroup
from megalith.model.checkpoint import Checkpoint

DEADLINE_S = 60.0
"""For any one answer of a rank within a step."""


class TensorParallelRunner(TorchRunner):
    """Rank 0, and the processes of ranks 1 and up, which open the model at `path` themselves.

    Raises MachineError when one does not start.
    """

    group: WorkerGroup[RankLink]

    def __init__(
        self, checkpoint: Checkpoint, path: Path, option: ParallelOption, *, dtype: DTypeName, block_tokens: int,
        num_blocks: int, threads: int, deadline_s: float = DEADLINE_S,
    ) -> None:  # fmt: skip
        each, folder = max(1, threads // option.ranks), str(home_dir() / "windows")
        compute, kv = working_types(dtype, on_cpu=True)
        setups = [
            RankSetup(
                model=str(path), rank=rank, ranks=option.ranks, float_compute=compute == torch.float32,
                float_kv=kv == torch.float32, block_tokens=block_tokens, num_blocks=num_blocks, threads=each,
                collective=option.collective, link=option.link, window_blocks=option.window_blocks, folder=folder,
                disk_bytes_per_s=option.disk_bytes_per_s, deadline_s=deadline_s,
            )
            for rank in range(1, option.ranks)
        ]  # fmt: skip
        port = None if option.link is None else Port(option.link)
        links = start_ranks(setups, port)
        self._option = option
        self._shard = ShardCheckpoint(checkpoint, 0, option.ranks)
        try:
            channels = {link.setup.rank: link.channel for link in links}
            ranks = Ranks(0, option.ranks, option.collective, channels)
            forget = checkpoint.forget
            self._layers = Layers(ranks, option.window_blocks, folder, option.disk_bytes_per_s, forget)
            super().__init__(
                self._shard.spec, self._shard, dtype=dtype, block_tokens=block_tokens, num_blocks=num_blocks,
                threads=each, residence=Residence(make_linear=self._layers),
            )  # fmt: skip
            self._layers.seal()
            forget()
            self.group = WorkerGroup(links)
        except BaseException:
            for link in links:
                link.close()
            raise
        self.name = f"{self.name}-tp{option.ranks}"

    def memory_bytes(self) -> dict[str, int]:
        """Of all ranks together, itemised."""
        own = super().memory_bytes()
        if self._closed:
            return own
        reports = [link.report for link in self.group.links if link.report is not None]
        own["weights"] += self._layers.window_bytes + sum(report.weight_bytes for report in reports)
        own["kv"] += sum(report.kv_bytes for report in reports)
        return own

    def close(self) -> None:
        """End the other ranks and give everything back. Idempotent."""
        super().close()
        self.group.close()
        self._layers.close()

    def _forward(self, batch: StepBatch) -> Tensor:
        """As one process; a rank that fails takes the instance with it, for its share of KV is lost."""
        if self._closed:
            return super()._forward(batch)
        self.group.check()
        return self._together(lambda: super(TensorParallelRunner, self)._forward(batch))

    def _together(self, work: Callable[[], Tensor]) -> Tensor:
        try:
            return work()
        except PeerLost as lost:
            raise self.group.broken(named(self.group, lost)) from None
        except StepFailed as failure:
            raise self.group.broken(failure) from None
        except Exception as error:  # the others are somewhere in the step: they cannot be told to go back
            raise self.group.broken(StepFailed(f"Rank 0 failed: {type(error).__name__}: {error}.")) from error

    def _announce(self, batch: StepBatch, hidden_MD: Tensor) -> None:
        """Rows and hidden states to every rank. No tokens: what they stand for stays here."""
        parts = encode_step(batch, hidden_MD.float().numpy())
        for link in self.group.links:
            link.send(STEP, *parts)
