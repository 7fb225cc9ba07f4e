"""`megalith quantize`: a model's weights in another format, as a GGUF file or a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, progress, warn

app = App(
    name="quantize",
    help="Write a model with its weights in another format.",
    help_format="plaintext",
    help_epilogue="""\
--out NAME.gguf writes a GGUF file: q4_0 q4_1 q5_0 q5_1 q8_0 f16 bf16 f32, and bipolar1 to
bipolar8: weights of 1 to 8 bits, with activations of 8 bits or of as many as bipolar4a6
and the like say. Under the bipolar and the 4 and 5 bit formats the embedding and the head
take q8_0 unless --keep says otherwise.
Any other --out is a Hugging Face directory with safetensors: f32 f16 bf16, and q8_0 and
q4_0 as int8 and int4 weights that compressed-tensors, vLLM and transformers read
(pack-quantized, groups of 32); the embedding and the head stay f16.
int8 stands for q8_0, int4 for q4_0.

Examples:
  megalith quantize my-model/ --to q4_1 --out my-model.gguf
  megalith quantize big.gguf --to q5_1 --keep embed=q4_1 --keep down=q8_0 --out small.gguf
  megalith quantize smollm2 --to int8 --out smollm2-int8/
  megalith serve small.gguf""",
)


@app.default
def quantize(
    model: str,
    *,
    to: str,
    out: Path,
    keep: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    force: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> int:
    """Write a model with its weights in another format.

    Parameters
    ----------
    model
        A name, a GGUF file or a Hugging Face directory.
    to
        The format of the matrices.
    out
        The GGUF file to write (its name ends in .gguf), or the Hugging Face directory.
    keep
        PART=FORMAT for exceptions: embed, head, q, k, v, o, gate, up, down, or one tensor as layers.3.down.
    force
        Overwrite what is there.
    """
    from megalith.base.units import format_bytes
    from megalith.model import quantize as gguf
    from megalith.model import quantize_hf as directory
    from megalith.model.source import resolve

    recipe = gguf.Recipe.of(_format(to), _exceptions(keep))
    one_file = out.suffix == ".gguf"
    write = gguf.quantize if one_file else directory.quantize_directory
    total_bytes = gguf.total_bytes if one_file else directory.total_bytes
    files = resolve(model)
    mib = 1 << 20
    with progress(f"writing {out.name}", total_bytes(files, recipe) // mib, "MiB") as advance:
        done = [0, 0]

        def count(num_bytes: int) -> None:
            done[0] += num_bytes
            advance(done[0] // mib - done[1])
            done[1] = done[0] // mib

        outcome = write(files, recipe, out, force=force, advance=count)
    if outcome.requantized:
        sources = ", ".join(f"{count} tensors from {name}" for name, count in outcome.requantized.items())
        warn(f"{sources} were rounded a second time: their first error stays. An F16 or BF16 source is better.")
    if outcome.fallbacks:
        first = outcome.fallbacks[0]
        warn(f"{len(outcome.fallbacks)} matrices took F16: their rows are no multiple of a block ({first}).")
    if json:
        print_json(
            {"path": str(outcome.path), "num_bytes": outcome.num_bytes, "formats": outcome.formats,
             "requantized": outcome.requantized, "fallbacks": outcome.fallbacks}
        )  # fmt: skip
    else:
        formats = ", ".join(f"{name} {format_bytes(size)}" for name, size in outcome.formats.items())
        print(f"{outcome.path}: {format_bytes(outcome.num_bytes)} ({formats})")
    return 0


def _exceptions(keep: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in keep:
        part, equals, name = text.partition("=")
        if not (part and equals and name):
            raise ConfigError(f"--keep {text} is not PART=FORMAT.", "Write --keep embed=q8_0.")
        found[part] = _format(name)
    return found


def _format(name: str) -> str:
    """The format called `name`; int8 and int4 are the weight-only formats of groups of 32."""
    return {"int8": "Q8_0", "int4": "Q4_0"}.get(name.lower(), name.upper())
