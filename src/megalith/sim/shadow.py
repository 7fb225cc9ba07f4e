"""The shadow test: what a live scheduler was asked and answered, asked again of fresh policy objects.

Knows the words of a decision log (a header line, then one JSON array a call) and how to replay one; `engine.record`
writes it. Knows counts and keyed hashes only: no token, no text and no block id is in a log. Must not know the engine.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError, MegalithError
from megalith.policy.batching import by_name
from megalith.policy.facts import Chunk, Preempt, Request, Resume, StepPlan
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler

LOG_VERSION = 1
_CONTEXT_LINES = 6
_SHOWN_ENTRIES = 12
"""Chunks of a plan that a message shows around the first one that differs."""
ChunkEntry: TypeAlias = tuple[int, int, int, bool]
"""Request id, new tokens, context tokens, samples."""
PreemptEntry: TypeAlias = tuple[int, str, int, int]
"""Request id, mode, device blocks, host blocks."""
ResumeEntry: TypeAlias = tuple[int, int, int]
"""Request id, host blocks, device blocks."""


class LogHeader(Config, kw_only=True):
    """The first line: everything that fresh policy objects are made from, and where the log comes from."""

    log_version: int = LOG_VERSION
    megalith: str
    model: str = ""
    clock: str = ""
    """The kind of clock that stamped the calls."""
    policy: str
    token_budget: int
    limits: Limits
    num_blocks: int
    block_tokens: int
    num_host_blocks: int
    prefix_cache: bool
    watermark_blocks: int

    def scheduler(self) -> Scheduler:
        """A fresh one as the header says."""
        kv = KvAccount(
            self.num_blocks, self.block_tokens, self.num_host_blocks, self.prefix_cache, self.watermark_blocks
        )
        return Scheduler(by_name(self.policy, self.token_budget), kv, self.limits)


class _Call(msgspec.Struct, frozen=True, array_like=True, gc=False):
    ns: int
    """The engine's clock when the scheduler had answered."""


class AddCall(_Call, frozen=True, array_like=True, gc=False, tag="add"):
    """add(), with the facts of the request, and the kind of error that refused it."""

    id: int
    arrival_ns: int
    prompt_tokens: int
    max_new_tokens: int
    priority: int
    prefix_hashes: tuple[int, ...]
    refused: str = ""
    sampled: int = 0


class AbortCall(_Call, frozen=True, array_like=True, gc=False, tag="abort"):
    """abort() and whether the request was there."""

    id: int
    found: bool


class SealCall(_Call, frozen=True, array_like=True, gc=False, tag="seal"):
    """seal() of a generated block."""

    id: int
    block_hash: int


class PlanCall(_Call, frozen=True, array_like=True, gc=False, tag="plan"):
    """plan() and its answer."""

    chunks: tuple[ChunkEntry, ...]
    preempts: tuple[PreemptEntry, ...]
    resumes: tuple[ResumeEntry, ...]
    repeats: int


class AgainCall(_Call, frozen=True, array_like=True, gc=False, tag="again"):
    """again() of the last plan and its answer."""

    answer: bool


class CompleteCall(_Call, frozen=True, array_like=True, gc=False, tag="complete"):
    """complete() of the last plan; of one that has repeats it comes once for each run."""

    finished: tuple[int, ...]
    steps: int
    under_way: bool = False


class EndCall(_Call, frozen=True, array_like=True, gc=False, tag="end"):
    """The last line of a log that was closed; `why` is `closed` or `full`."""

    why: str


Call: TypeAlias = AddCall | AbortCall | SealCall | PlanCall | AgainCall | CompleteCall | EndCall


class Difference(Config, kw_only=True):
    """The first answer that differs."""

    line: int
    """Of the log, from 1."""
    call: str
    recorded: str
    replayed: str
    before: tuple[str, ...]
    """The calls before it, oldest first, shortened."""

    def __str__(self) -> str:
        before = "".join(f"  {line}\n" for line in self.before)
        return f"line {self.line}, {self.call}:\n{before}  recorded: {self.recorded}\n  replayed: {self.replayed}"


class ShadowReport(Config, kw_only=True):
    """What a replay found."""

    path: str
    header: LogHeader
    calls: dict[str, int]
    """{call: how many were replayed}"""
    steps: int = 0
    """Forward passes that the log accounts for."""
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    complete: bool = False
    """Whether the log has its last line; one of an engine that was killed has not."""
    difference: Difference | None = None

    @property
    def identical(self) -> bool:
        """Whether every answer was the recorded one."""
        return self.difference is None

    def __str__(self) -> str:
        made = ", ".join(f"{count} {call}" for call, count in sorted(self.calls.items()))
        head = f"{self.path}: {self.steps} steps, {made}; {self.preemptions} preemptions"
        if self.difference is not None:
            return f"{head}; the first difference is in {self.difference}"
        return f"{head}; identical" + ("" if self.complete else " (the log has no end: its writer did not close it)")


def replay(path: str | Path, *, policy: str | None = None, token_budget: int | None = None) -> ShadowReport:
    """Ask fresh policy objects everything that the log says, and compare every answer; stops at the first difference.

    `policy` and `token_budget` take the place of the header's: the control, which must differ. Raises ConfigError for
    a file that is no decision log.
    """
    log = DecisionLog.open(path)
    changes = {"policy": policy, "token_budget": token_budget}
    header = msgspec.structs.replace(log.header, **{key: value for key, value in changes.items() if value is not None})
    shadow = _Shadow(header.scheduler())
    calls: Counter[str] = Counter()
    steps = 0
    before: deque[str] = deque(maxlen=_CONTEXT_LINES)
    difference = None
    for line, call in log.calls():
        kind = call.__struct_config__.tag
        recorded, replayed = shadow.ask(call)
        if recorded != replayed:
            difference = Difference(
                line=line, call=str(kind), recorded=recorded, replayed=replayed, before=tuple(before)
            )  # fmt: skip
            break
        calls[str(kind)] += not isinstance(call, EndCall)
        steps += call.steps if isinstance(call, CompleteCall) else 0
        before.append(f"{line}: {_short(call)}")
    counters = shadow.scheduler.counters
    return ShadowReport(
        path=str(path), header=header, calls={kind: count for kind, count in calls.items() if count}, steps=steps,
        preemptions=counters.preemptions, prefix_hit_tokens=counters.prefix_hit_tokens, complete=log.ended,
        difference=difference,
    )  # fmt: skip


@dataclass(slots=True)
class DecisionLog:
    """A log that is being read."""

    path: Path
    header: LogHeader
    ended: bool = field(default=False)
    """Its last line has been read."""

    @staticmethod
    def open(path: str | Path) -> DecisionLog:
        """Read the header. Raises ConfigError for what is no decision log, or one of another version."""
        path = Path(path)
        try:
            header = msgspec.json.decode(next(_lines(path), b""), type=LogHeader)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", "Name a decision log.") from None
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"{path} is no decision log ({error}).", "Record one: megalith serve --record FILE."
            ) from None
        if header.log_version != LOG_VERSION:
            raise ConfigError(
                f"{path} has log version {header.log_version}; this is version {LOG_VERSION}.", "Record it again."
            )
        return DecisionLog(path, header)

    def calls(self) -> Iterator[tuple[int, Call]]:
        """(line number, call) in order. What the death of a writer cut off at the end is passed over."""
        decoder = msgspec.json.Decoder(Call)
        broken: tuple[int, msgspec.MsgspecError] | None = None
        for number, line in enumerate(_lines(self.path), 1):
            if number == 1:
                continue
            if broken is not None:
                raise ConfigError(f"{self.path}, line {broken[0]}: {broken[1]}.", "The log is damaged; record another.")
            try:
                call: Call = decoder.decode(line)
            except msgspec.MsgspecError as error:
                broken = (number, error)  # fatal unless it is the last line
                continue
            self.ended = isinstance(call, EndCall)
            yield number, call


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or gzip file, as far as it goes."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, zlib.error):
            return


class _Shadow:
    """Fresh policy objects, asked what the live ones were."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._plan = StepPlan(())

    def ask(self, call: Call) -> tuple[str, str]:
        """The recorded answer and the fresh one, equal when they agree."""
        match call:
            case PlanCall():
                self._plan = self.scheduler.plan()
                answer = plan_call(self._plan, call.ns)
                return ("", "") if answer == call else _both(call, answer)
            case AgainCall():
                return f"valid: {call.answer}", f"valid: {self.scheduler.again(self._plan)}"
            case CompleteCall():
                return "accepted", self._complete(call)
            case AddCall():
                return call.refused or "accepted", self._add(call)
            case AbortCall():
                return f"found: {call.found}", f"found: {self.scheduler.abort(call.id)}"
            case SealCall():
                return "accepted", self._seal(call)
            case EndCall():
                return "", ""

    def _add(self, call: AddCall) -> str:
        request = Request(
            call.id, call.arrival_ns, call.prompt_tokens, call.max_new_tokens, call.priority, call.prefix_hashes
        )  # fmt: skip
        try:
            self.scheduler.add(request, call.sampled)
        except (MegalithError, ValueError) as error:
            return type(error).__name__
        return "accepted"

    def _seal(self, call: SealCall) -> str:
        try:
            self.scheduler.seal(call.id, call.block_hash)
        except (KeyError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def _complete(self, call: CompleteCall) -> str:
        try:
            self.scheduler.complete(self._plan, call.finished, call.steps, call.under_way)
        except ValueError as error:
            return f"ValueError: {error}"
        return "accepted"


def plan_call(plan: StepPlan, ns: int) -> PlanCall:
    """The plan as it is recorded. To be made before complete(), while the plan can still be read."""
    return PlanCall(
        ns,
        tuple([_chunk(chunk) for chunk in plan.chunks]),
        tuple([_preempt(preempt) for preempt in plan.preempts]) if plan.preempts else (),
        tuple([_resume(resume) for resume in plan.resumes]) if plan.resumes else (),
        plan.repeats,
    )


def _chunk(chunk: Chunk) -> ChunkEntry:
    return (chunk.request_id, chunk.new_tokens, chunk.context_tokens, chunk.samples)


def _preempt(preempt: Preempt) -> PreemptEntry:
    return (preempt.request_id, preempt.mode, len(preempt.device_blocks), len(preempt.host_blocks))


def _resume(resume: Resume) -> ResumeEntry:
    return (resume.request_id, len(resume.host_blocks), len(resume.device_blocks))


def _both(recorded: PlanCall, replayed: PlanCall) -> tuple[str, str]:
    """Both plans in words, their chunks shown from shortly before the first that differs."""
    pairs = zip(recorded.chunks, replayed.chunks, strict=False)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if same is None:
        same = min(len(recorded.chunks), len(replayed.chunks))
    first = max(0, same - 2) if recorded.chunks != replayed.chunks else 0
    return _plan_text(recorded, first), _plan_text(replayed, first)


def _plan_text(plan: PlanCall, first: int = 0) -> str:
    shown = [
        f"{request}: {new}+{context}{'' if samples else ' no logits'}"
        for request, new, context, samples in plan.chunks[first : first + _SHOWN_ENTRIES]
    ]
    left = len(plan.chunks) - first - len(shown)
    chunks = ", ".join([*(["..."] if first else []), *shown, *([f"... {left} more"] if left else [])])
    moves = [f"preempt {r} by {mode} ({d} device, {h} host blocks)" for r, mode, d, h in plan.preempts]
    moves += [f"resume {r} ({h} host to {d} device blocks)" for r, h, d in plan.resumes]
    return "; ".join([*moves, f"{len(plan.chunks)} chunks (id: new+context): {chunks}", f"repeats {plan.repeats}"])


def _short(call: Call) -> str:
    """One line of context."""
    if isinstance(call, PlanCall):
        return f"plan -> {_plan_text(call)}"[:160]
    text = msgspec.json.encode(call).decode()
    return text if len(text) <= 120 else f"{text[:117]}..."
