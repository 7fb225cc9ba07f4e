"""Chat templates against transformers' own rendering, and against templates that mean harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megalith.base.errors import ModelFormatError, RequestError
from megalith.model import chat_sandbox
from megalith.model.chat import ChatTemplate, template_from_hf
from tests.model.packaged import opened

_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>& 'you'"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Weather?\n"},
]
_TOOLS = [{"type": "function", "function": {"name": "f", "description": "äh", "parameters": {"type": "object"}}}]


def test_smollm2s_template() -> None:
    template = opened("smollm2").chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(_TALK, add_generation_prompt=False).endswith("Weather?\n<|im_end|>\n")
    assert opened("gemma3-270m").chat_template is None


_EACH, _END = "{% for m in messages %}", "{% endfor %}"
_SOURCES = {
    "smollm2": None,
    "loops": _EACH + "\n  {% if loop.first %}\n<<{% endif %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}\n",
    "tools": "{{ tools | tojson }}{% for t in tools or [] %}{{ t.function | tojson(indent=2) }}"
    + _END
    + "{{ bos_token }}",
    "namespace": "{% set n = namespace(n=0) %}" + _EACH + "{% set n.n = n.n + m.content|length %}" + _END + "{{ n.n }}",
    "controls": _EACH + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content ~ '|' ~ loop.index }}" + _END,
    "generation": _EACH + "{% generation %}{{ m.content }}{% endgeneration %}" + _END,
    "strings": "{{ messages[0].content.replace('e', 'EE').upper().split() | join('/') }}{{ 'a,b'.split(',')[-1] }}",
    "formats": "{{ '-' * 5 }}{{ '{}-{:>4}'.format('a', 'b') }}{{ 'x'.ljust(4) }}{{ '/'.join(['a', 'b']) }}",
    "macro": "{% macro f(x, y='z') %}<{{ x }}{{ y }}>{% endmacro %}" + _EACH + "{{ f(m.role) }}" + _END,
    "filters": "{{ messages | map(attribute='role') | unique | list }}{{ messages | map(attribute='role') | join }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | join('.', 'role') }}",
    "indent": "{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(3, first=True) }}|{{ 'a-b' | replace('-', '+') }}",
    "slices": "{{ messages[::-1][0].content[2:5] }}{{ (1, 2) + (3,) }}{{ '%s=%d' % ('a', 3) }}{{ 7 // 2 ** 1 }}",
}


@pytest.mark.parametrize("name", _SOURCES)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(name: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = opened("smollm2").chat_template
    assert template is not None
    source = _SOURCES[name] or template.source
    expected, _ = render_jinja_template(
        conversations=[_TALK], chat_template=source, tools=_TOOLS, add_generation_prompt=prompt, bos_token="<s>"
    )
    ours = ChatTemplate(source, bos="<s>").render(_TALK, add_generation_prompt=prompt, tools=_TOOLS)
    assert ours == expected[0]
    assert ours


def test_messages_are_made_plain() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}|{{ m.tool_calls | tojson }}]{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert template.render([{"role": "user", "content": parts, "tool_calls": []}]) == "[ab|[]]"
    assert template.render([{"role": "user", "content": None, "tool_calls": []}]) == "[|[]]"
    rendered = template.render([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert '"arguments": {"x": 1}' in rendered
    assert call["function"]["arguments"] == '{"x": 1}', "the caller's message is left alone"  # type: ignore[index]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hi", "Message 0 is not an object"),
        ({"content": "hi"}, "with a role"),
        ({"role": "user", "content": 5}, "of type int"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url'; only text"),
        ({"role": "user", "content": ["x"]}, "'str'; only text"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "only text"),
    ],
)
def test_malformed_messages_are_the_callers_mistake(message: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate("{{ messages }}").render([message])
    assert caught.value.param == "messages"


_REFUSED = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0].nothing.more }}": "no attribute",
    "{{ messages[0].content + 1 }}": "refused",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.__class__.__init__.__globals__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe|undefined|no attribute",
    "{% include 'x' %}": "no loader",
    "{{ 1 / 0 }}": "division",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
}
_EXPLOSIVE = {
    "{{ 'a' * 10**9 }}": "1000000000 characters",
    "{{ [1] * 10**8 }}": "100000000",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "characters",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}": "characters",
    "{% set n = namespace(s=[1, 1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}": "items",
    "{% set n = namespace(s=3) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}": "bits",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 }}": "bits",
    "{{ 'a'.center(10**9) }}": "padded",
    "{{ 'a'.ljust(width=10**9) }}": "padded|refused",
    "{{ '%999999999d' % 1 }}": "width",
    "{{ '%*d' % (10**9, 1) }}": "width",
    "{{ '{:>999999999}'.format(1) }}": "width",
    "{{ '{:>{w}}'.format('a', w=10**9) }}": "width",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}": "10000000000",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}": "10000000000",
    "{{ ('a' * 100000) | list | join('b' * 100000) }}": "characters",
    "{{ ('b' * 100000).join('a' * 100000) }}": "characters",
    "{{ ('a\n' * 1000000) | indent('b' * 100000) }}": "characters",
    "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}": "characters",
    "{{ range(10**9) | list }}": "too big",
}


@pytest.mark.parametrize("source", [*_REFUSED, *_EXPLOSIVE])
def test_bad_templates_end_in_a_request_error_soon(source: str) -> None:
    start = time.process_time()
    with pytest.raises(RequestError, match=(_REFUSED | _EXPLOSIVE)[source]):
        ChatTemplate(source).render([{"role": "user", "content": "hello"}])
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    ],
)
def test_endless_work_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_TIME_NS", 300_000_000)
    start = time.process_time()
    with pytest.raises(RequestError, match="stopped: it took"):
        ChatTemplate(source).render([{"role": "user", "content": "hello"}])
    assert time.process_time() - start < 10


def test_the_budget_counts_without_a_clock_too() -> None:
    budget = chat_sandbox.Budget(lambda: 0)
    for _ in range(chat_sandbox.MAX_TICKS):
        budget.tick()
    with pytest.raises(chat_sandbox.Exhausted, match="1000000 loop turns"):
        budget.tick()


@pytest.mark.parametrize("source", ["{{ 1 + }}", "{% for %}", "{{ x | nosuchfilter }}", "{{ x | batch(3) }}"])
def test_a_template_that_does_not_compile_is_the_models_mistake(source: str) -> None:
    with pytest.raises(ModelFormatError, match="cannot be compiled"):
        ChatTemplate(source).render([])


def test_an_enormous_template_is_not_compiled() -> None:
    with pytest.raises(ModelFormatError, match="1048577 characters"):
        ChatTemplate("x" * (2**20 + 1))


def test_where_templates_are_looked_for(tmp_path: Path) -> None:
    assert template_from_hf(tmp_path, "", "") is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    )
    found = template_from_hf(tmp_path, "", "")
    assert found is not None
    assert found.source == "D"
    config.write_text('{"chat_template": "C{{ bos_token }}{{ eos_token }}"}')
    found = template_from_hf(tmp_path, "<s>", "</s>")
    assert found is not None
    assert found.render([]) == "C<s></s>"
    (tmp_path / "chat_template.jinja").write_text("J")
    found = template_from_hf(tmp_path, "", "")
    assert found is not None
    assert found.source == "J"


def test_dates_and_json() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}{{ x | tojson }}")
    assert template.render([], x={"<é>": [1, None]}).endswith('{"<é>": [1, null]}')
    with pytest.raises(RequestError, match="date format"):
        ChatTemplate("{{ strftime_now('%99999d') }}").render([])
