"""Which format a model's calls are in: what its chat template writes for a call says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tandem.program.formats import fenced, harmony, hermes, llama3, mistral, qwen3_coder
from tandem.program.formats.parsed import Parsed, Tools
from tandem.types import ToolCall


class CallFormat(NamedTuple):
    """Both ways of a format; `parse(write(calls, tools), tools).calls` are the calls."""

    parse: Callable[[str, Tools], Parsed]
    write: Callable[[Sequence[ToolCall], Tools], str]
    plain: bool = False  # a call may also be what a model writes that calls nothing: code, an object


FORMATS: Mapping[str, CallFormat] = {  # `task.tool_format`
    "hermes": CallFormat(hermes.parse, hermes.write),
    "qwen3_coder": CallFormat(qwen3_coder.parse, qwen3_coder.write),
    "llama3": CallFormat(llama3.parse, llama3.write, plain=True),
    "mistral": CallFormat(mistral.parse, mistral.write),
    "harmony": CallFormat(harmony.parse, harmony.write),
    "fenced": CallFormat(fenced.parse, fenced.write, plain=True),
}

# A tool, and a call of it with an id that every template takes.
PROBE: Tools = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "The word."},
                    "most": {"type": "integer", "description": "Entries at most."},
                },
                "required": ["word", "most"],
            },
        },
    },
)
PROBE_CALL = ToolCall("look_up", {"word": "oak", "most": 2}, "abc123def")


def format_of(written: str) -> str:
    """The format in which a template wrote PROBE_CALL; "" where it is none of them.

    >>> format_of('<tool_call>{"name": "look_up", "arguments": {"word": "oak", "most": 2}}</tool_call>')
    'hermes'
    """
    wanted = (PROBE_CALL.name, PROBE_CALL.arguments)
    for name, one in FORMATS.items():
        parsed = one.parse(written, PROBE)
        if not parsed.faults and [(call.name, call.arguments) for call in parsed.calls] == [wanted]:
            return name
    return ""
