"""Tools: schemas from signatures, and faults that the model is told of."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest

from tandem.errors import TaskError
from tandem.program.environment import Environment, Episode, Step, tool
from tandem.program.tools import is_async, respond, schemas, tools_of
from tandem.types import Message, Prompt, ToolCall

PROMPT = Prompt("p", (Message("user", "?"),))


class Desk(Episode):
    @tool
    def add(self, a: int, b: int = 1) -> int:
        """Adds two numbers."""
        return a + b

    @tool(deadline_s=0.02)
    async def wait(self, seconds: float) -> str:
        """Waits."""
        await asyncio.sleep(seconds)
        return "waited"

    @tool(most_characters=10)
    def shout(
        self, text: Annotated[str, msgspec.Meta(description="to be said")], how: Literal["loud", "louder"]
    ) -> str:
        return text * (50 if how == "louder" else 1)

    @tool(ends=True)
    def stop(self) -> None:
        """Ends."""

    @tool
    def fail(self, kind: str) -> None:
        raise TimeoutError("of its own") if kind == "time" else KeyError(kind)

    @tool
    def raw(self, size: int) -> bytes:
        return bytes([200] * size)


def told(*calls: ToolCall, faults: tuple[str, ...] = ()):
    desk = Desk(PROMPT)
    return asyncio.run(respond(desk, Message("assistant", "", calls, faults=faults)))


def test_the_schema_is_the_signature() -> None:
    """A default that is required, a choice that is free, or a description that is lost on the way to the model."""
    assert [schema["function"]["name"] for schema in schemas(Desk)] == ["add", "wait", "shout", "stop", "fail", "raw"]
    found = {schema["function"]["name"]: schema["function"] for schema in schemas(Desk)}
    assert found["add"]["description"] == "Adds two numbers." and found["raw"]["description"] == ""
    assert found["add"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert found["shout"]["parameters"]["properties"] == {
        "text": {"type": "string", "description": "to be said"},
        "how": {"enum": ["loud", "louder"]},
    }
    assert found["stop"]["parameters"]["properties"] == {} and found["stop"]["parameters"]["required"] == []


@pytest.mark.parametrize(
    ("call", "said", "count"),
    [
        (ToolCall("add", {"a": 2, "b": 3}), "5", None),
        (ToolCall("add", {"a": "2"}), "error: add: Expected `int`, got `str` - at `$.a`", "malformed_calls"),
        (ToolCall("add", {}), "error: add: Object missing required field `a`", "malformed_calls"),
        (ToolCall("add", {"a": 1, "c": 2}), "error: add: Object contains unknown field `c`", "malformed_calls"),
        (ToolCall("sub", {"a": 1}), "error: there is no tool 'sub'. Tools: add, wait, ", "malformed_calls"),
        (ToolCall("wait", {"seconds": 0.0}), "waited", None),
        (ToolCall("wait", {"seconds": 9.0}), "error: wait took longer than 0.02 s", "tool_timeouts"),
        (ToolCall("fail", {"kind": "x"}), "error: fail raised KeyError: 'x'", "tool_errors"),
        (ToolCall("fail", {"kind": "time"}), "error: fail raised TimeoutError: of its own", "tool_errors"),
        (ToolCall("shout", {"text": "ab", "how": "louder"}), "ababababab\n(cut: 10 of 100 characters)", None),
        (ToolCall("raw", {"size": 3}), "(3 bytes that are no text)", None),
    ],
)
def test_what_the_model_is_told(call: ToolCall, said: str, count: str | None) -> None:
    """A call that ends the program, or passes for an answer, where the model should learn what was wrong with it."""
    answers, ends, counts = told(call)
    assert [(answer.role, answer.more) for answer in answers] == [("tool", {"name": call.name})]
    assert answers[0].content.startswith(said)
    assert counts == {"tool_calls": 1} | ({count: 1} if count else {}) and not ends


def test_calls_are_answered_in_order_each_by_its_id() -> None:
    """Answers that change places, or the rest of a message lost behind a call that fails."""
    calls = (ToolCall("add", {"a": 1}, "x"), ToolCall("fail", {"kind": "k"}, "y"), ToolCall("stop", {}, "z"))
    answers, ends, _ = told(*calls, faults=("no JSON",))
    assert [answer.call_id for answer in answers] == ["x", "y", "z", ""] and ends
    assert answers[-1].content == "error: no JSON"


def test_an_episode_without_calls_ends() -> None:
    """A final answer that is asked to go on."""
    desk = Desk(PROMPT)
    step = asyncio.run(desk.observe((Message("assistant", "4"),)))
    assert step == Step(None) and desk.score(()) == 0.0


def test_what_cannot_be_a_tool_is_named() -> None:
    """A KeyError from deep inside, at the first call, for a parameter without a type."""

    class Untyped(Episode):
        @tool
        def go(self, x): ...

    class Many(Episode):
        @tool
        def go(self, *x: int): ...

    for kind, reason in ((Untyped, "tool go of Untyped: parameter x has no type"), (Many, "cannot be given by name")):
        with pytest.raises(TaskError, match=reason):
            tools_of(kind)


def test_static_and_class_methods_are_tools() -> None:
    """A tool that is left out of the prompt for the order of its decorators, or that loses its first parameter."""

    class Plain(Episode):
        base = 10

        @tool
        @staticmethod
        def one(a: int) -> int:
            """One."""
            return a

        @staticmethod
        @tool
        async def two(a: int) -> int:
            return a

        @tool(ends=True)
        @classmethod
        def three(cls, a: int) -> int:
            return cls.base + a

        @classmethod
        @tool
        def four(cls, a: int) -> int:
            return cls.base + a

    found = {schema["function"]["name"]: schema["function"] for schema in schemas(Plain)}
    assert [*found] == ["one", "two", "three", "four"] and found["one"]["description"] == "One."
    assert {tuple(one["parameters"]["required"]) for one in found.values()} == {("a",)}
    assert is_async(Plain, [])
    message = Message("assistant", "", tuple(ToolCall(name, {"a": 1}) for name in found))
    answers, ends, _ = asyncio.run(respond(Plain(PROMPT), message))
    assert [answer.content for answer in answers] == ["1", "1", "11", "11"] and ends


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclasses.dataclass
class Node:
    name: str
    under: list[Node] = dataclasses.field(default_factory=list)


class Place(TypedDict):
    x: int
    y: float


class Model:
    """As a class of a package that msgspec does not know."""


INTEGER, NUMBER, TEXT, NULL = ({"type": name} for name in ("integer", "number", "string", "null"))


@pytest.mark.parametrize(
    ("kind", "default", "wanted"),
    [
        (int | None, (), {"anyOf": [INTEGER, NULL]}),
        (str | None, (None,), {"anyOf": [TEXT, NULL], "default": None}),
        (int | str, (), {"anyOf": [INTEGER, TEXT]}),
        (Literal["a", "b"], ("b",), {"enum": ["a", "b"], "default": "b"}),
        (Colour, (Colour.RED,), {"$ref": "#/$defs/Colour", "default": "r"}),
        (list[int], ([1],), {"type": "array", "items": INTEGER, "default": [1]}),
        (dict[str, float], ({"a": 1.5},), {"type": "object", "additionalProperties": NUMBER, "default": {"a": 1.5}}),
        (dict[str, list[int]], (), {"type": "object", "additionalProperties": {"type": "array", "items": INTEGER}}),
        (Node, (), {"$ref": "#/$defs/Node"}),
        (Place, (), {"$ref": "#/$defs/Place"}),
        (int, (None,), "the default None of parameter it is no value of its type"),
        (float, (float("inf"),), "the default inf of parameter it is no value of its type"),
        (int, (object(),), "the default <object .*> of parameter it is no value of its type"),
        (Model, (), "parameter it: type <class '.*Model'> is not supported"),
        (list[int] | tuple[int, int], (), "parameter it: Type unions may not contain more than one array-like"),
    ],
)  # fmt: skip
def test_a_parameter_has_a_schema_or_an_error_with_its_name(kind: Any, default: tuple, wanted: Any) -> None:
    """A schema that says otherwise than the annotation, or an error that leaves out which tool and parameter."""

    class Typed(Episode):
        @tool
        def go(self, it): ...

    function = Typed.go
    function.__annotations__["it"], function.__defaults__ = kind, default or None
    if isinstance(wanted, str):
        with pytest.raises(TaskError, match=f"^tool go of Typed: {wanted}"):
            tools_of(Typed)
        return
    parameters = schemas(Typed)[0]["function"]["parameters"]
    assert parameters["properties"]["it"] == wanted and parameters["required"] == ([] if default else ["it"])
    if "$ref" in wanted:
        assert wanted["$ref"].rpartition("/")[2] in parameters["$defs"]


def test_a_default_that_a_tool_changes_is_new_in_each_call() -> None:
    """A list that one program's call appends to is another's default."""

    class Appends(Episode):
        @tool
        def go(self, to: list[int] = [0]) -> list[int]:  # noqa: B006
            to.append(1)
            return to

    message = Message("assistant", "", (ToolCall("go", {}), ToolCall("go", {"to": []}), ToolCall("go", {})))
    answers, _, _ = asyncio.run(respond(Appends(PROMPT), message))
    assert [answer.content for answer in answers] == ["[0,1]", "[1]", "[0,1]"]


def test_a_docstring_describes_its_parameters() -> None:
    """What a docstring says of parameters never reaches their schema, or is told twice."""

    class Told(Episode):
        @tool
        def go(self, a: Annotated[int, msgspec.Meta(description="mine")], b: str = "x", way: Node | None = None) -> int:
            """Goes.

            Args:
                a: Theirs.
                b (str): Words: many,
                    and more.
                way: Where.

            Returns:
                Nothing.
            """
            return a

        @tool
        def come(self, a: int) -> int:
            """Comes.

            Args:
                a: One.
                gone: No parameter of it.
            """
            return a

    go, come = (schema["function"] for schema in schemas(Told))
    assert go["description"] == "Goes.\n\nReturns:\n    Nothing."
    said = {name: value.get("description") for name, value in go["parameters"]["properties"].items()}
    assert said == {"a": "mine", "b": "Words: many, and more.", "way": "Where."}
    assert "gone: No parameter" in come["description"] and "description" not in come["parameters"]["properties"]["a"]


def test_what_is_no_tool_is_refused_where_it_is_marked() -> None:
    """A property or a number of seconds that makes a tool fail in each call, or an episode that cannot be asked."""
    for wrong in (property(lambda self: 1), "name", int):
        with pytest.raises(TaskError, match="@tool marks .*, which is no method"):
            tool(wrong)
    for marks in ({"deadline_s": 0.0}, {"most_characters": 0}):
        with pytest.raises(TaskError, match="both must be above 0"):
            tool(**marks)

    class Scores(Episode):
        @tool
        def score(self, turns: int): ...

    with pytest.raises(TaskError, match="tool score of Scores has the name of a method that tandem calls"):
        tools_of(Scores)


def test_a_tool_that_swallows_its_deadline_was_late() -> None:
    """An answer after the tool's deadline passes for one in time where the tool swallowed its cancellation."""

    class Clings(Episode):
        @tool(deadline_s=0.02)
        async def go(self) -> str:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                return "done"
            return "woke"

    answers, _, counts = asyncio.run(respond(Clings(PROMPT), Message("assistant", "", (ToolCall("go", {}),))))
    assert answers[0].content == "error: go took longer than 0.02 s" and counts["tool_timeouts"] == 1


def test_a_tool_taken_back_or_replaced_by_a_subclass() -> None:
    """A base class's tool that is offered though the subclass made it something else."""

    class Quiet(Desk):
        shout = None  # type: ignore[assignment]

        @tool
        def add(self, a: float) -> float:
            """Adds one."""
            return a + 1

    assert "shout" not in tools_of(Quiet) and tools_of(Quiet)["add"].schema["function"]["description"] == "Adds one."
    assert is_async(Desk, ["observe"]) and not is_async(Episode, ["observe", "score"])
    assert Environment().episodes is None


def test_an_answer_that_nobody_can_write_is_the_tools_error() -> None:
    """A value without an end, or a number of no text, that ends the program in place of an answer of its tool."""

    class Gives(Episode):
        @tool
        def deep(self) -> list[object]:
            whole: list[object] = []
            for _ in range(50_000):
                whole = [whole]
            return whole

        @tool
        def large(self, digits: int) -> int:
            return 10**digits

        @tool
        def odd(self) -> object:
            return type("Odd", (), {"__repr__": lambda self: 1 / 0})()

    calls = (ToolCall("deep", {}), ToolCall("large", {"digits": 30}), ToolCall("large", {"digits": 5000}))
    answers, _, counts = asyncio.run(respond(Gives(PROMPT), Message("assistant", "", (*calls, ToolCall("odd", {})))))
    assert [answer.content.partition(":")[0] for answer in answers] == ["error", str(10**30), "error", "error"]
    assert "RecursionError" in answers[0].content and "ZeroDivisionError" in answers[3].content
    assert counts == {"tool_calls": 4, "tool_errors": 3}


def test_a_long_call_is_not_said_again() -> None:
    """A context that fills with what the model itself wrote: a wrong value or name, word for word in the error."""
    long = "x" * 10_000
    calls = (ToolCall("shout", {"text": "a", "how": long}), ToolCall(long, {}))
    answers, _, _ = told(*calls, faults=(f"{long} is given twice",))
    assert all(len(answer.content) < 2_200 for answer in answers), [len(answer.content) for answer in answers]
    assert "Tools: add, wait" in answers[1].content
