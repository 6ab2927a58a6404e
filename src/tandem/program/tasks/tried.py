"""Runs in a sandbox: the tests of the modules named, without a test package, and a line for each that fails.

Little is imported: it is started for each try of each program.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def tests_of(module: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Its functions, and the methods of its classes, whose names begin with test."""
    for name, value in list(vars(module).items()):
        if name.startswith("test") and callable(value) and not isinstance(value, type):
            yield name, value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for method in dir(value):
                if method.startswith("test"):
                    yield f"{name}.{method}", bound(value, method)


def bound(kind: Any, method: str) -> Callable[[], Any]:
    """A method of an object of its own; of a unittest.TestCase, with its setUp and tearDown."""
    unittest: Any = sys.modules.get("unittest")
    if unittest is not None and issubclass(kind, unittest.TestCase):
        return lambda: kind(method).debug()
    return lambda: getattr(kind(), method)()


def fault(module: str, test: str, error: BaseException) -> str:
    """Where in the test's own file it failed, and with what."""
    import traceback

    places = traceback.extract_tb(error.__traceback__)
    own = [place for place in places if place.filename == sys.modules[module].__file__]
    place = (own or places)[-1]
    return f"FAILED {module}.{test}, line {place.lineno}: {place.line}  {type(error).__name__} {error}"


def main(modules: list[str]) -> str:
    """All of it, as text."""
    said, count = [], 0
    for name in modules:
        try:
            tests = list(tests_of(importlib.import_module(name)))
        except BaseException as error:  # noqa: BLE001 - told to the model
            said.append(f"FAILED {name}: {type(error).__name__}: {error}")
            continue
        for test, run in tests:
            count += 1
            try:
                run()
            except BaseException as error:  # noqa: BLE001 - told to the model
                if type(error).__name__ != "SkipTest":
                    said.append(fault(name, test, error))
    none = "all tests pass" if count else "there are no tests to run"
    return "\n".join([*said, f"{len(said)} failed" if said else none])


if __name__ == "__main__":
    print(main(sys.argv[1:]))
