"""`python -m megalith.engine.attention_worker FD`: a process that holds a share of the KV cache and attends to it.

Started by engine.attention_link over one end of a socket pair; it serves one engine process and ends with it: the
kernel closes the other end when that process goes, however it goes, and the next receive says so. Needs NumPy alone.
"""

from __future__ import annotations

import signal
import socket
import sys

import msgspec
import numpy as np

from megalith.engine import attention_wire as wire
from megalith.engine.attention_share import Array, KvShare
from megalith.engine.attention_wire import Channel, Run, Tables, WireError, WorkerSetup
from megalith.engine.partial_attention import Floats, Partial, merge

_HELLO_DEADLINE_S = 60.0


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        hello = channel.receive()
        if hello.kind != wire.HELLO:
            raise WireError("the first frame must be HELLO")
        self.setup = msgspec.json.decode(bytes(hello.payload), type=WorkerSetup)
        channel.deadline_s = self.setup.deadline_s
        self.kv = KvShare(self.setup)
        self.tables = Tables()
        self.runs: list[Run] = []
        self.at: tuple[Array, Array] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        channel.send(wire.READY, count=0)

    def serve(self) -> None:
        """Frame after frame until the engine closes. Raises WireError then."""
        while True:
            frame = self.channel.receive(idle=True)
            if frame.kind == wire.STEP:
                self.step(frame)
            elif frame.kind == wire.QUERY:
                self.attend(frame)
            elif frame.kind == wire.PUT:
                self.kv.put_block(self.known(frame.number), frame.payload)
            elif frame.kind == wire.GET:
                self.channel.send(wire.BLOCK, self.kv.block(self.known(frame.number)))
            elif frame.kind == wire.STATS:
                stats = {"read": self.kv.read_bytes, "written": self.kv.written_bytes, "held": self.kv.num_bytes}
                self.channel.send(wire.STATS, msgspec.json.encode(stats))
            else:
                raise ValueError(f"a frame of kind {frame.kind} out of turn")

    def known(self, block: int) -> int:
        if block >= self.setup.num_blocks:
            raise ValueError(f"block {block} of {self.setup.num_blocks}")
        return block

    def step(self, frame: wire.Frame) -> None:
        self.runs = self.tables.decode(frame.payload, frame.number)
        for run in self.runs:
            if run.blocks.size and not 0 <= run.blocks[:, 0].min() <= run.blocks[:, 0].max() < self.setup.num_blocks:
                raise ValueError(f"a block table outside the {self.setup.num_blocks} blocks")
        if self.setup.partial:
            return
        self.kv.begin(self.runs)
        tokens = self.setup.block_tokens
        positions = [np.arange(run.first, run.first + run.rows) for run in self.runs]
        blocks = [run.blocks[at // tokens, 0] for run, at in zip(self.runs, positions, strict=True)]
        self.at = np.concatenate(blocks).astype(np.int64), np.concatenate(positions) % tokens

    def attend(self, frame: wire.Frame) -> None:
        """Attention to what is stored begins at once; the rows' own keys and values come after it."""
        setup, layer = self.setup, frame.layer
        q_MHE = wire.widen(frame.payload, setup.float_queries).reshape(-1, setup.heads, setup.head_dim)
        if len(q_MHE) != sum(run.rows for run in self.runs):
            raise ValueError(f"{len(q_MHE)} query rows in a step of {sum(run.rows for run in self.runs)}")
        old = [self.kv.stored(layer, q, run) for q, run in zip(self.pieces(q_MHE), self.runs, strict=True)]
        if setup.partial:
            maximum, total, values = (np.concatenate(parts) for parts in zip(*old, strict=True))
            self.channel.send(wire.PARTIAL, maximum, total, self.narrow(values), layer=layer)
            return
        pair = self.channel.receive()
        if (pair.kind, pair.layer) != (wire.PAIR, layer):
            raise ValueError(f"kind {pair.kind} of layer {pair.layer} where k and v of layer {layer} must follow q")
        kind = np.float32 if setup.float_kv else np.uint16
        k_MKE, v_MKE = np.frombuffer(pair.payload, dtype=kind).reshape(2, -1, setup.kv_heads, setup.head_dim)
        new = [
            self.kv.new(layer, q, k, v)
            for q, k, v in zip(self.pieces(q_MHE), self.pieces(k_MKE), self.pieces(v_MKE), strict=True)
        ]
        merged: list[Partial] = [merge(both) for both in zip(old, new, strict=True)]
        self.channel.send(wire.OUTPUT, self.narrow(np.concatenate([part.values for part in merged])), layer=layer)
        self.kv.write(layer, *self.at, k_MKE, v_MKE)  # after the answer: nobody waits for it

    def pieces(self, rows: Array) -> list[Array]:
        """Rows by run."""
        return np.split(rows, np.cumsum([run.rows for run in self.runs])[:-1])

    def narrow(self, values: Floats) -> Array:
        """In the type of q and o."""
        return values if self.setup.float_queries else wire.to_bf16(values)


def main() -> int:
    """Serve the socket whose number is the only argument. 0 when the engine closed it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal reaches the whole group; the engine drains
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), _HELLO_DEADLINE_S)
    try:
        _Worker(channel).serve()
    except WireError:
        return 0
    except Exception as error:  # told to whoever waits, in their words
        try:
            channel.send(wire.ERROR, f"{type(error).__name__}: {error}".encode()[:1000])
        except WireError:
            return 1
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
