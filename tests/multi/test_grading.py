"""Regression caught: a program that passes tests by other means than right answers."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest

from tandem.errors import TaskError
from tandem.sandbox.grade import Verdict, earned
from tests.sandboxes import GRADING, graded

EXPECTED = 736_451  # is nowhere but in the tests
TESTS = f"""
import double
from double import twice

def test_small():
    assert twice(2) == 4

def test_large():
    assert twice({EXPECTED // 2}) + 1 == {EXPECTED}

def test_raises():
    try:
        twice("no")
    except TypeError:
        return
    raise AssertionError("it took a text")
"""
RIGHT = """
def twice(n):
    if not isinstance(n, int):
        raise TypeError(n)
    return 2 * n
"""


def test_a_right_program() -> None:
    """A program that is right and does not pass; a wrong one that loses what it has right."""
    assert graded(RIGHT, TESTS) == [Verdict(name, True) for name in ("test_small", "test_large", "test_raises")]
    part = graded("def twice(n): return n + 2", TESTS)
    assert [each.passed for each in part] == [True, False, True]
    assert earned(part) == 2 / 3
    assert [each.reason for each in part] == ["", "AssertionError: ", ""]
    (reason,) = {each.reason for each in graded("def twice(n: return", TESTS)}
    assert reason.startswith("SyntaxError: ")


# What a program does in place of an answer. `twice` of none is right.
CHEATS = {
    "ends well at once": "import os\nos._exit(0)",
    "ends well when asked": "import os\ndef twice(n): os._exit(0)",
    "exits": "import sys\ndef twice(n): sys.exit(0)",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef twice(n): raise SystemExit",
    "prints what a test runner prints": """
        def twice(n):
            print("3 passed in 0.01s", flush=True)
            print('{"test": "test_small", "reason": ""}', flush=True)
        """,
    "writes verdicts to every descriptor": r"""
        import os
        LINE = b'{"test": "test_small", "reason": ""}\n{"test": "test_large", "reason": ""}\n{"over": true}\n'
        def twice(n):
            for descriptor in range(64):
                try: os.write(descriptor, LINE)
                except OSError: pass
        """,
    "modules in place of the grader's": {
        "double.py": "def twice(n): return 0",
        **dict.fromkeys(
            ("sitecustomize.py", "usercustomize.py", "conftest.py", "tests.py", "test_double.py", "unittest.py"),
            "import builtins, os\nbuiltins.AssertionError = None\nprint('3 passed')\n",
        ),
        "ast.py": "def parse(*_): return type('Tree', (), {'body': []})",
        "json.py": "def loads(*_): return {}\ndef dumps(*_): return '{}'",
        "pytest.ini": "[pytest]\naddopts = --collect-only",
    },
    "an answer that equals everything": """
        class Equal:
            def __eq__(self, other): return True
            def __add__(self, other): return self
            __radd__ = __add__
        def twice(n): return Equal()
        """,
    "a number that equals everything": """
        class Equal(int):
            def __eq__(self, other): return True
            def __add__(self, other): return self
        def twice(n): return Equal(0)
        """,
    "a module that is something else": """
        import sys
        class Other:
            def __getattr__(self, name): return lambda *_: True
        sys.modules["double"] = Other()
        """,
    "changed builtins": """
        import builtins, sys
        builtins.AssertionError = builtins.TypeError = Warning
        for module in list(sys.modules.values()):
            for name in ("compare", "assertEqual", "run_test"):
                setattr(module, name, lambda *_: True)
        def twice(n): return 0
        """,
    "an error of the tests": "def twice(n): raise AssertionError",
    "a skip": "import unittest\ndef twice(n): raise unittest.SkipTest('no')",
    "the end of its caller": """
        import os, signal
        def twice(n):
            for pid in (1, os.getppid(), -1):
                os.kill(pid, signal.SIGKILL)
        """,
    "answers before they are asked for": r"""
        import os, threading, time
        def speak():
            for turn in range(1, 2000):
                for descriptor in range(3, 32):
                    try: os.write(descriptor, b'{"turn": %d, "value": null, "after": ["l", ["l"], ["d"]]}\n' % turn)
                    except OSError: pass
        threading.Thread(target=speak, daemon=True).start()
        def twice(n): time.sleep(0.01)
        """,
    "answers that are none": r"""
        import json
        json.dumps = lambda *_: next(LINES)
        LINES = iter(["[" * 100_000,
            '{"turn": 1}', '{"turn": 1, "value": ["q"]}', "NaN", '{"turn": "1"}', "1" * 5000] * 9)
        def twice(n): return 0
        """,
    "answers without end": """
        def twice(n): return "x" * 5_000_000
        """,
    "a value nested without end": """
        def twice(n):
            value = []
            for _ in range(100_000): value = [value]
            return value
        """,
    "a name that is an error of the system": """
        class Odd(Exception): pass
        Odd.__module__, Odd.__qualname__ = "builtins", "SystemExit"
        def twice(n): raise Odd
        """,
    "an end by another name": "def twice(n): raise KeyboardInterrupt",
    "an end by a thread": """
        import os, threading, time
        threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()
        def twice(n): time.sleep(0.2)
        """,
    "a skip by its name": """
        class SkipTest(Exception): pass
        SkipTest.__module__, SkipTest.__qualname__ = "unittest.case", "SkipTest"
        def twice(n): raise SkipTest
        """,
    "its argument": "def twice(n): return n",
    "a generator": "def twice(n): yield 2 * n",
    "a coroutine": "async def twice(n): return 2 * n",
    "no number": "def twice(n): return float('nan')",
    "a large number": "def twice(n): return 10**300_000",
    "a list without end": """
        class Endless(list):
            def __iter__(self):
                while True: yield 4
        def twice(n): return Endless()
        """,
    "a class that lies": """
        class Lies(str):
            __class__ = int
            def __eq__(self, other): return True
            def __add__(self, other): return self
            def __hash__(self): return hash(4)
        def twice(n): return Lies()
        """,
    "recursion": "def twice(n): return twice(n)",
    "more memory than there is": "def twice(n): return len(bytearray(10**11))",
    "two of it": "import os\ndef twice(n): os.fork()",
    "another player": """
        import gc
        for each in gc.get_objects():
            if type(each).__name__ == "Player":
                type(each).do = lambda self, asked: {"value": ["x", 0, ["builtins.AssertionError"]]}
        """,
    "other values": """
        import __main__
        __main__.encode = lambda *_: ["t", True, ["i", "0x1"], ["h", 0, "int"]]
        def twice(n): return None
        """,
    "an error that is none": """
        import gc
        for each in gc.get_objects():
            if type(each).__name__ == "Player":
                type(each).answer = lambda self, line: {"raised": [], "arguments": 7, "turn": 1}
        """,
    "what the tests were told": """
        for place in ("told.json", "../told.json"):
            try: file = open(place, "w")
            except OSError: continue
            file.write('{"tests": "def test_small(): pass"}')
        def twice(n): return None
        """,
    "its own output": "def twice(n):\n    while True: print('x' * 1000)",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats(cheat: str) -> None:
    """A program that is graded as right, in any test, for something else than an answer; or that ends the grader."""
    files = CHEATS[cheat]
    files = files if isinstance(files, dict) else {"double.py": textwrap.dedent(files)}
    results = graded(files, TESTS.replace("except TypeError", "except ZeroDivisionError"), 1.0)
    assert [each.name for each in results] == ["test_small", "test_large", "test_raises"]
    assert not any(each.passed for each in results), results
    assert all(each.reason for each in results)


LOOKS = """
import gc, os, sys
FOUND = []
MINUS, WORDS = -int("736" + "451"), (b"736" + b"451", b"test" + b"_large")

def twice(n):
    look()
    return 2 * n

def look():
    places = [f"/proc/{pid}/{name}" for pid in os.listdir("/proc") if pid.isdigit() for name in ("cmdline", "environ")]
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if folder != "/" or name not in ("proc", "usr", "root", "opt", "home")]
        places += [f"{folder}/{name}" for name in files]
    for place in places:
        try:
            text = open(place, "rb").read(100_000) if os.path.isfile(place) else b""
        except OSError:
            continue
        FOUND.extend((place, word) for word in WORDS if word in text)
    for each in gc.get_objects():
        if isinstance(each, (dict, list, tuple, set)):
            FOUND.extend(each for value in (each.values() if isinstance(each, dict) else each) if value == -MINUS)
    frame = sys._getframe()
    while frame is not None:
        FOUND.extend(name for name, value in frame.f_locals.items() if value == -MINUS)
        frame = frame.f_back

def found():
    return [str(each)[:300] for each in FOUND]
"""


def test_what_a_program_can_see() -> None:
    """An expected value, or a test's name or text, within the reach of the program that it grades."""
    assert str(EXPECTED) not in LOOKS and str(EXPECTED) in TESTS
    tests = f"""
        from double import found, twice
        def test_large(): assert twice({EXPECTED // 2}) + 1 == {EXPECTED}
        def test_found(): assert found() == [], found()
        """
    assert [each.reason for each in graded(LOOKS, tests)] == ["", ""]
    assert (
        "736451" in graded(LOOKS, tests.replace("twice(", f"twice({EXPECTED}), twice("))[1].reason
    )  # it would find it


OBJECTS = """
class Broken(ValueError):
    pass

class Stack:
    size = 3
    def __init__(self, *held): self.held = list(held)
    def push(self, each): self.held.append(each)
    def pop(self):
        if not self.held: raise Broken("empty")
        return self.held.pop()
    def __len__(self): return len(self.held)
    def __iter__(self): return iter(self.held)
    def __contains__(self, each): return each in self.held
    def __add__(self, other): return Stack(*self.held, *other.held)

def count(n):
    for i in range(n): yield i

def sort(numbers, into=None):
    numbers.sort()
    if into is not None: into.update(first=numbers[0])

def hang():
    while True: pass
def same(value): return value
"""
OBJECT_TESTS = """
import unittest
from objects import *
import objects

def test_values():
    odd = [2**200, -0.5, float("inf"), 1j, "ü\\0", b"x"]
    for value in [None, True, *odd, [], (1, [2]), {"a": {1}}, {(1, 2): frozenset([3])}]:
        assert same(value) == value and type(same(value)) is type(value), value
    assert same(float("nan")) != same(float("nan"))

def test_objects():
    stack = Stack(1)
    stack.push((2, 3))
    assert len(stack) == 2 and stack.pop() == (2, 3) and list(stack + stack) == [1, 1]
    assert Stack.size == objects.Stack.size == 3 and stack.held == [1] and not Stack()

def test_errors():
    try:
        Stack().pop()
    except objects.Broken as error:
        assert str(error) == "empty" and isinstance(error, ValueError)
    else:
        raise AssertionError

def test_changes():
    numbers, into = [3, 1, 2], {}
    assert sort(numbers, into=into) is None and numbers == [1, 2, 3] and into == {"first": 1}

def test_generators():
    assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0

def test_hangs(): hang()

def test_goes_on(): assert same(1) == 1

class TestPlain:
    def test_method(self): assert same(2) == 2

class Case(unittest.TestCase):
    def setUp(self): self.value = same(5)
    def test_equal(self): self.assertEqual(self.value, 5)
    def test_hangs(self): hang()
    def test_raises(self):
        with self.assertRaises(Broken): Stack().pop()
    @unittest.skip("later")
    def test_skipped(self): self.assertEqual(self.value, 5)
    def test_wrong(self): self.assertEqual(self.value, 6)

def test_compares(): assert Stack() == Stack()
def test_asks_it(): assert 7 in Stack(7)

def test_gives_a_function(): same(lambda: 1)

def test_is_not_there(): objects.nothing()
"""


def test_what_tests_may_use() -> None:
    """Tests of ordinary kinds that fail for how they are run; or one that hangs and takes others with it."""
    results = graded({"objects.py": OBJECTS}, OBJECT_TESTS, 1.0)
    slow = "the program took longer than 1 s"
    assert {each.name: each.reason for each in results} == {
        **dict.fromkeys(("test_values", "test_objects", "test_errors", "test_changes", "test_generators"), ""),
        "test_hangs": slow,
        **dict.fromkeys(("test_goes_on", "TestPlain.test_method", "Case.test_equal"), ""),
        "Case.test_hangs": slow,
        "Case.test_raises": "",
        "Case.test_skipped": "AssertionError: later",
        "Case.test_wrong": "AssertionError: AssertionError: 5 != 6",
        "test_compares": "TypeError: a Stack of the program cannot be compared: compare plain values",
        "test_asks_it": "TypeError: __contains__ of a Stack of the program and a value: compare plain values",
        "test_gives_a_function": "TypeError: a function cannot be given to the program: only plain values can",
        "test_is_not_there": "AttributeError: module 'objects' has no attribute 'nothing'",
    }


def test_packages_and_time() -> None:
    """A program in folders that cannot be imported; tests that take all the time there is and hide the others."""
    files = {
        "tools/__init__.py": "",
        "tools/deep/__init__.py": "from .sums import add",
        "tools/deep/sums.py": "def add(a, b): return a + b",
    }
    tests = """
        import tools.deep.sums as sums
        from tools.deep import add
        def test_a(): assert add(1, 2) == sums.add(2, 1) == 3
        """
    assert graded(files, tests) == [Verdict("test_a", True)]
    many = "from double import twice\n" + "".join(f"def test_{n}(): twice(1)\n" for n in range(30))
    results = graded("import time\ndef twice(n): time.sleep(3600)", many, 2.0, replace(GRADING, seconds=6.0))
    assert [each.passed for each in results] == [False] * 30
    assert results[0].reason == "the program took longer than 2 s" and results[-1].reason == "no time was left for it"


@pytest.mark.parametrize(
    ("tests", "said"), [("def test_(:", "are no Python"), ("x = 1", "have no function"), ("\0", "are no Python")]
)
def test_tests_that_are_none(tests: str, said: str) -> None:
    """A task whose tests hold no test, and every answer gets full marks, or none, in silence."""
    with pytest.raises(TaskError, match=said):
        graded(RIGHT, tests)
