"""Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tandem.program.formats.parsed import Parsed, Tools, as_call, dumps, read_after, read_json, scan, thought
from tandem.types import ToolCall

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def parse(text: str, tools: Tools = ()) -> Parsed:
    """
    >>> parse('<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>').calls[0].arguments
    {'a': 1}
    """
    reasoning, text = thought(text)
    return replace(scan(text, OPENING, _read, recover), reasoning=reasoning)


def write(calls: Sequence[ToolCall], tools: Tools = ()) -> str:
    """
    >>> write([ToolCall("add", {"a": 1})])
    '<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>'
    """
    values = [dumps({"name": call.name, "arguments": dict(call.arguments)}) for call in calls]
    return "\n".join(f"{OPENING}\n{value}\n{CLOSING}" for value in values)


def recover(text: str, inside: int) -> int:
    """Where a malformed call ends: behind its closing tag, or with the text."""
    end = text.find(CLOSING, inside)
    return end + len(CLOSING) if end >= 0 else len(text)


def _read(text: str, inside: int) -> tuple[list[ToolCall], int]:
    value, end = read_json(text, inside)
    call = as_call(value)
    return [call], read_after(text, end, CLOSING)
