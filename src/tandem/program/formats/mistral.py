"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and since 2025 [TOOL_CALLS]NAME[ARGS]{...} a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tandem.program.formats.parsed import (
    Malformed,
    Parsed,
    Tools,
    as_call,
    checked,
    dumps,
    quoted,
    read_json,
    scan,
    thought,
)
from tandem.types import ToolCall

OPENING = "[TOOL_CALLS]"
ARGUMENTS, ID = "[ARGS]", "[CALL_ID]"


def parse(text: str, tools: Tools = ()) -> Parsed:
    """
    >>> parse('[TOOL_CALLS]add[ARGS]{"a": 1}').calls[0].arguments
    {'a': 1}
    >>> parse('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]').calls[0].arguments
    {'a': 1}
    """
    reasoning, text = thought(text, "[THINK]", "[/THINK]")
    return replace(scan(text.removesuffix("</s>"), OPENING, _read, _recover), reasoning=reasoning)


def write(calls: Sequence[ToolCall], tools: Tools = ()) -> str:
    """
    >>> write([ToolCall("add", {"a": 1})])
    '[TOOL_CALLS]add[ARGS]{"a": 1}'
    """
    return "".join(f"{OPENING}{call.name}[ARGS]{dumps(dict(call.arguments))}" for call in calls)


def _read(text: str, inside: int) -> tuple[list[ToolCall], int]:
    rest = text[inside:].lstrip()
    if rest[:1] in ("[", "{"):
        value, end = read_json(text, inside)
        if value == []:
            raise Malformed("its list has no call")
        return [as_call(one) for one in (value if isinstance(value, list) else [value])], end
    head, found, _ = text[inside:].partition(ARGUMENTS)
    name, _, call_id = head.partition(ID)
    if not found or {*"[]{}"} & {*name}:
        raise Malformed(f"it begins with {quoted(rest)}, neither a list of calls nor NAME[ARGS]")
    value, end = read_json(text, inside + len(head) + len(found))
    return [checked(name, value, call_id.strip())], end


def _recover(text: str, inside: int) -> int:
    following = text.find(OPENING, inside)
    return following if following >= 0 else len(text)
