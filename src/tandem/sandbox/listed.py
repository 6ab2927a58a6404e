"""The tests that a Python source holds, without running it, and which of them cannot be run as they are meant.

Handed to the interpreter of `judge.py` as text before it: the standard library alone.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

MARKS = ("parametrize", "skip", "skipif", "xfail", "usefixtures")  # of pytest: tests that are run otherwise than called


class Test(NamedTuple):
    """A test of a file; `wrong` says why it cannot be run as it is meant."""

    owner: str  # its class, or ""
    name: str
    wrong: str = ""

    @property
    def title(self) -> str:
        return f"{self.owner}.{self.name}".lstrip(".")


def test_names(source: str) -> list[Test]:
    """The tests of a file: functions `test...` and methods of classes, those of their bases in it too.

    >>> test_names("def test_a(): assert f() == 1\\nasync def test_b(n): await g(n)")[1]
    Test(owner='', name='test_b', wrong="it takes arguments (n), as pytest's fixtures: nothing here gives them")
    """
    body = ast.parse(source).body
    every = next(filter(None, map(_wrong_for_all, body)), "")
    found: dict[tuple[str, str], Test] = {}
    methods: dict[str, dict[str, str]] = {}  # class -> its tests, and what is wrong with them
    cases: set[str] = set()
    tested: dict[str, bool] = {}  # class -> its `__test__`
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    bases = {base.id for node in classes for base in node.bases if isinstance(base, ast.Name)}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            found["", node.name] = Test("", node.name, every or _wrong(node, method=False))
        if not isinstance(node, ast.ClassDef):
            continue
        above = [_dotted(base) for base in node.bases]
        if any(name in cases or name.endswith("TestCase") for name in above):
            cases.add(node.name)
        own: dict[str, str] = {}
        for name in reversed(above):
            own |= methods.get(name, {})
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name.startswith("test"):
                own[inner.name] = _marked(node) or _wrong(inner, method=True)
            elif isinstance(inner, ast.Assign):  # `test_of_its_base = None`
                for target in inner.targets:
                    own.pop(getattr(target, "id", ""), None)
            elif isinstance(inner, ast.ClassDef) and inner.name.startswith("Test") and node.name not in cases:
                where = "a class in a class is not run here: put it at the top of the file"
                own |= {f"{inner.name}.{name}": where for name in _methods(inner)}
        methods[node.name] = own
        tested[node.name] = _tested(node, next((tested[name] for name in above if name in tested), True))
        if not tested[node.name]:
            continue
        if node.name in cases or node.name.startswith("Test") or node.name not in bases:
            found |= {(node.name, name): Test(node.name, name, every or wrong) for name, wrong in own.items()}
    return list(found.values())


def _wrong(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    if mark := _marked(node):
        return mark
    needed = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
    needed = needed[: len(needed) - len(node.args.defaults)][method:]
    if needed and not node.decorator_list:  # some decorators give arguments
        return f"it takes arguments ({', '.join(needed)}), as pytest's fixtures: nothing here gives them"
    if all(map(_says_nothing, node.body)):
        return "it tests nothing"
    return ""


def _methods(node: ast.ClassDef) -> list[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [one.name for one in node.body if isinstance(one, functions) and one.name.startswith("test")]


def _tested(node: ast.ClassDef, above: bool) -> bool:
    """What a class says by `__test__ = ...`, or one above it."""
    given = [one for one in node.body if isinstance(one, ast.Assign) and "__test__" in map(_dotted, one.targets)]
    value = given[-1].value if given else None
    return bool(value.value) if isinstance(value, ast.Constant) else above


def _says_nothing(node: ast.stmt) -> bool:
    checked = node.test if isinstance(node, ast.Assert) else node.value if isinstance(node, ast.Expr) else None
    return isinstance(node, ast.Pass) or isinstance(checked, ast.Constant)


def _marked(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    for decorator in node.decorator_list:
        name = _dotted(decorator.func if isinstance(decorator, ast.Call) else decorator)
        if ".mark." in f".{name}" and name.rpartition(".")[2] in MARKS:
            return f"it has the mark {name}: pytest's marks are not understood here"
    return ""


def _wrong_for_all(node: ast.stmt) -> str:
    """Why no test of a file can be run as it is meant, for one of its statements."""
    if isinstance(node, ast.Assign) and any(_dotted(target) == "pytestmark" for target in node.targets):
        return "the file has a pytestmark: pytest's marks are not understood here"
    for each in getattr(node, "decorator_list", ()):
        if isinstance(each, ast.Call) and _dotted(each.func).endswith("fixture"):
            if any(one.arg == "autouse" for one in each.keywords):
                return f"{getattr(node, 'name', '')} is a fixture for every test: pytest's are not understood here"
    return ""


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
