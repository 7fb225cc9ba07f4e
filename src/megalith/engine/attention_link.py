"""Starting attention workers and speaking to them: one link a worker; a failed one ends the whole group, by name.

Knows processes and frames; knows neither attention nor placement, and no torch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable

import msgspec

from megalith.base.errors import MachineError, StepFailed
from megalith.engine import attention_wire as wire
from megalith.engine.attention_wire import Buffer, Channel, Frame, Run, Tables, WireError, WorkerSetup

_START_DEADLINE_S = 60.0
_END_DEADLINE_S = 2.0


class WorkerLink:
    """One worker process and the tables that it knows. Raises MachineError when it does not start."""

    def __init__(self, name: str, setup: WorkerSetup, threads: int = 1) -> None:
        self.name = name
        self.setup = setup
        self._tables = Tables()
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OPENBLAS_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
        try:
            # No PR_SET_PDEATHSIG: it follows the thread that started the child, which may end long before the engine.
            # The worker sees the end of the socket instead, which the kernel closes with the process.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megalith.engine.attention_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise MachineError(f"{name} could not be started: {error}.", "Use --attention here.") from None
        finally:
            theirs.close()
        self.channel = Channel(ours, _START_DEADLINE_S)

    def hello(self) -> None:
        """Tell it what it serves and wait until it is ready. Raises MachineError."""
        try:
            self.channel.send(wire.HELLO, msgspec.json.encode(self.setup))
            self.receive(wire.READY)
        except (StepFailed, WireError) as error:
            self.close()
            raise MachineError(f"{self.name} did not start: {error}", "Use --attention here.") from None
        self.channel.deadline_s = self.setup.deadline_s

    def step(self, runs: list[Run]) -> None:
        """Where the rows of this step belong."""
        self.send(wire.STEP, self._tables.encode(runs), count=len(runs))

    def send(self, kind: int, *parts: Buffer, layer: int = 0, count: int = 0) -> None:
        """Send a frame. Raises StepFailed that names the worker."""
        try:
            self.channel.send(kind, *parts, layer=layer, count=count)
        except WireError as error:
            raise self._failed(error) from None

    def receive(self, kind: int) -> Frame:
        """The frame of that kind that must come now. Raises StepFailed that names the worker."""
        try:
            frame = self.channel.receive()
        except WireError as error:
            raise self._failed(error) from None
        if frame.kind == wire.ERROR:
            raise StepFailed(f"{self.name} gave up: {bytes(frame.payload).decode(errors='replace')}.")
        if frame.kind != kind:
            raise StepFailed(f"{self.name} sent kind {frame.kind} where {kind} was due.")
        return frame

    def stats(self) -> dict[str, int]:
        """Bytes that it `read` and `written` of its KV, and has `held`."""
        self.send(wire.STATS)
        return msgspec.json.decode(bytes(self.receive(wire.STATS).payload), type=dict[str, int])

    def close(self) -> None:
        """End the process: by closing the socket, else by force. Idempotent."""
        self.channel.sock.close()
        try:
            self.process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _failed(self, error: WireError) -> StepFailed:
        try:
            code: int | None = self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        end = str(error) if code is None else f"signal {-code} ended it" if code < 0 else f"it ended with code {code}"
        return StepFailed(f"{self.name} (process {self.process.pid}) has failed: {end}.")


class WorkerGroup:
    """Links that stand or fall together: KV that a worker took with it cannot be had again.

    After the first failure every step is refused with its reason, and the other workers are ended.
    """

    def __init__(self, links: list[WorkerLink]) -> None:
        self.links = links
        self._failure: StepFailed | None = None
        try:
            for link in links:  # all start at once; then each is waited for
                link.hello()
        except MachineError:
            self.close()
            raise

    def check(self) -> None:
        """Raises StepFailed when the group has broken."""
        if self._failure is not None:
            raise StepFailed(f"{self._failure.what} The KV it held is lost.", "Restart the engine.")

    def broken(self, failure: StepFailed) -> StepFailed:
        """Note the first failure and end the group; the error to raise."""
        if self._failure is None:
            self._failure = failure
            self.close()
        return StepFailed(f"{self._failure.what} The KV it held is lost.", "Restart the engine.")

    def traffic(self) -> dict[str, int]:
        """Bytes that crossed so far: tensors (`data`) and everything else (`headers`)."""
        return {
            "data": sum(link.channel.data_bytes for link in self.links),
            "headers": sum(link.channel.header_bytes for link in self.links),
        }

    def close(self) -> None:
        """End every worker. Idempotent."""
        for link in self.links:
            link.channel.sock.close()
        for link in self.links:
            link.close()


def start_workers(names: Iterable[str], setups: Iterable[WorkerSetup], threads: int) -> WorkerGroup:
    """A ready group. Raises MachineError, leaving no process behind."""
    links: list[WorkerLink] = []
    try:
        for name, setup in zip(names, setups, strict=True):
            links.append(WorkerLink(name, setup, threads))
    except MachineError:
        for link in links:
            link.close()
        raise
    return WorkerGroup(links)
