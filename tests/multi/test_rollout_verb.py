"""A rollout without training that shows other programs than a run would have, or a folder that cannot be read."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tandem.cli import main
from tandem.config import override
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.program.pool import RunningEpisode
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.report import programs
from tandem.report.programs import ProgramsTable
from tandem.rollout.watch import Progress, Watched
from tandem.run import evaluate as evaluating
from tandem.run import local
from tandem.run import rollout as alone
from tandem.run.counted import SCHEDULED
from tandem.run.source import resolve_source
from tandem.sync.departures import declaration
from tandem.types import Failure, Message, Prompt
from tests.display import Silent
from tests.samples import ended

SMALL = {
    "steps": "1",
    "objective": "policy_gradient",
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128",
    "task.heldout_size": "4",
    "evaluation.prompts": "0",
    "rollout.prompts_per_step": "3",
    "rollout.samples_per_prompt": "4",
    "rollout.max_new_tokens": "8",
    "learner.warmup_steps": "0",
}
WORDS = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def graded(self: RunningEpisode, unheard: int = 0) -> Future[float]:
    """Rewards that differ within a group."""
    return ended(float(sum(map(ord, self.said[-1].content)) % 11))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One step of a run."""
    monkeypatch.setattr(RunningEpisode, "score", graded)
    config = override(tiny_arithmetic(), SMALL)
    _, folder = local.train(config, out=tmp_path / "trained", resume=None, display=Silent())
    return folder


def test_a_rollout_has_the_programs_of_the_first_step(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other prompts, seeds or sampling than training has; a row or files that `tandem report` does not read."""
    folder = tmp_path / "alone"
    code = main.main(["rollout", "tiny_arithmetic", "--out", str(folder), "--json", *WORDS])
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert code == 0 and (row["trajectories"], row["failed"], row["step"]) == (12, 0, 0)
    assert row["run"] == str(folder) and row["page"] == str(folder / "trajectories.html")
    assert "3 train prompts x 4 programs, no training" in said.err
    (kept,) = rows(folder / "metrics.jsonl")
    assert kept.items() <= row.items() and kept["tokens_per_s"] > 0
    (of_training,) = rows(trained / "metrics.jsonl")
    for name in ("spelt_tokens", *SCHEDULED):
        sampled = row["tokens"] - of_training["tokens"] if name == "run_tokens" else 0
        assert kept[name] - sampled == of_training[name], name
    assert kept["cached_tokens"] > 0
    of_run = rows(trained / "trajectories/step-1.jsonl")
    of_rollout = rows(folder / "trajectories/step-0.jsonl")
    assert [one["prompt"] for one in of_rollout] == [one["prompt"] for one in of_run]
    assert "trajectories.html" in (folder / "report.html").read_text()
    assert main.main(["report", str(folder), "--trajectories"]) == 0
    assert main.main(["eval", str(folder)]) == 2  # it has no checkpoint


def test_rows_of_a_run_have_its_tokens_and_credit(trained: Path) -> None:
    """Credit that is not the group's; tokens that are not those of the text; weights of another step."""
    kept = rows(trained / "trajectories/step-1.jsonl")
    tokenizer = open_checkpoint(resolve_source(str(trained))).load_tokenizer()
    for first in range(0, 12, 4):
        group = kept[first : first + 4]
        rewards = np.array([row["reward"] for row in group])
        wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for row, advantage in zip(group, wanted, strict=True):
            tokens = row["tokens"]
            read, *drawn = tokens["sampled"]
            assert (read + sum(drawn), drawn) == (len(tokens["ids"]), [row["sampled_tokens"]])
            assert tokenizer.decode(tokens["ids"][:read]) == row["context"]
            assert tokenizer.decode(tokens["ids"][read:]) == row["text"]
            assert sum(tokens["chars"]) == len(row["context"]) + len(row["text"])
            assert tokens["versions"] == [0, *drawn]
            assert len(tokens["logprobs"]) == drawn[0] and max(tokens["logprobs"]) <= 0
            assert ("advantages" in row) == (row["reward"] != rewards.mean())
            if "advantages" in row:
                assert row["advantages"] == [pytest.approx(advantage, abs=6e-4), *drawn]
    assert any("advantages" in row for row in kept)


def test_tokens_are_kept_where_the_config_says(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that depend on what is kept; rows that go on growing where it is off; a resume that refuses a change."""
    monkeypatch.setattr(RunningEpisode, "score", graded)
    config = override(tiny_arithmetic(), SMALL | {"rollout.keep_tokens": "false"})
    _, folder = local.train(config, out=tmp_path / "short", resume=None, display=Silent())
    short, long = (rows(one / "trajectories/step-1.jsonl") for one in (folder, trained))
    for row in long:
        for name in ("tokens", "context", "advantages"):
            row.pop(name, None)
    assert short == long
    weights = [rows(one / "metrics.jsonl")[-1]["weights"] for one in (folder, trained)]
    assert weights[0] == weights[1]
    longer = override(config, {"rollout.keep_tokens": "true", "steps": "2"})
    local.train(longer, out=None, resume=folder, display=Silent())
    assert "tokens" in rows(folder / "trajectories/step-2.jsonl")[0]


@pytest.mark.parametrize(
    ("programs", "made"), [(None, (3, 4)), (1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (20, (5, 4)), (6, None), (0, None)]
)
def test_the_number_of_programs(programs: int | None, made: tuple[int, int] | None) -> None:
    """More or fewer programs than were asked for, and nothing said of it; or weights said to be older than they are."""
    config = override(tiny_arithmetic(), SMALL)
    if made is None:
        with pytest.raises(ConfigError, match="--programs is"):
            alone.sized(config, programs, "train")
        return
    rollout = alone.sized(config, programs, "train").rollout
    assert (rollout.prompts_per_step, rollout.samples_per_prompt) == made
    behind = override(config, {"sync.lag": "1"})
    assert declaration(behind) != declaration(alone.sized(behind, programs, "train")) == declaration(config)
    if made[0] > 4:
        with pytest.raises(ConfigError, match="5 held-out prompts are asked for, and task.heldout_size is 4"):
            alone.sized(config, programs, "heldout")


@pytest.mark.parametrize(
    ("verb", "settings", "unused"),
    [
        (
            "rollout",
            {"rollout.max_turns": "2", "seed": "3", "engine.draft.by": "lookup", "engine.draft.tokens": "2"},
            "",
        ),
        ("rollout", {"rollout.redraws": "2", "task.seed": "1"}, "rollout.redraws"),
        ("rollout", {"rollout.extra_prompts": "2", "learner.lr": "1e-5"}, "learner.lr, rollout.extra_prompts"),
        ("rollout", {"select.window": "64"}, "select.window"),
        ("eval", {"rollout.max_new_tokens": "9", "evaluation.prompts": "2", "engine.page_tokens": "32"}, ""),
        ("eval", {"rollout.temperature": "0.5", "seed": "3"}, "rollout.temperature, seed"),
        ("eval", {"engine.weights": "int4", "evaluation.every": "2"}, "engine.weights, evaluation.every"),
    ],
)
def test_a_setting_without_a_use_is_said(
    verb: str,
    settings: dict[str, str],
    unused: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a person sets to see its effect has none, and nothing says so; or what has one is said to have none."""

    def stopped(*_: Any) -> None:
        raise ConfigError("stopped")

    monkeypatch.setattr(alone, "sized", stopped)
    monkeypatch.setattr(evaluating, "evaluate_tasks", stopped)
    assert main.main([verb, "tiny_arithmetic", *[f"--set={name}={value}" for name, value in settings.items()]]) == 2
    said = capsys.readouterr().err
    names = ", ".join(sorted(unused.split(", ")))
    assert (f"tandem {verb} has no use for {names}: it " in said) if unused else ("no use" not in said), said


def test_a_recipes_own_step_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe whose steps run more prompts than its batches have: the programs that are shown are not said to be
    others."""
    (tmp_path / "more.py").write_text(
        "from dataclasses import replace\nfrom tandem.recipes.tiny_arithmetic import tiny_arithmetic\n"
        "from tandem.run.config import RunConfig\ndef more() -> RunConfig:\n    config = tiny_arithmetic()\n"
        "    return replace(config, rollout=replace(config.rollout, extra_prompts=2))\n"
    )
    assert main.main(["rollout", f"{tmp_path}/more.py:more", "--programs", "0"]) == 2
    assert "tandem rollout has no use for rollout.extra_prompts: it runs" in capsys.readouterr().err


def test_nothing_graded_is_an_exit_code_of_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken reward that looks like a good rollout to the script that tries it."""
    monkeypatch.setattr(RunningEpisode, "score", lambda self, unheard: ended(Failure("reward", "no grader")))
    words = ["rollout", "tiny_arithmetic", "--split", "heldout", "--programs", "2", *WORDS, "--out", f"{tmp_path}/x"]
    assert main.main(words) == 1
    said = capsys.readouterr().out
    assert "failed 2 (2 x reward: no grader)" in said and f"page {tmp_path / 'x' / 'trajectories.html'}" in said
    assert {row["prompt_id"] for row in rows(tmp_path / "x/trajectories/step-0.jsonl")} == {"chain_sum/heldout/0"}
    assert main.main(words) == 2  # the folder is there


def test_ctrl_c_keeps_what_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of programs thrown away by Ctrl-C; a folder that then cannot be read."""
    progress = Progress(12)
    config = override(tiny_arithmetic(), SMALL)

    def stop(self: Any, step: int, prompts: Any) -> Any:
        yield next(run(self, step, prompts))
        raise KeyboardInterrupt

    run = alone.Rollouts.run
    monkeypatch.setattr(alone.Rollouts, "run", stop)
    code, row = alone.roll_out(config, "train", tmp_path / "run", progress)
    assert code == 130 and row is not None and row["trajectories"] == 4
    assert len(rows(tmp_path / "run/trajectories/step-0.jsonl")) == 4


class Playing:
    """An episode that a test answers by hand."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.future: Future[Any] = Future()

    def observe(self, last: bool = False, /) -> Future[Any]:
        self.future = Future()
        return self.future

    score = observe

    counts: dict[str, int] = {}

    def teardown(self) -> None: ...


def test_the_table_counts_what_programs_do() -> None:
    """A table that shows other counts than the programs have, or a failure as a reward."""
    playing = [Playing(), Playing(), Playing()]
    made = iter(playing)
    pool = type("Pool", (), {"episode": lambda self, prompt, until_s: next(made)})()
    progress = Progress(4, sampled=lambda: 1234)
    heard: list[str] = []
    watched = Watched(pool, progress, lambda prompt: heard.append(prompt.id))
    running = [watched.episode(Prompt("p", ()), 0.0) for _ in playing]
    for episode in running:
        episode.said.append(Message("assistant", "hm", sampled=True))
    running[0].observe()
    running[1].score()
    assert (progress.begun, progress.running, progress.asked, progress.turns) == (3, 3, 2, 2)
    playing[0].future.set_result((Message("user", "go on"),))
    assert heard == ["p"]
    playing[1].future.set_result(0.5)
    running[1].teardown()
    running[0].said.append(Message("assistant", "ah", sampled=True))
    running[0].score()
    playing[0].future.set_result(Failure("reward", "returned nan"))
    running[0].teardown()
    running[2].observe(True)
    playing[2].future.set_result(None)
    assert heard == ["p"]  # nothing follows a last turn or a reward
    running[2].teardown()  # the engine gave it up
    assert (progress.ended, progress.running, progress.asked, progress.turns) == (3, 0, 0, 4)
    assert progress.rewards == [0.5]
    assert progress.failures == {"reward: returned nan": 1, "engine or deadline": 1}
    console = Console(file=io.StringIO(), width=100)
    console.print(ProgramsTable(progress, "title", io.StringIO()).render())
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for wanted in ("title", "3 of 4 ended, 0 running", "turns 4 (1.3 a program)", "tokens 1,234", "reward 0.500"):
        assert wanted in text, text
    assert "failed 2: 1 x reward: returned nan; 1 x engine or deadline" in text


def test_a_log_has_lines_before_any_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is silent for as long as the slowest program of a group takes; or that leaves out how it ended."""
    monkeypatch.setattr(programs, "_LINE_S", 0.01)
    written = threading.Event()

    class Log(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("programs 0 of 4"):
                written.set()
            return super().write(text)

    log, progress = Log(), Progress(4)
    with ProgramsTable(progress, "title", log):
        progress.begun = 4
        assert written.wait(30.0)
        progress.ended = 4
    lines = log.getvalue().splitlines()
    assert lines[0] == "title" and lines[1].startswith("programs 0 of 4 ended, 4 running")
    assert lines[-1].startswith("programs 4 of 4 ended, 0 running")
    quiet, none = io.StringIO(), io.StringIO()
    with ProgramsTable(progress, "title", quiet, quiet=True), ProgramsTable(Progress(4), "title", none):
        pass
    assert (quiet.getvalue(), none.getvalue()) == ("", "title\n")  # of a wrong task, its fault is said alone
