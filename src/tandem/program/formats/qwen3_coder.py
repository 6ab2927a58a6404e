"""Qwen3-Coder's tags: <tool_call><function=NAME><parameter=P>VALUE</parameter></function></tool_call>.

Values are bare text, so what a value is has to be known from the tool's schema: a parameter declared as text is taken
as it stands, any other as JSON; of one that is not declared, what reads as JSON is that and the rest is text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tandem.program.formats.hermes import CLOSING, OPENING, recover
from tandem.program.formats.parsed import (
    Malformed,
    Parsed,
    Tools,
    checked,
    dumps,
    properties,
    quoted,
    read_after,
    read_json,
    scan,
    thought,
)
from tandem.types import ToolCall

_FUNCTION = re.compile(r"\s*<function=([^>]*)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>]*)>")
_TEXT = ("string", "String", "str", "text", "varchar", "char", "enum")


def parse(text: str, tools: Tools = ()) -> Parsed:
    """
    >>> said = "<tool_call><function=add><parameter=a>\\n1\\n</parameter></function></tool_call>"
    >>> parse(said).calls[0].arguments
    {'a': 1}
    """
    reasoning, text = thought(text)
    return replace(scan(text, OPENING, lambda text, at: _read(text, at, tools), recover), reasoning=reasoning)


def write(calls: Sequence[ToolCall], tools: Tools = ()) -> str:
    """A text that holds `</parameter>` cannot be written where it is declared as text.

    >>> print(write([ToolCall("add", {"a": 1})]))
    <tool_call>
    <function=add>
    <parameter=a>
    1
    </parameter>
    </function>
    </tool_call>
    """
    return "\n".join(_written(call, properties(tools, call.name) or {}) for call in calls)


def _written(call: ToolCall, declared: Mapping[str, Any]) -> str:
    lines = [OPENING, f"<function={call.name}>"]
    for name, value in call.arguments.items():
        bare = isinstance(value, str) and (
            _is_text(declared.get(name)) or (_guessed(value) == value and "</parameter>" not in value)
        )
        text = value if bare else dumps(value).replace("</", "<\\/")
        lines += [f"<parameter={name}>", text, "</parameter>"]
    return "\n".join([*lines, "</function>", CLOSING])


def _read(text: str, inside: int, tools: Tools) -> tuple[list[ToolCall], int]:
    found = _FUNCTION.match(text, inside)
    if found is None:
        raise Malformed(f"it begins with {quoted(text[inside:].lstrip())}, not <function=NAME>")
    name, place = found[1].strip(), found.end()
    declared = properties(tools, name) or {}
    arguments: dict[str, Any] = {}
    while given := _PARAMETER.match(text, place):
        end = text.find("</parameter>", given.end())
        if end < 0:
            raise Malformed(f"parameter {given[1]} has no </parameter>")
        key, value = given[1].strip(), text[given.end() : end]
        if key in arguments:
            raise Malformed(f"parameter {key} is given twice")
        arguments[key] = _value(key, value.removeprefix("\n").removesuffix("\n"), declared.get(key))
        place = end + len("</parameter>")
    call = checked(name, arguments)
    if not text[place:].strip():  # there may have been more of it
        raise Malformed("it ends before its </function>")
    return [call], read_after(text, read_after(text, place, "</function>"), CLOSING)


def _value(name: str, text: str, declared: Any) -> Any:
    if _is_text(declared):
        return text
    value = _guessed(text)
    kinds = _kinds(declared)
    if isinstance(value, str) and kinds and not {*kinds} & {*_TEXT, "any"} and text[:1] != '"':
        raise Malformed(f"parameter {name} is {quoted(text)}, not {' or '.join(kinds)}")
    return value


def _guessed(text: str) -> Any:
    """What a bare text says: JSON or one of Python's words for it; else the text."""
    if text in ("True", "False", "None"):  # as templates write them, by Python's str
        return ast.literal_eval(text)
    try:
        value, end = read_json(text)
    except Malformed:
        return text
    return value if not text[end:].strip() else text


def _kinds(declared: Any) -> list[str]:
    """The types that a schema allows; none where it says nothing."""
    if not isinstance(declared, Mapping):
        return []
    kinds = declared.get("type", [])
    return [kinds] if isinstance(kinds, str) else [str(kind) for kind in kinds]


def _is_text(declared: Any) -> bool:
    kinds = _kinds(declared)
    return bool(kinds) and all(kind in _TEXT for kind in kinds)
