"""Training on held-out questions, prompts that change between runs, and files or names that fail without saying why."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import override
from tandem.errors import ConfigError, TandemWarning, TaskError
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.program.environment import Environment
from tandem.program.episode import Opened
from tandem.program.prompts import (
    DrawnPrompts,
    FilePrompts,
    make_prompts,
    question_key,
    read_questions,
)
from tandem.program.worker import Calls, driven
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.types import Message, Prompt

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
ADDITION = (("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2))


class Numbers(Environment):
    """`space` questions, drawn in turn, the same in both splits."""

    def __init__(self, space: int) -> None:
        self.space = space

    def prompt(self, split: str, index: int) -> Prompt:
        number = index % self.space
        return Prompt(f"{index}", (Message("user", f"Say {number}."),), {"answer": str(number)})

    def reward(self, prompt: Prompt, text: str) -> float:
        return float(text == prompt.record["answer"])


CALCULATOR = TaskConfig(parameters=ADDITION, system="You are a calculator.", reward="last_number", heldout_size=9)


@pytest.mark.parametrize(
    ("settings", "wanted", "dropped"),
    [
        ({"task.environment": "double.py:Double"}, TaskConfig("double.py:Double"), "heldout_size, .*parameters, .*sys"),
        ({"task.name": "gcd"}, TaskConfig(name="gcd"), "task.parameters, task.reward, task.system are dropped"),
        (
            {"task.path": "a.jsonl", "task.environment": "jsonl", "task.heldout_size": "3"},
            TaskConfig("jsonl", path="a.jsonl", heldout_size=3),
            "another task than chain_sum: its task.parameters, task.reward, task.system are dropped",
        ),
    ],
)
def test_another_task_starts_from_the_defaults(settings, wanted, dropped) -> None:
    """A recipe's system message, parameters and reward given to another task, whose prompts they spoil, in silence."""
    config = RunConfig("sums", 1, ModelConfig("m"), task=CALCULATOR, evaluation=EvaluationConfig(prompts=3))
    with pytest.warns(TandemWarning, match=dropped):
        assert override(config, settings) == replace(config, task=wanted)


@pytest.mark.parametrize(
    "settings", [{"task.environment": "reasoning_gym", "task.name": "chain_sum"}, {"task.parameters": "max_terms=3"}]
)
def test_the_same_task_keeps_its_settings(settings, recwarn) -> None:
    """A task named as it is loses its settings; or a warning about a task that nobody changed."""
    changed = override(CALCULATOR, {name.removeprefix("task."): text for name, text in settings.items()})
    assert changed == replace(CALCULATOR, parameters=changed.parameters) and not recwarn
    file = TaskConfig("jsonl", path="a.jsonl", question_field="q", system="s")
    assert override(file, {"path": "b.jsonl", "name": "gcd"}) == replace(file, path="b.jsonl", name="gcd")


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int) -> list[dict[str, object]]:
    return [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


@settings(max_examples=50, deadline=None)
@given(space=st.integers(1, 300), heldout=st.integers(0, 200), train_size=st.integers(0, 20), seed=st.integers(0, 5))
def test_drawn_splits_are_disjoint(space: int, heldout: int, train_size: int, seed: int) -> None:
    """A held-out question is asked in training, or a space too small for both goes unnoticed."""
    config = TaskConfig("x:Y", heldout_size=heldout, train_size=train_size, seed=seed)
    if heldout >= space:
        with pytest.raises(TaskError, match="heldout_size"):
            DrawnPrompts(config, Numbers(space))
        return
    source = DrawnPrompts(config, Numbers(space))
    keys = {question_key(prompt) for prompt in source.heldout}
    prompts = [source.train(index) for index in range(40)]
    assert len(keys) == heldout
    assert not keys & {question_key(prompt) for prompt in prompts}
    assert len({prompt.id for prompt in prompts} | {prompt.id for prompt in source.heldout}) == 40 + heldout
    assert prompts[33] == DrawnPrompts(config, Numbers(space)).train(33)
    if train_size:
        assert prompts[33].messages == prompts[33 % train_size].messages


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, 12), min_size=1, max_size=30), heldout=st.integers(0, 12), seed=st.integers(0, 5))
def test_file_splits_are_disjoint(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], heldout: int, seed: int
) -> None:
    """A question that stands in the file twice is held out and trained on; a question is lost or invented."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write(path, [{"question": f"Say  {n}." if place % 2 else f"Say {n}.", "answer": n} for place, n in enumerate(rows)])
    config = TaskConfig("jsonl", path=str(path), heldout_size=heldout, seed=seed)
    distinct = len(set(rows))
    if heldout >= distinct:
        with pytest.raises(TaskError, match="Lower task.heldout_size"):
            FilePrompts(config)
        return
    source = FilePrompts(config)
    keys = {question_key(prompt) for prompt in source.heldout}
    left = sum(f"Say {n}." not in keys for n in rows)
    epochs = [[source.train(epoch * left + place) for place in range(left)] for epoch in range(3)]
    assert len(keys) == heldout
    for epoch in epochs:
        assert not keys & {question_key(prompt) for prompt in epoch}
        assert sorted(p.record["line"] for p in epoch) == sorted(p.record["line"] for p in epochs[0])
    assert [source.train(place) for place in range(left)] == epochs[0]
    assert len({prompt.id for epoch in epochs for prompt in epoch}) == 3 * left


def test_file_order_changes_by_epoch_and_seed(tmp_path: Path) -> None:
    """Each epoch walks the file in the same order, or the seed does not matter."""
    path = write(tmp_path / "a.jsonl", questions(40))

    def lines(seed: int, epoch: int) -> list[int]:
        source = make_prompts(TaskConfig("jsonl", path=path, heldout_size=10, seed=seed))
        return [source.train(epoch * 30 + place).record["line"] for place in range(30)]

    assert lines(0, 0) != lines(0, 1) and lines(0, 0) != lines(1, 0)
    assert sorted(lines(0, 0)) == sorted(lines(0, 1))


def test_heldout_file(tmp_path: Path) -> None:
    """A training line with a question of the held-out file is trained on; an evaluation needs a training file."""
    train, test = write(tmp_path / "a.jsonl", questions(20)), write(tmp_path / "b.jsonl", questions(8))
    source = make_prompts(TaskConfig("jsonl", path=train, heldout_path=test, heldout_size=8))
    assert {p.record["question"] for p in source.heldout} == {q["question"] for q in questions(8)}
    assert {source.train(n).record["question"] for n in range(24)} == {q["question"] for q in questions(20)[8:]}
    only = make_prompts(TaskConfig("jsonl", heldout_path=test, heldout_size=5))
    assert len(only.heldout) == 5
    with pytest.raises(TaskError, match="nothing to train on"):
        only.train(0)
    with pytest.raises(TaskError, match="has 8 distinct questions. Lower task.heldout_size"):
        make_prompts(TaskConfig("jsonl", heldout_path=test))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "a", "answer": "b"', "line 3: not JSON"),
        (b'{"question": "a\xff", "answer": "b"}', "line 3: not JSON"),
        (b"[1]", "line 3: .* is not a JSON object"),
        (b'{"questions": "a", "answer": "b"}', "line 3: no field 'question' .* Did you mean questions"),
        (b"{}", "line 3: no field 'question'"),
        (b'{"question": "a"}', "line 3: no field 'answer'"),
        (b'{"question": "a", "answer": null}', "line 3: field 'answer' is None"),
        (b'{"question": " ", "answer": "b"}', "line 3: field 'question' is ' '"),
        (b'{"question": "a", "answer": true}', "line 3: field 'answer' is True"),
        (b'{"question": "a", "answer": "b ####"}', "line 3: nothing follows"),
        (b'{"question": "a", "answer": "####\\n42"}'.replace(b"####", b"#### "), None),
        (b'{"question": "\\ud800", "answer": "b"}', "line 3: field 'question' holds .ud800, half of a character, at 0"),
        (b'{"question": "a", "answer": "1 \\udc00"}', "line 3: field 'answer' holds .udc00, half of a character, at 2"),
        (b'{"question": "\\ud83d\\ude00", "answer": "b"}', None),
        (b'{"question": ' + b"[" * 100_000, "line 3: nested too deeply"),
        (b'{"question": "a", "answer": "b", "c": ' + b'{"d":' * 100_000, "line 3: nested too deeply"),
        (b'{"question": "a", "answer": NaN}', "line 3: field 'answer' is nan; text or a finite number"),
        (b'{"question": "a", "answer": -Infinity}', "line 3: field 'answer' is -inf"),
        (b'{"question": "a", "answer": 1e999}', "line 3: field 'answer' is inf"),
        (b'{"question": 1e308, "answer": 1e308, "c": NaN}', None),
        (b'{"question": "a", "answer": "nan"}', "line 3: the answer 'nan' .* no finite number"),
        (b'{"question": "a", "answer": ' + b"1" * 5000 + b"}", "line 3: not JSON .*4300 digits"),
        (b'{"question": "a", "question": "b", "answer": "c"}', "line 3: field 'question' is there twice"),
        (b'{"question": "a", "answer": "c", "d": {"answer": 1, "answer": 2}, "d": 1}', None),
        (b'{"question": "\\u2003\\n", "answer": "b"}', "line 3: field 'question' is '.u2003.n'"),
        (b'{"question": "a", "answer": ["b"]}', "line 3: field 'answer' is .'b'."),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: bytes, reason: str | None) -> None:
    """A broken line is skipped, crashes without its number, or blank lines shift the count; a good one is refused."""
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "x", "answer": 1.5}\r\n\n' + line + b"\n")
    if reason is None:
        assert len(read_questions(TaskConfig("jsonl", path=str(path)), str(path))) == 2
        return
    with pytest.raises(TaskError, match=reason):
        make_prompts(TaskConfig("jsonl", path=str(path), heldout_size=0))


def test_missing_or_empty_file(tmp_path: Path) -> None:
    """A file that is not there gives a traceback; an empty one gives a run without prompts."""
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        make_prompts(TaskConfig("jsonl", path=str(tmp_path / "none.jsonl")))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(TaskError, match="holds no line"):
        make_prompts(TaskConfig("jsonl", path=str(tmp_path / "empty.jsonl")))
    with pytest.raises(TaskError, match="task.train_size is 9, but .* leaves 6 lines"):
        make_prompts(TaskConfig("jsonl", path=write(tmp_path / "a.jsonl", questions(8)), heldout_size=2, train_size=9))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so #### 42", "42"),
        ("#### 41\nno\n####42", "42"),
        ("##### 42", "42"),
        ("####\n42\nbye", "42"),
        (4.0, "4.0"),
        (1e22, "10000000000000000000000"),
        (1e-7, "0.0000001"),
        (12, "12"),
    ],
)
def test_answer_of_a_line(tmp_path: Path, solution: object, answer: str) -> None:
    """A form of the gold answer is read with what stands around it, or a number as no number."""
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": solution}])
    (prompt,) = read_questions(TaskConfig("jsonl", path=path, reward="last_number"), path)
    assert prompt.record["answer"] == answer


@pytest.mark.parametrize("answer", ["1/2", "10:30", "3, 4", "2^3", "3-5", "2024-01-02", "1 000", "1,00,000", "Paris"])
def test_answer_that_is_not_one_number_is_refused_at_load(tmp_path: Path, answer: str) -> None:
    """last_number pays for the last digits of an answer that is no number: "2" where 1/2 is right."""
    path = write(tmp_path / "a.jsonl", [*questions(2), {"question": "a", "answer": f"so #### {answer}"}])
    with pytest.raises(TaskError, match="line 3: the answer .* is not one number"):
        make_prompts(TaskConfig("jsonl", path=path, heldout_size=0, reward="last_number"))
    make_prompts(TaskConfig("jsonl", path=path, heldout_size=0, reward="exact"))

    class Asked(Numbers):
        def prompt(self, split: str, index: int) -> Prompt:
            return dataclasses.replace(super().prompt(split, index), record={"answer": answer})

    for size in (0, 2):
        with pytest.raises(TaskError, match="task Y: the answer .* of prompt Y/.*/0 is not one number"):
            DrawnPrompts(TaskConfig("x:Y", heldout_size=size, reward="last_number"), Asked(50))


@pytest.mark.parametrize("value", [Decimal(5), {"a": [{1}]}, float("nan"), object(), [b"5"]])
def test_record_that_no_file_can_hold(value: object) -> None:
    """A record of other than plain values is a TypeError after step 1, when its trajectories are written."""

    class Odd(Numbers):
        def prompt(self, split: str, index: int) -> Prompt:
            return replace(super().prompt(split, index), record={"plain": [1, None, {"a": "b"}], "odd": value})

    with pytest.raises(TaskError, match=r"prompt 0 of 'heldout' has .* in its record's 'odd'; allowed: text"):
        DrawnPrompts(TaskConfig("x:Y", heldout_size=2), Odd(9))


def test_prompt_with_half_a_character() -> None:
    """An environment's prompt or observation that no tokeniser takes ends the run in a traceback."""

    class Half(Numbers):
        def prompt(self, split: str, index: int) -> Prompt:
            return Prompt("x", (Message("user", f"{index} \ud800"),), {})

        def observe(self, prompt: Prompt, turns: tuple[Message, ...]) -> list[Message]:
            return [Message("user", "\udfff")]

    with pytest.raises(TaskError, match="prompt 0 of 'heldout' holds .ud800, half of a character, at 2"):
        DrawnPrompts(TaskConfig("x:Y", heldout_size=1), Half(9))
    source = DrawnPrompts(TaskConfig("x:Y", heldout_size=0), Half(9))
    with pytest.raises(ValueError, match="half of a character"):
        driven(Calls(source, source.config).observe(0, Opened(Prompt("x", ())), ()))
    with pytest.raises(ConfigError, match=r"task.system holds .udc80, half"):
        TaskConfig(system="Be \udc80.")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"question": "a"}\n'.encode("utf-16"), "is UTF-16"),
        (gzip.compress(b'{"question": "a"}\n', mtime=0), "is gzip"),
        (b"PAR1\x15\x04", "is Parquet"),
        (b"PK\x03\x04", "is zip"),
        (b" " * 4096 + b"\n", "line 1 is longer than"),
        (b"[\n", "line 1: not JSON"),
    ],
)
def test_file_of_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str) -> None:
    """A file that is no jsonl is refused by a word about a byte, or fills the memory."""
    monkeypatch.setattr("tandem.program.prompts.MAX_LINE_BYTES", 1024)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(TaskError, match=reason):
        make_prompts(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl")))


def test_path_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe hangs the run for good; a folder, a file that may not be read or an odd path ends in a traceback."""
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "a.jsonl", questions(8))
    for path, reason in (
        (tmp_path / "pipe", "is a pipe or a device"),
        ("/dev/null", "is a pipe or a device"),
        (tmp_path, "Is a directory"),
        ("~no-such-person/a.jsonl", "cannot be read"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(TaskError, match=reason):
            make_prompts(TaskConfig("jsonl", path=str(path)))
    monkeypatch.setattr("tandem.program.prompts.MAX_FILE_BYTES", 64)
    with pytest.raises(TaskError, match="is larger than"):
        make_prompts(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl")))
    if os.geteuid():
        (tmp_path / "a.jsonl").chmod(0)
        with pytest.raises(TaskError, match="Permission denied"):
            make_prompts(TaskConfig("jsonl", path=str(tmp_path / "a.jsonl")))


def test_template_and_system(tmp_path: Path) -> None:
    """Braces of a question or template are taken for fields; the system message is lost or put twice."""
    path = write(tmp_path / "a.jsonl", [{"q": "What is {x} in \\frac{1}{2}?", "a": 3}])
    config = TaskConfig(
        "jsonl", path=path, question_field="q", answer_field="a", heldout_size=0, system="Be brief.",
        template="{question} Answer in \\boxed{}.",
    )  # fmt: skip
    prompt = make_prompts(config).train(0)
    assert prompt.messages == (
        Message("system", "Be brief."),
        Message("user", "What is {x} in \\frac{1}{2}? Answer in \\boxed{}."),
    )
    assert prompt.record["answer"] == "3"


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"{GSM8K} is not on this machine")
def test_gsm8k() -> None:
    """GSM8K's files as published no longer load, or the gold answer is not what follows '####'."""
    source = make_prompts(
        TaskConfig("jsonl", path=str(GSM8K / "train.jsonl"), heldout_path=str(GSM8K / "test.jsonl"), heldout_size=1319)
    )
    answers = {prompt.record["line"]: prompt.record["answer"] for prompt in source.heldout}
    assert len(answers) == 1319 and answers[1] == "18"
    assert all(re.fullmatch(r"-?[\d,.]+", answer) for answer in answers.values())
    assert len({source.train(index).record["line"] for index in range(7473)}) >= 7470


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic", "spell_backward", "gsm_symbolic"])
def test_reasoning_gym_by_name(name: str) -> None:
    """A data set of reasoning-gym cannot be named, its own answer scores below 1, or its splits overlap."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    config = TaskConfig(name=name, heldout_size=16, seed=3)
    source = make_prompts(config)
    prompts = [*source.heldout, *(source.train(index) for index in (0, 1, 4095, 4096, 10_000))]
    for prompt in prompts:
        nonsense = Message("assistant", "<answer>nonsense</answer>", sampled=True)
        said = Message("assistant", f"<answer>{prompt.record['answer']}</answer>", sampled=True)
        assert driven(Calls(source, config).score(0, Opened(prompt), (said,)))[0] == 1.0, prompt
        assert driven(Calls(source, config).score(0, Opened(prompt), (nonsense,)))[0] < 0.5, prompt
    assert source.train(4096) == make_prompts(config).train(4096)
    assert source.train(4096).messages != source.train(0).messages
    assert question_key(source.train(0)) != question_key(make_prompts(TaskConfig(name=name, seed=4)).train(0))
    json.dumps([dict(prompt.record) for prompt in prompts])


def test_reasoning_gym_scores_unmarked_numbers() -> None:
    """A right number inside a sentence scores as wrong because the data set compares the whole sentence."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    config = TaskConfig(parameters=ADDITION, heldout_size=4)
    source = make_prompts(config)
    prompt = source.train(0)
    gold = int(prompt.record["answer"])
    right, wrong = (Message("assistant", f"The sum is {number}.", sampled=True) for number in (gold, gold + 1))
    assert driven(Calls(source, config).score(0, Opened(prompt), (right,)))[0] == 1.0
    assert driven(Calls(source, config).score(0, Opened(prompt), (wrong,)))[0] < 0.5
    assert re.fullmatch(r"State .*: \d\d? [+-] \d\d? =", prompt.messages[0].content)


def test_reasoning_gym_answer_that_breaks_the_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer on which a scorer raises escapes its lesson as a failed trajectory, or a broken scorer gives zeros."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    config = TaskConfig(name="prime_factorization", heldout_size=0)
    source = make_prompts(config)
    prompt = source.train(0)
    assert source.environment.reward(prompt, "a × b") == 0.0
    assert source.environment.reward(prompt, prompt.record["answer"]) == 1.0
    scorer = source.environment.chunk("train", 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(scorer), "score_answer", lambda self, answer, entry: {}["gone"])
    with pytest.raises(KeyError, match="gone"):
        source.environment.reward(prompt, "2 × 3")


def test_reasoning_gym_errors() -> None:
    """A wrong name or parameter ends in a traceback of the package instead of the nearest right one."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    with pytest.raises(TaskError, match="Did you mean .*chain_sum"):
        make_prompts(TaskConfig(name="chain_sums"))
    with pytest.raises(TaskError, match="takes no 'min_term'. Did you mean min_terms"):
        make_prompts(TaskConfig(parameters=(("min_term", 2),)))
    with pytest.raises(TaskError, match="do not suit chain_sum: max_terms must be"):
        make_prompts(TaskConfig(parameters=(("min_terms", 3), ("max_terms", 2))))
    small = (("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 1))
    with pytest.raises(TaskError, match="distinct questions.*Lower task.heldout_size or widen task.parameters"):
        make_prompts(TaskConfig(parameters=small, heldout_size=190))


@pytest.mark.parametrize(
    "fields",
    [
        {"environment": "gym"},
        {"environment": "a.py:"},
        {"environment": "jsonl"},
        {"reward": "math"},
        {"template": "Say it."},
        {"environment": "a.py:A", "template": "{question}!"},
        {"heldout_size": -1},
        {"train_size": -1},
        {"reward_deadline_s": 0.0},
        {"reward_deadline_s": float("nan")},
    ],
)
def test_config_refuses(fields: dict[str, object]) -> None:
    """A value that cannot work is found only in the middle of a run."""
    with pytest.raises(ConfigError, match="task\\."):
        TaskConfig(**fields)  # type: ignore[arg-type]
