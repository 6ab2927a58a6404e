"""Tools: typed methods of an episode that the model may call.

A tool's JSON schema and the check of what the model gives it both come from its signature, by msgspec.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from tandem.errors import TaskError
from tandem.program.docstring import described
from tandem.program.formats.parsed import quoted
from tandem.types import Message, ToolCall

MOST_CHARACTERS = 2048  # of a tool's answer; what is longer is cut, and says so
ASKED = ("setup", "observe", "respond", "score", "teardown")  # of an episode
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class _Marks:
    deadline_s: float
    most_characters: int
    ends: bool


def tool(
    method: Method | None = None,
    *,
    deadline_s: float = math.inf,
    most_characters: int = MOST_CHARACTERS,
    ends: bool = False,
) -> Any:
    """Mark a method of an Episode as a tool. Its name, docstring and annotated parameters are what the model is told.

    deadline_s: of an `async def`; later, it is cancelled and the model is told. most_characters: of its answer.
    ends: a call of it ends the program.
    """

    if deadline_s <= 0 or most_characters < 1:
        raise TaskError(f"@tool(deadline_s={deadline_s}, most_characters={most_characters}): both must be above 0.")

    def marked(method: Method) -> Method:
        if not inspect.isfunction(_function(method)):
            raise TaskError(f"@tool marks {method!r}, which is no method. Write it right above `def` or `async def`.")
        method._tool = _Marks(deadline_s, most_characters, ends)  # type: ignore[attr-defined]
        return method

    return marked if method is None else marked(method)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of an episode's class.

    >>> class Adder:
    ...     @tool
    ...     def add(self, a: int, b: int = 1) -> int:
    ...         "Adds."
    ...         return a + b
    >>> tools_of(Adder)["add"].schema["function"]["parameters"]["required"]
    ['a']
    """

    name: str
    method: Callable[..., Any]
    arguments: type[msgspec.Struct]
    marks: _Marks

    @property
    def schema(self) -> Mapping[str, Any]:
        """As chat templates and servers have it."""
        text, said = described(inspect.getdoc(self.method) or "", self.arguments.__struct_fields__)
        found = msgspec.json.schema(self.arguments)
        parameters = found["$defs"].pop(found["$ref"].rpartition("/")[2])
        parameters = {name: value for name, value in parameters.items() if name not in ("title", "description")}
        for name, words in said.items():
            parameters["properties"][name].setdefault("description", words)
        more = {"$defs": found["$defs"]} if found["$defs"] else {}
        return {
            "type": "function",
            "function": {"name": self.name, "description": text, "parameters": parameters | more},
        }


@functools.lru_cache(maxsize=256)
def tools_of(kind: type[Any]) -> Mapping[str, Tool]:
    """The tools of a class, in the order in which they were written. TaskError where a parameter has no type."""
    found: dict[str, Tool] = {}
    for base in reversed(kind.__mro__):
        for name, method in vars(base).items():
            function = _function(method)
            marks = getattr(method, "_tool", None) or getattr(function, "_tool", None)
            if marks is None:
                found.pop(name, None)
            else:
                given = _arguments(kind, name, function, marks, bound=not isinstance(method, staticmethod))
                found[name] = Tool(name, function, given, marks)
    return found


def _function(method: Any) -> Any:
    """Of a static or a class method, what it wraps."""
    return method.__func__ if isinstance(method, staticmethod | classmethod) else method


def _arguments(kind: type, name: str, method: Callable[..., Any], marks: _Marks, bound: bool) -> type[msgspec.Struct]:
    where = f"tool {name} of {kind.__name__}"
    if name in ASKED:
        raise TaskError(f"{where} has the name of a method that tandem calls. Name the tool otherwise.")
    if marks.deadline_s != math.inf and not inspect.iscoroutinefunction(method):
        raise TaskError(
            f"{where} has a deadline_s and is a plain `def`, which nobody can cancel: write it `async def`."
        )
    try:
        hints = typing.get_type_hints(method, include_extras=True)
        parameters = list(inspect.signature(method).parameters.values())[bound:]
        fields = [_field(parameter, hints) for parameter in parameters]
        return msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    except (TypeError, NameError, ValueError) as error:
        raise TaskError(f"{where}: {error}. Write every parameter as NAME: TYPE, of types that JSON has.") from error


def _field(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """A parameter as a field of its tool's arguments; TypeError where JSON cannot give it."""
    name, default = parameter.name, parameter.default
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
        raise TypeError(f"parameter {parameter} cannot be given by name")
    if name not in hints:
        raise TypeError(f"parameter {name} has no type")
    try:
        msgspec.json.schema(hints[name])
    except TypeError as error:
        raise TypeError(f"parameter {name}: {str(error).splitlines()[-1]}") from error
    if default is parameter.empty:
        return name, hints[name], msgspec.field()
    try:
        plain = msgspec.json.decode(msgspec.json.encode(default))
        msgspec.convert(plain, hints[name])
    except (TypeError, ValueError) as error:
        raise TypeError(f"the default {default!r} of parameter {name} is no value of its type ({error})") from error
    if type(default).__hash__ is not None:
        return name, hints[name], msgspec.field(default=default)
    shown: Any = Annotated[hints[name], msgspec.Meta(extra_json_schema={"default": plain})]  # a factory's is not shown
    return name, shown, msgspec.field(default_factory=lambda: copy.deepcopy(default))  # for each call its own


async def respond(episode: Any, message: Message) -> tuple[list[Message], bool, Counter[str]]:
    """Run the calls of an assistant's message, one after another: the answers, whether one ends it, and counts.

    Whatever is wrong with a call, or goes wrong in it, is told to the model.
    """
    tools, counts, answers, ends = tools_of(type(episode)), Counter[str](), [], False  # type: ignore[arg-type]
    for call in message.calls:
        counts["tool_calls"] += 1
        chosen = tools.get(call.name)
        if chosen is None:
            counts["malformed_calls"] += 1
            said = _error(f"there is no tool {quoted(call.name)}. Tools: {', '.join(tools)}.")
        else:
            said, wrong = await _run(episode, chosen, call)
            counts.update([wrong] if wrong else [])
            ends = ends or (chosen.marks.ends and not wrong)
        answers.append(Message("tool", said, call_id=call.id, more={"name": call.name}))
    for reason in message.faults:
        counts["malformed_calls"] += 1
        answers.append(Message("tool", _error(reason), more={"name": "unreadable"}))
    return answers, ends, counts


async def _run(episode: Any, chosen: Tool, call: ToolCall) -> tuple[str, str]:
    """What a tool answers, and the count that a fault goes to."""
    try:
        given = msgspec.convert(dict(call.arguments), chosen.arguments)
    except msgspec.ValidationError as error:
        return _error(f"{call.name}: {error}"), "malformed_calls"
    try:
        value = getattr(episode, call.name)(**msgspec.structs.asdict(given))
        if inspect.isawaitable(value):
            limit_s = chosen.marks.deadline_s
            async with asyncio.timeout(None if math.isinf(limit_s) else limit_s) as timeout:
                value = await value
            if timeout.expired():  # it swallowed its cancellation, and came to an end
                raise TimeoutError
        return shown(value, chosen.marks.most_characters), ""
    except TimeoutError as error:
        if inspect.iscoroutinefunction(chosen.method) and timeout.expired():
            return f"error: {call.name} took longer than {limit_s:g} s", "tool_timeouts"
        return _raised(call.name, error), "tool_errors"
    except Exception as error:  # noqa: BLE001 - recorded boundary: told to the model, and counted
        return _raised(call.name, error), "tool_errors"


def _raised(name: str, error: Exception) -> str:
    return _error(f"{name} raised {type(error).__name__}: {error}")


def _error(said: str) -> str:
    """Whatever a model wrote into its call is not said to it again at any length."""
    return shown(f"error: {said}", MOST_CHARACTERS)


def shown(value: Any, most: int) -> str:
    """A tool's answer as text of at most `most` characters and a line that says so.

    >>> shown({"a": 1.5}, 99), shown(b"\\xff\\x00", 99), shown("abcdef", 3)
    ('{"a":1.5}', '(2 bytes that are no text)', 'abc\\n(cut: 3 of 6 characters)')
    """
    if isinstance(value, bytes | bytearray):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError:
            value = f"({len(value)} bytes that are no text)"
    if not isinstance(value, str):
        try:
            value = msgspec.json.encode(value).decode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            value = repr(value)
    value = value.encode("utf-8", "replace").decode()  # halves of characters
    return value if len(value) <= most else f"{value[:most]}\n(cut: {most} of {len(value)} characters)"


def schemas(kind: type) -> tuple[Mapping[str, Any], ...]:
    """Of all tools of a class, for `Prompt.tools`."""
    return tuple(one.schema for one in tools_of(kind).values())


def is_async(kind: type, names: Sequence[str]) -> bool:
    """Whether one of these methods, or a tool, is `async def`."""
    methods = [getattr(kind, name) for name in names] + [one.method for one in tools_of(kind).values()]
    return any(inspect.iscoroutinefunction(method) for method in methods)
