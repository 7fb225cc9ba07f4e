"""`megalith complete`: one prompt in, its continuation on stdout, from a local model or an endpoint."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.base.units import parse_bytes
from megalith.cli.output import JsonFlag, print_json, say

if TYPE_CHECKING:
    from megalith.cli.talk import Answer, Partner
    from megalith.engine.params import SamplingParams

_MAX_PROMPT_BYTES = 64 << 20

app = App(
    name="complete",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  megalith complete smollm2 "The capital of France is" --max-tokens 16
  megalith complete smollm2 --file story.txt --temperature 0.8 --seed 7
  git log -5 | megalith complete smollm2 --file - --json
  megalith complete --url http://127.0.0.1:8000/v1 "Once upon a time" """,
)


@Parameter(name="*", group="Model")
@dataclass(frozen=True)
class Where:
    """What answers; shared by `chat` and `complete`."""

    url: str | None = None
    """Ask this OpenAI-compatible endpoint instead of loading the model here."""
    api_key: str | None = None
    """Bearer key of the endpoint; by default $OPENAI_API_KEY."""
    device: str | None = None
    """cpu, cuda or cuda:1. [default: cpu]"""
    mode: str | None = None
    """auto, native, bf16 or float32. [default: auto]"""
    memory: str | None = None
    """Hard limit for weights and KV, such as 4GiB."""
    context: int | None = None
    """Longest prompt + output in tokens; by default the model's own, or what the limit leaves room for."""
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

    def engine(self) -> dict[str, Any]:
        """Settings for EngineConfig: those that were given."""
        settings: dict[str, Any] = {"device": self.device, "mode": self.mode, "threads": self.threads}
        settings |= {"attention": self.attention, "window": self.window, "max_context": self.context}
        settings |= {"activation_bits": self.activation_bits, "tensor_parallel": self.tensor_parallel}
        settings |= {"collective": self.collective, "link": self.link, "window_blocks": self.window_blocks}
        settings |= {"expert_cache": self.expert_cache, "neuron_window": self.neuron_window}
        settings |= {"kv_format": self.kv_format}
        settings["memory_bytes"] = parse_bytes(self.memory) if self.memory else None
        if self.mode not in (None, "auto", "native", "bf16", "float32"):
            raise ConfigError(f"There is no mode {self.mode!r}.", "Take auto, native, bf16 or float32.")
        if self.collective not in (None, "star", "ring"):
            raise ConfigError(f"There is no collective {self.collective!r}.", "Take star or ring.")
        return {name: value for name, value in settings.items() if value is not None}


@Parameter(name="*", group="Sampling")
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; shared by `chat` and `complete`."""

    max_tokens: Annotated[int | None, Parameter(name=["--max-tokens", "-n"])] = None
    """Longest answer. [default: 128; in a chat 1024]"""
    temperature: Annotated[float | None, Parameter(name=["--temperature", "-t"])] = None
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that make up this share."""
    seed: int | None = None
    """Same seed, same answer."""
    stop: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = ()
    """Text that ends the answer; may be given several times."""

    def params(self, *, temperature: float, max_tokens: int | None) -> SamplingParams:
        """SamplingParams, with the verb's own defaults for what was not given."""
        from megalith.engine.params import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
        )


@app.default
def complete(
    model: str | None = None,
    prompt: str | None = None,
    *,
    file: Annotated[str | None, Parameter(name=["--file", "-f"])] = None,
    where: Where = Where(),
    sampling: Sampling = Sampling(),
    json: JsonFlag = False,
) -> int:
    """Complete one prompt and print the text.

    The prompt is continued as it stands, without a chat template; `megalith
    chat` holds conversations. With --url the model may be left away: the first
    that the endpoint lists answers.

    Parameters
    ----------
    model
        Name or path of a local model, or a name that the endpoint knows. [default: smollm2]
    prompt
        The text to continue.
    file
        Read the prompt from this file; - is stdin.
    """
    from megalith.cli.talk import open_partner, rates

    if where.url is not None and prompt is None and file is None:
        model, prompt = None, model
    text = _prompt(prompt, file)
    params = sampling.params(temperature=0.0, max_tokens=128)
    partner = open_partner(model, where.url, where.api_key, where.engine())
    partner.load()
    answer = asyncio.run(_complete(partner, text, params, stream=not json))
    if json:
        print_json({"model": partner.name, "prompt": text, "answer": answer, **rates(answer, partner)})
        return 0
    if not answer.text.endswith("\n"):
        print()
    sys.stdout.flush()
    say(answer.summary(partner.predicted))
    return 0


def _prompt(prompt: str | None, file: str | None) -> str:
    """The prompt from the command line, a file, or piped stdin. Raises ConfigError without one."""
    if prompt is not None and file is not None:
        raise ConfigError("There is a prompt on the command line and in --file.", "Give one of them.")
    if file == "-" or (file is None and prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read(_MAX_PROMPT_BYTES)
    elif file is not None:
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"There is no file {file}.", "Name a text file, or - for stdin.")
        prompt = path.read_text(encoding="utf-8", errors="replace")
    if not prompt:
        hint = 'Write it after the model: megalith complete smollm2 "The capital of France is".'
        raise ConfigError("There is no prompt.", hint)
    return prompt


async def _complete(partner: Partner, text: str, params: SamplingParams, *, stream: bool) -> Answer:
    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        await partner.start()
        return await partner.complete(text, params, show if stream else lambda _: None)
    finally:
        await partner.close()
