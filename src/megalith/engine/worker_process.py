"""Worker processes of this machine and their groups: start, speak to, end; a failed one ends its whole group, by name.

Knows processes and frames; knows not what workers do, and no torch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Generic, TypeVar

from megalith.base.errors import MachineError, StepFailed
from megalith.engine.frames import ERROR, HELLO, READY, Buffer, Frame, FrameChannel, WireError

_START_DEADLINE_S = 60.0
_END_DEADLINE_S = 2.0


class WorkerProcess:
    """`python -m module FD [more fds]`, and this end of its channel. Raises MachineError when it does not start."""

    def __init__(
        self, name: str, module: str, channel: type[FrameChannel], threads: int, *, remedy: str,
        more_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self._remedy = remedy
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OPENBLAS_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
        fds = [theirs.fileno(), *more_fds]
        try:
            # No PR_SET_PDEATHSIG: it follows the thread that started the child, which may end long before the engine.
            # The worker sees the end of the socket instead, which the kernel closes with the process.
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, fds)],
                pass_fds=[fd for fd in fds if fd >= 0], env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise MachineError(f"{name} could not be started: {error}.", remedy) from None
        finally:
            theirs.close()
        self.channel = channel(ours, _START_DEADLINE_S)

    def hello(self) -> None:
        """Tell it what it serves and wait until it is ready. Raises MachineError."""
        raise NotImplementedError

    def greet(self, setup: bytes, deadline_s: float) -> Frame:
        """Send HELLO and wait for READY; from then on every answer is due within the deadline. Raises MachineError."""
        try:
            self.channel.send(HELLO, setup)
        except WireError as error:
            self.close()
            raise MachineError(f"{self.name} did not start: {error}", self._remedy) from None
        return self.await_ready(deadline_s)

    def await_ready(self, deadline_s: float) -> Frame:
        """The second half of greet, for who has sent HELLO already. Raises MachineError."""
        try:
            ready = self.receive(READY)
        except StepFailed as error:
            self.close()
            raise MachineError(f"{self.name} did not start: {error}", self._remedy) from None
        self.channel.deadline_s = deadline_s
        return ready

    def send(self, kind: int, *parts: Buffer, layer: int = 0, count: int = 0) -> None:
        """Send a frame. Raises StepFailed that names the worker."""
        try:
            self.channel.send(kind, *parts, layer=layer, count=count)
        except WireError as error:
            raise self.failed(error) from None

    def receive(self, kind: int) -> Frame:
        """The frame of that kind that must come now. Raises StepFailed that names the worker."""
        try:
            frame = self.channel.receive()
        except WireError as error:
            raise self.failed(error) from None
        if frame.kind == ERROR:
            raise StepFailed(f"{self.name} gave up: {bytes(frame.payload).decode(errors='replace')}.")
        if frame.kind != kind:
            raise StepFailed(f"{self.name} sent kind {frame.kind} where {kind} was due.")
        return frame

    def close(self) -> None:
        """End the process: by closing the socket, else by force. Idempotent."""
        self.channel.sock.close()
        try:
            self.process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def failed(self, error: WireError) -> StepFailed:
        """What became of it, as an error to raise."""
        try:
            code: int | None = self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        end = str(error) if code is None else f"signal {-code} ended it" if code < 0 else f"it ended with code {code}"
        return StepFailed(f"{self.name} (process {self.process.pid}) has failed: {end}.")


Link = TypeVar("Link", bound=WorkerProcess)


class WorkerGroup(Generic[Link]):
    """Links that stand or fall together: KV that a worker took with it cannot be had again.

    After the first failure every step is refused with its reason, and the other workers are ended.
    """

    def __init__(self, links: list[Link]) -> None:
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
