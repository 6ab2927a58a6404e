"""Functions to be written, graded by tests that the program can't reach."""

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
from tandem.types import Message
from tests.sandboxes import played

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


HUMANEVAL = "tandem.program.tasks.humaneval:HumanEval"


@pytest.mark.parametrize(("said", "paid"), [(RIGHT, 1.0), (EMPTY, 1 / 3), ("no idea", 0.0), ("x = (", 0.0)])
def test_parts_of_the_tests_are_paid(tmp_path: Path, said: str, paid: float) -> None:
    """All or nothing where a part of the tests passes, or a reward for text that is no program."""
    made = pool(tmp_path, HUMANEVAL, ROW)
    assert played(made, made.prompt(0), Message("assistant", said, sampled=True))[1] == pytest.approx(paid)
    made.close()


def test_a_program_that_claims_to_pass_does_not(tmp_path: Path) -> None:
    """A verdict that comes from what the program prints, returns or patches."""
    made = pool(tmp_path, HUMANEVAL, ROW, partial=False)
    for code in (
        "import os\nprint('all tests pass')\nos._exit(0)",
        "def halves(xs):\n    class Same(list):\n        def __eq__(self, other): return True\n    return Same()",
        "import builtins\nbuiltins.half = lambda x: x\ndef halves(xs):\n    return xs",
    ):
        assert played(made, made.prompt(0), Message("assistant", f"```python\n{code}\n```", sampled=True))[1] == 0.0
    made.close()


def test_another_attempt_is_told_how_many_pass(tmp_path: Path) -> None:
    """The hidden tests or their values told to the program, or another attempt asked for where all pass."""
    made = pool(tmp_path, HUMANEVAL, ROW)
    told, reward = played(
        made, made.prompt(0), *(Message("assistant", text, sampled=True) for text in (EMPTY, "no idea", RIGHT))
    )
    again = "of 3 hidden tests pass. Write the whole function again."
    assert told == [f"1 {again}", f"0 {again}"] and reward == 1.0
    made.close()


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    """A broken line of a task file is a traceback, or is left out without a word."""
    for row, reason in (
        ({**ROW, "entry_point": 7}, "line 2: its 'entry_point' is 7; wanted: str"),
        ({**ROW, "test": "def check("}, "its prompt or test is no Python"),
        ({**ROW, "test": "-" * 100_000 + "1"}, "its prompt or test is no Python"),
        ({**ROW, "entry_point": "no name"}, "line 2: its prompt defines no function 'no name'"),
        ({**ROW, "entry_point": "other"}, "line 2: its prompt defines no function 'other'"),
        ({**ROW, "canonical_solution": 5}, "line 2: its 'canonical_solution' is 5; wanted: str, or nothing"),
        ({**ROW, "test": "def other(c): pass"}, "line 2: its test has no function check"),
        ({**ROW, "test": "def check(c):\n    assert True"}, "line 2: its check.candidate. asserts nothing"),
    ):
        made = pool(tmp_path, HUMANEVAL, ROW, row)
        with pytest.raises(TaskError, match=reason):
            made.ready()
        made.close()


def test_a_file_as_other_tools_write_it(tmp_path: Path) -> None:
    """A mark before the first line, or a solution that is null, ends the run."""
    made = pool(tmp_path, HUMANEVAL, {**ROW, "canonical_solution": None})
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert made.prompt(0).record["entry_point"] == ROW["entry_point"]
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
        episodes[-1].said.append(Message("assistant", text, sampled=True))
    rewards = [future.result(120) for future in [episode.score() for episode in episodes]]
    assert dict(zip(chosen, rewards, strict=True)) == dict.fromkeys(chosen, 1.0)
    assert all("def test_0" in hidden_tests(row) for row in rows)
    made.close()
