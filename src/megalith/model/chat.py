"""Chat templates: messages to the text that a model was trained on.

Knows what Hugging Face's templates expect of their environment. A template comes with the weights, so it is not
trusted: it runs in Jinja's immutable sandbox, and loops, calls, text and time are counted. Jinja2 is imported on first
use.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from megalith.base.errors import ModelFormatError, RequestError
from megalith.model.gguf import GgufFile
from megalith.model.tokenizer_hf import read_json

if TYPE_CHECKING:
    from jinja2 import Template

_MAX_TEMPLATE_CHARS = 1 << 20
_MAX_INDENT = 16


class ChatTemplate:
    """One compiled template. Raises ModelFormatError when the source cannot be compiled."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        self.source, self.bos, self.eos = source, bos, eos
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise ModelFormatError(f"The chat template has {len(source)} characters; at most {_MAX_TEMPLATE_CHARS}.")
        self._template: Template | None = None

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text, special tokens included: encode it with `parse_special`.

        `messages` are OpenAI's: content may be a string, null, or a list of text parts, which are joined; `tools` are
        passed through. Further keywords reach the template as variables. Raises RequestError when a message is
        malformed, and when the template refuses the conversation, fails or takes too much.
        """
        from jinja2.exceptions import TemplateError

        from megalith.model.chat_sandbox import Budget, Exhausted, render_counted

        values = {"bos_token": self.bos, "eos_token": self.eos, "tools": tools, **variables}
        values |= {"messages": [_plain(m, i) for i, m in enumerate(messages)]}
        values |= {"add_generation_prompt": add_generation_prompt}
        template = self._compiled()
        try:
            return render_counted(template, values, Budget(time.monotonic_ns))
        except Exhausted as error:
            raise RequestError(f"The model's chat template was stopped: {error}.", param="messages") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"The model's chat template refused these messages: {error}.", param="messages"
            ) from None
        except (RecursionError, MemoryError) as error:
            raise RequestError(f"The model's chat template failed: {type(error).__name__}.", param="messages") from None

    def _compiled(self) -> Template:
        if self._template is None:
            from jinja2.exceptions import TemplateError

            from megalith.model.chat_sandbox import environment

            try:
                self._template = environment().from_string(self.source)
            except (TemplateError, RecursionError, ValueError) as error:
                raise ModelFormatError(f"The model's chat template cannot be compiled: {error}.") from None
        return self._template


def template_from_gguf(file: GgufFile, bos: str, eos: str) -> ChatTemplate | None:
    """The template in a GGUF file's metadata, or None."""
    source = file.metadata.get("tokenizer.chat_template")
    return ChatTemplate(source, bos, eos) if isinstance(source, str) and source else None


def template_from_hf(directory: Path, bos: str, eos: str) -> ChatTemplate | None:
    """The template of a Hugging Face directory: `chat_template.jinja`, else the one in its configs, or None."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * _MAX_TEMPLATE_CHARS:
            raise ModelFormatError(
                f"{path} has {path.stat().st_size} bytes; at most {4 * _MAX_TEMPLATE_CHARS} are read."
            )
        return ChatTemplate(path.read_text(encoding="utf-8", errors="replace"), bos, eos)
    found = read_json(directory / "tokenizer_config.json").get("chat_template")
    found = found or read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return ChatTemplate(found, bos, eos) if isinstance(found, str) and found else None


def _plain(message: Any, index: int) -> dict[str, Any]:
    """The message as templates expect it: text content, tool arguments as objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"Message {index} is not an object with a role.", param="messages")
    plain = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        plain["content"] = "".join(_part_text(part, index) for part in content)
    elif content is None:
        # Templates join content to strings; only a call to a tool may go without.
        if not message.get("tool_calls"):
            plain["content"] = ""
    elif not isinstance(content, str):
        kind = type(content).__name__
        raise RequestError(
            f"The content of message {index} is of type {kind}, not text or text parts.", param="messages"
        )
    if isinstance(message.get("tool_calls"), list):
        plain["tool_calls"] = [_call_with_object(call) for call in message["tool_calls"]]
    return plain


def _part_text(part: Any, index: int) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text") else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RequestError(
            f"Message {index} has a part of type {kind!r}; only text parts are served.", param="messages"
        )
    return text


def _call_with_object(call: Any) -> Any:
    """OpenAI sends arguments as JSON text, templates print them with `tojson`: without this they are quoted twice."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        decoded = msgspec.json.decode(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": decoded}} if isinstance(decoded, dict) else call


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """The `tojson` of Hugging Face's templates: plain JSON, without Jinja's HTML escapes."""
    allowed = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    # The template chooses the indent, and a wide one multiplies every line.
    width = None if indent is None else max(0, min(int(indent), _MAX_INDENT))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=width, **allowed)
