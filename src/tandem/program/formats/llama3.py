"""Llama 3: the whole answer is {"name": ..., "parameters": {...}}, or what stands behind <|python_tag|>.

Several calls are several objects with a semicolon between; behind the tag also Python, as its built-in tools write it.
Without the tag nothing but its form says that an object is a call: another object is an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from tandem.program.formats.fenced import python_calls
from tandem.program.formats.parsed import (
    Malformed,
    Parsed,
    Tools,
    as_call,
    dumps,
    fault,
    names,
    quoted,
    read_json,
    thought,
)
from tandem.types import ToolCall

TAG = "<|python_tag|>"
ENDS = ("<|eom_id|>", "<|eot_id|>")
_ARGUMENTS = re.compile(r'"(?:parameters|arguments)"\s*:')


def parse(text: str, tools: Tools = ()) -> Parsed:
    """
    >>> parse('{"name": "add", "parameters": {"a": 1}}').calls[0].arguments
    {'a': 1}
    """
    reasoning, text = thought(text)
    for end in ENDS:
        text = text.removesuffix(end)
    tag = text.find(TAG, _behind(text))
    before, said = (text[:tag], text[tag + len(TAG) :]) if tag >= 0 else ("", text)
    if tag < 0 and not _calls(said, tools):
        return Parsed(text, reasoning)
    try:
        calls = _objects(said) if said.lstrip().startswith("{") else _python(said, tools)
    except Malformed as error:
        return Parsed(text, reasoning, (), (fault(0, error),))
    return Parsed(before.strip(), reasoning, tuple(calls))


def write(calls: Sequence[ToolCall], tools: Tools = ()) -> str:
    """
    >>> write([ToolCall("add", {"a": 1})])
    '{"name": "add", "parameters": {"a": 1}}'
    """
    return "; ".join(dumps({"name": call.name, "parameters": dict(call.arguments)}) for call in calls)


def _calls(text: str, tools: Tools) -> bool:
    """Whether an answer without the tag is meant as a call: an object with name and parameters, or of a tool's name."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        value, _ = read_json(text)
    except Malformed:
        value = text
    known = names(tools)
    if isinstance(value, dict):
        return value.get("name") in known or ("name" in value and ("parameters" in value or "arguments" in value))
    return '"name"' in text and (bool(_ARGUMENTS.search(text)) or any(f'"{name}"' in text for name in known))


def _behind(text: str) -> int:
    """Where the objects that a text begins with end: a tag that stands in one is a text of theirs."""
    place = 0
    while (start := len(text) - len(text[place:].lstrip(" \n\t;"))) < len(text) and text[start] == "{":
        try:
            _, place = read_json(text, start)
        except Malformed:
            break
    return place


def _objects(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    place = 0
    while rest := text[place:].strip(" \n\t;"):
        if not rest.startswith("{"):
            raise Malformed(f"behind its end stands {quoted(rest)}, not another call")
        value, end = read_json(text, text.index("{", place))
        calls.append(as_call(value))
        place = end
    return calls


def _python(text: str, tools: Tools) -> list[ToolCall]:
    calls = python_calls(text, tools)
    if calls is None:
        raise Malformed(f"{quoted(text.strip())} calls no tool")
    return [replace(call, name=call.name.removesuffix(".call")) for call in calls]
