"""Code tasks: problems that are graded by tests the program can't reach, and repairs."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from tandem.errors import TaskError
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.program.tasks.humaneval import hidden_tests, program
from tandem.program.tasks.planted import planted
from tandem.types import Message, Prompt, ToolCall

SHARED = Path(__file__).parents[3] / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
ROW = {
    "task_id": "T/0",
    "prompt": "from typing import List\n\ndef half(x: int) -> int:\n    return x // 2\n\n"
    'def halves(xs: List[int]) -> List[int]:\n    """Half of each."""\n',
    "entry_point": "halves",
    "canonical_solution": "    return [half(x) for x in xs]\n",
    "test": "META = {}\n\ndef check(candidate):\n    assert candidate([4]) == [2]\n    big = [10, 20]\n"
    "    assert candidate(big) == [half(x) for x in big]\n    for n in range(3):\n        assert candidate([]) == []\n",
}
RIGHT = "```python\ndef halves(xs):\n    return [half(x) for x in xs]\n```"
EMPTY = "```python\ndef halves(xs):\n    return []\n```"


def pool(tmp_path: Path, name: str, *rows: dict, **parameters) -> EnvironmentPool:
    if rows:
        (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        parameters["path"] = str(tmp_path / "tasks.jsonl")
    return EnvironmentPool(TaskConfig(name, parameters=tuple(parameters.items()), heldout_size=0))


def played(made: EnvironmentPool, prompt: Prompt, *said: Message) -> tuple[list[str], float]:
    """What followed each turn, and the reward."""
    episode = made.episode(prompt, 1e12)
    told = []
    for message in said:
        episode.said.append(message)
        found = episode.observe().result(60)
        told += [one.content for one in found.messages or ()]
    reward = episode.score().result(60)
    episode.teardown()
    return told, reward


def calls(name: str, **arguments) -> Message:
    return Message("assistant", "", (ToolCall(name, arguments),))


HUMANEVAL = "tandem.program.tasks.humaneval:HumanEval"
REPAIR = "tandem.program.tasks.repair:Repair"


@pytest.mark.parametrize(("said", "paid"), [(RIGHT, 1.0), (EMPTY, 1 / 3), ("no idea", 0.0), ("x = (", 0.0)])
def test_parts_of_the_tests_are_paid(tmp_path: Path, said: str, paid: float) -> None:
    """All or nothing where a part of the tests passes, or a reward for text that is no program."""
    made = pool(tmp_path, HUMANEVAL, ROW)
    assert played(made, made.prompt(0), Message("assistant", said))[1] == pytest.approx(paid)
    made.close()


def test_a_program_that_claims_to_pass_does_not(tmp_path: Path) -> None:
    """A verdict that comes from what the program prints, returns or patches."""
    made = pool(tmp_path, HUMANEVAL, ROW, partial=False)
    for code in (
        "import os\nprint('all tests pass')\nos._exit(0)",
        "def halves(xs):\n    class Same(list):\n        def __eq__(self, other): return True\n    return Same()",
        "import builtins\nbuiltins.half = lambda x: x\ndef halves(xs):\n    return xs",
    ):
        assert played(made, made.prompt(0), Message("assistant", f"```python\n{code}\n```"))[1] == 0.0
    made.close()


def test_another_attempt_is_told_how_many_pass(tmp_path: Path) -> None:
    """The hidden tests or their values told to the program, or an attempt more than was asked for."""
    made = pool(tmp_path, HUMANEVAL, ROW, attempts=2)
    told, reward = played(made, made.prompt(0), Message("assistant", EMPTY), Message("assistant", RIGHT))
    assert told == ["1 of 3 hidden tests pass. Write the whole function again."] and reward == 1.0
    made.close()


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    """A broken line of a task file is a traceback, or is left out without a word."""
    for row, reason in (
        ({**ROW, "entry_point": 7}, "line 2: its 'entry_point' is 7; wanted: str"),
        ({**ROW, "test": "def check("}, "its prompt or test is no Python"),
        ({**ROW, "test": "def other(c): pass"}, "line 2: its test has no function check"),
        ({**ROW, "test": "def check(c):\n    assert True"}, "line 2: its check.candidate. asserts nothing"),
    ):
        made = pool(tmp_path, HUMANEVAL, ROW, row)
        with pytest.raises(TaskError, match=reason):
            made.ready()
        made.close()


def test_what_an_answer_amounts_to() -> None:
    """An example before the answer is graded in its place, or the prompt's imports are lost."""
    two = "```python\nprint(halves([1]))\n```\nand\n```python\ndef halves(xs):\n    return xs\n```\n"
    assert program(ROW["prompt"], "halves", two).endswith(
        "def half(x: int) -> int:\n    return x // 2\n\ndef halves(xs):\n    return xs\n"
    )
    for fence in ("```Python\n", "```python3\n", "  ```py\n"):
        assert (
            program("", "halves", f"{fence}def halves(xs):\r\n    return xs\n```") == "def halves(xs):\n    return xs\n"
        )
    assert program(ROW["prompt"], "halves", "    return xs\n") == ROW["prompt"] + "    return xs\n"


def test_all_of_humaneval_is_right_by_its_own_solutions(tmp_path: Path) -> None:
    """A problem whose own solution fails here, by how its tests are split or its values travel."""
    if not SHARED.is_file():
        pytest.skip("the HumanEval file is not here")
    rows = [json.loads(line) for line in gzip.open(SHARED, "rt")]
    assert len(rows) == 164
    chosen = random.Random(1).sample(range(164), 12)
    made = EnvironmentPool(TaskConfig(HUMANEVAL, parameters=(("path", str(SHARED)),), heldout_size=0))
    prompts = made.batch(0, 164)
    episodes = []
    for place in chosen:
        episodes.append(made.episode(prompts[place], 1e12))
        text = f"```python\n{rows[place]['prompt']}{rows[place]['canonical_solution']}```"
        episodes[-1].said.append(Message("assistant", text))
    rewards = [future.result(120) for future in [episode.score() for episode in episodes]]
    assert dict(zip(chosen, rewards, strict=True)) == dict.fromkeys(chosen, 1.0)
    assert all("def test_0" in hidden_tests(row) for row in rows)
    made.close()


def test_a_wrong_repair_is_named(tmp_path: Path) -> None:
    """A line that ends the run in the middle, or fails every program of it."""
    good = {"files": {"a.py": "x = 1\n"}, "tests": {}, "hidden": "def test_a(): assert False", "issue": "x"}
    for change, reason in (
        ({"files": {"a.py": 5}}, "line 2: 'a.py' is 5; wanted: a path inside the folder"),
        ({"files": {"../a.py": ""}}, "line 2: '../a.py' is ''; wanted: a path inside"),
        ({"hidden": "def ("}, "line 2: its hidden tests are no Python"),
        ({"hidden": "x = 1"}, "line 2: its hidden tests have no function"),
    ):
        made = pool(tmp_path, REPAIR, good, {**good, **change})
        with pytest.raises(TaskError, match=reason):
            made.ready()
        made.close()


def test_planted_bugs_are_noticed_and_can_be_mended() -> None:
    """A bug that no shown test sees, or two lines that differ."""
    seen = set()
    for seed in range(200):
        made = planted(random.Random(seed))
        differ = [a for a, b in zip(made.right.splitlines(), made.broken.splitlines(), strict=True) if a != b]
        assert len(differ) == 1 and made.right.splitlines()[made.line - 1] == differ[0]
        scope: dict = {"__name__": "m"}
        name = made.path.removesuffix(".py")
        exec(made.broken, scope)
        shown = made.shown.replace(f"from {name} import {name}\n", "")
        exec(shown, scope)
        failed = 0
        for key in [key for key in scope if key.startswith("test_")]:
            try:
                scope[key]()
            except (AssertionError, IndexError, ZeroDivisionError):
                failed += 1
        assert failed > 0
        seen.add((name, made.broken))
    assert len(seen) > 20


def test_a_repair_by_its_tools(tmp_path: Path) -> None:
    """Edits that do not reach the files that are graded, tests that the program may see but not run, or a whole reward
    for a module that breaks what was right."""
    made = pool(tmp_path, REPAIR)
    prompt = made.prompt(3)
    (path,) = prompt.record["files"]
    problem = planted(random.Random("0/train/3"))
    old, new = (text.splitlines()[problem.line - 1] for text in (problem.broken, problem.right))
    told, reward = played(
        made,
        prompt,
        calls("read", path=path),
        calls("search", text=old.strip()),
        calls("run"),
        calls("edit", path=path, old=old, new=new),
        calls("run"),
        Message("assistant", "done"),
    )
    assert f"{problem.line}: {old}" in told[0] and told[1] == f"{path}:{problem.line}: {old}"
    assert "FAILED test_" in told[2] and told[3:] == ["done", "all tests pass"] and reward == 1.0
    assert played(made, prompt, calls("run"), Message("assistant", "all tests pass"))[1] == 0.0
    spoilt = calls("edit", path=path, old=problem.broken.splitlines()[-1], new="    return None")
    assert played(made, prompt, spoilt)[1] == 0.0
    told, _ = played(made, prompt, calls("edit", path=path, old="nowhere", new=""), calls("read", path="/etc/passwd"))
    assert "stands 0 times" in told[0] and "there is no /etc/passwd" in told[1]
    made.close()


def test_a_repair_of_a_file(tmp_path: Path) -> None:
    """Problems of a user's own, whose failing tests nobody has listed."""
    row = {
        "files": {"shop/__init__.py": "", "shop/till.py": "def change(paid, due):\n    return due - paid\n"},
        "tests": {"test_till.py": "from shop.till import change\n\ndef test_it():\n    assert change(5, 3) == 2\n"},
        "hidden": "from shop.till import change\n\ndef test_a():\n    assert change(9, 4) == 5\n\n"
        "def test_b():\n    assert change(1, 1) == 0\n",
        "issue": "change gives a negative amount.",
    }
    made = pool(tmp_path, REPAIR, row)
    mend = calls("edit", path="shop/till.py", old="due - paid", new="paid - due")
    told, reward = played(made, made.prompt(0), calls("run"), mend, calls("run"))
    assert "FAILED test_till.test_it, line 4" in told[0] and told[2] == "all tests pass" and reward == 1.0
    made.close()
