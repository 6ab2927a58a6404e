"""A run's programs learned from again: token for token where they were kept, by reward, turns told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.columns import Columns
from tandem.corpus.config import CorpusConfig
from tandem.corpus.sources import readers_of
from tandem.corpus.stream import CorpusStream
from tandem.errors import CorpusError
from tandem.models.scratch import new_tokenizer
from tandem.program.render import Renderer
from tandem.rollout.pieces import Pieces
from tandem.rollout.rows import trajectory_rows
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Failure, Group, Message, Prompt, StopReason, ToolCall, Trajectory, Turn
from tests.null.test_render import CHATML, byte_tokenizer

TOKENIZER = new_tokenizer()
RENDERER = Renderer(TOKENIZER)


def program(name: str, prompt: Prompt, outcome: float | Failure, *turns: tuple[str, str]) -> Trajectory:
    """(what the model says, what a tool answers) a turn."""
    asked = RENDERER.prompt_tokens(prompt.messages)
    made, said = [], []
    for text, answer in turns:
        tokens = RENDERER.answer_tokens(text)
        columns = Columns.of(tokens=tokens, logprobs=[-1.0] * len(tokens), versions=[0] * len(tokens))
        seen = RENDERER.observation_tokens(tokens, (Message("tool", answer),)) if answer else ()
        made.append(Turn(Completion(name, columns, StopReason.STOP_TOKEN), seen))
        calls = (ToolCall("run", {"code": text}),) if answer else ()
        said += [Message("assistant", text, calls, sampled=True), *([Message("tool", answer)] if answer else [])]
    return replace(flatten(name, prompt.id, asked, made, outcome), said=tuple(said))


def written(folder: Path, keep_tokens: bool = True) -> Path:
    """A run of two steps: a group that is half right, an error and a repetition, a failure."""
    asked = [Prompt(f"sums/train/{n}", (Message("user", f"{n} + 1?"),), {"answer": str(n + 1)}) for n in range(3)]
    steps = {
        1: [Group(asked[0], (program("sums/train/0/1/0", asked[0], 1.0, ("1", "")),
                             program("sums/train/0/1/1", asked[0], 0.0, ("2", "")),
                             program("sums/train/0/1/2", asked[0], Failure("deadline", "late"), ("3", ""))))],
        10: [Group(asked[1], (program("sums/train/1/10/0", asked[1], 0.5, ("try", "error: no"), ("again", "fine"),
                                      ("again", "fine"), ("2", "")),)),
             Group(asked[2], (program("sums/train/2/10/0", asked[2], 1.0, ("3", "")),))],
    }  # fmt: skip
    (folder / "trajectories").mkdir(parents=True)
    for step, groups in steps.items():
        rows = trajectory_rows(groups, Pieces(TOKENIZER.decode), keep_tokens)
        (folder / "trajectories" / f"step-{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def reader(folder: Path, renderer: Renderer = RENDERER, **config: Any) -> Any:
    (found,) = readers_of(CorpusConfig((str(folder),), **config), renderer)
    return found


def said(groups: Sequence[Group], name: str = "loss_mask") -> list[str]:
    """What is trained of each, or marked."""
    return [
        TOKENIZER.decode(one.columns["tokens"][one.columns[name]].tolist())
        for group in groups
        for one in group.trajectories
    ]


def everything(found: Any) -> list[Group]:
    return [found.group(number) for number in range(len(found))]


def test_programs_come_back_token_for_token(tmp_path: Path) -> None:
    """Other tokens or another mask than the run sampled; programs that were not graded; steps in the order of text."""
    found = reader(written(tmp_path / "run"))
    groups = everything(found)
    assert said(groups) == [
        "1<|im_end|>", "2<|im_end|>", "try<|im_end|>again<|im_end|>again<|im_end|>2<|im_end|>", "3<|im_end|>"
    ]  # fmt: skip
    assert dict(found.left_out) == {"not graded": 1}
    assert found.place(0) == f"{tmp_path / 'run' / 'trajectories' / 'step-1.jsonl'} line 1"
    asked = Prompt("sums/train/1", (Message("user", "1 + 1?"),))
    own = program("p", asked, 0.5, ("try", "error: no"), ("again", "fine"), ("again", "fine"), ("2", ""))
    (kept,) = groups[2].trajectories
    assert kept.columns["tokens"].tolist() == own.columns["tokens"].tolist()
    assert kept.columns["loss_mask"].tolist() == own.columns["loss_mask"].tolist() and not kept.counts
    assert [one.reward for group in groups for one in group.trajectories] == [1.0, 0.0, 0.5, 1.0]
    advantages = [float(one.columns["advantages"].sum()) for group in groups for one in group.trajectories]
    assert advantages == [0.5 * 2, -0.5 * 2, 0.0, 0.0]  # each token's is the reward less the group's mean
    assert groups[0].prompt.messages == (Message("user", "0 + 1?"),)
    assert [m.content for m in kept.said if m.sampled][0] == "try<|im_end|>"


def test_by_reward_and_last_turns(tmp_path: Path) -> None:
    """Programs below the reward that was asked for; earlier turns where the last alone was."""
    folder = written(tmp_path / "run")
    found = reader(folder, reward_at_least=0.5, turns="last")
    assert said(everything(found)) == ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]
    assert dict(found.left_out) == {"not graded": 1, "of a reward below 0.5": 1}
    (first,) = found.group(0).trajectories
    assert float(first.columns["advantages"].max()) == 0.5  # of the group as it was sampled
    assert found.digest != reader(folder).digest


def test_turns_that_failed_are_marked(tmp_path: Path) -> None:
    """A turn that a tool answered with an error, or the second of two alike, learned as any; another in their place."""
    folder = written(tmp_path / "run")
    (errors,) = reader(folder, error_turns="mark").group(2).trajectories
    (repeats,) = reader(folder, repeated_turns="mark").group(2).trajectories
    decode, tokens = TOKENIZER.decode, errors.columns["tokens"]
    assert decode(tokens[errors.columns["failed"]].tolist()) == "try<|im_end|>"
    assert decode(tokens[repeats.columns["failed"]].tolist()) == "again<|im_end|>"
    first = np.flatnonzero(repeats.columns["failed"])[0]
    assert decode(tokens[:first].tolist()).count("again<|im_end|>") == 1  # the first of the two stays
    assert "failed" not in reader(folder).group(2).trajectories[0].columns


@pytest.mark.parametrize("marked", ["error_turns", "repeated_turns"])
def test_the_account_says_how_many_turns_are_marked(tmp_path: Path, marked: str) -> None:
    """Turns are left out of the loss, or made less likely, and nothing before the first step says so."""
    folder = written(tmp_path / "run")
    config = CorpusConfig((str(folder),), **{marked: "mark"})
    found = CorpusStream(readers_of(config, RENDERER), config, 1000, 0)
    assert found.totals()["turns marked"] == 1 and ", 1 turn marked," in found.account()[0], found.account()
    plain = CorpusConfig((str(folder),))
    assert "marked" not in CorpusStream(readers_of(plain, RENDERER), plain, 1000, 0).account()[0]


def test_without_tokens_texts_are_read(tmp_path: Path) -> None:
    """A mask over what a tool said, or other tokens than were sampled, where a run kept none."""
    kept, folder = reader(written(tmp_path / "kept")), written(tmp_path / "texts", keep_tokens=False)
    found = reader(folder)
    for number in (0, 1, 3):
        (one,), (other,) = found.group(number).trajectories, kept.group(number).trajectories
        assert one.columns == other.columns and one.counts == {"rendered": 1}
    with pytest.raises(CorpusError, match=r"step-10\.jsonl line 1: its prompt had tools, .* rollout\.keep_tokens"):
        found.group(2)
    path = folder / "trajectories" / "step-10.jsonl"
    path.write_text(path.read_text().replace('"tool_calls"', '"calls"'))
    (one,), (other,) = reader(folder).group(2).trajectories, kept.group(2).trajectories
    assert one.columns == other.columns


def test_another_tokenisers_tokens_are_not_taken(tmp_path: Path) -> None:
    """Ids of the run's model trained as those of a model to which they say something else."""
    other = byte_tokenizer(CHATML)
    found = reader(written(tmp_path / "run"), Renderer(other))
    (one,) = found.group(0).trajectories
    assert one.counts == {"rendered": 1}
    assert other.decode(one.columns["tokens"][one.columns["loss_mask"]].tolist()) == "1<|im_end|>"


def test_files_that_are_no_trajectories(tmp_path: Path) -> None:
    """A folder without trajectories, a broken line, or a file of trajectories learned as plain texts."""
    (tmp_path / "run" / "trajectories").mkdir(parents=True)
    with pytest.raises(CorpusError, match="holds no step-N.jsonl: the run has sampled nothing yet"):
        reader(tmp_path / "run")
    path = tmp_path / "run" / "trajectories" / "step-1.jsonl"
    for line, why in (("{", "Expecting property"), ("{}", "no trajectory's row"), ("[]", "")):
        path.write_text(line + "\n")
        with pytest.raises(CorpusError, match=rf"step-1\.jsonl line 1: .*{why}"):
            reader(tmp_path / "run")
    path.write_text(json.dumps(dict.fromkeys(("program_id", "prompt_id", "prompt", "text", "sampled_tokens"))) + "\n{")
    torn = reader(tmp_path / "run", bad="count")
    assert len(torn) == 0 and dict(torn.left_out) == {"refused: not JSON": 1, "not graded": 1}
    whole = written(tmp_path / "whole") / "trajectories" / "step-1.jsonl"
    assert said(everything(reader(whole))) == ["1<|im_end|>", "2<|im_end|>"]


def test_what_was_not_sampled_is_no_program(tmp_path: Path) -> None:
    """A preference run's rejected answers are trained, as programs of a reward of 0; SFT's folder passes as graded."""
    asked = Prompt("pairs/0", (Message("user", "1 + 1?"),))
    tokens = [*RENDERER.prompt_tokens(asked.messages), *RENDERER.answer_tokens("3")]
    mask = np.arange(len(tokens)) >= len(tokens) - len(RENDERER.answer_tokens("3"))
    rejected = Trajectory("pairs/0/1", asked.id, Columns.of(tokens=tokens, loss_mask=mask))
    path = written(tmp_path / "run") / "trajectories" / "step-1.jsonl"
    with path.open("a") as file:
        rows = trajectory_rows([Group(asked, (rejected,))], Pieces(TOKENIZER.decode))
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for source in (tmp_path / "run", path):
        with pytest.raises(
            CorpusError, match=r"step-1\.jsonl line 4: no model sampled it.*corpus\.sources of its conf"
        ):
            reader(source, bad="count")
