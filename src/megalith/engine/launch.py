"""From an EngineConfig to a running instance: open the model, choose the runner, size the KV cache, put it together.

Knows which parts there are and in which order they start; decides nothing about requests. torch is imported only when
the torch runner is chosen, so that the native path starts in well under two seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from megalith.base.clock import MonotonicClock
from megalith.base.errors import ConfigError, MachineError, TierError
from megalith.base.units import format_bytes, format_duration
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import RunnerKind
from megalith.cost.streaming import DiskRate
from megalith.engine.admission import Admission
from megalith.engine.api import EngineConfig
from megalith.engine.attention_option import check_attention, check_room, parse_attention
from megalith.engine.batch import Runner
from megalith.engine.engine import Engine
from megalith.engine.grammar import GrammarCompiler
from megalith.engine.kv_option import check_kv
from megalith.engine.neuron_option import check_neurons, open_neurons, parse_neurons, planned
from megalith.engine.parallel.option import ParallelOption, check_parallel
from megalith.engine.record import RecordingScheduler, check_new
from megalith.engine.service import LocalEngine
from megalith.engine.streamed import StreamTally
from megalith.model.bipolar import BITS_OF
from megalith.model.open import OpenModel, open_model
from megalith.plan import machine
from megalith.plan.fit import Fit, check_fits
from megalith.plan.source import resolve
from megalith.policy.batching import by_name
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.specs.kv_format import parse_kv_format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megalith.engine.weight_window import WeightWindow

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
"""Told what is being done, before it is done."""
_WATERMARK_SHARE = 100
"""One block in so many stays free at admission, so that running requests can grow before anyone is preempted."""


_DISK_PASSES = 3
"""The best counts: a disk that rested, or that somebody else uses now, gives less for a moment."""


@dataclass(slots=True)
class Spans:
    """How long each part of the start took, in nanoseconds, in order."""

    ns: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str, progress: Progress | None = None) -> Iterator[None]:
        """Time the block; tell `progress` first."""
        if progress is not None:
            progress(name)
        begin_ns = time.perf_counter_ns()
        yield
        self.ns[name] = time.perf_counter_ns() - begin_ns

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_duration(ns)}" for name, ns in self.ns.items())


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A ready instance; `engine.start()` sets it going and `engine.stop()` gives everything back."""

    engine: LocalEngine
    model: OpenModel
    runner: Runner
    fit: Fit
    """The plan that the sizes come from: print `fit.text`."""
    spans: Spans
    why: str
    """Which runner, and why not the native one where that was not chosen."""

    def streamed_facts(self) -> dict[str, float]:
        """The same for programs: bytes of a step, decode steps, and their mean time, measured and predicted."""
        tally: StreamTally | None = getattr(self.runner, "streamed", None)
        if tally is None or not tally.decode_steps:
            return {}
        return {
            "step_bytes": tally.step_bytes, "decode_steps": tally.decode_steps,
            "measured_step_ns": tally.decode_ns / tally.decode_steps,
            "predicted_step_ns": self.fit.plan.points[0].tpot_ns.value,
        }  # fmt: skip

    def streamed(self) -> str:
        """What streaming weights took and was predicted to take, for the end of a verb; empty where nothing did."""
        tally: StreamTally | None = getattr(self.runner, "streamed", None)
        return "" if tally is None else tally.summary(self.fit.plan.points[0].tpot_ns.value)


def build_engine(
    config: EngineConfig, progress: Progress | None = None, on_plan: Callable[[Fit], None] | None = None
) -> BuiltEngine:
    """Load the model and build the instance. `on_plan` is given the plan before a weight is read.

    Raises ModelNotFound or ModelFormatError, DoesNotFit when the sizes do not fit the memory, ConfigError for a
    configuration that contradicts itself, MachineError when what was asked for is not on this machine.
    """
    if config.record is not None:
        check_new(config.record)
    spans = Spans()
    with spans.of("open the model", progress):
        model = open_model(config.model)
    option = check_attention(config, model.spec)
    parallel = check_parallel(config, model.spec)
    check_neurons(config, model.spec)
    check_kv(config, model.spec)
    with spans.of("plan", progress):
        kind, why = choose_runner(config, model)
        _check_activation_bits(config, model, kind)
        fit = _sizes(config, model, kind)
        check_room(option, config, fit.num_blocks)
    if on_plan is not None:
        on_plan(fit)
    with spans.of("load the weights", progress):
        runner = _runner(config, model, fit, parallel, progress)
    with spans.of("put it together", progress):
        engine = assemble(config, model, runner, fit.max_context)
    held = sum(runner.memory_bytes().values())
    log.info("%s: %s; %d KV blocks; holds %s; %s", model.spec.name, why, fit.num_blocks, format_bytes(held), spans)
    return BuiltEngine(engine, model, runner, fit, spans, why)


def assemble(config: EngineConfig, model: OpenModel, runner: Runner, max_context: int) -> LocalEngine:
    """An engine over a runner that is there already."""
    clock = MonotonicClock()
    blocks, size = runner.num_blocks, runner.block_tokens
    kv = KvAccount(
        blocks, size, runner.num_host_blocks, config.prefix_cache, watermark_blocks=blocks // _WATERMARK_SHARE
    )
    limits = Limits(
        max_sequences=config.max_sequences,
        max_waiting=config.max_waiting + config.max_sequences,  # preempted ones wait too; the service keeps the bound
        preempt=config.preempt,
    )
    policy = by_name(config.policy, config.token_budget)
    if config.record is None:
        scheduler = Scheduler(policy, kv, limits)
    else:
        scheduler = RecordingScheduler(policy, kv, limits, clock, config.record, model.files.name)
    eos_ids = model.tokenizer.eos_ids
    admission = Admission(
        max_context=min(max_context, blocks * size),
        vocab=model.spec.vocab,
        eos_ids=eos_ids,
        new_stream=model.tokenizer.stream,
        grammars=GrammarCompiler(lambda: str(model.tokenizer.backend.to_str()), model.spec.vocab, eos_ids),
    )
    return LocalEngine(Engine(runner, scheduler, clock), admission, config, model.spec, clock)


def choose_runner(config: EngineConfig, model: OpenModel) -> tuple[RunnerKind, str]:
    """The runner for this configuration, model and machine, and why."""
    if config.device.startswith("cuda"):
        if config.mode == "native":
            raise ConfigError("The native backend runs on the CPU.", "Use --mode bf16 or float32 with --device cuda.")
        return "cuda", f"torch on {config.device}"
    if config.device != "cpu":
        raise ConfigError(f"device is {config.device!r}.", "Use cpu, cuda or cuda:N.")
    if config.mode in ("float32", "bf16"):
        return "torch-cpu", f"torch on the CPU in {config.mode}"
    away = parse_attention(config.attention).elsewhere
    if config.tensor_parallel > 1 or config.window_blocks:
        return "torch-cpu", f"torch on the CPU in bf16, {config.tensor_parallel} ranks"
    reason = f"attention runs in {config.attention}" if away else why_not_native(model)
    if config.kv_format and reason is None:
        reason = f"KV in {config.kv_format} is the torch runner's."
    if config.expert_cache is not None and reason is None:
        reason = "a cache of experts is the torch runner's."
    if config.window is not None and reason is None:
        reason = "a window of layers is one over torch modules."
    if reason is None:
        return "native", "native CPU backend"
    if config.mode == "native":
        raise MachineError(f"The native backend cannot run {model.spec.name}: {reason}", "Use --mode auto or bf16.")
    log.warning("the native backend cannot run %s: %s; torch runs it in bf16 instead", model.spec.name, reason)
    return "torch-cpu", f"torch on the CPU in bf16, because the native backend cannot run it: {reason}"


def _sizes(config: EngineConfig, model: OpenModel, kind: RunnerKind) -> Fit:
    """The plan of one instance; where several share each request's KV, the context that they hold together."""
    instances = parse_attention(config.attention).instances
    if instances == 1:
        return _one_size(config, model, kind)
    asked = config.max_context
    each = msgspec.structs.replace(config, max_context=None if asked is None else -(-asked // instances))
    fit = _one_size(each, model, kind)
    together = fit.num_blocks * config.block_tokens * instances
    return replace(fit, max_context=min(asked or model.spec.max_context, together))


def _one_size(config: EngineConfig, model: OpenModel, kind: RunnerKind) -> Fit:
    plan_of = replace(resolve(str(model.files.path)), name=model.files.name)
    plan_of = planned(plan_of, parse_neurons(config.neuron_window))
    if config.tensor_parallel > 1 or config.window_blocks or config.neuron_window:  # These have windows of their own.
        config = msgspec.structs.replace(config, weights="resident")
    if kind == "torch-cpu" and config.mode != "float32":
        from megalith.engine.torch_linear import cpu_has_bf16

        if not cpu_has_bf16():  # the torch runner then holds float32 weights beside bfloat16 KV
            wide = msgspec.structs.replace(config, mode="float32")
            resident, stream = _streaming_bytes(wide, model)
            return check_fits(
                wide,
                kind=kind,
                model=plan_of,
                kv_format=config.kv_format or "bf16",
                resident_bytes=resident,
                stream_bytes=stream,
            )
    resident, stream = _streaming_bytes(config, model)
    kv_format = config.kv_format or None
    fit = check_fits(
        config, kind=kind, model=plan_of, kv_format=kv_format, resident_bytes=resident, stream_bytes=stream
    )
    if resident is not None:
        return fit
    disk = None if fit.window_bytes is None or kind == "cuda" else _disk_rate(model)
    return fit if disk is None else check_fits(config, kind=kind, model=plan_of, kv_format=kv_format, disk=disk)


def _disk_rate(model: OpenModel) -> DiskRate | None:
    """Of the file that steps will read, or the model's where there is none yet; None where neither says it."""
    from megalith.engine.packed_file import packed_path
    from megalith.tier.disk_rate import direct_rate

    for path in (packed_path(model.files.path), model.files.path):
        with suppress(TierError):
            return DiskRate(bytes_per_s=direct_rate(path, passes=_DISK_PASSES), source="measured at start")
    return None


def _streaming_bytes(config: EngineConfig, model: OpenModel) -> tuple[int | None, int | None]:
    """What of the weights stays in memory, and what a step of one row reads; None: all, and all layers.

    How often experts are in memory is not known before; as if tokens were sent evenly.
    """
    near, spec = _experts_near(config, model), model.spec
    if near is None:
        return _windows_bytes(config, model), None
    name = "f32" if config.mode == "float32" else "bf16"
    weights, count = weight_bytes(spec, name, name), spec.num_layers * spec.num_experts
    one = weights.experts // count
    read = spec.num_layers * spec.experts_per_token * one
    return weights.total - (count - near) * one, round(read * (1.0 - near / count))


def _experts_near(config: EngineConfig, model: OpenModel) -> int | None:
    if config.expert_cache is None:
        return None
    from megalith.engine.expert_cache import parse_cache  # And with it torch.

    if config.window is not None:
        raise ConfigError("Layers and experts cannot both have a window.", "Use --window or --expert-cache.")
    return parse_cache(config.expert_cache, model.spec, "f32" if config.mode == "float32" else "bf16")


def _windows_bytes(config: EngineConfig, model: OpenModel) -> int | None:
    """Of all ranks together where their layers go through windows, and what more processes take; None: they do not."""
    if not config.window_blocks:
        return None
    from megalith.plan.tensor_parallel import RanksQuestion, held_bytes

    question = RanksQuestion(
        spec=model.spec, profile=machine.here("torch-cpu"), ranks=config.tensor_parallel,
        window_blocks=config.window_blocks, weight_format="f32" if config.mode == "float32" else "bf16",
    )  # fmt: skip
    return held_bytes(question)


def why_not_native(model: OpenModel) -> str | None:
    """Why the native backend cannot run this model here; None when it can."""
    try:
        from megalith.engine.native_runner import supports
    except ImportError as error:
        return f"it is not part of this installation ({error})"
    return supports(model.spec, model.checkpoint)


def _check_activation_bits(config: EngineConfig, model: OpenModel, kind: RunnerKind) -> None:
    """Raise ConfigError for activation bits that nothing would use."""
    bits = config.activation_bits
    if bits is None:
        return
    if not 1 <= bits <= 8:
        raise ConfigError(f"activation_bits is {bits}.", "Give 1 to 8.")
    formats = model.checkpoint.formats()
    if not formats.keys() & BITS_OF.keys():
        raise ConfigError(
            f"activation_bits is {bits}, but {model.files.name} has no bipolar weights; it has {', '.join(formats)}.",
            "Write some: megalith quantize MODEL --to bipolar4 --out FILE.gguf.",
        )
    if kind != "native":
        raise ConfigError(f"activation_bits is {bits}, but {kind} multiplies bipolar weights in floating point.",
                          "Leave it away, or use --mode native on the CPU.")  # fmt: skip


def _runner(
    config: EngineConfig, model: OpenModel, fit: Fit, parallel: ParallelOption, progress: Progress | None
) -> Runner:
    threads = config.threads or machine.cores()
    if parallel.used:
        from megalith.engine.parallel.runner import TensorParallelRunner

        return TensorParallelRunner(
            model.checkpoint, model.files.path, parallel, dtype="float32" if config.mode == "float32" else "bf16",
            block_tokens=config.block_tokens, num_blocks=fit.num_blocks, threads=threads,
        )  # fmt: skip
    if fit.kind == "native":
        from megalith.engine.native_runner import NativeRunner

        return NativeRunner(
            model.spec, model.checkpoint, block_tokens=config.block_tokens, num_blocks=fit.num_blocks,
            num_host_blocks=fit.num_host_blocks, max_rows=max_rows(config, fit.max_context), threads=threads,
            window=None if fit.window_bytes is None else _window(model, fit.window_bytes, progress),
            activation_bits=config.activation_bits or model.checkpoint.activation_bits or 8,
        )  # fmt: skip
    from megalith.engine.torch_residence import Residence
    from megalith.engine.torch_runner import TorchRunner

    return TorchRunner(
        model.spec, model.checkpoint, device=config.device, dtype="float32" if config.mode == "float32" else "bf16",
        block_tokens=config.block_tokens, num_blocks=fit.num_blocks, num_host_blocks=fit.num_host_blocks,
        threads=threads, attention=parse_attention(config.attention), kv_form=parse_kv_format(config.kv_format),
        residence=Residence(
            fit.layers, _experts_near(config, model),
            open_neurons(model, parse_neurons(config.neuron_window), progress),
            channel_orders=_channel_orders(config, model, fit),
        ),
    )  # fmt: skip


def _channel_orders(config: EngineConfig, model: OpenModel, fit: Fit) -> NDArray[np.int64] | None:
    """The order of K's channels where the KV format wants one, by a run of the model over the calibration text."""
    form = parse_kv_format(config.kv_format)
    if form is None or not form.reorder:
        return None
    if fit.layers is not None:
        raise ConfigError("`reorder` calibrates with all weights in memory, which the limit does not allow.",
                          "Give more --memory, or leave `reorder` away.")  # fmt: skip
    from megalith.engine import k_order

    ids = model.tokenizer.encode(k_order.TEXT.read_text(encoding="utf-8"), parse_special=False)
    return k_order.channel_orders(model.checkpoint, ids, form.keys)


def _window(model: OpenModel, window_bytes: int, progress: Progress | None) -> WeightWindow:
    """The weights of `model` in so much memory, packed into a file first where they are not yet."""
    from megalith.engine.packed_file import PackedFile, ensure_packed, packed_path
    from megalith.engine.weight_window import WeightWindow

    path = ensure_packed(packed_path(model.files.path), model.spec, model.checkpoint, progress)
    return WeightWindow(PackedFile(path), model.spec, window_bytes)


def max_rows(config: EngineConfig, max_context: int) -> int:
    """Rows of the largest step that the policy can ask for: the budget, or a whole prompt where prompts are not cut."""
    if config.policy == "splitfuse":
        return config.token_budget
    return max(config.token_budget, config.max_sequences, max_context)
