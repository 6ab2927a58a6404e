"""A reward that hangs, dies, raises or returns nonsense stops the run or passes for a zero."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import env
from tandem.errors import EnvironmentFailure, TaskError
from tandem.program import printed, workers
from tandem.program.config import TaskConfig
from tandem.program.episode import Observed, checked_reward, inline_reward
from tandem.program.pool import EnvironmentPool, RunningEpisode
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
        if text.startswith("slow"):
            time.sleep(float(text[4:]))
        if text == "spin":
            while True:
                pass
        if text == "grandchild":
            sleeper = subprocess.Popen(["sleep", "60"])
            open(prompt.record["path"], "w").write(str(sleeper.pid))
            sleeper.wait()
        if text == "flood":
            for number in range(20_000):
                print(number)
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
    made = EnvironmentPool(TaskConfig(f"{source}:Odd", heldout_size=2, reward_deadline_s=1.0, workers=1))
    yield made
    made.close()


def said(text: str) -> tuple[Prompt, tuple[Message, ...]]:
    return PROMPT, (Message("assistant", text, sampled=True),)


def running(task: EnvironmentPool, conversations: list[Any], until_s: float) -> list[RunningEpisode]:
    episodes = [task.episode(prompt, until_s) for prompt, _ in conversations]
    for episode, (_, turns) in zip(episodes, conversations, strict=True):
        episode.said.extend(turns)
    return episodes


def grades_of(task: EnvironmentPool, conversations: list[Any], until_s: float = math.inf) -> list[float | Failure]:
    return [one.result(60) for one in [episode.score() for episode in running(task, conversations, until_s)]]


def observed(task: EnvironmentPool, conversations: list[Any]) -> list[Any]:
    return [one.result(60) for one in [episode.observe() for episode in running(task, conversations, math.inf)]]


def test_bad_rewards_fail_alone(task: EnvironmentPool) -> None:
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
    assert dict(zip(cases, grades_of(task, [said(text) for text in cases]), strict=True)) == cases


def test_step_deadline(task: EnvironmentPool) -> None:
    """Many hanging rewards take their deadlines one after the other, far past that of the step."""
    grades_of(task, [said("fine")])
    grades = grades_of(task, [said("hang")] * 50, until_s=time.monotonic() + 0.5)
    assert all(isinstance(grade, Failure) and grade.where == "deadline" for grade in grades)
    late = r"reward took longer than (0\.\d+) s \(its share of rollout.deadline_s\)"
    shares = [float(found[1]) for grade in grades if (found := re.fullmatch(late, grade.reason))]
    assert shares and min(shares) < 0.3  # of 0.5, which the first do not take whole
    assert grades[-1] == Failure("deadline", "no time was left for its reward (rollout.deadline_s)")
    assert grades_of(task, [said("fine")]) == [0.5]


def test_slow_answers_cost_themselves(task: EnvironmentPool) -> None:
    """Good answers lose their rewards because slow ones stand before them and take all of the step's time."""
    grades_of(task, [said("fine")])
    texts = ["hang"] * 2 + ["fine"] * 10
    grades = grades_of(task, [said(text) for text in texts], until_s=time.monotonic() + 6.0)
    assert grades[2:] == [0.5] * 10
    assert [grade.where for grade in grades[:2] if isinstance(grade, Failure)] == ["deadline"] * 2


def test_slow_answer_gets_what_the_quick_leave(task: EnvironmentPool) -> None:
    """An answer that needs more than an even share fails although the others leave it enough."""
    grades_of(task, [said("fine")])
    grades = grades_of(task, [said("fine"), said("slow0.7"), *[said("fine")] * 20], until_s=time.monotonic() + 8.0)
    assert grades == [0.5] * 22


class Clock:
    """A time for `_Waiting`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def served(
    monkeypatch: pytest.MonkeyPatch, needs_s: list[float], until_s: float, deadline_s: float, start_s: float
) -> list[bool]:
    """Which calls are answered, each needing its seconds, where a new child takes `start_s`."""
    clock = Clock()
    monkeypatch.setattr(workers, "time", clock)
    waiting = workers._Waiting(deadline_s)
    calls = [workers.Asked("score", (place,), "reward", until_s) for place in range(len(needs_s))]
    for call in calls:
        waiting.add(call)
    answered = [False] * len(needs_s)
    while (call := waiting.next(None)) is not None and clock.now_s < until_s:
        limit_s, (place,) = waiting.limit_s(call, start_s, 1), call.arguments
        if call.overran and call.had_s >= limit_s:
            continue
        answered[place] = needs_s[place] <= limit_s
        clock.now_s += min(needs_s[place], limit_s)
        failure = None if answered[place] else Failure("deadline", "late")
        waiting.took(call, min(needs_s[place], limit_s), limit_s, failure)
        clock.now_s += 0.0 if failure is None else start_s
    return answered


@given(
    slow=st.lists(st.booleans(), min_size=1, max_size=40),
    until_s=st.floats(10.0, 600.0),
    deadline_s=st.floats(1.0, 20.0),
)
def test_turns(slow: list[bool], until_s: float, deadline_s: float) -> None:
    """Wherever the slow ones stand, a quick answer is left without a turn, or the loop does not end."""
    start_s = until_s / len(slow) / 10
    with pytest.MonkeyPatch.context() as patch:
        needs_s = [1e9 if is_slow else 1e-3 for is_slow in slow]
        assert served(patch, needs_s, until_s, deadline_s, start_s) == [not is_slow for is_slow in slow]


def test_turns_where_all_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 5 s each in 600 s for 128 of them: each is killed at its share, and none is graded at all."""
    assert sum(served(monkeypatch, [5.0] * 128, 600.0, 10.0, 1.0)) >= 110
    assert sum(served(monkeypatch, [4.0] * 128, 600.0, 10.0, 1.0)) == 128
    mixed = served(monkeypatch, [8.0 if place % 16 == 0 else 0.1 for place in range(128)], 600.0, 10.0, 1.0)
    assert mixed == [True] * 128


def test_observations(task: EnvironmentPool) -> None:
    """What an environment observes reaches the model although it is no message, or its failure stops the run."""
    kept, ended, bad, one = observed(task, [said("go"), said("stop"), said("bad"), said("one")])
    assert kept.messages == (Message("user", "more"),) and ended.messages is None
    for failure in (bad, one):
        assert isinstance(failure, Failure) and failure.where == "environment"
        assert "a list of tandem.types.Message or None is needed" in failure.reason


def test_prompts_that_cannot_be_had(task: EnvironmentPool) -> None:
    """A prompt that raises, hangs or cannot travel hangs the run or passes for a prompt."""
    assert [prompt.messages[0].content for prompt in task.heldout] == ["heldout 0", "heldout 1"]
    assert [prompt.id for prompt in task.batch(0, 2)] == ["Odd/train/0", "Odd/train/1"]
    for index, reason in ((3, "raised RuntimeError: no third"), (4, "took longer than")):
        with pytest.raises(EnvironmentFailure, match=f"training prompt {index}: .*{reason}"):
            task.prompt(index)
    with pytest.raises(TaskError, match="prompt 5 of 'train' has <.*> in its record's 'object'; allowed: text, finite"):
        task.prompt(5)
    assert task.prompt(6).messages[0].content == "train 6"


def test_what_a_reward_started_dies_with_it(task: EnvironmentPool, tmp_path: Path) -> None:
    """Each overrun leaves a process behind that the user's code had started."""
    prompt = Prompt("p", PROMPT.messages, {"path": str(tmp_path / "pid")})
    (grade,) = grades_of(task, [(prompt, (Message("assistant", "grandchild", sampled=True),))])
    assert isinstance(grade, Failure) and grade.where == "deadline"
    status = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    until = time.monotonic() + 20  # it was sent a signal, which it takes when it gets a core
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.01)


def test_output_stays_off_stdout(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a reward prints lands among the lines of `--json`."""
    printing = EnvironmentPool(TaskConfig(f"{source}:Odd", heldout_size=0))
    assert grades_of(printing, [said("fine")]) == [0.5]
    printing.close()
    shown = capfd.readouterr()
    assert shown.out == "" and "grading fine" in shown.err


def test_a_flood_of_output_is_bounded(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An environment that prints without end fills the terminal or the log; or why its process died is lost in it."""
    printing = EnvironmentPool(TaskConfig(f"{source}:Odd", heldout_size=0, workers=1))
    assert grades_of(printing, [said("fine"), said("flood"), said("fine")]) == [0.5, 0.5, 0.5]
    printing.close()
    shown = capfd.readouterr().err
    assert shown.startswith("grading fine\ngrading flood\n0") and shown.endswith("grading fine\n")
    assert len(shown) < printed.MOST_BYTES + printed.LAST_BYTES + 300
    lost = 2 * len("grading fine\n") + len("grading flood\n") + sum(len(f"{n}\n") for n in range(20_000))
    assert "tandem: task Odd printed 16 KiB; what it prints more is left out for a minute\n" in shown
    assert f"tandem: task Odd printed {lost - printed.MOST_BYTES:,} bytes more; the last:\n" in shown


def test_output_is_shown_again_after_a_minute() -> None:
    """A task that once printed much is silent for the rest of a run of days."""
    shown: list[bytes] = []
    seen = printed.Printed("t", shown.append)
    for second in range(0, 200, 20):
        seen.take(b"a" * (8 << 10), float(second))
    assert (
        sum(text.count(b"a") for text in shown if b"tandem" not in text)
        == 4 * printed.MOST_BYTES - (8 << 10) + 3 * printed.LAST_BYTES
    )
    assert sum(b"8,192 bytes more" in text for text in shown) == 3
    seen.tell()
    assert sum(b"bytes more" in text for text in shown) == 3


def test_start_that_hangs_or_fails(source: Path, tmp_path: Path) -> None:
    """A constructor that hangs blocks the run for good; a wrong file or class ends in a traceback."""
    hung = EnvironmentPool(TaskConfig(f"{source}:Odd", parameters=(("slow", 60.0),)), start_deadline_s=0.5)
    with pytest.raises(EnvironmentFailure, match=re.escape("did not come up within 0.5 s (it hung)")):
        hung.ready()
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "needs.py").write_text(
        "class Needs:\n    def __init__(self, path, sandbox, seed, size=3):\n        pass\n"
        "class Any:\n    def __init__(self, **more):\n        pass\n"
    )
    (tmp_path / "thing.py").write_text("class Thing:\n    pass\n\ndef leave():\n    raise SystemExit(2)\n")
    for environment, parameters, reason in (
        (f"{tmp_path}/none.py:A", (), "no file"),
        (f"{tmp_path}/broken.py:A", (), "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("nothing_of_this_name:A", (), "No module named"),
        (f"{source}:Old", (), "has no 'Old'. Did you mean Odd"),
        (f"{source}:Odd", (("fast", 1),), "task.parameters: Odd takes no 'fast'. Allowed: slow"),
        (f"{tmp_path}/needs.py:Needs", (), "task.parameters: Needs needs a value of 'path'. Give it: --set task.param"),
        (f"{tmp_path}/needs.py:Needs", (("pth", "x"),), "task.parameters: Needs takes no 'pth'. Did you mean path"),
        (f"{tmp_path}/needs.py:Needs", (("path", "x"), ("sandbox", 1)), "task.parameters: Needs takes no 'sandbox'"),
        (f"{tmp_path}/needs.py:Any", (("other", 1),), "lacks prompt and reward"),
        (f"{tmp_path}/thing.py:Thing", (), "lacks prompt and reward"),
    ):
        with pytest.raises(TaskError, match=re.escape(reason)):
            EnvironmentPool(TaskConfig(environment, parameters=parameters)).ready()
    with pytest.raises(EnvironmentFailure, match="SystemExit"):
        EnvironmentPool(TaskConfig(f"{tmp_path}/thing.py:leave")).ready()


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
        EnvironmentPool(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl")))


def test_math_verify_in_the_child(tmp_path: Path) -> None:
    """math-verify's signals or its import reach the process that trains, or its grades are lost on the way."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "work #### 1,000"}\n')
    task = EnvironmentPool(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl"), heldout_size=0, reward="math_verify"))
    prompt = task.prompt(0)
    answers = ["It is \\boxed{1000}", "1,000.00", "I get 999", ""]
    assert grades_of(task, [(prompt, (Message("assistant", text, sampled=True),)) for text in answers]) == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    assert observed(task, [(prompt, ())]) == [Observed(None)]
    task.close()


def test_answer_that_never_ends_evaluating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer whose evaluation does not end costs every reply to it the full deadline, and says nothing at load."""
    package = tmp_path / "math_verify"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import time\n"
        "def parse(text, parsing_timeout):\n"
        "    time.sleep(60 if 'endless' in text else 0)\n"
        "    return [] if 'broken' in text else [text]\n"
        "def verify(gold, answer, timeout_seconds):\n"
        "    return False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "user.py").write_text(
        "from tandem.types import Message, Prompt\n"
        "class Endless:\n"
        "    def prompt(self, split, index):\n"
        "        return Prompt('x', (Message('user', f'{split} {index}'),), {'answer': f'endless^{index}'})\n"
        "    def reward(self, prompt, text):\n"
        "        return 0.0\n"
    )
    lines = ['{"question": "a", "answer": "7"}', '{"question": "b", "answer": "x^2"}']
    for answer, reward, reason in (
        ("endless", "score", "line 3: the answer 'endless' cannot be evaluated: trial took longer than 0.5 s"),
        ("endless", "math_verify", "line 3: the answer 'endless'"),
        ("broken", "score", "line 3: the answer 'broken' cannot be evaluated: raised ValueError: math-verify cannot"),
        ("endless", "exact", ""),
        ("y^2", "score", ""),
    ):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join([*lines, f'{{"question": "c", "answer": "{answer}"}}']))
        made = EnvironmentPool(
            TaskConfig("jsonl", path=str(path), heldout_size=1, reward=reward, reward_deadline_s=0.5)
        )
        if reason:
            with pytest.raises(TaskError, match=re.escape(reason)):
                made.ready()
        else:
            made.ready()
        made.close()
    made = EnvironmentPool(
        TaskConfig(f"{tmp_path}/user.py:Endless", heldout_size=1, reward="math_verify", reward_deadline_s=0.5)
    )
    with pytest.raises(TaskError, match="prompt Endless/heldout/0: the answer 'endless.0' cannot be evaluated"):
        made.ready()
    made.close()


def test_bound_of_rewards() -> None:
    """A reward of 1e308 overflows a mean or a deviation and ends the run in a traceback."""
    assert checked_reward(1e9) == 1e9 and checked_reward(-1e9) == -1e9
    beyond = Failure("reward", "returned 1e+308; allowed is -1e+09 to 1e+09")
    assert checked_reward(1e308) == beyond == inline_reward(lambda prompt, text: 1e308, PROMPT, "x")


def test_inline_rewards() -> None:
    """A trusted reward that raises stops the run."""

    def broken(prompt: Prompt, text: str) -> float:
        raise ZeroDivisionError

    assert inline_reward(broken, PROMPT, "x") == Failure("reward", "raised ZeroDivisionError")
    assert checked_reward(1) == 1.0
    huge = Failure("reward", "returned a int that is not a finite number (int too large to convert to float)")
    assert checked_reward(10**5000) == huge
