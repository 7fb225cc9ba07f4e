"""`megalith perplexity`: how well a model predicts a text, and how far it is from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from cyclopts import App

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, progress, say
from megalith.engine.api import ComputeMode

if TYPE_CHECKING:
    from megalith.engine.batch import I32
    from megalith.engine.launch import BuiltEngine
    from megalith.engine.perplexity import Perplexity

app = App(
    name="perplexity",
    help="Measure a model's perplexity, alone or against a reference.",
    help_format="plaintext",
    help_epilogue="""\
The second half of each window is scored. Figures compare only with the same text,
tokenizer and context; the text that comes with Megalith is six chapters of a novel
of 1890.

Examples:
  megalith perplexity smollm2
  megalith perplexity small.gguf --against smollm2
  megalith perplexity smollm2 --mode native --against float32 --tokens 4096
  megalith perplexity smollm2 --kv-format bfp4:block=32,reorder --against float32
  megalith perplexity smollm2 --text notes.txt --context 1024 --json""",
)


@app.default
def perplexity(
    model: str,
    *,
    text: Path | None = None,
    context: int = 512,
    tokens: int | None = None,
    mode: ComputeMode = "auto",
    against: str | None = None,
    threads: int | None = None,
    kv_format: str = "",
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
        Tokens of a window.
    tokens
        Only so many tokens of the text.
    mode
        Which runner: auto, native, bf16 or float32.
    against
        A mode, for the same model in it, or a model with the same tokenizer: adds the KL divergence from it and how
        often both agree.
    threads
        Threads; by default one for each core.
    kv_format
        KV in block floating point, such as bfp4:block=32,reorder; --against keeps KV as its mode has it.
    """
    from megalith.engine import perplexity as scoring

    body = _text(scoring.TEXT if text is None else text)
    built: list[BuiltEngine] = []
    try:
        built.append(_build(model, mode, context, threads, kv_format))
        parts = scoring.windows(built[0].model.tokenizer, body, context, tokens)
        if against is not None:
            other, other_mode = (model, against) if against in get_args(ComputeMode) else (against, mode)
            built.append(_build(other, other_mode, context, threads))
            _check_same(parts, scoring.windows(built[1].model.tokenizer, body, context, tokens), model, against)
        reference = built[1].runner if against is not None else None
        with progress("scoring", scoring.tokens_run(parts), "tokens") as advance:
            found = scoring.measure(built[0].runner, parts, reference, advance)
        names = [each.runner.name for each in built] + [""]
    finally:
        for each in built:
            each.runner.close()
    if json:
        import msgspec

        runners = {"runner": names[0], "reference": against, "reference_runner": names[1] or None}
        print_json({"model": model, **runners, "text": str(text or scoring.TEXT), **msgspec.structs.asdict(found)})
    else:
        print(_paragraph(found, model, names, against))
    return 0


def _check_same(parts: list[I32], theirs: list[I32], model: str, against: str) -> None:
    if [p.tolist() for p in theirs] != [p.tolist() for p in parts]:
        raise ConfigError(f"{model} and {against} cut the text into different tokens: nothing compares.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start:,} is not.", "Convert it first.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _paragraph(found: Perplexity, model: str, runners: list[str], against: str | None) -> str:
    lines = [
        f"{model} on {runners[0]}: perplexity {found.perplexity:.3f} ± {found.standard_error:.3f} "
        f"(measured; {found.tokens:,} tokens, the second halves of {found.windows:,} windows of {found.context:,})"
    ]
    if found.mean_kl_nats is not None:
        lines.append(
            f"against {against} on {runners[1]} (perplexity {found.reference_perplexity:.3f}): KL divergence "
            f"{found.mean_kl_nats:.5f} ± {found.kl_standard_error:.5f} nats, "
            f"same first choice {found.top1_agreement:.2%}"
        )
    return "\n".join(lines)


def _build(model: str, mode: str, context: int, threads: int | None, kv_format: str = "") -> BuiltEngine:
    """One sequence's worth of an engine. Raises what build_engine raises."""
    from megalith.engine.api import EngineConfig
    from megalith.engine.launch import build_engine
    from megalith.engine.perplexity import ROWS

    say(f"loading {model}")
    config = EngineConfig(
        model=model,
        mode=cast(ComputeMode, mode),
        threads=threads,
        max_context=context,
        max_sequences=1,
        token_budget=ROWS,
        num_blocks=-(-max(context, 1) // 16) + 1,
        kv_format=kv_format,
    )
    return build_engine(config)
