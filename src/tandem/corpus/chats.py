"""A row of a file as a conversation: messages as OpenAI's API has them, or as ShareGPT. Both are checked alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.corpus.reader import UNTOLD, refused
from tandem.errors import nearest
from tandem.program.formats.parsed import Tools
from tandem.program.reward import clipped
from tandem.types import Message, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
UNNAMED = "\0"  # begins the name of a call without an id
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that rows have for it
KEPT = ("name", *REASONING, "is_error")  # further keys that templates or filters read


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as a row has it."""

    messages: tuple[Message, ...]
    tools: Tools = ()
    untrained: frozenset[int] = frozenset()  # places of messages with a weight of 0


def openai(rows: Any, system: Any, tools: Any, place: str) -> Chat:
    """Of `messages`, as a list or as the JSON of one. CorpusError says what is wrong with which message."""
    rows = decoded(rows, "messages", place)
    messages, untrained = _system(system, place), set[int]()
    first = 1 - len(messages)
    for number, row in enumerate(_objects(rows, "messages", place), first):
        at = f"{place}, message {number}"
        messages.append(message(row, at))
        weight = row.get("weight")
        if weight is not None and (messages[-1].role != "assistant" or weight not in (0, 1)):
            raise refused("a weight", at, f"the weight is {weight!r}; it is 0 or 1, of a message of the assistant's.")
        if weight == 0:
            untrained.add(len(messages) - 1)
    _check(messages, first, place)
    return Chat(tuple(messages), _tools(tools, place), frozenset(untrained))


def message(row: Mapping[str, Any], place: str) -> Message:
    """A message as OpenAI's API and a run's trajectories have it. CorpusError where it is none."""
    role = row.get("role")
    if role not in ROLES:
        raise refused("unknown role", place, f"the role is {role!r}.{nearest(str(role), ROLES)}")
    calls = tuple(_call(one, place) for one in _objects(row.get("tool_calls") or [], "tool_calls", place))
    more = {name: row[name] for name in KEPT if row.get(name) is not None}
    text = _content(row.get("content"), place)
    return Message(role, text, calls, str(row.get("tool_call_id") or ""), more, sampled=role == "assistant")


def sharegpt(rows: Any, system: Any, tools: Any, place: str) -> Chat:
    """Of `conversations`: `from` and `value` of each message."""
    messages = _system(system, place)
    first = 1 - len(messages)
    for number, row in enumerate(_objects(decoded(rows, "conversations", place), "conversations", place), first):
        at = f"{place}, message {number}"
        said_by = row.get("from")
        if said_by not in SHAREGPT:
            raise refused("unknown role", at, f"it is from {said_by!r}.{nearest(str(said_by), SHAREGPT)}")
        role, text, calls = SHAREGPT[said_by], _content(row.get("value"), at), tuple[ToolCall, ...]()
        if said_by in ("function_call", "tool_call"):
            found = decoded(text, "value", at)
            found = found if isinstance(found, list) else [found]
            calls, text = tuple(_call({"function": one}, at) for one in _objects(found, "value", at)), ""
        messages.append(Message(role, text, calls, sampled=role == "assistant"))
    _check(messages, first, place)
    return Chat(tuple(messages), _tools(tools, place))


def decoded(value: Any, name: str, place: str) -> Any:
    """The value, of its JSON where it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise refused(
            "not JSON", place, f"its {name!r} is a text, and no JSON ({error}). Mend or remove it."
        ) from error


def _objects(values: Any, name: str, place: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(one, Mapping) for one in values):
        raise refused("wrong type", place, f"its {name!r} is {clipped(values)}; a list of objects is needed.")
    return values


def _content(value: Any, place: str) -> str:
    """A text; of parts, their texts."""
    if value is None:
        return ""
    if isinstance(value, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in value]
        if any(kind != "text" for kind in kinds):
            raise refused("not a text", place, f"its content has parts {clipped(kinds)}; only texts are learned from.")
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise refused("wrong type", place, f"its content is {clipped(value)}; a text is needed.")
    return value


def _system(value: Any, place: str) -> list[Message]:
    """What a row says of the system beside its messages."""
    text = _content(value, place)
    return [Message("system", text)] if text else []


def _call(row: Mapping[str, Any], place: str) -> ToolCall:
    function = row.get("function", row)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise refused("a broken call", place, f"the call {clipped(row)} names no function.")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else decoded(arguments, "arguments", place)
    if not isinstance(arguments, Mapping):
        raise refused(
            "a broken call", place, f"the arguments of {function['name']} are {clipped(arguments)}, no object."
        )
    return ToolCall(function["name"], dict(arguments), str(row.get("id") or ""))


def _tools(value: Any, place: str) -> Tools:
    if value in (None, "", []):
        return ()
    tools = list[Mapping[str, Any]]()
    for one in _objects(decoded(value, "tools", place), "tools", place):
        function = one.get("function", one)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise refused("wrong type", place, f"its tool {clipped(one)} names no function.")
        tools.append(one if "function" in one else {"type": "function", "function": one})
    return tuple(tools)


def _check(messages: Sequence[Message], first: int, place: str) -> None:
    """CorpusError where the turns are in no order that a program could have had. `first`: the number of the first."""
    before, open_calls = "", set[str]()
    for number, message in enumerate(messages, first):
        at, role = f"{place}, message {number}", message.role
        if role == before == "system":
            raise refused("roles out of order", at, "a system message behind another. Join the two.")
        if role in UNTOLD and before not in ("", *UNTOLD):
            raise refused("roles out of order", at, f"a {role} message behind one of {before}; it comes first.")
        if role == "user" and before == "user":
            raise refused("roles out of order", at, "a user's message behind another. Join the two.")
        if role == "assistant" and before not in ("user", "tool"):
            raise refused(
                "roles out of order",
                at,
                f"an assistant's turn {'at the beginning' if before in ('', *UNTOLD) else 'behind another'}; it "
                "answers a user or a tool.",
            )
        if role == "tool" and (before not in ("assistant", "tool") or not open_calls):
            raise refused("a tool turn without a call", at, "a tool answers, and no call of the turn before is open.")
        named = all(not call.startswith(UNNAMED) for call in open_calls)
        if role == "tool" and named and message.call_id and message.call_id not in open_calls:
            raise refused(
                "a tool turn without a call",
                at,
                f"it answers the call {message.call_id!r}; open are {', '.join(map(repr, sorted(open_calls)))}.",
            )
        if role == "assistant":
            thinks = any(message.more.get(name) for name in REASONING)
            if not message.content.strip() and not message.calls:
                what = "a turn that only thinks" if thinks else "an empty turn"
                raise refused("an empty assistant turn", at, f"{what} of the assistant's. Remove the row, or give it.")
            open_calls = {call.id or f"{UNNAMED}{count:06d}" for count, call in enumerate(message.calls)}
        elif role == "tool":
            open_calls.discard(message.call_id if message.call_id in open_calls else min(open_calls))
        before = role
    if not any(message.role == "assistant" for message in messages):
        raise refused("nothing to learn", place, "no message is the assistant's.")
