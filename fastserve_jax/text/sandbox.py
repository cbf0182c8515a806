"""Runs a template that a stranger wrote: no Python reached, and work and memory bounded.

Jinja's own sandbox keeps a template from Python's internals, but not from looping or growing for
ever. Here every loop step, call, comparison and container is paid for out of a budget, whatever
could multiply a string is measured before it does, and the rest of Jinja's filters are left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, CodeType
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from fastserve_jax.text.budget import MAX_CHARS, Budget

_MAX_INT_BITS = 256
_MAX_INDENT = 64
_SIZED = (str, list, tuple)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METHODS: dict[type, frozenset[str]] = {
    str: _words(
        "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join"
        " lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit"
        " rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: _words("get items keys values"),
    list: _words("count index"),
    tuple: _words("count index"),
}
# What a filter or test may look at decides what is paid: nothing, each item, or the whole tree.
_GLANCE_FILTERS = _words("count d default first last length")
_SHALLOW_FILTERS = _words("items list map reject rejectattr reverse select selectattr")
_DEEP_FILTERS = _words(
    "abs capitalize dictsort float int lower max min safe sort string title trim unique upper"
)
_GLANCE_TESTS = _words(
    "boolean defined false float integer iterable mapping none number sequence string true"
    " undefined"
)
_DEEP_TESTS = _words("== != divisibleby eq equalto even ge gt in le lt lower ne odd upper")


class _Metered(NodeTransformer):
    """Puts a meter wherever a template can spend work without a call."""

    def _metered(self, node: nodes.Node, meter: str) -> nodes.Node:
        self.generic_visit(node)
        return _through(node, meter)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(node.iter, "_steps")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through(node.expr, "_weighed")
        for operand in node.ops:
            operand.expr = _through(operand.expr, "_weighed")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # compiled to Python's own, past `getitem`
            node.node = _through(node.node, "_copied")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._metered(node, "_weighed") if node.ctx == "load" else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._metered(node, "_weighed")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._metered(node, "_weighed")


def _through(node: Any, meter: str) -> nodes.Filter:
    return nodes.Filter(node, meter, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one compilation or one rendering, with that one's budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.budget = Budget()
        filters: dict[str, Any] = dict(self.filters)
        self.filters = {name: filters[name] for name in _GLANCE_FILTERS}
        self.filters |= {n: self._paid(filters[n], self.budget.pass_over) for n in _SHALLOW_FILTERS}
        self.filters |= {n: self._paid(filters[n], self.budget.weigh) for n in _DEEP_FILTERS}
        self.filters |= {
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            "_concatenated": self._concatenated,
            "_copied": self._copied,
            "_steps": self._steps,
            "_weighed": self._weighed,
        }
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: tests[name] for name in _GLANCE_TESTS}
        self.tests |= {n: self._paid(tests[n], self.budget.weigh) for n in _DEEP_TESTS}
        safe = ("range", "namespace", "dict")
        self.globals = {name: self.globals[name] for name in safe}
        self.globals["raise_exception"] = _refuse
        self.finalize = self._weighed

    def compile_metered(self, source: str) -> CodeType:
        """The template as code for `run`. Raises TemplateError and RecursionError."""
        tree = _Metered().visit(self.parse(source))
        tree.set_environment(self)
        return self.compile(tree)

    def run(self, code: CodeType, variables: Mapping[str, object]) -> str:
        """The rendered text. Raises TemplateError, or whatever the template's faults raise."""
        template = Template.from_code(self, code, self.make_globals(None))
        pieces = []
        length = 0
        for piece in template.generate(variables):
            length += len(piece)
            if length > MAX_CHARS:
                raise SecurityError("it makes too long a text")
            self.budget.grow(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.charge(1)
        if isinstance(obj, BuiltinMethodType):
            owner: Any = obj.__self__
            if obj.__name__ not in _METHODS.get(type(owner), frozenset()):
                raise SecurityError(f"{type(owner).__name__}.{obj.__name__} is not allowed")
            if isinstance(owner, list | tuple):
                self.budget.weigh(owner)  # their methods compare
            elif isinstance(owner, str):
                self.budget.pass_over(owner)
            if obj.__name__ == "replace":
                return self._replace(owner, *args, **kwargs)
            if obj.__name__ == "join":
                return self._join(args[0], owner)
        if not isinstance(obj, Macro):
            self.budget.weigh(args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"{operator} is not allowed")
        if operator == "*" and (isinstance(left, _SIZED) or isinstance(right, _SIZED)):
            raise SecurityError("repetition is not allowed")
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
                raise SecurityError("its numbers are too large")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.grow(len(left) + len(right))
        elif operator == "+":
            self.budget.pass_over(left)
            self.budget.pass_over(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """None: str.format is a method like any other, and not among the allowed."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.weigh(argument)  # it will be hashed
        return super().getitem(obj, argument)

    def _paid(
        self, function: Callable[..., Any], price: Callable[[Any], None]
    ) -> Callable[..., Any]:
        """The same filter or test, its arguments paid for first."""
        first = int(hasattr(function, "jinja_pass_arg"))  # the context, if it wants one

        @functools.wraps(function)  # Jinja's marks of what else to pass come along
        def paid(*args: Any, **kwargs: Any) -> Any:
            for value in args[first:]:
                price(value)
            return function(*args, **kwargs)

        return paid

    def _weighed(self, value: Any) -> Any:
        self.budget.weigh(value)
        return value

    def _copied(self, value: Any) -> Any:
        self.budget.pass_over(value)
        return value

    def _steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.charge(1)
            yield value

    def _concatenated(self, values: list[Any]) -> str:
        self.budget.weigh(values)
        texts = [str(value) for value in values]
        self.budget.grow(sum(map(len, texts)))
        return "".join(texts)

    def _join(self, values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
        items = list(self._steps(values))
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self.budget.weigh(items)
        texts = [str(item) for item in items]
        self.budget.grow(sum(map(len, texts)) + len(str(separator)) * len(texts))
        return str(separator).join(texts)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text, most = str(text), -1 if count is None else count
        found = text.count(old) if most < 0 else min(text.count(old), most)
        self.budget.grow(len(text) + found * len(new))
        replaced: str = text.replace(old, new, most)
        return replaced

    def _indent(
        self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        margin = width if isinstance(width, str) else " " * min(width, _MAX_INDENT)
        lines = str(text).split("\n")
        self.budget.grow(len(str(text)) + len(lines) * len(margin))
        return "\n".join(
            margin + line if (line or blank) and (index or first) else line
            for index, line in enumerate(lines)
        )

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        self.budget.weigh(value)
        if indent is not None and indent > _MAX_INDENT:
            raise SecurityError("it indents too far")
        if isinstance(value, Undefined):
            raise TemplateError("tojson of an undefined value")
        # The result may hold markup and any letter: it goes to a tokenizer, not to a browser.
        return json.dumps(
            value,
            ensure_ascii=False,
            indent=indent,
            separators=tuple(separators) if separators else None,
            sort_keys=sort_keys,
        )


def _refuse(message: object = "") -> NoReturn:
    raise TemplateError(str(message))
