"""gpt-oss's harmony: <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>, on channels.

The analysis channel is reasoning; commentary to nobody and the final channel are content. The text begins behind the
<|start|>assistant that the template wrote, and its last token, where it stops a turn, is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tandem.program.formats.parsed import Malformed, Parsed, Tools, checked, dumps, fault, quoted, read_json
from tandem.types import ToolCall

START, MESSAGE, CALL = "<|start|>", "<|message|>", "<|call|>"
_END = re.compile(r"<\|(?:end|call|return)\|>|(?=<\|start\|>)|\Z")
_TO = re.compile(r"\bto=([^\s<]+)")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")


def parse(text: str, tools: Tools = ()) -> Parsed:
    """
    >>> parse('<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>').calls[0].name
    'add'
    """
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    faults: list[str] = []
    place = 0
    while place < len(text):
        behind = text.find(MESSAGE, place)
        if behind < 0:
            if _TO.search(text, place):
                faults.append(fault(len(calls) + len(faults), Malformed(f"it ends before its {MESSAGE}")))
            content.append(text[place:].removeprefix(f"{START}assistant"))
            break
        header, body = text[place:behind], behind + len(MESSAGE)
        to = _TO.search(header)
        try:
            if to is not None:
                call, place = _read(text, body, to[1])
                calls.append(call)
                continue
        except Malformed as error:
            faults.append(fault(len(calls) + len(faults), error))
        end = _ended(text, body)
        analysis = to is None and _ANALYSIS.search(header)
        (reasoning if analysis else content).append(text[place : end.end()] if to else text[body : end.start()])
        place = end.end()
    return Parsed("\n".join(filter(None, content)), "\n".join(filter(None, reasoning)), tuple(calls), tuple(faults))


def write(calls: Sequence[ToolCall], tools: Tools = ()) -> str:
    """
    >>> write([ToolCall("add", {"a": 1})])
    '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
    """
    return f"{START}assistant".join(
        f"<|channel|>commentary to=functions.{call.name} <|constrain|>json{MESSAGE}{dumps(dict(call.arguments))}{CALL}"
        for call in calls
    )


def _read(text: str, body: int, recipient: str) -> tuple[ToolCall, int]:
    name = recipient.removeprefix("functions.")
    if name == recipient == "python":  # its built-in tool takes code as it stands
        end = _ended(text, body)
        return checked(name, {"code": text[body : end.start()]}), end.end()
    value, last = read_json(text, body)
    call = checked(name, value)
    end = _ended(text, last)
    if text[last : end.start()].strip():
        raise Malformed(f"behind its end stands {quoted(text[last:])}, not {CALL}")
    return call, end.end()


def _ended(text: str, place: int) -> re.Match[str]:
    found = _END.search(text, place)
    assert found is not None  # the end of the text is one
    return found
