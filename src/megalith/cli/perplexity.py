"""`megalith perplexity`: how well a model predicts a text, and how far it is from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, progress, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megalith.engine.launch import BuiltEngine

Mode = Literal["auto", "native", "bf16", "float32"]

app = App(
    name="perplexity",
    help="Measure a model's perplexity, alone or against a reference.",
    help_format="plaintext",
    help_epilogue="""\
The text is prose of this project's own guides unless --text names another. Figures
compare only with the same text, tokenizer and context.

Examples:
  megalith perplexity smollm2
  megalith perplexity small.gguf --against smollm2
  megalith perplexity smollm2 --mode native --against smollm2 --against-mode float32 --json""",
)


@app.default
def perplexity(
    model: str,
    *,
    text: Path | None = None,
    context: int = 512,
    tokens: int | None = None,
    mode: Mode = "auto",
    against: str | None = None,
    against_mode: Mode = "float32",
    threads: int | None = None,
    json: JsonFlag = False,
) -> int:
    """Measure a model's perplexity, alone or against a reference.

    Parameters
    ----------
    model
        A name, a GGUF file or a Hugging Face directory.
    text
        A UTF-8 file; by default the text that comes with Megalith.
    context
        Tokens of a window; each is scored from its second token on.
    tokens
        Only so many tokens of the text.
    mode
        Which runner: auto, native, bf16 or float32.
    against
        A reference with the same tokenizer: adds its perplexity, the KL divergence and how often both agree.
    against_mode
        The reference's runner.
    threads
        Threads; by default one for each core.
    """
    from megalith.engine import perplexity as scoring

    if context < 2 or (tokens is not None and tokens < 2):
        raise ConfigError(f"--context {context} and --tokens {tokens} leave nothing to score.", "Give at least 2.")
    try:
        body = (text or scoring.TEXT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{text} cannot be read as UTF-8 text: {error}.") from None
    built: list[BuiltEngine] = []
    try:
        built.append(_build(model, mode, context, threads))
        parts = _parts(built[0], body, context, tokens)
        if against is not None:
            built.append(_build(against, against_mode, context, threads))
            if [p.tolist() for p in _parts(built[1], body, context, tokens)] != [p.tolist() for p in parts]:
                raise ConfigError(f"{model} and {against} cut the text into different tokens: nothing compares.")
        reference = built[1].runner if against is not None else None
        with progress("scoring", sum(map(len, parts)), "tokens") as advance:
            found = scoring.measure(built[0].runner, parts, context, reference, advance)
        runner = built[0].runner.name
    finally:
        for each in built:
            each.runner.close()
    if json:
        import msgspec

        print_json({"model": model, "runner": runner, "against": against, **msgspec.structs.asdict(found)})
        return 0
    print(f"{model} ({runner}), {found.tokens} tokens in windows of {context}, measured:")
    print(f"perplexity {found.perplexity:.3f}, {found.bits_per_token:.4f} bits/token")
    if found.mean_kl_nats is not None:
        print(
            f"against {against} ({against_mode}, perplexity {found.reference_perplexity:.3f}): "
            f"KL {found.mean_kl_nats:.5f} nats, same first choice {found.top1_agreement:.2%}"
        )
    return 0


def _build(model: str, mode: Mode, context: int, threads: int | None) -> BuiltEngine:
    from megalith.engine.api import EngineConfig
    from megalith.engine.launch import build_engine

    say(f"loading {model}")
    return build_engine(
        EngineConfig(
            model=model, mode=mode, threads=threads, max_context=context, max_sequences=1, token_budget=64,
            num_blocks=-(-context // 16) + 1,
        )
    )  # fmt: skip


def _parts(built: BuiltEngine, body: str, context: int, tokens: int | None) -> list[NDArray[np.int32]]:
    from megalith.engine.perplexity import windows

    tokenizer = built.model.tokenizer
    ids = tokenizer.encode(body)
    found = windows(ids[:tokens], context, None)
    if not found:
        raise ConfigError("The text has fewer than 2 tokens.", "Give a longer one.")
    return found
