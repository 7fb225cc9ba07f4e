"""The engine for asyncio programs: the step loop on a thread of its own, deltas handed over once per step.

Knows threads, event loops and admission; knows neither HTTP nor arrays. One lock guards what crosses to the thread (new
requests, aborts, the wish to stop); everything else belongs to one side only: the core to the step thread, the streams
to the event loop.

Memory of a slow consumer is bounded: a request emits at most max_tokens deltas, and what piles up is merged into one
when it is read. A consumer that does not read never holds up the loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from megalith.base.clock import Clock
from megalith.base.errors import EngineStopped, QueueFull
from megalith.base.units import NS_PER_S
from megalith.engine.admission import Admission
from megalith.engine.api import Delta, EngineConfig, EngineStats
from megalith.engine.engine import Emitted, Engine, describe
from megalith.engine.params import SamplingParams
from megalith.engine.record import RecordingScheduler
from megalith.engine.sequence import Admitted
from megalith.specs.model import ModelSpec

log = logging.getLogger(__name__)
_IDLE_WAIT_S = 5.0
"""The idle thread wakes this often to look around; every event wakes it at once."""
_STOP_WAIT_S = 10.0
"""Longest wait for the step in progress when stopping; longer steps are left behind on their daemon thread."""
_SWITCH_S = 0.0005
"""Interpreter switch interval while the engine runs. When the runner returns, the step thread waits at most this long
for the interpreter lock; Python's default of 5 ms is longer than a whole step of a small model."""


@dataclass(slots=True)
class _Stream:
    """Deltas on their way to one consumer. Touched by the event loop only."""

    pending: list[Delta] = field(default_factory=list)
    waiter: asyncio.Future[None] | None = None
    ended: bool = False
    """The last delta has arrived here."""

    def put(self, delta: Delta) -> None:
        self.pending.append(delta)
        self.ended = self.ended or delta.finish_reason is not None
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self) -> Delta:
        """What has come since the last call, as one delta. The step loop ends every stream, also when it fails."""
        while not self.pending:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        pending, self.pending = self.pending, []
        return pending[0] if len(pending) == 1 else merge(pending)


class LocalEngine:
    """An AsyncEngine (see `engine.api`) over a core in this process. All calls but stats() from one event loop."""

    def __init__(
        self, core: Engine, admission: Admission, config: EngineConfig, spec: ModelSpec, clock: Clock
    ) -> None:  # fmt: skip
        self.config = config
        self.spec = spec
        self.max_context = admission.max_context
        self._core = core
        self._admission = admission
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._streams: dict[int, _Stream] = {}
        self._ids = itertools.count(1)
        self._quiet = asyncio.Event()
        """Set while no stream waits for a last delta."""
        self._quiet.set()
        self._accepting = False
        self._finish_times_ns: deque[int] = deque(maxlen=64)
        self._old_switch_s: float | None = None
        # Crosses to the step thread; guarded by _wake.
        self._wake = threading.Condition()
        self._inbox: list[Admitted] = []
        self._aborts: list[int] = []
        self._end_all = False
        self._stopping = False
        self._failure = ""

    # The protocol

    async def start(self) -> None:
        """Start the step loop. A second call does nothing; a stopped engine cannot start again."""
        if self._thread is not None:
            return
        if self._stopping:
            raise EngineStopped("This engine has been stopped.", "Build a new one.")
        self._loop = asyncio.get_running_loop()
        if sys.getswitchinterval() > _SWITCH_S:
            self._old_switch_s = sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_S)
        self._thread = threading.Thread(target=self._run, name="megalith-steps", daemon=True)
        self._accepting = True
        self._thread.start()

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, priority: int = 0, request_id: str = ""
    ) -> AsyncIterator[Delta]:
        """Run one request; see the protocol. Closing the iterator aborts the request."""
        self._check_accepting()
        number = next(self._ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        admitted = await self._admission.admit(number, prompt_ids, params, seed)
        stream = _Stream()
        self._submit(replace(admitted, priority=priority, arrival_ns=self._clock.now_ns()), stream)
        log.debug("request %s is number %d: %d prompt tokens", request_id or "-", number, len(prompt_ids))
        try:
            while True:
                delta = await stream.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._drop(number)

    def stats(self) -> EngineStats:
        """A snapshot; cheap, callable from any thread."""
        stats = self._core.stats()
        waiting = stats.waiting + len(self._inbox)
        if self._failure:
            return replace(stats, waiting=waiting, healthy=False, detail=self._failure)
        return replace(stats, waiting=waiting)

    async def drain(self, deadline_ns: int) -> None:
        """Refuse new requests, let running ones finish for at most `deadline_ns` from now, then abort the rest."""
        self._accepting = False
        if not await self._wait_quiet(deadline_ns / NS_PER_S):
            self._tell(end_all=True)
            await self._wait_quiet(_STOP_WAIT_S)

    async def stop(self) -> None:
        """Abort everything, stop the loop and close the runner. Idempotent; never hangs."""
        self._accepting = False
        self._tell(end_all=True, stopping=True)
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.join, _STOP_WAIT_S)
            if thread.is_alive():
                log.error("the step in progress did not end within %.0f s; its thread is left behind", _STOP_WAIT_S)
            else:
                self._core.runner.close()
                if isinstance(self._core.scheduler, RecordingScheduler):
                    self._core.scheduler.close()
        if self._old_switch_s is not None and math.isclose(sys.getswitchinterval(), _SWITCH_S):
            sys.setswitchinterval(self._old_switch_s)
        self._old_switch_s = None
        for stream in self._streams.values():  # only those that a thread left behind did not end
            if not stream.ended:
                stream.put(Delta("", (), "abort"))
        self._quiet.set()

    # The event loop's side

    def _check_accepting(self) -> None:
        if self._failure:
            raise EngineStopped(f"The engine has failed ({self._failure}).", "Restart the server.")
        if not self._accepting:
            raise EngineStopped(
                "The engine takes no new requests: it is stopped or about to stop.", "Try another instance."
            )

    def _submit(self, admitted: Admitted, stream: _Stream) -> None:
        """Hand a request to the step thread. Raises QueueFull or EngineStopped."""
        with self._wake:
            self._check_accepting()
            waiting = len(self._inbox) + self._core.scheduler.num_waiting
            full = waiting >= self.config.max_waiting
            if not full:
                self._inbox.append(admitted)
                self._wake.notify()
        if full:
            raise QueueFull(
                f"{waiting} requests wait already, and the limit is {self.config.max_waiting}.",
                "Try again shortly.",
                retry_after_s=self._retry_after_s(),
            )
        self._streams[admitted.id] = stream
        self._quiet.clear()

    def _retry_after_s(self) -> int:
        """When a place should be free: the mean time between recent completions."""
        times = self._finish_times_ns
        if len(times) < 2:
            return 1
        return min(60, max(1, math.ceil((times[-1] - times[0]) / (len(times) - 1) / NS_PER_S)))

    def _drop(self, number: int) -> None:
        """The consumer is done with its stream; if the request is not done, it ends now."""
        stream = self._streams.pop(number)
        if not stream.ended:
            self._tell(abort=number)
        self._check_quiet()

    def _hand_over(self, emitted: list[Emitted]) -> None:
        """Give each stream its deltas: called in the event loop, once per step."""
        streams = self._streams
        for number, delta in emitted:
            if delta.finish_reason is not None:
                self._finish_times_ns.append(self._clock.now_ns())
            stream = streams.get(number)
            if stream is not None:
                stream.put(delta)
        self._check_quiet()

    def _check_quiet(self) -> None:
        if not self._quiet.is_set() and all(stream.ended for stream in self._streams.values()):
            self._quiet.set()

    async def _wait_quiet(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._quiet.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _tell(self, *, abort: int | None = None, end_all: bool = False, stopping: bool = False) -> None:
        with self._wake:
            if abort is not None:
                self._aborts.append(abort)
            self._end_all |= end_all
            self._stopping |= stopping
            self._wake.notify()

    # The step thread's side

    def _run(self) -> None:
        open_ids: set[int] = set()
        try:
            while self._turn(open_ids):
                pass
        except BaseException as error:
            log.exception("the step loop has failed")
            with self._wake:
                self._failure = f"{type(error).__name__}: {error}"
                open_ids.update([admitted.id for admitted in self._inbox])
            message = f"The engine has failed ({self._failure})."
            self._send([Emitted(number, Delta("", (), "error", error=message)) for number in sorted(open_ids)])

    def _turn(self, open_ids: set[int]) -> bool:
        """Take what came, run one step, hand over what it emitted; False when it is time to stop."""
        inbox, aborts, end_all, stopping = self._collect()
        emitted: list[Emitted] = []
        for admitted in inbox:
            open_ids.add(admitted.id)
            try:
                self._core.add(admitted)
            except Exception as error:
                emitted.append(Emitted(admitted.id, Delta("", (), "error", error=describe(error))))
        for number in aborts if not end_all else sorted(open_ids):
            last = self._core.abort(number)
            if last is not None:
                emitted.append(Emitted(number, last))
        if not stopping:
            emitted += self._core.step()
        if emitted:
            open_ids.difference_update([number for number, delta in emitted if delta.finish_reason is not None])
            self._send(emitted)
        return not stopping

    def _collect(self) -> tuple[list[Admitted], list[int], bool, bool]:
        with self._wake:
            while not (self._inbox or self._aborts or self._end_all or self._stopping or self._core.has_work):
                self._wake.wait(_IDLE_WAIT_S)
            taken = (self._inbox, self._aborts, self._end_all, self._stopping)
            self._inbox, self._aborts, self._end_all = [], [], False
            return taken

    def _send(self, emitted: list[Emitted]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hand_over, emitted)
        except RuntimeError:  # the event loop was closed under us: nobody is left to read
            self._tell(end_all=True, stopping=True)


def merge(deltas: list[Delta]) -> Delta:
    """Several deltas of one request as one."""
    first, last = deltas[0], deltas[-1]
    scored = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return replace(
        last,
        text="".join([delta.text for delta in deltas]),
        token_ids=tuple([token for delta in deltas for token in delta.token_ids]),
        logprobs=tuple([entry for entries in scored for entry in entries]) if scored else None,
        prompt_logprobs=first.prompt_logprobs,
    )
