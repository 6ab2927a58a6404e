"""Small modules with one planted bug each, and tests that tell: repair problems without end, from a seed."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CASES = 6  # tests of a module: half of them are shown
TRIES = 64  # bugs tried for one that a test notices

# What a bug may be planted in. All of it ends, whatever is changed: there is no `while`.
FUNCTIONS = """
def difference(a, b):
    return a - b

def area(width, height):
    return width * height

def is_adult(age):
    return age >= 18

def last(values):
    return values[-1]

def total(values):
    result = 0
    for value in values:
        result = result + value
    return result

def largest(values):
    best = values[0]
    for value in values:
        if value > best:
            best = value
    return best

def count_even(values):
    count = 0
    for value in values:
        if value % 2 == 0:
            count = count + 1
    return count

def clamp(value, low, high):
    if value < low:
        return low
    if value > high:
        return high
    return value

def below(values, limit):
    found = []
    for value in values:
        if value < limit:
            found.append(value)
    return found

def price(count, each, free):
    paid = count - free
    if paid < 0:
        paid = 0
    return paid * each
"""


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randrange(-30, 60) for _ in range(rng.randrange(3, 7))]


# The arguments of a test.
ARGUMENTS: dict[str, Callable[[random.Random], tuple[Any, ...]]] = {
    "difference": lambda rng: (rng.randrange(50), rng.randrange(50)),
    "area": lambda rng: (rng.randrange(2, 20), rng.randrange(2, 20)),
    "is_adult": lambda rng: (rng.choice([17, 18, 19, rng.randrange(90)]),),
    "last": lambda rng: (_numbers(rng),),
    "total": lambda rng: (_numbers(rng),),
    "largest": lambda rng: (_numbers(rng),),
    "count_even": lambda rng: (_numbers(rng),),
    "clamp": lambda rng: (rng.randrange(-20, 20), -5, 5),
    "below": lambda rng: (_numbers(rng), rng.randrange(40)),
    "price": lambda rng: (rng.randrange(9), rng.randrange(1, 9), rng.randrange(5)),
}
SOURCES = {
    node.name: ast.unparse(node) + "\n" for node in ast.parse(FUNCTIONS).body if isinstance(node, ast.FunctionDef)
}
assert SOURCES.keys() == ARGUMENTS.keys(), (list(SOURCES), list(ARGUMENTS))
_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.Lt: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A module with a bug.

    >>> planted(random.Random(1)).path.endswith(".py")
    True
    """

    path: str
    broken: str  # the module as the program finds it
    right: str
    shown: str  # tests that the program may run, one of which fails
    hidden: str  # all tests
    failing: tuple[str, ...]  # of the hidden ones
    line: int  # of the bug, from 1


def planted(rng: random.Random) -> Problem:
    """A problem; every one has a bug that a shown test notices."""
    while True:
        name = rng.choice(list(SOURCES))
        right = SOURCES[name]
        cases = [ARGUMENTS[name](rng) for _ in range(CASES)]
        wanted = [_result(right, name, case) for case in cases]
        bugs = list(_bugs(right))
        rng.shuffle(bugs)
        for broken in bugs[:TRIES]:
            failing = [_result(broken, name, case) != result for case, result in zip(cases, wanted, strict=True)]
            if any(failing):
                order = sorted(range(CASES), key=lambda i: not failing[i])
                first = _tests(name, [(cases[i], wanted[i]) for i in sorted(order[: CASES // 2])])
                every = _tests(name, list(zip(cases, wanted, strict=True)))
                pairs = zip(right.splitlines(), broken.splitlines(), strict=True)
                line = next(number for number, (a, b) in enumerate(pairs, start=1) if a != b)
                wrong = tuple(f"test_{number}" for number, fails in enumerate(failing) if fails)
                return Problem(f"{name}.py", broken, right, first, every, wrong, line)


def _bugs(source: str) -> Iterator[str]:
    """The module with one operator or number changed, at each place where there is one."""
    count = sum(1 for _ in ast.walk(ast.parse(source)))
    for place in range(count):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[place]
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPS:
            node.op = _SWAPS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            node.ops[0] = _SWAPS[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        else:
            continue
        yield ast.unparse(tree) + "\n"


def _result(source: str, name: str, case: tuple[Any, ...]) -> Any:
    """What one of SOURCES, or a change of it, gives."""
    scope: dict[str, Any] = {}
    exec(compile(source, name, "exec"), scope)
    try:
        return scope[name](*case)
    except (IndexError, ZeroDivisionError, TypeError, ValueError) as error:
        return type(error).__name__


def _tests(name: str, cases: list[tuple[tuple[Any, ...], Any]]) -> str:
    lines = [f"from {name} import {name}", ""]
    for number, (case, result) in enumerate(cases):
        arguments = ", ".join(map(repr, case))
        lines += [f"def test_{number}():", f"    assert {name}({arguments}) == {result!r}", ""]
    return "\n".join(lines)
