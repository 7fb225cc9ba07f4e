"""Jinja's immutable sandbox with a budget, for templates that came with somebody's weights.

The sandbox keeps a template from Python's internals; the budget keeps it from eating the machine. Every turn of a loop
and every call ticks; operations that can make text or lists huge are measured before they are done.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TICKS = 1_000_000
MAX_TEXT_CHARS = 1 << 24
"""Characters of a result, and of any one string made on the way."""
MAX_TIME_NS = 5_000_000_000
_TICKS_PER_CLOCK = 256
_MAX_WIDTH = 1000
_MAX_POWER_BITS = 4096
_PADDERS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDE = re.compile(r"\d{4,}|\*|\{[^{}]*:[^{}]*\{")
"""A width of four or more digits, or one that comes from an argument, in either style of format."""


class Exhausted(Exception):
    """The template used up its budget; the message says which part."""


class Budget:
    """What one rendering may use. `now_ns` is the clock."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._deadline_ns = now_ns() + MAX_TIME_NS
        self._ticks = 0

    def tick(self) -> None:
        """One turn of a loop or one call."""
        self._ticks += 1
        if self._ticks > MAX_TICKS:
            raise Exhausted(f"it took more than {MAX_TICKS} loop turns and calls")
        if self._ticks % _TICKS_PER_CLOCK == 0 and self._now_ns() > self._deadline_ns:
            raise Exhausted(f"it took longer than {MAX_TIME_NS // 10**9} s")

    def size(self, elements: int) -> None:
        """A string or list of that many elements is about to be made."""
        if elements > MAX_TEXT_CHARS:
            raise Exhausted(f"it made a value of {elements} characters or items; at most {MAX_TEXT_CHARS} are allowed")


_BUDGET: ContextVar[Budget] = ContextVar("template_budget")


def render_counted(template: Template, values: dict[str, Any], budget: Budget) -> str:
    """Render within `budget`. Raises Exhausted, and whatever Jinja and the template raise."""
    token = _BUDGET.set(budget)
    try:
        pieces, chars = [], 0
        for piece in template.generate(**values):
            budget.tick()
            chars += len(piece)
            budget.size(chars)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _BUDGET.reset(token)


@cache
def environment() -> _Sandbox:
    """The one environment, with what Hugging Face's templates may use."""
    from megalith.model.chat import to_json

    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = to_json
    # Filters that no chat template needs and that make much out of little.
    for name in ("batch", "center", "format", "pprint", "random", "slice", "urlize", "wordwrap"):
        del made.filters[name]
    made.filters |= {"indent": _indent, "replace": _replace, "join": _join}
    made.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    del made.globals["lipsum"]
    return made


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        return super()._generate(_Counting(self).visit(source), name, filename, defer_init)

    def tick(self) -> str:
        """Called by compiled templates on every turn of a loop."""
        return ""

    def concat_checked(self, *parts: Any) -> str:
        """The `~` of templates."""
        texts = [str(part) for part in parts]
        _BUDGET.get().size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        _BUDGET.get().tick()
        # The sandbox hands out str.format wrapped in a function of its own.
        method = getattr(function, "__wrapped__", function)
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            if name in _PADDERS and any(isinstance(a, int) and a > _MAX_WIDTH for a in (*args, *kwargs.values())):
                raise Exhausted(f"it padded text to more than {_MAX_WIDTH} characters")
            if name in ("format", "format_map"):
                _check_format(text)
            if name == "replace":
                return _replace(text, *args, **kwargs)
            if name == "join" and len(args) == 1:
                return _join(args[0], text)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Counting(NodeTransformer):
    """Puts a tick into every loop body and measures `~`."""

    def __init__(self, sandbox: _Sandbox) -> None:
        self._environment = sandbox

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno).set_environment(self._environment))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("concat_checked"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno).set_environment(self._environment)


class _Generation(Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, by which templates mark the assistant's words for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_binop(operator: str, left: Any, right: Any) -> None:
    sized = (str, list, tuple, bytes)
    if operator == "*" and isinstance(left, int) != isinstance(right, int):
        times, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(value, sized) and isinstance(times, int):
            _BUDGET.get().size(len(value) * max(times, 0))
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _BUDGET.get().size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)


def _check_bits(bits: int) -> None:
    if bits > _MAX_POWER_BITS:
        raise Exhausted(f"it computed a number of {bits} bits; at most {_MAX_POWER_BITS} are allowed")


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise Exhausted("it used a format with a width of four or more digits, or with a computed one")


def _join(items: Any, separator: Any = "", attribute: Any = None) -> str:
    between, budget = str(separator), _BUDGET.get()
    texts, chars = [], 0
    for item in items:
        budget.tick()
        value = item if attribute is None else environment().getitem(item, attribute)
        text = str(value)
        chars += len(text) + len(between)
        budget.size(chars)
        texts.append(text)
    return between.join(texts)


def _replace(text: Any, old: Any, new: Any, count: Any = -1) -> str:
    whole, out, into = str(text), str(old), str(new)
    limit = -1 if count is None else int(count)
    times = whole.count(out) if limit < 0 else min(whole.count(out), limit)
    _BUDGET.get().size(len(whole) + times * max(0, len(into) - len(out)))
    return whole.replace(out, into, limit)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), _MAX_WIDTH)
    lines = str(text).split("\n")
    _BUDGET.get().size(len(lines) * len(pad))
    rest = [pad + line if blank or line else line for line in lines[1:]]
    return "\n".join([(pad if first else "") + lines[0], *rest])


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(layout: Any) -> str:
    text = str(layout)
    if len(text) > 100 or _WIDE.search(text):
        raise TemplateError("the date format is too long")
    return datetime.datetime.now().strftime(text)
