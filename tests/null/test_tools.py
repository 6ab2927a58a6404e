"""Tools: schemas from signatures, and faults that the model is told of."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

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
