"""`megalith serve`: plan, load and serve a model on an OpenAI-compatible endpoint, until a signal ends it."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from megalith.base.errors import MachineError
from megalith.base.units import format_duration, parse_bytes, parse_duration_ns
from megalith.cli.output import JsonFlag, progress, warn

if TYPE_CHECKING:
    from megalith.engine.launch import BuiltEngine
    from megalith.plan.fit import Fit
    from megalith.serve.config import ServeRecipe

app = App(
    name="serve",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  megalith serve smollm2
  megalith serve smollm2 --memory 1GiB --context 4096 --max-sequences 16
  megalith serve ./model.gguf --port 0 --served-model-name my-model
  megalith serve smollm2 --host 0.0.0.0 --api-key-file keys.txt --cors-origin https://app.example
  megalith serve --config serve.toml --set server.request_timeout_ns=60s

A recipe holds an [engine] and a [server] table; every key of both can be given with --set.
SIGTERM or Ctrl-C drains: running requests finish, new ones get 503; a second one stops at once.""",
)


Assignments = Annotated[tuple[str, ...], Parameter(name="--set", group="Recipe", negative="", show_default=False)]


@Parameter(name="*", group="Engine")
@dataclass(frozen=True)
class EngineFlags:
    """What runs the model."""

    device: str | None = None
    """cpu, cuda or cuda:1. [default: cpu]"""
    mode: str | None = None
    """auto, native, bf16 or float32. [default: auto]"""
    memory: str | None = None
    """Hard limit for weights, KV and activations, such as 4GiB; by default what is free, less a margin.
    On a CPU the server runs inside it (see --limit-by)."""
    context: int | None = None
    """Longest prompt + output in tokens; by default the model's own."""
    max_sequences: int | None = None
    """Requests that run at once. [default: 64]"""
    token_budget: int | None = None
    """Rows of one forward pass. [default: 256]"""
    policy: str | None = None
    """splitfuse, prefill-first or first-come. [default: splitfuse]"""
    preempt: str | None = None
    """recompute or swap. [default: recompute]"""
    threads: int | None = None
    """CPU threads; by default one for each core."""
    activation_bits: int | None = None
    """Bits of activations beside bipolar weights, 1 to 8. [default: what the file says, else 8]"""
    attention: str | None = None
    """here, or in other processes: workers:N, spread:N, storage:FOLDER[/keep=N]. [default: here]"""
    window: str | None = None
    """K or K,K': so many layers in memory, K' exchanged at a time (modes bf16, float32). [default: by --memory]"""
    expert_cache: str | None = None
    """N, or a size such as 2GiB: so many experts of a mixture in memory, the others from disk. [default: all]"""
    tensor_parallel: int | None = None
    """Processes that the model is cut over (torch runner, this machine). [default: 1]"""
    collective: str | None = None
    """How they add up: star or ring. [default: star]"""
    link: str | None = None
    """Latency, or latency/bytes a second, imposed between them: 2ms, 2ms/125MB."""
    window_blocks: int | None = None
    """Attention and FFN blocks that each keeps in memory; the rest streams from disk. [default: all]"""
    neuron_window: str | None = None
    """ReLU models: neurons on disk, those of the last TOKENS in memory: 5, 5/memory=256MiB, 5/sigmas=6."""
    kv_format: str | None = None
    """KV in block floating point: bfp4:block=32, values=8 and reorder after a comma (modes bf16, float32)."""
    record: str | None = None
    """New file (.gz: compressed) for every scheduling decision: counts and keyed hashes, no text."""

    def table(self, model: str | None) -> dict[str, Any]:
        """The `[engine]` keys that were given."""
        return {
            "model": model, "device": self.device, "mode": self.mode, "max_context": self.context,
            "memory_bytes": None if self.memory is None else parse_bytes(self.memory), "policy": self.policy,
            "max_sequences": self.max_sequences, "token_budget": self.token_budget, "preempt": self.preempt,
            "threads": self.threads, "attention": self.attention, "window": self.window, "record": self.record,
            "activation_bits": self.activation_bits, "neuron_window": self.neuron_window,
            "kv_format": self.kv_format,
            "tensor_parallel": self.tensor_parallel, "collective": self.collective, "link": self.link,
            "window_blocks": self.window_blocks, "expert_cache": self.expert_cache,
        }  # fmt: skip


@Parameter(name="*", group="Server")
@dataclass(frozen=True)
class ServerFlags:
    """Who may connect, and how."""

    port: Annotated[int | None, Parameter(name=["--port", "-p"])] = None
    """0 takes any free port. [default: 8000]"""
    host: str | None = None
    """Address to listen on; beyond loopback only with keys. [default: 127.0.0.1]"""
    api_key_file: str | None = None
    """One API key a line: `key`, `name:key` or `name:sha256:<hex>`."""
    insecure: Annotated[bool, Parameter(negative="")] = False
    """Listen beyond loopback without API keys."""
    cors_origin: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = ()
    """Web origin that browsers may call from; may be given several times. Off by default."""
    served_model_name: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = ()
    """Name under which clients ask for the model; may be given several times."""
    lenient: Annotated[bool, Parameter(negative="")] = False
    """Drop unknown request fields instead of refusing them."""
    access_log: str | None = None
    """text, json or off. [default: text]"""
    limit_by: str | None = None
    """How --memory is held: cgroup (by the kernel), measure (by samples), off, or auto. [default: auto]"""
    drain: str | None = None
    """How long running requests may go on after SIGTERM, such as 30s. [default: 30s]"""

    def table(self) -> dict[str, Any]:
        """The `[server]` keys that were given."""
        return {
            "port": self.port, "host": self.host, "api_key_file": self.api_key_file,
            "insecure": self.insecure or None, "cors_origins": self.cors_origin or None,
            "served_names": self.served_model_name or None, "lenient": self.lenient or None,
            "access_log": self.access_log, "limit_by": self.limit_by,
            "drain_timeout_ns": None if self.drain is None else parse_duration_ns(self.drain),
        }  # fmt: skip


@app.default
def serve(
    model: str | None = None,
    *,
    engine: EngineFlags = EngineFlags(),
    server: ServerFlags = ServerFlags(),
    config: Annotated[str | None, Parameter(group="Recipe")] = None,
    assignments: Assignments = (),
    json: JsonFlag = False,
) -> int:
    """Serve a model on an OpenAI-compatible endpoint.

    Prints the plan first, and refuses with numbers when the model does not
    fit; then loads, then prints the address. Exit code 0 when every request
    was finished before it ended.

    Parameters
    ----------
    model
        Name or path of a local model (`megalith models` lists them).
    config
        Recipe file (TOML); flags and --set win over it.
    assignments
        One key of the recipe, such as server.max_n=4; may be given several times.
    """
    begin_ns = time.monotonic_ns()
    try:
        from megalith.serve.recipe import build_recipe

        recipe = build_recipe(config, {"engine": engine.table(model), "server": server.table()}, assignments)
        if recipe.engine.memory_bytes is not None:
            from megalith.cli.limit import held_from_outside, run_again_inside

            limit_by = recipe.server.limit_by
            if held_from_outside(recipe.engine, limit_by):
                return run_again_inside(recipe.engine, limit_by, as_json=json)
        return _serve(recipe, begin_ns, as_json=json)
    except ModuleNotFoundError as error:
        raise _missing(error) from None


def _serve(recipe: ServeRecipe, begin_ns: int, *, as_json: bool) -> int:
    """Serve in this process."""
    from megalith.serve.recipe import keep
    from megalith.serve.run import bind, configure_logging, run_server

    with bind(recipe.server) as sock:
        if not recipe.server.on_loopback and recipe.server.api_key_file is None:
            port = sock.getsockname()[1]
            warn(f"whoever can reach {recipe.server.host}:{port} can use the model: there are no API keys")
        configure_logging(recipe.server.access_log)
        built = _load(recipe)
        keep(recipe)
        from megalith.serve.app import build_app

        name = (recipe.server.served_names or (built.model.files.name,))[0]

        def on_ready(url: str) -> None:
            _announce(url, name, time.monotonic_ns() - begin_ns, as_json=as_json)
            _tell(recipe, ready=True)

        code = run_server(build_app(built.engine, built.model, recipe.server), recipe.server, sock, on_ready)
        if streamed := built.streamed():
            print(streamed, file=sys.stderr, flush=True)
        return code


def _load(recipe: ServeRecipe) -> BuiltEngine:
    """Print the plan, then build the engine. Raises DoesNotFit before a weight is read."""
    from megalith.engine.launch import build_engine

    def on_plan(fit: Fit) -> None:
        print(fit.text, file=sys.stderr, flush=True)
        _tell(recipe, planned_bytes=fit.plan.need_bytes)

    with contextlib.ExitStack() as shown:

        def on_part(part: str) -> None:
            # The plan is printed before the weights are read; only what comes after takes long enough for a bar.
            if part == "load the weights":
                shown.enter_context(progress(f"loading {recipe.engine.model}"))

        return build_engine(recipe.engine, on_part, on_plan)


def _tell(recipe: ServeRecipe, **facts: int | bool) -> None:
    """Tell the process that holds the limit, where there is one."""
    if recipe.engine.memory_bytes is not None:
        from megalith.base.confined import tell

        tell(**facts)


def _missing(error: ModuleNotFoundError) -> Exception:
    """What to say of a package that is not installed; our own modules cannot be missing, so that is a bug."""
    if error.name is None or error.name.startswith("megalith"):
        return error
    return MachineError(
        f"The server needs the package {error.name}, which is not installed.",
        "Install it with: pip install 'megalith[engine,serve]'",
    )


def _announce(url: str, name: str, took_ns: int, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        line = msgspec.json.encode({"event": "ready", "url": url, "model": name, "took_ns": took_ns})
        print(line.decode(), flush=True)
        return
    print(f"ready in {format_duration(took_ns)}: {name} on {url}/v1")
    print(
        f"""
  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{name}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
""",
        flush=True,
    )
