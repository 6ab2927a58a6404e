"""Runs in a sandbox: the tests of the modules named, without a test package, and a line for each that fails.

Little is imported: it is started for each try of each program.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any


class Tried:
    """The tests of some modules: those that failed, and how many there were."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.count = 0

    def module(self, name: str) -> None:
        """Its functions, and the methods of its classes, whose names begin with test."""
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - told to the model
            self.said.append(f"FAILED {name}: {type(error).__name__}: {error}")
            return
        if not self.part(name, "setup_module", lambda: called(module, "setup_module", module)):
            return
        found = list(vars(module).items())
        for key, value in found:
            if key.startswith("test") and callable(value) and not isinstance(value, type):
                self.test(name, key, module, value, "function")
        own = [value for _, value in found if isinstance(value, type) and value.__module__ == module.__name__]
        unittest: Any = sys.modules.get("unittest")
        cases = [kind for kind in own if unittest is not None and issubclass(kind, unittest.TestCase)]
        bases = {base for kind in own for base in kind.__mro__[1:]}
        for kind in own:
            if kind not in cases and (kind.__name__.startswith("Test") or kind not in bases):
                self.methods(name, kind)
        if cases:
            self.cases(name, unittest, cases)
        self.part(name, "teardown_module", lambda: called(module, "teardown_module", module))

    def methods(self, module: str, kind: type) -> None:
        """The tests of a plain class, each of an object of its own."""
        tests = [name for name in dir(kind) if name.startswith("test") and callable(getattr(kind, name))]
        up = lambda: called(kind, "setup_class", kind)  # noqa: E731
        if not tests or not self.part(module, f"{kind.__name__}.setup_class", up):
            return
        for name in tests:
            self.test(module, f"{kind.__name__}.{name}", kind, name, "method")
        self.part(module, f"{kind.__name__}.teardown_class", lambda: called(kind, "teardown_class", kind))

    def cases(self, module: str, unittest: Any, kinds: list[Any]) -> None:
        """The tests of unittest's classes, with all that it does around them."""
        tried = self

        class Told(unittest.TestResult):  # type: ignore[misc]
            def startTest(self, test: Any) -> None:
                super().startTest(test)
                tried.count += 1

            def addError(self, test: Any, error: Any) -> None:
                title = test.id().removeprefix(f"{module}.")
                tried.failed(module, title, error[1])

            addFailure = addError

            def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
                if error is not None:
                    self.addError(subtest, error)

            def addUnexpectedSuccess(self, test: Any) -> None:
                self.addError(test, (None, AssertionError("it was to fail, and did not"), None))

        tests = [unittest.defaultTestLoader.loadTestsFromTestCase(kind) for kind in kinds]
        with warnings.catch_warnings():  # a test that returns something: a coroutine, say, of which nothing ran
            warnings.filterwarnings("error", "It is deprecated to return a value", DeprecationWarning)
            unittest.TestSuite(tests).run(Told())

    def test(self, module: str, title: str, holder: Any, test: Any, what: str) -> None:
        """A function of a module, or a method by its name, of an object of its own."""

        def run() -> None:
            owner, function = (holder, test) if what == "function" else (made := holder(), getattr(made, test))
            called(owner, f"setup_{what}", function)
            try:
                ended(function())
            finally:
                called(owner, f"teardown_{what}", function)

        self.count += 1
        self.part(module, title, run)

    def part(self, module: str, title: str, run: Callable[[], None]) -> bool:
        """Whether a part of a test ran to its end."""
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - told to the model
            self.failed(module, title, error)
            return False
        return True

    def failed(self, module: str, title: str, error: BaseException) -> None:
        """Where in the test's own file it failed, and with what."""
        if type(error).__name__ == "SkipTest":
            return
        import traceback

        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if place.filename == sys.modules[module].__file__]
        where = f", line {own[-1].lineno}: {own[-1].line} " if own else ":"
        self.said.append(f"FAILED {module}.{title}{where} {type(error).__name__} {error}")

    def text(self) -> str:
        none = "all tests pass" if self.count else "there are no tests to run"
        return "\n".join([*self.said, f"{len(self.said)} failed" if self.said else none])


def called(holder: Any, name: str, given: Any) -> None:
    """Call what stands before or behind a test, which may take one argument or none."""
    if (function := getattr(holder, name, None)) is not None:
        import inspect

        ended(function(given) if inspect.signature(function).parameters else function())


def ended(value: Any) -> None:
    """Take what a test returned: a coroutine is run."""
    kind = type(value).__name__
    if kind == "coroutine":
        import asyncio

        asyncio.run(value)
    elif kind in ("generator", "async_generator"):
        raise TypeError("it yields, so that nothing of it ran")


def main(modules: list[str]) -> str:
    """All of it, as text."""
    tried = Tried()
    for name in modules:
        tried.module(name)
    return tried.text()


if __name__ == "__main__":
    print(main(sys.argv[1:]))
