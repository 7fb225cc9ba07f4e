"""The recorder: a scheduler that also writes down what it was asked and what it answered, for the shadow test.

Knows the scheduler's calls and one file; decides nothing: every answer comes from the one Scheduler. What is written is
in `sim.shadow`, which replays it. Calls are kept as tuples and encoded a thousand at a time, so that a step pays a few
microseconds. A disk that fails or a full log ends the recording, never the serving.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

import megalith
from megalith.base.clock import Clock
from megalith.base.errors import ConfigError
from megalith.base.units import GIB, format_bytes
from megalith.policy.batching import BatchFacts, BatchPolicy
from megalith.policy.facts import Request, RequestId, StepPlan
from megalith.policy.kv import KvAccount
from megalith.policy.limits import MANY
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.shadow import (
    AbortCall,
    AddCall,
    AgainCall,
    Call,
    CompleteCall,
    EndCall,
    LogHeader,
    SealCall,
    plan_call,
)

log = logging.getLogger(__name__)
_BUFFERED_CALLS = 1024
_MAX_BYTES = 4 * GIB


class DecisionWriter:
    """Appends calls to a log file; gzip when the name ends in .gz. Not thread-safe: it belongs to the step thread.

    At most `max_bytes` (before compression) are written; then the log ends and says so.
    """

    def __init__(self, path: str | Path, header: LogHeader, max_bytes: int = _MAX_BYTES) -> None:
        """Create the file. Raises ConfigError when it exists or cannot be made."""
        self.path = Path(path)
        self.closed = False
        self._max_bytes = max_bytes
        self._written = 0
        self._calls: list[Call] = []
        self._encoder = msgspec.json.Encoder()
        try:
            opened = gzip.open(path, "xb", 1) if self.path.suffix == ".gz" else self.path.open("xb")  # noqa: SIM115
            self._file = cast(BinaryIO, opened)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise ConfigError(f"The decision log {path} cannot be made: {error.strerror or error}.") from None
        self._write(self._encoder.encode(header) + b"\n")

    def append(self, call: Call) -> None:
        """Keep a call; after every thousandth they go to the file."""
        self._calls.append(call)
        if len(self._calls) >= _BUFFERED_CALLS:
            self.flush()

    def flush(self) -> None:
        """Encode and write what is kept."""
        calls, self._calls = self._calls, []
        if self.closed or not calls:
            return
        data = self._encoder.encode_lines(calls)
        if self._written + len(data) > self._max_bytes:
            log.warning("the decision log %s is full at %s; it ends here", self.path, format_bytes(self._written))
            self._end(calls[0].ns, "full")
        else:
            self._write(data)

    def close(self, ns: int) -> None:
        """Write the rest and the last line. Idempotent."""
        self.flush()
        if not self.closed:
            self._end(ns, "closed")

    def _end(self, ns: int, why: str) -> None:
        self._write(self._encoder.encode(EndCall(ns, why)) + b"\n")
        if not self.closed:
            self._shut()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._written += len(data)
        except OSError as error:
            log.error("the decision log %s ends early: %s", self.path, error)
            self._shut()

    def _shut(self) -> None:
        self.closed = True
        try:
            self._file.close()
        except OSError as error:
            log.error("the decision log %s was not closed well: %s", self.path, error)


class RecordingScheduler(Scheduler):
    """The Scheduler, with its calls and answers written to `path` and stamped by `clock`."""

    def __init__(
        self, policy: BatchPolicy, kv: KvAccount, limits: Limits, clock: Clock, path: str | Path, model: str = ""
    ) -> None:  # fmt: skip
        super().__init__(policy, kv, limits)
        self._record_clock = clock
        self._record = DecisionWriter(path, header_of(self, clock, model))

    def add(self, request: Request, sampled: int = 0) -> None:
        """See Scheduler; a refusal is recorded too."""
        refused = ""
        try:
            super().add(request, sampled)
        except Exception as error:
            refused = type(error).__name__
            raise
        finally:
            call = AddCall(
                self._record_clock.now_ns(), request.id, request.arrival_ns, request.prompt_tokens,
                request.max_new_tokens, request.priority, request.prefix_hashes, refused,
                sampled,
            )  # fmt: skip
            self._record.append(call)

    def abort(self, request_id: RequestId) -> bool:
        """See Scheduler."""
        found = super().abort(request_id)
        self._record.append(AbortCall(self._record_clock.now_ns(), request_id, found))
        return found

    def seal(self, request_id: RequestId, block_hash: int) -> None:
        """See Scheduler."""
        super().seal(request_id, block_hash)
        self._record.append(SealCall(self._record_clock.now_ns(), request_id, block_hash))

    def plan(self, most_repeats: int = MANY) -> StepPlan:  # noqa: ARG002 - all of them are recorded
        """See Scheduler."""
        plan = super().plan()
        self._record.append(plan_call(plan, self._record_clock.now_ns()))
        return plan

    def again(self, plan: StepPlan) -> bool:
        """See Scheduler."""
        answer = super().again(plan)
        self._record.append(AgainCall(self._record_clock.now_ns(), answer))
        return answer

    def complete(
        self, plan: StepPlan, finished: Iterable[RequestId] = (), steps: int = 1, under_way: bool = False
    ) -> None:
        """See Scheduler."""
        ended = tuple(finished)
        super().complete(plan, ended, steps, under_way)
        self._record.append(CompleteCall(self._record_clock.now_ns(), ended, steps, under_way))

    def close(self) -> None:
        """Finish the log. Idempotent."""
        self._record.close(self._record_clock.now_ns())


def check_new(path: str | Path) -> None:
    """Raise ConfigError when the log exists: better before a model is loaded than after."""
    if Path(path).exists():
        raise _exists(path)


def _exists(path: str | Path) -> ConfigError:
    return ConfigError(f"The decision log {path} exists already.", "Name a new file, or move it away.")


def header_of(scheduler: Scheduler, clock: Clock, model: str = "") -> LogHeader:
    """What fresh policy objects can be made from."""
    policy, kv = scheduler.policy, scheduler.kv
    return LogHeader(
        megalith=megalith.__version__, model=model, clock=type(clock).__name__, policy=policy.name,
        token_budget=policy.shape(BatchFacts(0, 1)).token_budget, limits=scheduler.limits, num_blocks=kv.num_blocks,
        block_tokens=kv.block_tokens, num_host_blocks=kv.num_host_blocks, prefix_cache=kv.prefix_cache,
        watermark_blocks=kv.watermark_blocks,
    )  # fmt: skip
