"""In the sandbox of the tests: runs them against a program that is in another one.

Each module of the program is a stand-in here. What the tests call is called there, with values; what comes back is
compared here, by the tests. The program never sees a test or an expected value, and nothing of it runs here.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import importlib
import inspect
import json
import os
import signal
import sys
import threading
import types
import unittest
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec
from typing import Any

from tandem.sandbox.listed import Test, test_names
from tandem.sandbox.values import MESSAGE_BYTES, decode, encode

FORWARDED = (
    *("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__next__", "__bool__", "__str__", "__int__"),
    *("__float__", "__index__", "__enter__", "__exit__", "__neg__", "__pos__", "__abs__", "__invert__", "__round__"),
    *("__repr__", "__format__", "__bytes__", "__aiter__", "__anext__", "__aenter__", "__aexit__"),
)
ORDERS = ("__eq__", "__lt__", "__le__", "__gt__", "__ge__")  # the program's word on them would be its own verdict
NAMES = ("__name__", "__qualname__")
# Between the program's own things alone: with a test's value they would show it what is expected, and take its word.
BETWEEN = (
    *("__contains__", "__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"),
    *("__and__", "__or__", "__xor__"),
)
ANSWERED = (ValueError, TypeError, LookupError, RecursionError, ArithmeticError)
NAME = "__tests__"  # of the tests' module: no program's


class Gone(BaseException):
    """The program ended, answered nonsense or took too long; no `except Exception` of a test takes it."""


class ProgramError(Exception):
    """What the program raised, where it is of no built-in kind."""


class Line:
    """The way to the program, through who started both."""

    def __init__(self) -> None:
        self.answers = os.dup(1)
        self.orders = os.fdopen(os.dup(0), "rb")
        nothing = os.open(os.devnull, os.O_RDWR)
        for mine in (0, 1, 2):  # what tests print is no message, and nobody reads it
            os.dup2(nothing, mine)
        self.turn = 0
        self.lives = 0  # programs that were started
        self.lost = ""  # what became of the last one, until another is there
        self.errors: dict[str, type[BaseException]] = {}
        self.used: set[str] = set()  # names that the tests' text has
        self.lock = threading.RLock()  # tests may have threads; the program answers one call at a time

    def say(self, message: dict[str, Any]) -> None:
        """ValueError for a call that nobody would carry: its test alone fails."""
        left = memoryview(json.dumps(message).encode() + b"\n")
        if len(left) > MESSAGE_BYTES:
            raise ValueError(f"a call has {len(left):,} bytes; allowed are {MESSAGE_BYTES:,}")
        while left:
            left = left[os.write(self.answers, left) :]

    def ask(self, *do: Any) -> dict[str, Any]:
        with self.lock:
            self.turn += 1
            self.say({"ask": {"do": do, "turn": self.turn}})
            while True:
                answer = self.heard()
                if answer.get("turn") == self.turn:
                    break
        if "raised" in answer:
            raise self.raised(answer)
        return answer

    def raised(self, answer: dict[str, Any]) -> BaseException:
        """What the program raised: of its kind, with its arguments where they are plain, else with its text."""
        try:
            kind, text = self.error(answer["raised"]), str(answer.get("text", ""))
            for arguments in (self.value(answer.get("arguments")), (text,)):
                if isinstance(arguments, tuple):
                    with suppress(TypeError):
                        made = kind(*arguments)
                        made.__dict__["_text"] = text
                        return made
        except ANSWERED:
            return self.gone("answered nonsense")
        return ProgramError(text)

    def heard(self) -> dict[str, Any]:
        line = self.orders.readline()
        if not line:
            os._exit(1)
        try:
            answer = json.loads(line)
        except ANSWERED:
            raise self.gone("answered nonsense") from None
        if not isinstance(answer, dict):
            raise self.gone("answered nonsense")
        if "gone" in answer:
            raise self.gone(str(answer["gone"]))
        return answer

    def gone(self, reason: str) -> Gone:
        """For a test that goes on in spite of it too, it has failed."""
        self.lost = self.lost or f"the program {reason}"
        return Gone(self.lost)

    def again(self) -> None:
        """Another program in place of one that ended or hangs."""
        self.say({"again": True})
        while True:
            try:
                if "fresh" in self.heard():
                    self.lives, self.lost = self.lives + 1, ""
                    return
            except Gone:
                continue

    def value(self, code: Any) -> Any:
        try:
            return decode(code, self.stand_in)
        except ANSWERED:
            raise self.gone("answered with what is no value") from None

    def stand_in(self, code: list[Any]) -> Any:
        letter, number, rest = code
        if letter == "x":
            return self.error(rest)
        return (Coroutine if rest == "coroutine" else Remote)(self, int(number), str(rest))

    def error(self, names: list[str]) -> type[BaseException]:
        """The class that stands for an exception of the program: of the built-in kind that it is of."""
        own = str(names[0])
        bases = [getattr(builtins, str(name).removeprefix("builtins."), None) for name in names]
        base = next((b for b in bases if isinstance(b, type) and issubclass(b, (Exception, SystemExit))), ProgramError)
        if own == f"builtins.{base.__name__}":
            return base
        if own not in self.errors:
            parent = ProgramError if base is Exception else base
            self.errors[own] = type(own.rpartition(".")[2], (parent,), {"__str__": lambda self: self.__dict__["_text"]})
        return self.errors[own]


class Remote:
    """Something of the program that is no plain value. It is never equal to anything: only plain values compare."""

    def __init__(self, line: Line, number: int, kind: str) -> None:
        self.__dict__.update(_line=line, _number=number, _kind=kind, _life=line.lives)

    def _ask(self, *do: Any) -> dict[str, Any]:
        if self._life != self._line.lives:
            raise self._line.gone("ended, and this was of the one before")
        return self._line.ask(do[0], self._number, *do[1:])

    def _call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        answer = self._ask("call", name, encode([list(arguments), named], code_of))
        after = self._line.value(answer.get("after"))
        if not (isinstance(after, list) and len(after) == 2 and [type(each) for each in after] == [list, dict]):
            raise self._line.gone("answered nonsense")
        for mine, theirs in [*zip(arguments, after[0], strict=False), *((named[k], after[1].get(k)) for k in named)]:
            changed(mine, theirs)
        return self._line.value(answer.get("value"))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call("__call__", arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in NAMES:
            raise AttributeError(name)
        return self._line.value(self._ask("attribute", name).get("value"))

    __doc__ = property(lambda self: self._line.value(self._ask("attribute", "__doc__").get("value")))  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, encode(value, code_of))

    def __delattr__(self, name: str) -> None:
        self._ask("delete", name)

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self._line.value(self._ask("await").get("value"))

    def __mro_entries__(self, bases: Any) -> Any:
        raise TypeError("a class of the program cannot be the base of one of the tests")

    def __instancecheck__(self, instance: Any) -> bool:
        raise TypeError("what is of a class of the program, it would say itself: compare plain values")

    __hash__ = object.__hash__


class Coroutine(Remote):
    """One that `asyncio.run` takes for what it is."""

    def _steps(self) -> Generator[Any, None, Any]:
        if "_waits" not in self.__dict__:
            self.__dict__["_waits"] = self.__await__()
        return self.__dict__["_waits"]

    def __next__(self) -> Any:  # in place of the program's
        return next(self._steps())

    def send(self, value: Any) -> Any:
        return self._steps().send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps().throw(*error)

    def close(self) -> None:
        self._steps().close()


def _forwarded(name: str) -> Any:
    return lambda self, *arguments: self._call(name, arguments, {})


def _refused(self: Remote, other: object) -> bool:
    raise TypeError(f"a {self._kind} of the program cannot be compared: compare plain values")


def _between(name: str) -> Any:
    def call(self: Remote, *arguments: Any) -> Any:
        if not all(isinstance(one, Remote) for one in arguments):
            raise TypeError(f"{name} of a {self._kind} of the program and a value: compare plain values")
        return self._call(name, arguments, {})

    return call


for _name in FORWARDED:
    setattr(Remote, _name, _forwarded(_name))
for _name in ORDERS:
    setattr(Remote, _name, _refused)
for _name in BETWEEN:
    setattr(Remote, _name, _between(_name))


def code_of(value: Any) -> list[Any]:
    if isinstance(value, Remote):
        return ["h", value._number, ""]
    raise TypeError(f"a {type(value).__name__} cannot be given to the program: only plain values can")


def changed(mine: Any, theirs: Any) -> None:
    """Change an argument in place as the program did."""
    if not isinstance(mine, type(theirs)) or isinstance(mine, Remote) or mine == theirs:
        return
    if isinstance(mine, tuple):
        for one, other in zip(mine, theirs, strict=False):
            changed(one, other)
    elif isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)


class StandIns:
    """Finds the program's modules for the tests' imports."""

    def __init__(self, line: Line, names: list[str]) -> None:
        self.line, self.names = line, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        remote = self.line.value(self.line.ask("import", spec.name).get("value"))
        if not isinstance(remote, Remote):
            raise self.line.gone("answered nonsense")
        module = StandIn(spec.name)
        module.__dict__["_remote"] = remote
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return starred(self.__dict__["_remote"], sys._getframe(1).f_globals)
        return getattr(self.__dict__["_remote"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or isinstance(value, types.ModuleType):  # what an import writes
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__["_remote"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_remote"], name)


def starred(remote: Remote, space: dict[str, Any]) -> list[str]:
    """What `import *` takes of the program into `space`: nothing in place of what the tests judge by."""
    names, modules = remote._line.value(remote._ask("names").get("value"))
    if taken := sorted({*names} & {*dir(builtins)} & remote._line.used):
        raise ImportError(f"the program has a {taken[0]} of its own, and `import *` takes it: name what is imported")
    for name in {*modules} & sys.stdlib_module_names:
        space.setdefault(name, importlib.import_module(name))
    return [name for name in names if type(space.get(name)) is not types.ModuleType]


def made_tests(space: dict[str, Any]) -> Iterator[str]:
    """Titles of the tests that a loaded file has of its own."""
    for name, value in space.items():
        if getattr(value, "__module__", "") != NAME or not getattr(value, "__test__", True):
            continue
        if isinstance(value, types.FunctionType) and name.startswith("test"):
            yield name
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            yield from (f"{name}.{test}" for test in unittest.TestLoader().getTestCaseNames(value))


class Unfit(Exception):
    """Why a test was not run as it is meant."""


def ended(value: Any) -> None:
    """Take what a test function returned: a coroutine is run, and nothing else may be left."""
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    if isinstance(value, Generator) or inspect.isasyncgen(value):
        raise Unfit("it yields, so that nothing of it ran")
    if value is not None:
        raise Unfit(f"it returned a {type(value).__name__}: a test asserts, and returns nothing")


def called(function: Any, given: Any) -> None:
    """Call a set-up as pytest does, which may take one argument or none; None is none."""
    if function is not None:
        ended(function(given) if inspect.signature(function).parameters else function())


def run_case(kind: type[unittest.TestCase], name: str) -> None:
    if inspect.iscoroutinefunction(getattr(kind, name)) and not issubclass(kind, unittest.IsolatedAsyncioTestCase):
        raise Unfit("it is `async def`, which a TestCase does not run: use unittest.IsolatedAsyncioTestCase")
    outcome = unittest.TestResult()
    with warnings.catch_warnings():  # a test that returns something: a generator, say, of which nothing ran
        warnings.filterwarnings("error", "It is deprecated to return a value", DeprecationWarning)
        kind(name).run(outcome)
    for _, text in [*outcome.failures, *outcome.errors, *outcome.skipped]:
        raise AssertionError(text.strip().splitlines()[-1] if text.strip() else "skipped")
    if not outcome.wasSuccessful():
        raise AssertionError("it was to fail, and did not")


class Judge:
    """Loads the tests and runs them one after the other, each within its time."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.line = told, Line()
        self.tests = test_names(told["tests"])
        self.line.used = {one.id for one in ast.walk(ast.parse(told["tests"])) if isinstance(one, ast.Name)}
        sys.meta_path.insert(0, StandIns(self.line, told["modules"]))  # type: ignore[arg-type]
        signal.signal(signal.SIGALRM, self.late)
        self.space: dict[str, Any] = {}
        self.loaded = False
        self.set_up: tuple[str, BaseException | None] = "", None  # the class that is, and what its set-up raised

    def late(self, *_: Any) -> None:
        raise self.line.gone(f"took longer than {self.told['test_seconds']:g} s")

    def load(self) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in self.told["modules"]]:
            del sys.modules[name]
        module = sys.modules[NAME] = types.ModuleType(NAME)
        self.space, self.set_up = module.__dict__, ("", None)
        exec(compile(self.told["tests"], "tests", "exec"), self.space)
        if made := {*made_tests(self.space)} - {test.title for test in self.tests}:
            raise Unfit(f"{min(made)} is made while the file runs: only tests that stand in it, at its top, are seen")
        for name in ("setUpModule", "setup_module"):
            called(self.space.get(name), module)
        self.loaded = True

    def class_up(self, owner: str) -> None:
        """The set-up of a class, once for all of its tests."""
        if self.set_up[0] != owner:
            kind, self.set_up = self.space[owner], (owner, None)
            try:
                if not issubclass(kind, unittest.TestCase):
                    called(getattr(kind, "setup_class", None), kind)
                elif not getattr(kind, "__unittest_skip__", False):
                    kind.setUpClass()
            except BaseException as error:  # noqa: BLE001 - it is raised for each of its tests
                self.set_up = owner, error
        if self.set_up[1] is not None:
            raise self.set_up[1]

    def class_down(self) -> None:
        (owner, failed), self.set_up = self.set_up, ("", None)
        kind = self.space.get(owner)
        if kind is None:
            return
        if not issubclass(kind, unittest.TestCase):
            if failed is None:
                called(getattr(kind, "teardown_class", None), kind)
            return
        try:
            if failed is None and not getattr(kind, "__unittest_skip__", False):
                kind.tearDownClass()
        finally:
            kind.doClassCleanups()
        for _, error, _ in kind.tearDown_exceptions:
            raise error

    def module_down(self) -> None:
        try:
            for name in ("tearDownModule", "teardown_module"):
                called(self.space.get(name), sys.modules[NAME])
        finally:
            unittest.doModuleCleanups()  # type: ignore[attr-defined]

    def one(self, test: Test) -> None:
        if test.wrong:
            raise Unfit(test.wrong)
        if not self.loaded:
            self.load()
        if not test.owner:
            function = self.space[test.name]
            called(self.space.get("setup_function"), function)
            try:
                ended(function())
            finally:
                called(self.space.get("teardown_function"), function)
            return
        self.class_up(test.owner)
        kind = self.space[test.owner]
        if issubclass(kind, unittest.TestCase):
            run_case(kind, test.name)
            return
        made = kind()
        method = getattr(made, test.name)
        called(getattr(made, "setup_method", None), method)
        try:
            ended(method())
        finally:
            called(getattr(made, "teardown_method", None), method)

    def reason(self, part: Callable[[], None]) -> str:
        """Why a part of a test failed, or "". What was lost with the program is that of all that follows."""
        if self.line.lost:
            return self.line.lost
        said = ""
        try:
            signal.setitimer(signal.ITIMER_REAL, self.told["test_seconds"])
            try:
                try:
                    part()
                except Unfit as error:
                    said = str(error)
                except BaseException as error:  # noqa: BLE001 - a test's failure is its result
                    said = type(error).__name__
                    said = f"{said}: {error}"  # which may hold a thing of the program, that says its own text
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:  # noqa: BLE001 - it has failed, with or without words
            said = said or type(error).__name__
        return self.line.lost or said[:500]

    def parts(self, place: int) -> Iterator[Callable[[], None]]:
        """A test, and what is to be torn down behind it."""
        yield lambda: self.one(self.tests[place])
        following = self.tests[place + 1].owner if place + 1 < len(self.tests) else None
        if self.loaded and following != self.tests[place].owner:
            yield self.class_down
        if self.loaded and following is None:
            yield self.module_down

    def run(self) -> None:
        for place, test in enumerate(self.tests):
            reasons = [self.reason(part) for part in self.parts(place)]
            reason = next(filter(None, reasons), "")
            if self.line.lost:
                reason, self.loaded = self.line.lost, False
                self.line.again()
            self.line.say({"test": test.title, "reason": reason})
        self.line.say({"over": True})
