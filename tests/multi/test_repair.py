"""Repairs: planted problems and those of one's own, what the tools do, what is paid."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest

from tandem.errors import TaskError
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.program.prompts import DrawnPrompts
from tandem.program.tasks.planted import SPLITS, Problem, planted
from tandem.program.tasks.problems import read_problems
from tandem.program.tasks.repair import Repair, _replaced
from tandem.types import Message, Prompt, ToolCall
from tests.sandboxes import played

REPAIR = "tandem.program.tasks.repair:Repair"
TILL = "def change(paid, due):\n    return due - paid\n\n\ndef vat(price):\n    return price // 5\n"
TILL_TEST = "from shop.till import change\n\ndef test_it():\n    assert change(5, 3) == 2\n"
HIDDEN = """from shop.till import change, vat

def test_a():
    assert change(9, 4) == 5

def test_b():
    assert change(7, 1) == 6

def test_vat():
    assert vat(10) == 2
"""


FAILED = "assert one() == 1  AssertionError"
RIGHT = "def test_a(self): assert one() == self.right"
KINDS = {  # of tests of a function that gives 2: what is said of them, or nothing
    "coroutine": (f"test_a, line 3: {FAILED}", "async def test_a():\n    assert one() == 1"),
    "generator": ("test_a: TypeError it yields", "def test_a():\n    yield\n    assert one() == 1"),
    "fixture": ("test_a: TypeError test_a() missing 1", "def test_a(tmp_path):\n    assert one() == 2"),
    "coroutine of a case": (
        "A.test_a: DeprecationWarning It is",
        "class A(unittest.TestCase):\n    async def test_a(self):\n        assert one() == 1",
    ),
    "coroutine of an asynchronous case": (
        f"A.test_a, line 4: {FAILED}",
        "class A(unittest.IsolatedAsyncioTestCase):\n    async def test_a(self):\n        assert one() == 1",
    ),
    "part": (
        f"A.test_a (n=1), line 4: with self.subTest(n=1): {FAILED}",
        "class A(unittest.TestCase):\n    def test_a(self):\n        with self.subTest(n=1): assert one() == 1",
    ),
    "to fail": (
        "",
        "class A(unittest.TestCase):\n    @unittest.expectedFailure\n    def test_a(self): assert one() == 1",
    ),
    "to fail, and does not": (
        "A.test_a: AssertionError it was to fail",
        "class A(unittest.TestCase):\n    @unittest.expectedFailure\n    def test_a(self): assert one() == 2",
    ),
    "setUpClass": (
        "",
        f"class A(unittest.TestCase):\n    setUpClass = classmethod(lambda cls: setattr(cls, 'right', 2))\n    {RIGHT}",
    ),
    "setup_class": (
        "",
        f"class TestA:\n    test_data = [1]\n    def setup_class(cls): cls.right = 2\n    {RIGHT}",
    ),
    "setup_method": (
        "",
        f"class TestA:\n    def setup_method(self): self.right = 2\n    {RIGHT}",
    ),
    "setup_module": ("", "def setup_module(m): m.right = 2\ndef test_a(): assert one() == right"),
    "teardown_function": (
        f"test_a, line 2: def teardown_function(): {FAILED}",
        "def teardown_function(): assert one() == 1\ndef test_a(): assert one() == 2",
    ),
    "base": ("", f"class Base:\n    {RIGHT}\nclass TestA(Base): right = 2"),
}
WRONG_PATHS = ("../a.py", "/a.py", "", ".", "a/", "./a.py", "a//b.py", "a" * 256)


def pool(**parameters) -> EnvironmentPool:
    return EnvironmentPool(TaskConfig(REPAIR, parameters=tuple(parameters.items()), heldout_size=0))


def calls(name: str, **arguments) -> Message:
    return Message("assistant", "", (ToolCall(name, arguments),), sampled=True)


def problem_folder(folder: Path) -> Path:
    """A folder of problems with one, `till`, whose failing tests nobody has listed."""
    till = folder / "problems" / "till"
    for path, text in {
        "repo/shop/__init__.py": "",
        "repo/shop/till.py": TILL,
        "repo/tests/test_till.py": TILL_TEST,
        "repo/.git/index": "\0",
        "hidden.py": HIDDEN,
        "issue.md": "change gives a negative amount.\n",
    }.items():
        (till / path).parent.mkdir(parents=True, exist_ok=True)
        (till / path).write_text(text)
    return till


def test_planted_bugs_are_noticed_and_can_be_mended() -> None:
    """A bug that no shown test sees, two lines that differ, or a held-out problem in a function that was trained on."""
    seen = set()
    for seed in range(200):
        made = planted(random.Random(seed), "train", 1 if seed % 2 else 0)
        differ = [a for a, b in zip(made.right.splitlines(), made.broken.splitlines(), strict=True) if a != b]
        assert len(differ) == 1 and made.right.splitlines()[made.line - 1] == differ[0]
        assert failures(made.broken, made, made.shown) and not failures(made.right, made, made.shown)
        assert failures(made.broken, made, made.hidden) == set(made.failing) and made.failing
        assert not failures(made.right, made, made.hidden)
        assert seed % 2 == 0 or made.right.count("\n") == 2
        call, does = made.issue.split(") gives ")[0].split(") raises ")[0] + ")", made.issue
        assert f"{call} == {does.rsplit('It should be ', 1)[1][:-1]}\n" in made.shown
        seen.add((made.path, made.broken))
    assert len(seen) > 50
    assert not {one.name for one in SPLITS["train"]} & {one.name for one in SPLITS["heldout"]}


def failures(module: str, made: Problem, tests: str) -> set[str]:
    scope: dict = {"__name__": "m"}
    name = made.path.removesuffix(".py")
    exec(module, scope)
    exec(tests.replace(f"from {name} import {name}\n", ""), scope)
    failed = set()
    for key in [key for key in scope if key.startswith("test_")]:
        try:
            scope[key]()
        except (AssertionError, IndexError, ZeroDivisionError, TypeError, ValueError):
            failed.add(key)
    return failed


def test_a_repair_by_its_tools() -> None:
    """Edits that do not reach the files that are graded, tests that the program may run but not read, or can change."""
    made = pool()
    prompt = made.prompt(3)
    (path,) = prompt.record["files"]
    (test,) = prompt.record["tests"]
    problem = planted(random.Random("0/train/3"), "train")
    old, new = (text.splitlines()[problem.line - 1] for text in (problem.broken, problem.right))
    told, reward = played(
        made,
        prompt,
        calls("read", path=path),
        calls("search", text=old.strip()),
        calls("run"),
        calls("edit", path=path, old=old, new=new),
        calls("run"),
        Message("assistant", "done", sampled=True),
    )
    assert f"{problem.line}: {old}" in told[0] and told[1] == f"{path}:{problem.line}: {old}"
    assert "FAILED test_" in told[2] and told[3:] == ["done", "all tests pass"] and reward == 1.0
    assert played(made, prompt, calls("run"), Message("assistant", "all tests pass", sampled=True))[1] == 0.0
    told, reward = played(
        made,
        prompt,
        calls("edit", path=path, old="nowhere", new=""),
        calls("read", path="/etc/passwd"),
        calls("read", path=test),
        calls("search", text="def test_0"),
        calls("edit", path=test, old="assert", new="pass  #"),
    )
    assert "stands 0 times" in told[0] and "there is no /etc/passwd" in told[1] and reward == 0.0
    assert "def test_0():" in told[2] and told[3] == f"{test}:3: def test_0():"
    assert f"{test} is a test, which cannot be changed; there are {path}" in told[4]
    made.close()


def test_a_repair_by_whole_functions() -> None:
    """A function put in another's place, one that loses its decorators or what stands around it, or code that is put
    nowhere without a word."""
    before = "import functools\n\n\n@functools.cache\ndef one(x):\n    return x\n\n\nclass Two:\n    pass\n\n\nz = 1\n"
    row: dict = {"files": {"a.py": before, "b.py": "def other(): return 0\n", "c.py": "\0"}}
    row |= {"tests": {}, "issue": "x"}
    prompt = Prompt("p", (Message("user", "x"),), {**row, "hidden": "def test_a(): assert False"})
    made = pool(edit="function")
    told, _ = played(
        made,
        prompt,
        calls("python", code="def one(x):\n    return x + 1"),
        calls("read", path="a.py"),
        calls("python", code="class Two:\n    y = 3\n\ndef other():\n    return 2\n"),
        calls("search", text="  "),
        calls("python", code="def three():\n    pass"),
        calls("python", code="import os\n\ndef one(x):\n    return os"),
        calls("python", code="def one(x:"),
        calls("python", code="# nothing"),
    )
    assert told[0] == "there are no tests to run"
    lines = [line.partition(": ")[2] for line in told[1].splitlines()]
    assert lines == before.replace("@functools.cache\n", "").replace("return x", "return x + 1").splitlines()
    assert told[3] == "a.py:5:     return x + 1\na.py:9:     y = 3\nb.py:2:     return 2"
    assert "three is defined 0 times; once is needed" in told[4]
    assert "line 1 is no function or class" in told[5]
    assert "it is no Python" in told[6] and "there is no function in it" in told[7]
    made.close()


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n", "\x0c\n", "\x1c\n", "\u2028\n"])
def test_lines_are_those_of_python(end: str) -> None:
    """A function put beside its place, where what ends a line for Python does not for us, or the other way round."""
    text = f'said = """a{end}b"""\n\ndef one():\n    return 1\n\ndef two():\n    return 2'
    code = f'def other():\n    return """{end}"""\n\n@staticmethod\ndef two():\n    return 3'
    before: dict = {}
    after: dict = {}
    exec(text, before)
    exec(_replaced(text, ast.parse(text).body[2], code, ast.parse(code).body[1]), after)
    assert (after["one"](), after["two"](), after["said"]) == (1, 3, before["said"])


@pytest.mark.parametrize(
    ("written", "paid"),
    [
        ("return paid - due", 1.0),
        ("return 5", 0.1),
        ("return due - paid + 0", 0.0),
        ("return paid - due\n\ndef vat(price):\n    return 0", 0.0),
        ("while True: pass", 0.0),
    ],
)
def test_what_a_repair_is_paid(tmp_path: Path, written: str, paid: float) -> None:
    """A large part of the reward for an answer read off a test, or any where what was right is broken."""
    problem_folder(tmp_path)
    made = pool(path=str(tmp_path / "problems"), edit="function")
    _, reward = played(made, made.prompt(0), calls("python", code=f"def change(paid, due):\n    {written}"))
    assert reward == pytest.approx(paid)
    made.close()


def test_tests_of_any_kind_are_run() -> None:
    """Tests in classes passed over as if they passed, a skipped one that fails, or a fault without its place."""
    tests = """import unittest
from a import one

def helper(x):
    assert x == 1, f"got {x}"

class TestOne:
    def test_a(self):
        helper(one())

class Old(unittest.TestCase):
    def setUp(self):
        self.wanted = 2
    def test_b(self):
        self.assertEqual(one(), self.wanted)
    @unittest.skip("not now")
    def test_c(self):
        raise ValueError
"""
    row = {"files": {"a.py": "def one():\n    return 2\n"}, "hidden": "def test_a(): assert False", "issue": "x"}
    prompt = Prompt(
        "p", (Message("user", "x"),), {**row, "tests": {"test_a.py": tests, "sub/test_b.py": "import gone"}}
    )
    made = pool()
    told, _ = played(made, prompt, calls("run"), calls("edit", path="a.py", old="2", new="1"), calls("run"))
    assert told[0].splitlines() == [
        "FAILED sub.test_b: ModuleNotFoundError: No module named 'gone'",
        'FAILED test_a.TestOne.test_a, line 5: assert x == 1, f"got {x}"  AssertionError got 2',
        "2 failed",
    ]
    assert told[2].splitlines()[1:] == [
        "FAILED test_a.Old.test_b, line 15: self.assertEqual(one(), self.wanted)  AssertionError 1 != 2",
        "2 failed",
    ]
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tests_that_can_be_read(kind: str) -> None:
    """A test of which nothing ran is said to pass, or one fails whose set-up was passed over: none can be mended."""
    said, test = KINDS[kind]
    text = f"import unittest; from a import one\n{test}\n"
    row = {"files": {"a.py": "def one():\n    return 2\n"}, "hidden": "def test_a(): assert False", "issue": "x"}
    made = pool()
    told, _ = played(made, Prompt("p", (Message("user", "x"),), {**row, "tests": {"test_a.py": text}}), calls("run"))
    made.close()
    assert told[0] == "all tests pass" if not said else told[0].startswith(f"FAILED test_a.{said}"), told
    assert not said or told[0].endswith("\n1 failed")


@pytest.mark.parametrize("form", ["folder", "lines"])
def test_a_repair_of_ones_own(tmp_path: Path, form: str) -> None:
    """Problems of a user's own, in either form, that lose a file, a test or the issue on the way."""
    problem_folder(tmp_path)
    path = tmp_path / "problems"
    if form == "lines":
        row = {"files": {"shop/__init__.py": "", "shop/till.py": TILL}, "tests": {"tests/test_till.py": TILL_TEST}}
        path = tmp_path / "tasks.jsonl"
        path.write_text(json.dumps({**row, "hidden": HIDDEN, "issue": "change gives a negative amount."}) + "\n")
    made = pool(path=str(path))
    prompt = made.prompt(0)
    assert prompt.messages[-1].content == (
        f"shop/__init__.py:\n\n\nshop/till.py:\n{TILL}\nchange gives a negative amount."
    )
    mend = calls("edit", path="shop/till.py", old="due - paid", new="paid - due")
    told, reward = played(made, prompt, calls("run"), mend, calls("run"), calls("read", path="tests/test_till.py"))
    assert "FAILED tests.test_till.test_it, line 4" in told[0] and told[2] == "all tests pass" and reward == 1.0
    assert "4:     assert change(5, 3) == 2" in told[3]
    made.close()


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"edit": "texts"}, "edit is 'texts'. Did you mean text"),
        ({"most_lines": -1}, "most_lines is -1. Allowed: 0"),
        ({"path": "nowhere"}, "nowhere is not there. Give a folder"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict, reason: str) -> None:
    """A value that fails every prompt of a run, one after the other."""
    with pytest.raises(TaskError, match=reason):
        Repair(None, **parameters)  # type: ignore[arg-type]


def test_a_wrong_problem_is_named(tmp_path: Path) -> None:
    """A line that ends the run in the middle, or fails every program of it."""
    good = {
        "files": {"a.py": "x = 1\n"},
        "tests": {},
        "hidden": "import a\ndef test_a(): assert a.x == 2",
        "issue": "x",
    }
    for change, reason in (
        ({"files": {"a.py": 5}}, "line 2: 'a.py' is 5; wanted: a path inside the folder"),
        *(({"files": {path: ""}}, f"line 2: {path!r} is ''; wanted: a path inside") for path in WRONG_PATHS),
        ({"files": {"a.py": "\ud800"}}, "line 2: 'a.py' is '.ud800'; wanted: a path inside the folder, and a text"),
        ({"files": {"a": "", "a/b.py": ""}}, "line 2: 'a' is a file, and a folder with 'a/b.py' in it"),
        (
            {"files": {"test_a.py": ""}, "tests": {"test_a.py": ""}},
            "line 2: 'test_a.py' stands in its files and",
        ),
        ({"tests": {"notes.txt": ""}}, "line 2: the test 'notes.txt' cannot be imported; wanted: a file NAME.py"),
        ({"tests": {"v1.2/test_a.py": ""}}, "line 2: the test 'v1.2/test_a.py' cannot be imported"),
        ({"issue": "\ud800"}, "line 2: its 'issue' holds .ud800, half of a character"),
        ({"hidden": "-" * 100_000 + "1"}, "line 2: its hidden tests are no Python"),
        ({"files": {}}, "line 2: it has no file to be mended"),
        ({"files": {"a.py": "x" * (5 << 20)}}, "line 2: its files have 5,242,880 characters; allowed are 4,194,304"),
        ({"hidden": "def ("}, "line 2: its hidden tests are no Python"),
        ({"hidden": "x = 1"}, "line 2: its hidden tests have no function"),
        ({"hidden": "def test_a(tmp_path): assert tmp_path"}, "line 2: its hidden test test_a cannot be run: it takes"),
        ({"failing": "test_a"}, "line 2: its 'failing' is 'test_a'; wanted: names"),
        ({"failing": ["test_b"]}, "line 2: no hidden test is called 'test_b'; there are 'test_a'"),
    ):
        path = tmp_path / "tasks.jsonl"
        path.write_text("\n".join(map(json.dumps, [good, {**good, **change}])) + "\n")
        with pytest.raises(TaskError, match=reason):
            read_problems(str(path))


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    """A problem of a folder that is left out, or ends the run in the middle, without its path."""
    till = problem_folder(tmp_path)
    (till / "hidden.py").write_text("\ufeff" + (till / "hidden.py").read_text())  # as some editors save it
    (till / "failing.txt").write_text("test_a\ntest_b\n")
    (row,) = read_problems(str(till.parent))
    assert row["failing"] == ["test_a", "test_b"] and set(row["files"]) == {"shop/__init__.py", "shop/till.py"}
    for path, change, reason in (
        ("failing.txt", "test_z", "till: no hidden test is called 'test_z'; there are 'test_a, test_b, test_vat'"),
        ("repo/logo.png", b"\x89PNG", "till/repo/logo.png is no UTF-8 text"),
        ("repo/link", Path("/etc/passwd"), "till/repo/link is neither file nor folder, such as a link"),
        ("hidden.py", None, "till/hidden.py cannot be read: No such file"),
        ("repo", None, "till has no folder repo with the files"),
        (".", None, "problems holds no folder. Give one that holds a folder for each problem"),
    ):
        place = tmp_path / f"broken-{path.replace('/', '-')}"
        broken = problem_folder(place) / path
        if isinstance(change, Path):
            broken.symlink_to(change)
        elif isinstance(change, bytes):
            broken.write_bytes(change)
        elif change is not None:
            broken.write_text(change)
        else:
            broken.rename(place / "gone")
        with pytest.raises(TaskError, match=reason):
            read_problems(str(place / "problems"))


def test_problems_that_say_the_same_are_told_apart(tmp_path: Path) -> None:
    """Problems whose files are not shown are taken for one question: none is left to train on, or to be held out."""
    rows = [{"files": {"a.py": f"x = {n}\n"}, "tests": {}, "hidden": HIDDEN, "issue": "Mend it."} for n in range(4)]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Repair(None, path=str(path), shows=False)  # type: ignore[arg-type]
    made = DrawnPrompts(TaskConfig(REPAIR, heldout_size=2), task)
    held = {prompt.record["files"]["a.py"] for prompt in made.heldout}
    trained = {made.train(index).record["files"]["a.py"] for index in range(8)}
    assert held == {"x = 3\n", "x = 2\n"} and trained == {"x = 0\n", "x = 1\n"}
