"""What a model wrote, taken apart, and what the formats of tool calls share: reasoning, JSON, checks of a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.types import ToolCall

Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions, as chat templates take them

MOST_DEPTH = 100  # of nested arguments: calls go to other processes, and pickle ends at less than json does
MOST_DIGITS = 4300  # of an integer: Python reads no longer one
SHOWN = 30  # characters of a malformed call that its fault quotes


class Malformed(ValueError):
    """Why a call cannot be read, as the model is told it."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A text by its parts. A malformed call stays in the content, and its fault says why.

    >>> Parsed("Let me see.", calls=(ToolCall("add", {"a": 1}),)).faults
    ()
    """

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    faults: tuple[str, ...] = ()


def thought(text: str, opening: str = "<think>", closing: str = "</think>") -> tuple[str, str]:
    """The reasoning that a text begins with, and the rest; without `closing` it was cut short within.

    >>> thought("<think>\\nsum\\n</think>\\n\\n4"), thought("4")
    (('sum', '4'), ('', '4'))
    """
    if not text.lstrip().startswith(opening):
        return "", text
    reasoning, _, rest = text.lstrip().removeprefix(opening).partition(closing)
    return reasoning.strip("\n"), rest.lstrip("\n")


def behind_thought(text: str, place: int, start: int) -> int:
    """Where a think block ends that begins between `place` and `start`: no call stands in one. 0 where none does."""
    for opening, closing in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        if 0 <= (begins := text.find(opening, place, start)) and (ends := text.find(closing, begins)) > start:
            return ends + len(closing)
    return 0


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start` behind white space, and where it ends. Malformed says what is wrong with it.

    >>> read_json(' {"a": [1]}</x>')
    ({'a': [1]}, 11)
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        place = f"character {error.pos - start + 1}, at {quoted(text[error.pos :])}"
        raise Malformed(f"its JSON is broken at {place}: {error.msg}") from None
    except (Malformed, RecursionError) as error:
        raise Malformed(f"its JSON cannot be read: {error}") from None


def _constant(name: str) -> None:
    raise Malformed(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Malformed(f"it has a number of {len(digits):,} digits")
    return int(digits)


def once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object from its keys and values; Malformed where a key stands twice, and nobody can know which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Malformed(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, object_pairs_hook=once)


def checked(name: Any, arguments: Any, id: Any = "") -> ToolCall:
    """A call, if it is one: a name, and arguments that JSON can write. Tuples become lists."""
    if not isinstance(name, str) or not name.strip():
        raise Malformed("it has no name")
    if not isinstance(arguments, Mapping):
        raise Malformed(f"the arguments of {name.strip()} are {_shown(arguments)}, not an object of names")
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{name}{written}".encode()
        plain = json.loads(written)
    except UnicodeEncodeError:
        raise Malformed(f"the arguments of {name.strip()} hold half of a character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"the arguments of {name.strip()} cannot be written as JSON: {error}") from None
    if _deeper(plain):
        raise Malformed(f"the arguments of {name.strip()} are nested more than {MOST_DEPTH} deep")
    return ToolCall(name.strip(), plain, id if isinstance(id, str) else "")


def _deeper(value: Any) -> bool:
    """Whether lists and objects stand in each other more than MOST_DEPTH deep."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        parts = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [each for part in parts for each in part]
        if not level:
            return False
    return True


def as_call(value: Any) -> ToolCall:
    """A call from {"name", "arguments"}; "parameters" and arguments given as JSON in a text are taken too.

    >>> as_call({"name": "add", "arguments": '{"a": 1}'}).arguments
    {'a': 1}
    """
    if not isinstance(value, Mapping):
        raise Malformed(f"it is {_shown(value)}, not an object with name and arguments")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments, _ = read_json(arguments)
    return checked(value.get("name"), {} if arguments is None else arguments, value.get("id", ""))


def read_after(text: str, start: int, closing: str) -> int:
    """Where `closing` ends, which stands at `start` behind white space; the text may also end there."""
    rest = text[start:].lstrip()
    if rest and not rest.startswith(closing):
        raise Malformed(f"behind its end stands {quoted(rest)}, not {closing}")
    return len(text) - len(rest) + (len(closing) if rest else 0)


def scan(
    text: str,
    opening: str,
    read: Callable[[str, int], tuple[list[ToolCall], int]],
    recover: Callable[[str, int], int],
) -> Parsed:
    """All calls of a text behind its `opening`s. `read` gives those at a place and where they end; `recover` where a
    malformed one does.
    """
    rest: list[str] = []
    calls: list[ToolCall] = []
    faults: list[str] = []
    place = 0
    while (start := text.find(opening, place)) >= 0:
        if (behind := behind_thought(text, place, start)) > 0:
            rest.append(text[place:behind])
            place = behind
            continue
        rest.append(text[place:start])
        inside = start + len(opening)
        try:
            found, place = read(text, inside)
            calls += found
        except Malformed as error:
            faults.append(fault(len(calls) + len(faults), error))
            place = recover(text, inside)
            rest.append(text[start:place])
    rest.append(text[place:])
    content = "".join(rest)
    return Parsed(content.strip() if calls else content, "", tuple(calls), tuple(faults))


def fault(number: int, error: Malformed) -> str:
    """What the model is told of its call `number`, counted from 0."""
    return f"tool call {number + 1}: {' '.join(str(error).split())}"


def quoted(text: str) -> str:
    """The beginning of a text, as a fault shows it."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _shown(value: Any) -> str:
    try:
        return quoted(json.dumps(value))
    except RecursionError:
        return "nested too deep"


def dumps(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def properties(tools: Tools, name: str) -> Mapping[str, Any] | None:
    """The declared parameters of a tool by name, in order; None where it is not declared."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters") or {}
            return parameters.get("properties") or {}
    return None


def names(tools: Tools) -> list[str]:
    """What the tools are called."""
    functions = [tool.get("function", tool) for tool in tools]
    return [str(one["name"]) for one in functions if isinstance(one, Mapping) and one.get("name")]
