"""`python -m megalith.engine.parallel.worker FD LEFT RIGHT`: rank 1 or higher of an instance over several processes.

Its layers, its KV heads and its place in the sums; no embedding, no head, no tokenizer: what it is sent are hidden
states. Ends with the engine, however that ends: the kernel then closes the other end of FD. LEFT and RIGHT are channels
to neighbours in a ring, or -1.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import msgspec
import torch

from megalith.engine.batch import StepBatch
from megalith.engine.frames import ERROR, HELLO, READY, WireError
from megalith.engine.parallel import wire
from megalith.engine.parallel.collectives import Ranks
from megalith.engine.parallel.ports import Port, PortChannel
from megalith.engine.parallel.shard import ShardCheckpoint
from megalith.engine.parallel.share import Layers
from megalith.engine.parallel.wire import RankReport, RankSetup
from megalith.engine.torch_attention import PagedKv, StepAttention
from megalith.engine.torch_linear import PackedLinear
from megalith.model.checkpoint import open_checkpoint
from megalith.model.source import resolve
from megalith.model.transformer import Part, Transformer

_HELLO_DEADLINE_S = 60.0


class _Rank:
    def __init__(self, channel: PortChannel, neighbours: list[int]) -> None:
        self.channel = channel
        hello = channel.receive()
        if hello.kind != HELLO:
            raise WireError("the first frame must be HELLO")
        self.setup = setup = msgspec.json.decode(bytes(hello.payload), type=RankSetup)
        torch.set_num_threads(setup.threads)
        channel.deadline_s = setup.deadline_s
        channel.port = port = None if setup.link is None else Port(setup.link)
        channels = {0: channel}
        for fd, rank in zip(neighbours, (setup.rank - 1, (setup.rank + 1) % setup.ranks), strict=True):
            if fd >= 0:
                channels[rank] = PortChannel(socket.socket(fileno=fd), setup.deadline_s, port)
        ranks = Ranks(setup.rank, setup.ranks, setup.collective, channels)
        self.checkpoint = ShardCheckpoint(open_checkpoint(resolve(setup.model)), setup.rank, setup.ranks)
        self.layers = Layers(ranks, setup.window_blocks, setup.folder, setup.disk_bytes_per_s, self.checkpoint.forget)
        self.compute = torch.float32 if setup.float_compute else torch.bfloat16
        with torch.inference_mode():
            self.build()
        channel.send(READY, msgspec.json.encode(self.report()))

    def build(self) -> None:
        setup, spec = self.setup, self.checkpoint.spec
        part = Part(embedding=False, head=False)
        self.model = Transformer(self.checkpoint, dtype=self.compute, make_linear=self.layers, part=part)
        self.layers.seal()
        self.checkpoint.forget()
        self.windows = [spec.layer_window(layer) for layer in range(spec.num_layers)]
        self.kv = PagedKv(
            (spec.num_layers, spec.num_kv_heads, spec.head_dim), blocks=(setup.num_blocks, 0),
            block_tokens=setup.block_tokens, dtype=torch.float32 if setup.float_kv else torch.bfloat16,
            device=torch.device("cpu"),
        )  # fmt: skip

    def serve(self) -> None:
        """Step after step until the engine closes. Raises WireError then."""
        while True:
            frame = self.channel.receive(idle=True)
            if frame.kind == wire.STEP:
                rows = wire.decode_step(frame.payload, self.checkpoint.spec.hidden)
                with torch.inference_mode():
                    self.step(rows.batch, torch.from_numpy(rows.hidden_MD))
            elif frame.kind == wire.STATS:
                self.channel.send(wire.STATS, msgspec.json.encode(self.report()))
            else:
                raise ValueError(f"a frame of kind {frame.kind} out of turn")

    def step(self, batch: StepBatch, hidden_MD: torch.Tensor) -> None:
        attend = StepAttention(self.kv, batch, self.windows, self.checkpoint.spec.attention_scale)
        positions = torch.from_numpy(batch.positions_M).long()
        self.model.run(hidden_MD.to(self.compute), positions, attend)

    def report(self) -> RankReport:
        packed = sum(m.weight_bytes for m in self.model.modules() if isinstance(m, PackedLinear))
        window = self.layers.window
        return RankReport(
            tensors=tuple(self.checkpoint.tensors_read),
            weight_bytes=self.model.weight_bytes() + packed + self.layers.window_bytes,
            kv_bytes=self.kv.num_bytes(), read_bytes=0 if window is None else window.read_bytes,
        )  # fmt: skip


def main() -> int:
    """Serve the socket whose number is the first argument. 0 when the engine closed it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal reaches the whole group; the engine drains
    channel = PortChannel(socket.socket(fileno=int(sys.argv[1])), _HELLO_DEADLINE_S)
    try:
        _Rank(channel, [int(fd) for fd in sys.argv[2:4]]).serve()
    except Exception as error:  # told to whoever waits, in their words; where nobody is left, that is the normal end
        try:
            channel.send(ERROR, f"{type(error).__name__}: {error}".encode()[:1000])
        except WireError:
            return 0 if isinstance(error, WireError) else 1
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # torch takes seconds to take itself apart on a busy machine, and the engine waits
