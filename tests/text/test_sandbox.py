"""Templates that a stranger wrote: Python stays out of reach, work and memory are bounded."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve_jax.text.budget import MAX_CHARS, Budget
from fastserve_jax.text.sandbox import Sandbox

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi. "}]


def render(source: str, **variables: Any) -> str:
    code = Sandbox().compile_metered(source)
    return Sandbox().run(code, {"messages": MESSAGES} | variables)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'].__mro__ }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|first }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ ''.format.__globals__ }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '%s' % messages }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ dict.fromkeys(range(10)) }}",
    "{{ 'x'.encode() }}",
    "{{ (1).to_bytes(8, 'big') }}",
    "{{ range.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
    "{{ strftime_now('%Y') }}",
    "{{ lipsum() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_outside_is_reached(source: str) -> None:
    try:
        text = render(source)
    except Exception:  # which one is Jinja's affair
        text = ""
    assert text == ""
    assert MESSAGES == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi. "},
    ]


_MANY = "{% for i in range(99999) %}"
_GROW = "{% set n = namespace(x=X) %}{% for i in range(90) %}{% set n.x = Y %}{% endfor %}"


def _growing(start: str, step: str, then: str = "{{ n.x }}") -> str:
    return _GROW.replace("X", start).replace("Y", step) + then


BOMBS = {
    "nested loops": _MANY + _MANY + "{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "macro recursion": "{% macro f(n) %}{{ f(n - 1) }}{% endmacro %}{{ f(1) }}",
    "macro doubling": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "output": _MANY + "x" * 200 + "{% endfor %}",
    "lists in a loop": _MANY + "{% set x = range(99999) | list %}{% endfor %}",
    "slices in a loop": "{% set l = range(99999) | list %}"
    + _MANY
    + "{% set x = l[1:] %}{% endfor %}",
    "comparisons in a loop": "{% set l = range(9999) | list %}"
    + _MANY
    + "{% if l == l[:] %}{% endif %}{% endfor %}",
    "lookups in a loop": "{% set l = range(9999) | list %}"
    + _MANY
    + "{% if -1 in l %}{% endif %}{% endfor %}",
    "maps in a loop": _MANY + "{% set x = range(999) | map('string') | join %}{% endfor %}",
    "concatenation": _growing("'ab'", "n.x ~ n.x"),
    "addition": _growing("'ab'", "n.x + n.x"),
    "list addition": _growing("[1]", "n.x + n.x"),
    "list nesting": _growing("[1]", "[n.x, n.x]", "{{ n.x | tojson }}"),
    "list depth": _growing("[1]", "[n.x]", "{{ n.x | tojson }}"),
    "tuple hashing": _growing("(1, 1)", "(n.x, n.x)", "{{ {n.x: 1} | length }}"),
    "dict nesting": _growing("dict(a=1)", "dict(a=n.x, b=n.x)", "{{ n.x }}"),
    "namespace nesting": _growing("namespace(a=1)", "namespace(a=n.x, b=n.x)", "{{ n.x }}"),
    "namespace in text": _growing("1", "namespace(a=n.x, b=n.x)", "{{ n.x ~ '' }}"),
    "replace": _growing("'a'", "n.x | replace('a', 'aaaaaaaa')"),
    "replace method": _growing("'a'", "n.x.replace('', 'aaaaaaaa')"),
    "join": _growing("'ab'", "n.x.join(['', '', n.x, ''])"),
    "join filter": _growing("'ab'", "[n.x, n.x] | join(n.x)"),
    "multiplied numbers": _growing("99", "n.x * n.x"),
    "repetition": "{{ 'a' * 1000000000 }}",
    "repeated list": "{{ [1] * 1000000000 }}",
    "power": "{{ 10 ** 1000000000 }}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "centre": "{{ 'x' | center(1000000000) }}",
    "padding": "{{ 'x'.ljust(1000000000) }}",
    "rounding": "{{ 5 | round(-1000000000) }}",
    "json indent": "{{ messages | tojson(indent=1000000000) }}",
    "range": "{{ range(1000000000) | list }}",
    "parentheses": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 3000,
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_stopped(source: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        render(source)
    assert not isinstance(caught.value, MemoryError)


def test_the_bound_is_on_work_so_it_is_the_same_every_time() -> None:
    source = "{% for i in range(N) %}{{ i }}{% endfor %}"
    spent = []
    for _ in range(2):
        code = Sandbox().compile_metered(source.replace("N", "100"))
        sandbox = Sandbox()
        sandbox.run(code, {})
        spent.append(sandbox.budget._units)
    assert spent[0] == spent[1] < Budget()._units


def test_one_rendering_does_not_pay_for_another() -> None:
    source = "{% for i in range(60000) %}{% endfor %}"
    code = Sandbox().compile_metered(source)
    assert [Sandbox().run(code, {}) for _ in range(12)] == [""] * 12


def test_indentation_is_cut_to_a_margin() -> None:
    assert len(render("{{ 'a\nb' | indent(10000000) }}")) < 100


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ m.role }};{% endfor %}", "1user;2assistant;"),
        ("{{ messages[-1]['content'] | trim | upper }}", "HI."),
        ("{{ messages[1:] | length }}{{ messages[::-1][0].role }}", "1assistant"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | join('-', attribute='role') }}", "user-assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hello"}'),
        (
            "{{ {'b': '<ü>', 'a': 1} | tojson(indent=1, sort_keys=true) }}",
            '{\n "a": 1,\n "b": "<ü>"\n}',
        ),
        ("{{ 'a,b'.split(',')[1] ~ 1 ~ none }}", "b1None"),
        ("{{ 'aXbX'.replace('X', '-', 1) ~ 'aXbX' | replace('X', '') }}", "a-bXab"),
        (
            "{% for k, v in messages[0].items() %}{{ k }}={{ v }} {% endfor %}",
            "role=user content=hello ",
        ),
        ("{% for k, v in messages[0] | items %}{{ k }} {% endfor %}", "role content "),
        (
            "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}"
            "{% endfor %}",
            "user",
        ),
        (
            "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}"
            "{{ n.k }}",
            "2",
        ),
        ("{% macro f(m) %}<{{ m.role }}>{% endmacro %}{{ f(messages[0]) }}", "<user>"),
        ("{{ 'yes' if 'role' in messages[0] and 'x' not in messages[0] else 'no' }}", "yes"),
        (
            "{{ messages[0].content is string }}{{ nope is defined }}{{ messages is iterable }}",
            "TrueFalseTrue",
        ),
        ("{{ nope }}{{ messages[0].nope }}{{ (1 + 2 * 3) % 4 }}", "3"),
        ("{{ 'a\n\nb' | indent(2) }}|{{ 'a' | indent(2, true) }}", "a\n\n  b|  a"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # blocks leave no lines behind
        ("{{ messages[0].get('role') }}{{ messages[0].get('x', 'd') }}", "userd"),
        ("{{ 'Hello'.startswith('He') }}{{ ' x '.strip() }}{{ 'x' in 'xyz' }}", "TruexTrue"),
        ("{{ [3, 1, 2] | sort | first }}{{ [1, 1] | unique | list }}", "1[1]"),
    ],
)
def test_what_templates_use_works_as_ever(source: str, text: str) -> None:
    assert render(source) == text


def test_long_conversations_and_texts_fit() -> None:
    """A template that looks at the whole list for every message, as real ones do."""
    source = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}!{% endif %}"
        "{{ '<' + m['role'] + '>' + m['content'] | trim }}{% endfor %}"
    )
    many = [{"role": "user", "content": "word " * 20}] * 5000
    assert render(source, messages=many).count("<user>") == 5000
    long = [{"role": "user", "content": "x" * (MAX_CHARS // 2)}]
    assert len(render(source, messages=long)) > MAX_CHARS // 2
