"""A reward that hangs, dies, raises or returns nonsense stops the run or passes for a zero."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem import env
from tandem.errors import EnvironmentFailure, TaskError
from tandem.program.config import TaskConfig
from tandem.program.guard import Guard, checked_reward, inline_reward
from tandem.program.task import Task, make_environment
from tandem.types import Failure, Message, Prompt

USER = """
import os, subprocess, sys, time
from tandem.types import Message, Prompt

class Number:
    def __float__(self):
        return 0.25

class Odd:
    def __init__(self, slow=0.0):
        time.sleep(slow)

    def prompt(self, split, index):
        if split == "train" and index == 3:
            raise RuntimeError("no third")
        if split == "train" and index == 4:
            time.sleep(60)
        record = {"object": self} if split == "train" and index == 5 else {"answer": "7"}
        return Prompt("x", (Message("user", f"{split} {index}"),), record)

    def reward(self, prompt, text):
        print("grading", text)
        if text == "hang":
            time.sleep(60)
        if text == "spin":
            while True:
                pass
        if text == "grandchild":
            sleeper = subprocess.Popen(["sleep", "60"])
            open(prompt.record["path"], "w").write(str(sleeper.pid))
            sleeper.wait()
        if text == "die":
            os._exit(3)
        if text == "exit":
            sys.exit("enough")
        if text == "raise":
            raise KeyError("gold\\nanswer")
        return {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "object": Number(), "yes": True,
                "list": [1.0]}.get(text, 0.5)

    def observe(self, prompt, turns):
        return {"stop": None, "bad": "words", "one": Message("user", "x")}.get(
            turns[-1].content, [Message("user", "more")])
"""

PROMPT = Prompt("p", (Message("user", "?"),), {"answer": "7"})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "odd.py"
    path.write_text(USER)
    return path


@pytest.fixture(scope="module")
def task(source: Path):
    made = make_environment(TaskConfig(f"{source}:Odd", heldout_size=2, reward_deadline_s=1.0))
    yield made
    made.close()


def said(text: str) -> tuple[Prompt, tuple[Message, ...]]:
    return PROMPT, (Message("assistant", text),)


def test_bad_rewards_fail_alone(task: Task) -> None:
    """One bad reward takes the good ones of its step with it, or is graded as a number."""
    cases = {
        "fine": 0.5,
        "hang": Failure("deadline", "reward took longer than 1 s (task.reward_deadline_s)"),
        "fine again": 0.5,
        "raise": Failure("reward", "raised KeyError: 'gold\\nanswer'"),
        "nan": Failure("reward", "returned nan"),
        "inf": Failure("reward", "returned inf"),
        "none": Failure("reward", "returned None, not a number"),
        "text": Failure("reward", "returned '1.0', not a number"),
        "list": Failure("reward", "returned [1.0], not a number"),
        "object": 0.25,
        "yes": 1.0,
        "die": Failure("reward", "its process died (exit code 3)"),
        "exit": Failure("reward", "raised SystemExit: enough"),
        "spin": Failure("deadline", "reward took longer than 1 s (task.reward_deadline_s)"),
        "last": 0.5,
    }
    assert dict(zip(cases, task.grade([said(text) for text in cases]), strict=True)) == cases


def test_step_deadline(task: Task) -> None:
    """Many hanging rewards take their deadlines one after the other, far past that of the step."""
    task.grade([said("fine")])
    grades = task.grade([said("hang")] * 50, until_s=time.monotonic() + 0.5)
    assert all(isinstance(grade, Failure) and grade.where == "deadline" for grade in grades)
    assert re.fullmatch(r"reward took longer than 0\.[45]\d* s \(rollout.deadline_s\)", grades[0].reason)
    assert grades[-1] == Failure("deadline", "no time was left for its reward (rollout.deadline_s)")
    assert task.grade([said("fine")]) == [0.5]


def test_observations(task: Task) -> None:
    """What an environment observes reaches the model although it is no message, or its failure stops the run."""
    kept, ended, bad, one = task.observe([said("go"), said("stop"), said("bad"), said("one")])
    assert kept == (Message("user", "more"),) and ended is None
    for failure in (bad, one):
        assert isinstance(failure, Failure) and failure.where == "environment"
        assert "a list of tandem.types.Message or None is needed" in failure.reason


def test_prompts_that_cannot_be_had(task: Task) -> None:
    """A prompt that raises, hangs or cannot travel hangs the run or passes for a prompt."""
    assert [prompt.messages[0].content for prompt in task.heldout] == ["heldout 0", "heldout 1"]
    assert [prompt.id for prompt in task.batch(0, 2)] == ["Odd/train/0", "Odd/train/1"]
    for index, reason in ((3, "raised RuntimeError: no third"), (4, "took longer than"), (5, "use plain values")):
        with pytest.raises(EnvironmentFailure, match=f"training prompt {index}: .*{reason}"):
            task.prompt(index)
    assert task.prompt(6).messages[0].content == "train 6"


def test_what_a_reward_started_dies_with_it(task: Task, tmp_path: Path) -> None:
    """Each overrun leaves a process behind that the user's code had started."""
    prompt = Prompt("p", PROMPT.messages, {"path": str(tmp_path / "pid")})
    (grade,) = task.grade([(prompt, (Message("assistant", "grandchild"),))])
    assert isinstance(grade, Failure) and grade.where == "deadline"
    status = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    until = time.monotonic() + 20  # it was sent a signal, which it takes when it gets a core
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.01)


def test_output_stays_off_stdout(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a reward prints lands among the lines of `--json`."""
    printing = make_environment(TaskConfig(f"{source}:Odd", heldout_size=0))
    assert printing.grade([said("fine")]) == [0.5]
    printing.close()
    shown = capfd.readouterr()
    assert shown.out == "" and "grading fine" in shown.err


def test_start_that_hangs_or_fails(source: Path, tmp_path: Path) -> None:
    """A constructor that hangs blocks the run for good; a wrong file or class ends in a traceback."""
    hung = Guard(TaskConfig(f"{source}:Odd", parameters=(("slow", 60.0),)), start_deadline_s=0.5)
    with pytest.raises(EnvironmentFailure, match=re.escape("did not come up within 0.5 s (it hung)")):
        hung.ready()
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "thing.py").write_text("class Thing:\n    pass\n\ndef leave():\n    raise SystemExit(2)\n")
    for environment, parameters, reason in (
        (f"{tmp_path}/none.py:A", (), "no file"),
        (f"{tmp_path}/broken.py:A", (), "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("nothing_of_this_name:A", (), "No module named"),
        (f"{source}:Old", (), "has no 'Old'. Did you mean Odd"),
        (f"{source}:Odd", (("fast", 1),), "unexpected keyword argument 'fast'"),
        (f"{tmp_path}/thing.py:Thing", (), "lacks prompt and reward"),
    ):
        with pytest.raises(TaskError, match=re.escape(reason)):
            make_environment(TaskConfig(environment, parameters=parameters)).ready()
    with pytest.raises(EnvironmentFailure, match="SystemExit"):
        make_environment(TaskConfig(f"{tmp_path}/thing.py:leave")).ready()


@pytest.mark.parametrize("leaves", ["before the task", "after the task", "with an answer unread"])
def test_a_parent_that_leaves(source: Path, leaves: str) -> None:
    """The child prints a traceback beside what the user is told when the parent closes the pipe in its middle."""
    ours, theirs = multiprocessing.Pipe()
    code = f"from tandem.program.worker import main; main({theirs.fileno()}, {os.getpid()})"
    command, paths = [sys.executable, "-c", code], env.child(PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE, env=paths) as child:
        theirs.close()
        if leaves != "before the task":
            ours.send(TaskConfig(f"{source}:Odd", heldout_size=0))
        if leaves == "with an answer unread":
            assert ours.poll(60)
        ours.close()
        _, printed = child.communicate(timeout=60)
    assert (child.returncode, printed.decode()) == (0, "")


def test_jsonl_errors_come_at_once(tmp_path: Path) -> None:
    """A broken task file is found only after the model is loaded."""
    (tmp_path / "a.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(TaskError, match="line 1: no field 'answer'"):
        make_environment(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl")))


def test_math_verify_in_the_child(tmp_path: Path) -> None:
    """math-verify's signals or its import reach the process that trains, or its grades are lost on the way."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "work #### 1,000"}\n')
    task = make_environment(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl"), heldout_size=0, reward="math_verify"))
    prompt = task.prompt(0)
    answers = ["It is \\boxed{1000}", "1,000.00", "I get 999", ""]
    assert task.grade([(prompt, (Message("assistant", text),)) for text in answers]) == [1.0, 1.0, 0.0, 0.0]
    assert task.observe([(prompt, ())]) == [None]
    task.close()


def test_inline_rewards() -> None:
    """A trusted reward that raises stops the run."""

    def broken(prompt: Prompt, text: str) -> float:
        raise ZeroDivisionError

    assert inline_reward(broken, PROMPT, "x") == Failure("reward", "raised ZeroDivisionError")
    assert checked_reward(1) == 1.0
    huge = Failure("reward", "returned a int that is not a finite number (int too large to convert to float)")
    assert checked_reward(10**5000) == huge
