"""Chat templates: jinja in Transformers' environment (`chat_template_utils`: the same names and whitespace rules, in a
sandbox, because templates come with downloaded models), so that the same messages give the same text in any process:
the clock is handed in, what would differ by chance is refused, and nothing runs or grows without end.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TemplateError", "render", "variables"]

DEADLINE_S = 5.0  # of one rendering; a prompt of SmolLM2 takes 15 us
MAX_CHARACTERS, MAX_ENTRIES, MAX_INTEGER = 1 << 24, 1 << 20, 1 << 64  # of a value: beyond any prompt
MAX_MADE = 1 << 27  # characters that one call may make, or that all of a rendering makes
_ENTRY = MAX_CHARACTERS // MAX_ENTRIES  # characters that an entry of a list counts for
# Slower than linear, or without a bound in their arguments, and in no chat template.
REFUSED = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr", "expandtabs", "translate"})
LINEAR = frozenset("split rsplit strip lstrip rstrip startswith endswith find lower upper title".split())  # for speed
_INNER_WIDTH = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")  # ends what Python writes for an object that has no text of its own


def render(source: str, now: datetime, variables: Mapping[str, Any]) -> str:
    """The template's text; `strftime_now` writes `now`. Raises TemplateError, or whatever else a template can raise."""
    template = _compile(source)
    environment = template.environment
    assert isinstance(environment, _Environment)
    environment.limit.at, environment.limit.made = time.monotonic() + DEADLINE_S, 0
    text = template.render(strftime_now=now.strftime, **variables)
    if any(address not in str(variables) for address in _ADDRESS.findall(text)):
        raise TemplateError(f"it writes an object, not its text: {_ADDRESS.split(text)[0][-60:]} at 0x...")
    return text


def variables(source: str) -> set[str]:
    """The names that a template reads, but for those that every template has and its own: names that it sets, unless it
    asks whether they are defined.

    >>> sorted(variables("{% if x is not defined %}{% set x = 1 %}{% endif %}{% if y %}{% set z = 1 %}{% endif %}"))
    ['x', 'y']
    """
    environment = _compile(source).environment
    tree = environment.parse(source)
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    asked = [node.node for node in tree.find_all(jinja2.nodes.Test) if node.name in ("defined", "undefined")]
    own -= {node.name for node in asked if isinstance(node, jinja2.nodes.Name)}
    return find_undeclared_variables(tree) - {*environment.globals} - own


class _Checked(CodeGenerator):
    """Code that asks the time in every block (a loop's body, a branch, a macro) and the size of all that it makes."""

    _adding = False

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def _made(self, visit: Any, node: Any, frame: Any) -> None:
        self.write("environment.bounded(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: Any, frame: Any) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self._made(super().visit_Concat, node, frame)

    def visit_Add(self, node: Any, frame: Any) -> None:
        """Of a + b + c the sum of all: its parts are no larger."""
        inner, self._adding = self._adding, True
        if inner:
            super().visit_Add(node, frame)
        else:
            self._made(super().visit_Add, node, frame)
        self._adding = inner


class _Limit(threading.local):
    at, made = math.inf, 0  # when this thread's rendering ends, and the characters that it has made


class _Environment(ImmutableSandboxedEnvironment):
    """All that a template makes passes `bounded`, and what a call could make of its arguments is asked before it."""

    code_generator_class = _Checked
    intercepted_binops = frozenset(["-", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self.written, **options)
        self.limit = _Limit()

    def tick(self) -> None:
        if time.monotonic() > self.limit.at:
            raise TemplateError(f"it runs for more than {DEADLINE_S:g} s")

    def bounded(self, value: Any) -> Any:
        """`value`, unless it is larger than any prompt, or with all before it larger than any rendering."""
        if type(value) is bool or value is None:
            return value
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise TemplateError("it makes an int larger than any prompt")
        limit, size = self.limit, len(value) if isinstance(value, str) else _size(value)
        limit.made += size
        if size > MAX_CHARACTERS or limit.made > MAX_MADE:
            raise TemplateError(f"it makes a {type(value).__name__} larger than any prompt")
        return value

    def written(self, value: Any) -> str:
        """What `{{ value }}` writes."""
        return value if isinstance(value, str) else self.bounded(str(value))

    def concat(self, pieces: Iterable[str]) -> str:
        found = list(pieces)
        if sum(map(len, found)) > MAX_CHARACTERS:
            raise TemplateError("it writes a text larger than any prompt")
        return "".join(found)

    def counted(self, entries: Iterator[Any], more: int) -> Iterator[Any]:
        """Entries that a filter makes one by one; each lets another make `more` characters."""
        for entry in entries:
            self.tick()
            self.limit.made += _size(entry) + more + _ENTRY
            if self.limit.made > MAX_MADE:
                raise TemplateError("it makes entries larger than any prompt")
            yield entry

    def guarded(self, name: str, first: Any, rest: Sequence[Any]) -> None:
        """Before a call of method or filter `name` of `first`: the most that it makes is `rest` at each place of it."""
        if name in REFUSED:
            raise TemplateError(f"it asks for {name}, which has no bound")
        if name == "sum" and any(isinstance(one, (list, tuple)) for one in rest):
            raise TemplateError("it sums lists, which takes their square")
        more = 0
        for one in rest:
            more += len(one) if type(one) is str else abs(one) if type(one) is int else _size(one)
        if name in ("format", "format_map", "%") and isinstance(first, str):
            if _INNER_WIDTH.search(first.replace("{{", "")):
                raise TemplateError("it takes a width from its arguments")
            more = _size(list(rest)) + max(map(int, re.findall(r"\d+", first)), default=0)
        if more and (1 + _size(first)) * more > MAX_MADE:
            raise TemplateError(f"it may make a text larger than any prompt by {name}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) * len(str(left)) > 64:  # asked before: such a power has no end
            raise TemplateError(f"it raises {left!s:.20} to the power {right!s:.20}")
        for entries, times in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(entries, (str, list, tuple)) and len(entries) * times > MAX_ENTRIES:
                raise TemplateError(f"it repeats {len(entries)} entries {times} times")
        if operator == "%" and isinstance(left, str):
            self.guarded(operator, left, (right,))
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, set):
            raise TemplateError("it makes a set, whose order is another in each process")
        return self.bounded(value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        __self.tick()
        builtin = type(__obj) is BuiltinMethodType
        method = __obj if builtin else getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        of = getattr(method, "__self__", None)
        if builtin and type(of) is str and method.__name__ in LINEAR:
            return __self.bounded(super().call(__context, __obj, *args, **kwargs))
        rest = (*args, *kwargs.values())
        if isinstance(of, (str, bytes, int)):
            __self.guarded(method.__name__, of, rest)
            if args and hasattr(args[0], "__next__"):
                args = (__self.counted(args[0], _size(of)), *args[1:])
        else:
            for one in rest:
                if type(one) is int and one > MAX_ENTRIES:
                    raise TemplateError(f"it asks for a count of {one}")
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def filter_of(self, name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        """A filter, guarded."""
        place = int(hasattr(of, "jinja_pass_arg"))

        @functools.wraps(of)  # keeps what it is to be passed
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            rest = (*args[place + 1 :], *kwargs.values())
            if rest or name in REFUSED:
                self.guarded(name, args[place] if args[place:] else None, rest)
            if hasattr(args[place], "__next__"):
                args = (*args[:place], self.counted(args[place], _size(list(rest))), *args[place + 1 :])
            return self.bounded(of(*args, **kwargs))

        return guarded


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text; it renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _size(value: Any) -> int:
    """Characters of a value, those of its entries included, however often one is there. Raises beyond any prompt."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if type(value) is list and len(value) < 9 and {str}.issuperset(map(type, value)):  # of split: for speed
        return _ENTRY * len(value) + sum(map(len, value))
    total, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, (list, tuple, dict, ValuesView, ItemsView, KeysView)):
            total += _ENTRY * len(one)
            if total <= MAX_CHARACTERS:
                left.extend(one)
                left.extend(one.values() if isinstance(one, dict) else ())
        if total > MAX_CHARACTERS:
            raise TemplateError("it makes entries larger than any prompt")
    return total


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if len(indent) > 16 if isinstance(indent, str) else (indent or 0) > 16:
        raise TemplateError("it indents JSON by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _chance(*_: Any, **__: Any) -> None:
    raise TemplateError("it draws at random, so a resumed run would not repeat")


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters |= {"tojson": _tojson, "random": _chance}
    free = ("default", "d")  # they return an argument
    guarded = {name: environment.filter_of(name, of) for name, of in environment.filters.items() if name not in free}
    environment.filters |= guarded
    environment.globals |= {"raise_exception": _raise_exception, "lipsum": _chance}
    return environment.from_string(source)
