"""What the server and the terminal see of an engine: one protocol and the values that cross it. No torch, no NumPy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megalith.base.config import Config
from megalith.cost.collective import Collective
from megalith.engine.params import SamplingParams
from megalith.specs.model import ModelSpec

FinishReason = Literal["stop", "length", "abort", "error"]
ComputeMode = Literal["auto", "native", "bf16", "float32"]


class EngineConfig(Config):
    """How to build one instance. Everything that is None is derived from the model and the machine, and printed."""

    model: str
    """A catalogue name with local weights (`smollm2`), a GGUF file, or a Hugging Face directory."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:1`."""
    mode: ComputeMode = "auto"
    """auto: native where the backend can run this model, else bf16. float32 is the exact torch path."""
    memory_bytes: int | None = None
    """Hard limit for weights + KV + activations of this instance; None: what the machine has free, less a margin."""
    weights: Literal["auto", "resident", "window"] = "auto"
    """window: weights stream through what memory is left, from disk (to a CUDA device from host memory): pieces of
    them in the native backend, whole layers in the torch runner. auto: where they do not fit."""
    window: str | None = None
    """`K` or `K,K'`: K layers are in memory, and when K' have run, those go and as many come (torch runner). None: what
    the limit allows."""
    expert_cache: str | None = None
    """`N` or a size: so many experts of a mixture are in memory, others come from disk (torch runner). None: all."""
    activation_bits: int | None = None
    """Bits, 1 to 8, of the activations that bipolar weights are multiplied with; None: what the file says, else 8."""
    max_context: int | None = None
    """Longest prompt + output, in tokens; None: the model's own."""
    max_sequences: int = 64
    """Requests that run at once."""
    token_budget: int = 256
    """Rows of one forward pass."""
    policy: str = "splitfuse"
    """`splitfuse`, `prefill-first` or `first-come`."""
    preempt: Literal["recompute", "swap"] = "recompute"
    prefix_cache: bool = True
    block_tokens: int = 16
    num_blocks: int | None = None
    num_host_blocks: int | None = None
    """Blocks of host memory for swapped requests; None: as many as device blocks when `preempt` is swap, else 0."""
    threads: int | None = None
    """Threads of the CPU backend; None: one for each core that this process may use."""
    max_waiting: int = 1024
    """Requests that may wait for admission; one more is refused with QueueFull."""
    attention: str = "here"
    """`here`, or in other processes: `workers:N`, `spread:N`, `storage:FOLDER`, `storage:FOLDER/keep=N`."""
    tensor_parallel: int = 1
    """Processes that the torch runner's layers are cut over, on this machine."""
    collective: Collective = "star"
    """How they add up: `star` through the first, two hops; `ring`."""
    link: str = ""
    """Imposed between them, for trials: `2ms`, or `2ms/125MB` with bytes a second. Empty: none."""
    window_blocks: int = 0
    """Attention and FFN blocks of its share that each keeps in memory, the rest streams from disk; 0: all."""
    disk_bytes_per_s: int | None = None
    """Imposed on those windows, for trials."""
    neuron_window: str = ""
    """`5`, `5/memory=256MiB`, `5/sigmas=6`: neurons of a ReLU model come from disk, those of 5 tokens stay."""
    kv_format: str = ""
    """`bfp4:block=32,reorder`: KV in block floating point (torch runner, CPU). Empty: that of the mode."""
    record: str | None = None
    """New file that every scheduling decision is written to, for the shadow test; gzip when it ends in .gz."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one emitted token and, where asked, of the most likely ones (token id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of output of one request. The last one has a `finish_reason`; its counts are final.

    `text` never holds half a character nor the start of a stop string that may still complete.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """On the first delta only, when asked: one entry a prompt token, None for the first."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache served."""
    completion_tokens: int = 0
    stop_reason: str | int | None = None
    """The stop string or token id that ended it, when that was not end-of-text."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and gauges now. Times are integer nanoseconds."""

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    kv_blocks_used: int = 0
    """Held by requests (cached but unheld prefix blocks are not used: they can be had at once)."""
    kv_blocks_total: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_rows: int = 0
    step_ns: int = 0
    """Time inside the runner."""
    python_ns: int = 0
    """Time of the step loop outside the runner: scheduling, batch building, output handling."""
    finished: dict[str, int] = field(default_factory=dict)
    """{finish reason: requests}"""
    healthy: bool = True
    detail: str = ""
    """Why it is not healthy."""


class AsyncEngine(Protocol):
    """An engine as an asyncio program sees it. The step loop runs on a thread of its own.

    Tokenizing and chat templates are the caller's (`model.Tokenizer`, `model.ChatTemplate`); detokenizing and stop
    strings are the engine's.
    """

    config: EngineConfig
    spec: ModelSpec
    max_context: int

    async def start(self) -> None:
        """Start the step loop."""
        ...

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, priority: int = 0, request_id: str = ""
    ) -> AsyncIterator[Delta]:
        """Run one request; yields deltas until one carries a finish reason.

        Closing the iterator (or cancelling the task that reads it) aborts the request and frees its KV before the
        next step. Raises PromptTooLong, RequestError, QueueFull or EngineStopped before the first delta; a failure
        inside the engine afterwards ends the stream with finish_reason `error`.
        """
        ...

    def stats(self) -> EngineStats:
        """A snapshot; cheap, callable from any thread."""
        ...

    async def drain(self, deadline_ns: int) -> None:
        """Refuse new requests, let running ones finish for at most `deadline_ns` from now, then abort the rest."""
        ...

    async def stop(self) -> None:
        """Abort everything and stop the loop. Idempotent; never hangs."""
        ...
