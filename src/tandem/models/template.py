"""Chat templates: jinja in Transformers' environment (`chat_template_utils`: the same names and whitespace rules, in a
sandbox, because templates come with downloaded models), so that the same messages give the same text in any process:
the clock is handed in, what would differ by chance is refused, and nothing runs or grows without end.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TemplateError", "render"]

DEADLINE_S = 5.0  # of one rendering; a prompt of SmolLM2 takes 15 us
MAX_CHARACTERS, MAX_ENTRIES, MAX_INTEGER = 1 << 24, 1 << 20, 1 << 64  # of a value: beyond any prompt
_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")  # ends what Python writes for an object that has no text of its own


def render(source: str, now: datetime, variables: Mapping[str, Any]) -> str:
    """The template's text; `strftime_now` writes `now`. Raises TemplateError, or whatever else a template can raise."""
    template = _compile(source)
    environment = template.environment
    assert isinstance(environment, _Environment)
    environment.limit.at = time.monotonic() + DEADLINE_S
    text = template.render(strftime_now=now.strftime, **variables)
    if any(address not in str(variables) for address in _ADDRESS.findall(text)):
        raise TemplateError(f"it writes an object, not its text: {_ADDRESS.split(text)[0][-60:]} at 0x...")
    return text


class _Checked(CodeGenerator):
    """Code that asks the time in every block (a loop's body, a branch, a macro) and the size of what it keeps."""

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Assign(self, node: Any, frame: Any) -> None:
        super().visit_Assign(node, frame)
        self._bound(node.target, frame)

    def visit_AssignBlock(self, node: Any, frame: Any) -> None:
        super().visit_AssignBlock(node, frame)
        self._bound(node.target, frame)

    def _bound(self, target: Any, frame: Any) -> None:
        for one in target.items if isinstance(target, jinja2.nodes.Tuple) else [target]:
            if isinstance(one, jinja2.nodes.NSRef):
                one = jinja2.nodes.Getattr(jinja2.nodes.Name(one.name, "load"), one.attr, "load")
            self.writeline("environment.bounded(")
            self.visit(one, frame)
            self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Checked
    intercepted_binops = frozenset(["-", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.limit = threading.local()

    def tick(self) -> None:
        if time.monotonic() > self.limit.at:
            raise TemplateError(f"it runs for more than {DEADLINE_S:g} s")

    def bounded(self, value: Any) -> Any:
        """`value`, unless it is larger than any prompt."""
        if isinstance(value, str):
            size, most = len(value), MAX_CHARACTERS
        elif isinstance(value, int):
            size, most = abs(value), MAX_INTEGER
        else:
            size, most = len(value) if isinstance(value, (list, tuple, dict)) else 0, MAX_ENTRIES
        if size > most:
            raise TemplateError(f"it makes a {type(value).__name__} larger than any prompt")
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) * len(str(left)) > 64:  # asked before: such a power has no end
            raise TemplateError(f"it raises {left!s:.20} to the power {right!s:.20}")
        for entries, times in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(entries, (str, list, tuple)) and len(entries) * times > MAX_ENTRIES:
                raise TemplateError(f"it repeats {len(entries)} entries {times} times")
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, set):
            raise TemplateError("it makes a set, whose order is another in each process")
        return self.bounded(value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        __self.tick()
        _widths((*args, *kwargs.values()))
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text; it renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _widths(values: tuple[Any, ...]) -> None:
    """Arguments may be widths: 'x'.center(10 ** 9)."""
    for value in values:
        if type(value) is int and value > MAX_ENTRIES:
            raise TemplateError(f"it asks for a width or a count of {value}")


def _narrow(of: Callable[..., Any]) -> Callable[..., Any]:
    def narrow(*args: Any, **kwargs: Any) -> Any:
        _widths((*args, *kwargs.values()))
        return of(*args, **kwargs)

    return narrow


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _chance(*_: Any, **__: Any) -> None:
    raise TemplateError("it draws at random, so a resumed run would not repeat")


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters |= {name: _narrow(environment.filters[name]) for name in ("batch", "center", "indent", "slice")}
    environment.filters |= {"tojson": _tojson, "random": _chance}
    environment.globals |= {"raise_exception": _raise_exception, "lipsum": _chance}
    return environment.from_string(source)
