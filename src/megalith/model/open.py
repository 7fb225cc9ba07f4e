"""One call from a name to everything that serving it needs: description, weights, tokenizer, chat template."""

from __future__ import annotations

from dataclasses import dataclass

from megalith.base.errors import ModelFormatError
from megalith.model.chat import ChatTemplate, template_from_gguf, template_from_hf
from megalith.model.checkpoint import Checkpoint, gguf_checkpoint, open_checkpoint
from megalith.model.gguf import GgufFile
from megalith.model.source import ModelFiles, resolve
from megalith.model.tokenizer import Tokenizer
from megalith.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model, opened: headers read, weights untouched."""

    spec: ModelSpec
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None for a base model that comes without one."""
    files: ModelFiles


def open_model(name_or_path: str) -> OpenModel:
    """Open a model by name or path. Raises ModelNotFound, ModelFormatError or MachineError (see `source.resolve`)."""
    from megalith.model.tokenizer_gguf import tokenizer_from_gguf
    from megalith.model.tokenizer_hf import tokenizer_from_hf

    files = resolve(name_or_path)
    if files.kind == "gguf":
        file = GgufFile(files.path)
        checkpoint, tokenizer = gguf_checkpoint(file), tokenizer_from_gguf(file)
        template = template_from_gguf(file, *_ends(tokenizer))
    else:
        checkpoint, tokenizer = open_checkpoint(files), tokenizer_from_hf(files.path)
        template = template_from_hf(files.path, *_ends(tokenizer))
    if tokenizer.vocab > checkpoint.spec.vocab:
        raise ModelFormatError(
            f"{files.path}: the tokenizer has {tokenizer.vocab} tokens, but the embedding {checkpoint.spec.vocab} rows."
        )
    return OpenModel(checkpoint.spec, checkpoint, tokenizer, template, files)


def _ends(tokenizer: Tokenizer) -> tuple[str, str]:
    """Texts of the beginning and end tokens, for templates that write them."""
    bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    return bos, "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id)
