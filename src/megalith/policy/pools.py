"""Splitwise's mixed pool: prompt, token and borrowed instances, both ends of a request chosen at its arrival.

Knows roles, queues and promised memory; must not know costs or the true output length. Rule by rule that of the
released simulator (splitwise-sim, scheduler.py, MixedPoolScheduler; paper: ISCA 2024, section IV). Its prompt pool is
the role `prefill`, its token pool `decode`, and an instance that was borrowed from the other pool has the role `mixed`
until it has nothing left. The simulator knows output lengths and reserves `prompt + output`; here it is `prompt +
max_new_tokens` (capped) or `prompt + a guess` (predicted). With max_new_tokens set to the true length by the workload,
capped is the original; such a run must be labelled `oracle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Literal

from megalith.policy.cluster import (
    Command,
    Event,
    InstanceFacts,
    InstanceId,
    Placement,
    Route,
    SetRole,
    TransferMode,
    View,
)
from megalith.policy.facts import Request, RequestId
from megalith.policy.lengths import OutputLengths
from megalith.policy.router_options import RouterOptions, require
from megalith.policy.routing import later, queued_tokens

_PENDING: Callable[[InstanceFacts], int] = attrgetter("pending_tokens")
_PROMISED: Callable[[InstanceFacts], int] = attrgetter("promised_tokens")


def _queue(instance: InstanceFacts) -> int:
    """sched_pending_tokens of the original: prompts count where they run, tokens where they decode."""
    return instance.pending_tokens if instance.role == "prefill" else queued_tokens(instance)


class SplitwiseOptions(RouterOptions):
    """The constants of the paper and its simulator."""

    transfer: TransferMode = "layerwise"
    layerwise_from_tokens: int = 512
    """Shorter prompts are sent in one piece when they are done (paper, section IV). Only with transfer layerwise."""
    queue_tokens: int = 8192
    """A prompt queue is long when someone waits and this would be exceeded (prompt_max_pending_batch_tokens)."""
    lengths: Literal["capped", "predicted"] = "capped"
    """What is reserved for the output: max_new_tokens, or a guess from what has finished."""
    quantile: float | None = None
    """The guess is this quantile of the outputs so far; without it their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.queue_tokens > 0, "queue_tokens must be above 0")
        require(self.quantile is None or 0 < self.quantile <= 1, "quantile must be above 0 and at most 1")


class SplitwisePools:
    """Router and controller in one. State: who is borrowed and, for predicted lengths, what is promised to whom."""

    name = "splitwise"
    period_ns: int | None = None

    def __init__(self, options: SplitwiseOptions, seed: int = 0) -> None:  # noqa: ARG002
        self.options = options
        self.listens = frozenset({"idle"})
        self._borrowed: set[InstanceId] = set()
        self._commands: list[Command] = []
        self._guess: OutputLengths | None = None
        self._promises: dict[RequestId, tuple[InstanceId, int]] = {}
        self._promised: dict[InstanceId, int] = {}
        if options.lengths == "predicted":
            self._guess = OutputLengths(options.quantile)
            self.listens = frozenset({"idle", "finish", "down"})

    # Routing

    def route(self, request: Request, view: View) -> Placement:
        """Both ends; the same one twice when the pools have nothing to offer."""
        prefill, mixed, decode = view.by_role("prefill"), view.by_role("mixed"), view.by_role("decode")
        if not (prefill or mixed or decode):
            return later(request, view, self.options)
        self._commands = []
        needed = request.prompt_tokens + self._new_tokens(request)
        prompt = self._prompt_end(request, prefill, _PENDING) or self._prompt_end(request, mixed, queued_tokens)
        token = self._token_end(needed, decode) or self._token_end(needed, mixed)
        if prompt is None and decode:
            prompt = min(decode, key=queued_tokens)
            self._borrow(prompt)
        if token is None and prefill:
            token = min(prefill, key=_PROMISED)
            self._borrow(token)
        if prompt is None or token is None:
            # A borrowed one is the last of the mixed ones by now: the order decides among equals.
            prompt = token = min(sorted([*prefill, *mixed, *decode], key=self._pool_order), key=_queue)
        if self._guess is not None:
            self._promise(request.id, token.id, needed)
        if prompt.id == token.id:
            return Route(request.id, prompt.id)
        return Route(request.id, prompt.id, token.id, self._transfer(request))

    def commands(self) -> Sequence[Command]:
        """The roles that the last route() changed."""
        commands, self._commands = self._commands, []
        return commands

    def _prompt_end(
        self, request: Request, pool: Sequence[InstanceFacts], load: Callable[[InstanceFacts], int]
    ) -> InstanceFacts | None:
        """The shortest queue, unless it is long. A prompt instance generates nothing: its load is pending prompts."""
        if not pool:
            return None
        best = min(pool, key=load)
        is_long = load(best) + request.prompt_tokens > self.options.queue_tokens and best.waiting() > 0
        return None if is_long else best

    def _token_end(self, needed: int, pool: Sequence[InstanceFacts]) -> InstanceFacts | None:
        """The one with the least memory promised, unless this request does not fit there any more."""
        if not pool:
            return None
        best = min(pool, key=self._memory)
        return None if self._memory(best) + needed >= best.kv_blocks * best.block_tokens else best

    def _memory(self, instance: InstanceFacts) -> int:
        return instance.promised_tokens if self._guess is None else self._promised.get(instance.id, 0)

    def _borrow(self, instance: InstanceFacts) -> None:
        self._borrowed.add(instance.id)
        self._commands.append(SetRole(instance.id, "mixed"))

    def _pool_order(self, instance: InstanceFacts) -> int:
        borrowed = any(isinstance(one, SetRole) and one.instance == instance.id for one in self._commands)
        return 2 if borrowed else {"prefill": 0, "mixed": 1, "decode": 3}[instance.role]

    def _transfer(self, request: Request) -> TransferMode:
        transfer = self.options.transfer
        short = transfer == "layerwise" and request.prompt_tokens < self.options.layerwise_from_tokens
        return "push" if short else transfer

    # Guesses

    def _new_tokens(self, request: Request) -> int:
        if self._guess is None:
            return request.max_new_tokens
        features = {"prompt_tokens": request.prompt_tokens, "max_new_tokens": request.max_new_tokens}
        return int(self._guess.predict(features)["new_tokens"])

    def _promise(self, request_id: RequestId, instance: InstanceId, tokens: int) -> None:
        self._release(request_id)
        self._promises[request_id] = (instance, tokens)
        self._promised[instance] = self._promised.get(instance, 0) + tokens

    def _release(self, request_id: RequestId) -> None:
        instance, tokens = self._promises.pop(request_id, (-1, 0))
        if tokens and instance in self._promised:
            self._promised[instance] -= tokens

    # Events

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """A borrowed instance that has nothing left goes home; what has finished teaches the guess."""
        if event.kind == "idle":
            return self._return_home(event.subject, view)
        if event.kind == "finish":
            self._release(event.subject)
            if self._guess is not None and event.data["outcome"] == "finished":
                self._guess.observe(
                    {"prompt_tokens": event.data["prompt_tokens"]}, {"new_tokens": event.data["new_tokens"]}
                )
        elif event.kind == "down":
            self._promised.pop(event.subject, None)
            gone = [request_id for request_id, promise in self._promises.items() if promise[0] == event.subject]
            for request_id in gone:
                del self._promises[request_id]
        return ()

    def _return_home(self, instance_id: InstanceId, view: View) -> Iterable[Command]:
        # The view may be older than the borrowing, hence the memory of it.
        was_borrowed = instance_id in self._borrowed
        self._borrowed.discard(instance_id)
        try:
            instance = view.by_id(instance_id)
        except KeyError:
            return ()
        return (SetRole(instance_id, instance.home),) if was_borrowed or instance.role != instance.home else ()
