"""Small modules with one planted bug each, and tests that tell: repair problems without end, from a seed."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SHOWN, HIDDEN = 2, 6  # tests of a module

# What a bug may be planted in, and the kinds of its arguments. It ends, whatever is changed: there is no `while`.
FUNCTIONS = """
def add(a: small, b: small): return a + b
def difference(a: small, b: small): return a - b
def area(width: small, height: small): return width * height
def perimeter(width: small, height: small): return 2 * (width + height)
def square(x: small): return x * x
def triple(x: small): return x * 3
def half(x: small): return x // 2
def next_day(day: small): return day + 1
def previous_page(page: small): return page - 1
def minutes(hours: small): return hours * 60
def seconds(minutes: small): return minutes * 60
def legs(dogs: small): return dogs * 4
def weeks(days: large): return days // 7
def full_boxes(eggs: large): return eggs // 6
def last_digit(n: large): return n % 10
def remainder(a: large, b: digit): return a % b
def average(a: small, b: small): return (a + b) / 2
def change(paid: large, price: small): return paid - price
def cost(price: digit, count: digit): return price * count
def with_tip(price: small, tip: digit): return price + tip
def is_adult(age: age): return age >= 18
def is_child(age: age): return age < 18
def is_even(n: small): return n % 2 == 0
def is_odd(n: small): return n % 2 == 1
def is_positive(n: signed): return n > 0
def is_negative(n: signed): return n < 0
def is_zero(n: signed): return n == 0
def is_longer(a: word, b: word): return len(a) > len(b)
def is_empty(values: any_numbers): return len(values) == 0
def between(x: signed): return x > -2 and x < 2
def smaller(a: small, b: small): return min(a, b)
def bigger(a: small, b: small): return max(a, b)
def lowest(values: numbers): return min(values)
def highest(values: numbers): return max(values)
def spread(values: numbers): return max(values) - min(values)
def mean(values: numbers): return sum(values) / len(values)
def total_price(prices: numbers): return sum(prices)
def count_all(values: any_numbers): return len(values)
def first(values: numbers): return values[0]
def second(values: numbers): return values[1]
def last(values: numbers): return values[-1]
def without_first(values: numbers): return values[1:]
def first_two(values: numbers): return values[:2]
def initial(name: word): return name[0]
def shout(text: word): return text.upper()
def whisper(text: word): return text.lower()
def plural(word: word): return word + 's'
def twice(text: word): return text * 2

def total(values: numbers):
    result = 0
    for value in values:
        result = result + value
    return result

def product(values: numbers):
    result = 1
    for value in values:
        result = result * value
    return result

def largest(values: numbers):
    best = values[0]
    for value in values:
        if value > best:
            best = value
    return best

def smallest(values: numbers):
    best = values[0]
    for value in values:
        if value < best:
            best = value
    return best

def count_even(values: numbers):
    count = 0
    for value in values:
        if value % 2 == 0:
            count = count + 1
    return count

def count_negative(values: numbers):
    count = 0
    for value in values:
        if value < 0:
            count = count + 1
    return count

def clamp(value: signed):
    if value < -3:
        return -3
    if value > 3:
        return 3
    return value

def absolute(x: signed):
    if x < 0:
        return -x
    return x

def below(values: numbers, limit: small):
    found = []
    for value in values:
        if value < limit:
            found.append(value)
    return found

def doubled(values: numbers):
    found = []
    for value in values:
        found.append(value * 2)
    return found

def price(count: digit, each: digit, free: digit):
    paid = count - free
    if paid < 0:
        paid = 0
    return paid * each

def ticket(age: age):
    if age < 18:
        return 5
    return 8
"""
WORDS = ("apple", "Tree", "sun", "Moon", "river", "Oak", "sea", "Bird", "kite", "Rain")
KINDS: dict[str, Callable[[random.Random], Any]] = {
    "digit": lambda rng: rng.randrange(1, 10),
    "small": lambda rng: rng.randrange(2, 25),
    "large": lambda rng: rng.randrange(20, 100),
    "signed": lambda rng: rng.randrange(-6, 7),
    "age": lambda rng: rng.choice([5, 12, 17, 18, 18, 19, 30, 64]),
    "numbers": lambda rng: [rng.randrange(-9, 20) for _ in range(rng.randrange(2, 5))],
    "any_numbers": lambda rng: [rng.randrange(-9, 20) for _ in range(rng.randrange(4))],
    "word": lambda rng: rng.choice(WORDS),
}
_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Lt: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.And: ast.Or,
}
_NAMES = {"min": "max", "max": "min", "sum": "len", "len": "sum", "upper": "lower", "lower": "upper"}


@dataclass(frozen=True, slots=True)
class Function:
    """What a bug is planted in."""

    name: str
    source: str  # of the module, which is this function
    kinds: tuple[str, ...]  # of its arguments
    lines: int  # of its body


def _read(node: ast.FunctionDef) -> Function:
    kinds = [ast.unparse(each.annotation) for each in node.args.args if each.annotation is not None]
    for each in node.args.args:
        each.annotation = None
    source = ast.unparse(node) + "\n"
    return Function(node.name, source, tuple(kinds), source.count("\n") - 1)


_ALL = [_read(node) for node in ast.parse(FUNCTIONS).body if isinstance(node, ast.FunctionDef)]
# No training prompt is planted in a function that a held-out one is planted in.
SPLITS = {"train": [one for i, one in enumerate(_ALL) if i % 4 != 1], "heldout": _ALL[1::4]}


@dataclass(frozen=True, slots=True)
class Problem:
    """A module with a bug.

    >>> planted(random.Random(1), "train").path.endswith(".py")
    True
    """

    path: str
    broken: str  # the module as the program finds it
    right: str
    issue: str  # what a shown test gives, and what it should
    shown: str  # tests that the program may run, the first of which fails
    hidden: str  # other tests
    failing: tuple[str, ...]  # of the hidden ones
    line: int  # of the bug, from 1


def planted(rng: random.Random, split: str, most_lines: int = 0) -> Problem:
    """A problem whose bug a shown and a hidden test notice. most_lines: of the function's body; 0 is any."""
    allowed = [one for one in SPLITS[split] if not most_lines or one.lines <= most_lines]
    while True:
        function = rng.choice(allowed)
        broken = rng.choice(list(_bugs(function.source)))
        cases = [tuple(KINDS[kind](rng) for kind in function.kinds) for _ in range(SHOWN + HIDDEN)]
        wanted = [_result(function.source, function.name, case) for case in cases]
        given = [_result(broken, function.name, case) for case in cases]
        order = sorted(range(len(cases)), key=lambda i: given[i] == wanted[i])  # those that fail first
        first, hidden = order[:1] + order[len(order) - SHOWN + 1 :], order[1 : 1 + HIDDEN]
        failing = tuple(f"test_{number}" for number, i in enumerate(hidden) if given[i] != wanted[i])
        if not failing:
            continue
        pairs = zip(function.source.splitlines(), broken.splitlines(), strict=True)
        line = next(number for number, (a, b) in enumerate(pairs, start=1) if a != b)
        call, (value, raised) = _call(function.name, cases[order[0]]), given[order[0]]
        does = f"raises {raised}" if raised else f"gives {value!r}"
        return Problem(
            path=f"{function.name}.py",
            broken=broken,
            right=function.source,
            issue=f"{call} {does}. It should be {wanted[order[0]][0]!r}.",
            shown=_tests(function.name, [(cases[i], wanted[i][0]) for i in first]),
            hidden=_tests(function.name, [(cases[i], wanted[i][0]) for i in hidden]),
            failing=failing,
            line=line,
        )


def _bugs(source: str) -> Iterator[str]:
    """The module with one operator, number or name changed, at each place where there is one."""
    count = sum(1 for _ in ast.walk(ast.parse(source)))
    for place in range(count):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[place]
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
            node.op = _SWAPS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            node.ops[0] = _SWAPS[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        elif isinstance(node, ast.Name) and node.id in _NAMES:
            node.id = _NAMES[node.id]
        elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
            node.attr = _NAMES[node.attr]
        else:
            continue
        yield ast.unparse(tree) + "\n"


def _result(source: str, name: str, case: tuple[Any, ...]) -> tuple[Any, str]:
    """What a function above, or a change of it, gives, or what it raises."""
    scope: dict[str, Any] = {}
    exec(compile(source, name, "exec"), scope)
    try:
        return scope[name](*case), ""
    except (IndexError, ZeroDivisionError, TypeError, ValueError) as error:
        return None, type(error).__name__


def _call(name: str, case: tuple[Any, ...]) -> str:
    return f"{name}({', '.join(map(repr, case))})"


def _tests(name: str, cases: list[tuple[tuple[Any, ...], Any]]) -> str:
    lines = [f"from {name} import {name}", ""]
    for number, (case, result) in enumerate(cases):
        lines += [f"def test_{number}():", f"    assert {_call(name, case)} == {result!r}", ""]
    return "\n".join(lines)
