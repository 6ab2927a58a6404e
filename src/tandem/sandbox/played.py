"""In the sandbox of a program under test: imports its modules and calls what the tests call, by values.

Nothing here is trusted: the program shares this interpreter and may answer what it likes. All that it can give is a
value, which the tests in the other sandbox look at.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

from tandem.sandbox.values import decode, encode

RAISED = (Exception, SystemExit)  # what a program may raise and go on
OPERATIONS = {"__bool__": bool, "__iter__": iter, "__contains__": operator.contains, "__str__": str, "__repr__": repr}


def operation(aim: Any, name: str) -> Callable[..., Any]:
    """What Python does for a special method; TypeError where the object has none."""
    found: Any = OPERATIONS.get(name) or getattr(type(aim), name, None)
    if found is None:
        raise TypeError(f"{type(aim).__name__} has no {name}")
    return found


def unplain(value: Any) -> list[Any]:
    raise TypeError(f"a {type(value).__name__} is no plain value")


def starred(module: Any) -> tuple[list[str], list[str]]:
    """Names that `import *` takes, and those that are modules of others: the tests have their own."""
    names, top = [name for name in dir(module) if not name.startswith("_")], module.__name__.partition(".")[0]
    others = [
        name
        for name in names
        if isinstance(value := getattr(module, name), type(sys)) and value.__name__.partition(".")[0] != top
    ]
    return [name for name in names if name not in others], others


async def finished(aim: Any) -> Any:
    return await aim


class Player:
    def __init__(self) -> None:
        self.held: list[Any] = []  # what is no plain value, by number
        self.loop = asyncio.new_event_loop()

    def hold(self, value: Any) -> list[Any]:
        self.held.append(value)
        number = len(self.held) - 1
        if isinstance(value, type) and issubclass(value, RAISED):
            return ["x", number, self.kind(value)]
        return ["h", number, type(value).__name__]

    def kind(self, error: type[BaseException]) -> list[str]:
        """Names of an exception's classes, its own first."""
        return [f"{each.__module__}.{each.__qualname__}" for each in error.__mro__ if issubclass(each, RAISED)]

    def given(self, code: Any) -> Any:
        return decode(code, lambda rest: self.held[rest[1]])

    def do(self, asked: dict[str, Any]) -> dict[str, Any]:
        kind, first, *rest = asked["do"]
        if kind == "import":
            return {"value": self.hold(importlib.import_module(first))}
        aim = self.held[first]
        if kind == "attribute":
            return {"value": encode(getattr(aim, rest[0]), self.hold)}
        if kind == "names":
            return {"value": encode(starred(aim), self.hold)}
        if kind == "set":
            setattr(aim, rest[0], self.given(rest[1]))
            return {"value": None}
        if kind == "delete":
            delattr(aim, rest[0])
            return {"value": None}
        if kind == "await":
            return {"value": encode(self.loop.run_until_complete(finished(aim)), self.hold)}
        name, code = rest
        arguments, named = self.given(code)
        if name == "__call__":
            value = aim(*arguments, **named)
        else:
            value = operation(aim, name)(aim, *arguments)
        # What a call changed in its arguments is seen by the caller, as in one interpreter.
        return {"value": encode(value, self.hold), "after": encode([arguments, named], self.hold)}

    def answer(self, line: bytes) -> dict[str, Any]:
        asked = json.loads(line)
        try:
            answer = self.do(asked)
        except RAISED as error:
            answer = {"raised": self.kind(type(error)), "text": str(error)[:1000]}
            try:
                json.dumps(arguments := encode(error.args, unplain))
                answer["arguments"] = arguments
            except Exception:  # noqa: BLE001 - not plain: the text says it
                pass
        return {**answer, "turn": asked["turn"]}


def play() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what the program prints is none of the answers
    orders = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.path.insert(0, os.getcwd())
    sys.dont_write_bytecode = True
    player = Player()
    for line in orders:
        left = memoryview(json.dumps(player.answer(line)).encode() + b"\n")
        while left:
            left = left[os.write(answers, left) :]
