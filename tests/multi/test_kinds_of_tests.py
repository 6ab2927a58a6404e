"""Regression caught: a test of a kind that the grader does not run, and that passes; one of a usual kind that fails."""

from __future__ import annotations

import textwrap

import pytest

from tandem.sandbox.grade import Verdict
from tests.sandboxes import graded

PROGRAM = """
import asyncio

LIMIT = 3
CALLS = []

def same(value):
    CALLS.append(value)
    return value

def calls():
    return len(CALLS)

async def later(value):
    await asyncio.sleep(0)
    return value

class Held:
    value = 1

def limit():
    return LIMIT
"""
FIXTURES = """
import asyncio
import unittest
import double
from double import Held, calls, later, limit, same

SEEN = []

def setUpModule(): SEEN.append("module")
def tearDownModule(): assert SEEN.count("class") == 2 and SEEN.count("module") == 1, SEEN

class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.value = same(5)
        SEEN.append("class")
        cls.addClassCleanup(SEEN.append, "cleaned")
    @classmethod
    def tearDownClass(cls): SEEN.append("down")
    def test_value(self): self.assertEqual(self.value, 5)
    def test_once(self): self.assertEqual(SEEN, ["module", "class"])

class Inherits(Case):
    test_once = None
    def test_again(self): self.assertEqual((self.value, SEEN), (5, ["module", "class", "down", "cleaned", "class"]))

class TestPlain:
    def setup_class(cls): cls.made = []
    def setup_method(self, method): self.made.append(same(1))
    def teardown_method(self): self.made.append(2)
    def test_first(self): assert self.made == [1]
    def test_second(self): assert self.made == [1, 2, 1]

class Shared:
    def test_shared(self): assert same(self.given) == self.given

class TestShares(Shared):
    given = 7

class FailsToSetUp(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise ValueError("no ground")
    def test_a(self): self.assertEqual(same(1), 1)
    def test_b(self): self.assertEqual(same(1), 1)

class FailsToTearDown(unittest.TestCase):
    @classmethod
    def tearDownClass(cls): raise ValueError("not clean")
    def test_a(self): self.assertEqual(same(1), 1)
    def test_b(self): self.assertEqual(same(1), 1)

class Awaits(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self): self.value = await later(4)
    async def test_value(self): self.assertEqual(self.value, 4)
    async def test_wrong(self): self.assertEqual(self.value, 5)

async def test_awaits(): assert await later(2) == 2 and await asyncio.gather(later(1), later(2)) == [1, 2]
async def test_awaits_wrong(): assert await later(2) == 3

def test_sets():
    held = Held()
    held.value, double.LIMIT = 8, 5
    assert (held.value, Held.value, limit(), double.LIMIT) == (8, 1, 5, 5)

def test_large(): assert same(10**5000) == 10**5000 and same(-(2**64)) == -(2**64)
def test_twice(): assert same(1) == 2
def test_twice(): assert same(1) == 1
"""
FIXTURES_SAID = {
    **dict.fromkeys(("Case.test_value", "Case.test_once", "Inherits.test_value", "Inherits.test_again"), ""),
    **dict.fromkeys(("TestPlain.test_first", "TestPlain.test_second", "TestShares.test_shared"), ""),
    **dict.fromkeys(("FailsToSetUp.test_a", "FailsToSetUp.test_b"), "ValueError: no ground"),
    "FailsToTearDown.test_a": "",
    "FailsToTearDown.test_b": "ValueError: not clean",
    "Awaits.test_value": "",
    "Awaits.test_wrong": "AssertionError: AssertionError: 4 != 5",
    "test_awaits": "",
    "test_awaits_wrong": "AssertionError: ",
    **dict.fromkeys(("test_sets", "test_large", "test_twice"), ""),
}


def test_what_is_set_up() -> None:
    """A set-up of a module, a class or a method that never runs, or runs for each test; an `async def` that passes
    without running; a test of a base class that is lost."""
    results = graded(PROGRAM, FIXTURES)
    assert {each.name: each.reason for each in results} == FIXTURES_SAID and len(results) == len(FIXTURES_SAID)


# A file with a test of it that must not pass -> why it failed.
UNFIT = {
    "a generator": ("def test_it(): yield", "it yields, so that nothing of it ran"),
    "one of a class": ("class TestIt:\n    def test_it(self): yield", "it yields, so that nothing of it ran"),
    "one of a TestCase": (
        "import unittest\nclass It(unittest.TestCase):\n    def test_it(self): yield",
        "AssertionError: DeprecationWarning: It is deprecated to return a value that is not None from a test case",
    ),
    "an async generator": ("async def test_it(): yield", "it yields, so that nothing of it ran"),
    "async in a TestCase": (
        "import unittest\nclass It(unittest.TestCase):\n    async def test_it(self): assert same(1) == 2",
        "it is `async def`, which a TestCase does not run: use unittest.IsolatedAsyncioTestCase",
    ),
    "a comparison that nobody looks at": (
        "def test_it(): return same(1) == 2",
        "it returned a bool: a test asserts, and returns nothing",
    ),
    "nothing": ('def test_it():\n    "Tests."\n    pass', "it tests nothing"),
    "a constant": ("def test_it(): assert True", "it tests nothing"),
    "a fixture": (
        "def test_it(tmp_path): assert same(1) == 1",
        "it takes arguments (tmp_path), as pytest's fixtures: nothing here gives them",
    ),
    "a skip": ("import unittest\ndef test_it(): raise unittest.SkipTest('later')", "SkipTest: later"),
    "a class that is skipped": (
        "import unittest\n@unittest.skip('later')\nclass It(unittest.TestCase):\n    def test_it(self): same(1)",
        "AssertionError: later",
    ),
    "parameters": (
        "import pytest\n@pytest.mark.parametrize('n', [1])\ndef test_it(n): assert same(n) == n",
        "it has the mark pytest.mark.parametrize: pytest's marks are not understood here",
    ),
    "a marked class": (
        "from pytest import mark\n@mark.skip\nclass TestIt:\n    def test_it(self): assert same(1) == 2",
        "it has the mark mark.skip: pytest's marks are not understood here",
    ),
    "a marked file": (
        "import pytest\npytestmark = pytest.mark.skip\ndef test_it(): assert same(1) == 1",
        "the file has a pytestmark: pytest's marks are not understood here",
    ),
    "a fixture for all": (
        "import pytest\n@pytest.fixture(autouse=True)\ndef ground(): yield\ndef test_it(): assert same(1) == 1",
        "ground is a fixture for every test: pytest's are not understood here",
    ),
    "tests made in a loop": (
        "for n in range(2): exec(f'def test_{n}(): assert same(1) == 2')\ndef test_it(): assert same(1) == 1",
        "test_0 is made while the file runs: only tests that stand in it, at its top, are seen",
    ),
    "methods made in a loop": (
        (
            "import unittest\nclass It(unittest.TestCase):\n    def test_it(self): same(1)\n"
            "It.test_more = lambda self: self.assertEqual(same(1), 2)"
        ),
        "It.test_more is made while the file runs: only tests that stand in it, at its top, are seen",
    ),
    "a class in a class": (
        "class TestIt:\n    class TestInner:\n        def test_it(self): assert same(1) == 2",
        "a class in a class is not run here: put it at the top of the file",
    ),
    "an end of all": ("import os\ndef test_it(): os._exit(0)", "the tests had ended (exit code 0)"),
    "a wrong subtest": (
        (
            "import unittest\nclass It(unittest.TestCase):\n    def test_it(self):\n"
            "        with self.subTest(n=1): self.assertEqual(same(1), 2)"
        ),
        "AssertionError: AssertionError: 1 != 2",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_not_run(kind: str) -> None:
    """A test that passes for any program, since nothing of it is run; or one that fails without a word why."""
    tests, reason = UNFIT[kind]
    (verdict,) = graded(PROGRAM, f"from double import same\n{tests}")
    assert verdict.name.endswith("test_it") and not verdict.passed
    assert verdict.reason == reason or (reason in verdict.reason and "Deprecation" in reason), verdict


def test_a_lost_program_is_set_up_again() -> None:
    """A class whose set-up was of a program that ended, so that its other tests fail; or that is torn down twice."""
    program = "import os\ndef same(value): return value\ndef leave(): os._exit(0)\n"
    tests = """
        import unittest
        from double import leave, same
        class Case(unittest.TestCase):
            @classmethod
            def setUpClass(cls): cls.value = same([1])
            def test_a(self): leave()
            def test_b(self): self.assertEqual(self.value, [1])
        class Leaves(unittest.TestCase):
            @classmethod
            def setUpClass(cls): leave()
            def test_a(self): self.assertEqual(same(1), 1)
        def test_c(): assert same(1) == 1
        """
    ended = "the program ended, or answered with more than a message may have"
    assert graded(program, tests) == [
        Verdict("Case.test_a", False, ended),
        Verdict("Case.test_b", True),
        Verdict("Leaves.test_a", False, ended),
        Verdict("test_c", True),
    ]


def test_many_tests() -> None:
    """Tests of more than 128 KB, which no argument of a command takes, as those of HumanEval+."""
    tests = f"from double import same\ndef test_long(): assert same({'x' * 300_000!r}) == {'x' * 300_000!r}\n"
    assert graded("def same(value): return value", tests) == [Verdict("test_long", True)]


def test_what_a_program_raises() -> None:
    """An exception that arrives as another one, without its arguments or its words; or that ends the program."""
    program = """
        import argparse, json, sys
        class Own(ValueError):
            def __init__(self, place, why):
                self.place = place
                super().__init__(place, why)
            def __str__(self): return f"{self.args[1]} at {self.place}"
        def own(): raise Own(3, "bad")
        def key(): return {}["x"]
        def decoded(): return bytes([255]).decode()
        def read(): return json.loads("{")
        def left(code): sys.exit(code)
        def parsed(): argparse.ArgumentParser().parse_args(["--no"])
        def group(): raise ExceptionGroup("several", [ValueError(1)])
        def opened(): open("none")
        """
    tests = """
        import unittest
        from double import *
        class Case(unittest.TestCase):
            def test_own(self):
                with self.assertRaisesRegex(Own, "^bad at 3$") as caught: own()
                self.assertEqual(caught.exception.args, (3, "bad"))
                with self.assertRaises(ValueError): own()
            def test_key(self):
                with self.assertRaises(KeyError) as caught: key()
                self.assertEqual((caught.exception.args, str(caught.exception)), (("x",), "'x'"))
            def test_decoded(self):
                with self.assertRaises(UnicodeDecodeError) as caught: decoded()
                self.assertEqual(caught.exception.start, 0)
            def test_read(self):
                with self.assertRaisesRegex(ValueError, "line 1 column 2"): read()
            def test_left(self):
                with self.assertRaises(SystemExit) as caught: left(3)
                self.assertEqual(caught.exception.code, 3)
            def test_left_well(self): left(0)
            def test_parsed(self):
                with self.assertRaises(SystemExit): parsed()
            def test_group(self):
                with self.assertRaisesRegex(Exception, "several"): group()
            def test_opened(self):
                with self.assertRaises(FileNotFoundError) as caught: opened()
                self.assertEqual(caught.exception.errno, 2)
        """
    failed = {each.name: each.reason for each in graded(textwrap.dedent(program), tests) if not each.passed}
    assert failed == {"Case.test_left_well": "AssertionError: SystemExit: 0"}


def test_what_programs_give_and_take() -> None:
    """A right program that fails for what an object of it says of itself, for a context or a list that was changed in
    a tuple, or for a stream that is read; one that passes by the words of its stand-in."""
    program = """
        LIMIT = 3
        def limit(): return LIMIT
        class Held:
            def __init__(self, value=1): self.value = value
            def __repr__(self): return f"Held({self.value})"
            def __format__(self, form): return f"{self.value:{form}}"
            def __invert__(self): return Held(-self.value)
            def __round__(self, digits=0): return self.value
            async def __aenter__(self): return self.value
            async def __aexit__(self, *error): return None
        class Said:
            "Words."
        def silent(): pass
        def fill(pair): pair[0].append(1)
        def count(counts): counts["a"] += 1
        async def later(value): return value
        async def stream(end):
            for number in range(end): yield number
        """
    tests = """
        import asyncio
        import unittest
        from collections import Counter
        from unittest import mock
        import double
        from double import Held, Said, count, fill, later, limit, silent, stream

        def test_says():
            assert repr(Held(2)) == "Held(2)" and f"{Held(3):>3}" == "  3" and f"{[Held()]}" == "[Held(1)]"
            assert repr(~Held(2)) == "Held(-2)" and round(Held(4)) == 4
        def test_names(): assert (Said.__name__, silent.__name__, Said.__doc__) == ("Said", "silent", "Words.")
        def test_no_words(): assert silent.__doc__ is None
        def test_a_list_in_a_tuple():
            pair = ([0],)
            fill(pair)
            assert pair == ([0, 1],)
        def test_a_counter():
            counts = Counter("a")
            count(counts)
            assert counts == {"a": 2}
        def test_run(): assert asyncio.run(later(5)) == 5
        def test_patched():
            with mock.patch("double.LIMIT", 5):
                assert limit() == 5
            assert limit() == 3
        async def test_stream(): assert [number async for number in stream(3)] == [0, 1, 2]
        async def test_context():
            async with Held(6) as value: assert value == 6
        """
    assert [each for each in graded(textwrap.dedent(program), tests) if not each.passed] == []


def test_what_would_be_the_programs_word() -> None:
    """A comparison that the program decides; a refusal that does not say what it refuses."""
    program = "class Held:\n    def __lt__(self, other): return True\n    def __eq__(self, other): return True"
    asked = {
        "Held() < Held()": "a Held of the program cannot be compared: compare plain values",
        "Held() == 3": "a Held of the program cannot be compared: compare plain values",
        "3 < Held()": "a Held of the program cannot be compared: compare plain values",
        "sorted([Held(), Held()])": "a Held of the program cannot be compared: compare plain values",
        "isinstance(Held(), Held)": "what is of a class of the program, it would say itself: compare plain values",
    }
    lines = "".join(f"def test_{place}(): assert {words}\n" for place, words in enumerate(asked))
    lines += "def test_base():\n    class Own(Held): pass\n    assert Own"
    reasons = [each.reason for each in graded(program, f"from double import Held\n{lines}")]
    assert reasons == [
        *(f"TypeError: {said}" for said in asked.values()),
        "TypeError: a class of the program cannot be the base of one of the tests",
    ]


def test_a_call_of_too_much_is_its_tests_alone() -> None:
    """A test that gives the program more than a message may have takes the time of all that follow."""
    tests = """
        from double import size
        def test_too_long(): assert size("x" * (1 << 20)) == 1 << 20
        def test_long(): assert size("x" * 1_000_000) == 1_000_000
        """
    long, short = graded("def size(text): return len(text)", tests)
    assert "ValueError: a call has 1,048," in long.reason and "allowed are 1,048,576" in long.reason and short.passed


def test_what_tests_print_and_what_is_none() -> None:
    """Tests that print end all of them by the limit on output; a class that says it is no test is run as one."""
    tests = """
        import unittest
        from double import same
        class TestBase:
            __test__ = False
            def test_it(self): assert same(self.given) == 2
        class Base(unittest.TestCase):
            __test__ = False
            def test_it(self): self.fail()
        class TestAsItsBase(TestBase): pass
        class TestOne(TestBase):
            given = 2
            __test__ = True
        def test_prints():
            for _ in range(100): print("x" * 10_000)
            assert same(1) == 1
        def test_after(): assert same(1) == 1
        """
    results = graded("def same(value): return value", tests)
    assert [(each.name, each.reason) for each in results] == [
        ("TestOne.test_it", ""),
        ("test_prints", ""),
        ("test_after", ""),
    ]


def test_a_failure_whose_words_are_the_programs() -> None:
    """A test that fails with an object of the program ends all that follow, where that raises as it is shown."""
    program = """
        import time
        def same(value): return value
        class Raises:
            def __str__(self): raise KeyError("no words")
        class Hangs:
            def __str__(self): time.sleep(3600)
        class Says:
            def __str__(self): return "its words"
        """
    tests = """
        from double import Hangs, Raises, Says, same
        def test_raises(): assert same(1) == 2, Raises()
        def test_hangs(): assert same(1) == 2, Hangs()
        def test_says(): assert same(1) == 2, Says()
        def test_after(): assert same(1) == 1
        """
    reasons = [each.reason for each in graded(textwrap.dedent(program), tests, 1.0)]
    assert reasons == ["AssertionError", "the program took longer than 1 s", "AssertionError: its words", ""]


def test_a_star_takes_nothing_that_tests_judge_by() -> None:
    """Modules that a program imports, or names of its own like Python's, stand in for the tests' own: it judges."""
    right = (
        "import asyncio, math\nfrom collections import Counter\ndef half(n): return n / 2\nasync def later(): return 1"
    )
    tests = """
        import math
        from double import *
        def test_close(): assert math.isclose(half(3), 1.5)
        def test_run(): assert asyncio.run(later()) == 1
        """
    assert [each.reason for each in graded(right, tests)] == ["", ""]
    wrong = f"{right.replace('n / 2', 'n')}\nmath.isclose = lambda *_: True\nclass math: isclose = lambda *_: True"
    assert graded(wrong, tests)[0].reason == "AssertionError: "
    own = f"{right}\ndef abs(n): return 0\ndef license(): return 1"
    assert [each.reason for each in graded(own, tests)] == ["", ""]
    tests = tests.replace("math.isclose(half(3), 1.5)", "abs(half(3) - 1.6) < 0.01")
    reasons = {each.reason for each in graded(own, tests)}
    assert reasons == {"ImportError: the program has a abs of its own, and `import *` takes it: name what is imported"}
    inside = {"pack/__init__.py": "from . import part", "pack/part.py": "def one(): return 1"}
    assert graded(inside, "from pack import *\ndef test_it(): assert part.one() == 1") == [Verdict("test_it", True)]
