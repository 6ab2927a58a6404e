"""Readers of pairs, ratings, scores and a run's ranked groups: what is learned of which line, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.algo.config import PreferenceConfig
from tandem.algo.pack import count_prompts, pack
from tandem.corpus.config import CorpusConfig
from tandem.corpus.preferences import preferences_of
from tandem.corpus.reader import Reader
from tandem.corpus.stream import CorpusStream
from tandem.errors import ConfigError, CorpusError
from tandem.models.checkpoint import open_checkpoint
from tandem.program.render import Renderer
from tandem.types import Group, Sample

RENDERER = Renderer(open_checkpoint("new:").load_tokenizer())
DECODE = RENDERER.tokenizer.decode


def written(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def reader(
    path: Path, loss: str = "dpo", most_rows: int = 1024, *, fields: Sequence[Any] = (), **preference: Any
) -> Reader:
    config = CorpusConfig((str(path),), fields=tuple(fields))
    (found,) = preferences_of(config, PreferenceConfig(loss, **preference), RENDERER, most_rows=most_rows)
    return found


def said(group: Group) -> list[tuple[str, str, int]]:
    """Of each answer: what it was asked, what is trained, and its side."""
    found = []
    for one in group.trajectories:
        tokens, mask = one.columns["tokens"], one.columns["loss_mask"]
        (side,) = set(one.columns["preferred"].tolist())
        found.append((DECODE(tokens[~mask].tolist()), DECODE(tokens[mask].tolist()), side))
    return found


ASKED = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
TURN = {"role": "user", "content": "Hi?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {
            "prompt": [TURN],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
        {
            "prompt": "Hi?",
            "chosen": [TURN, {"role": "assistant", "content": "Yes."}],
            "rejected": [TURN, {"role": "assistant", "content": "No."}],
        },
        {
            "chosen": [TURN, {"role": "assistant", "content": "Yes."}],
            "rejected": [TURN, {"role": "assistant", "content": "No."}],
        },
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
    ],
    ids=["texts", "messages", "whole conversations", "no prompt", "hh"],
)
def test_forms_of_a_pair(tmp_path: Path, row: Mapping[str, Any]) -> None:
    """A form gives other tokens than another, the sides are exchanged, or a prompt's tokens are trained."""
    found = reader(written(tmp_path / "pairs.jsonl", [row]))
    assert len(found) == 1 and found.place(0).endswith("pairs.jsonl line 1")
    group = found.group(0)
    assert said(group) == [(ASKED, "Yes.<|im_end|>", 1), (ASKED, "No.<|im_end|>", 0)]
    assert [one.id for one in group.trajectories] == ["pairs/0/0/0", "pairs/0/1/0"]
    assert {one.prompt_id for one in group.trajectories} == {group.prompt.id} == {"pairs/0"}
    assert group.prompt.messages[-1].content == "Hi?"


def test_turns_before_the_answer_are_not_trained(tmp_path: Path) -> None:
    """An earlier answer that both sides have is learned from, or of a longer answer only the last turn is."""
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    tail = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    row = {
        "chosen": [*before, {"role": "assistant", "content": "d"}, *tail],
        "rejected": [*before, {"role": "assistant", "content": "D"}],
        "margin": 1.5,
    }
    chosen, rejected = reader(written(tmp_path / "pairs.jsonl", [row])).group(0).trajectories
    for one, wanted in ((chosen, "d<|im_end|>f<|im_end|>"), (rejected, "D<|im_end|>")):
        assert DECODE(one.columns["tokens"][one.columns["loss_mask"]].tolist()) == wanted
        assert set(one.columns["margins"].tolist()) == {1.5}


GOOD = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(
    ("row", "fault", "why"),
    [
        ("{", "not JSON", "Mend or remove"),
        ({"prompt": "Hi?", "chosen": "Yes."}, "not a pair", "it has no rejected, only prompt, chosen"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."}, "equal sides", "are the same"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": " "}, "an empty side", "its rejected is empty"),
        ({"prompt": "", "chosen": "Yes.", "rejected": "No."}, "an empty prompt", "its prompt is empty"),
        ({"chosen": "Yes.", "rejected": "No."}, "not a pair", "its sides are no dialogue"),
        ({"prompt": "Hi?", "chosen": 3, "rejected": "No."}, "wrong type", "its chosen is 3"),
        (
            {"chosen": "\n\nHuman: Hi?\n\nAssistant: ", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
            "an empty assistant turn",
            "chosen, message 2",
        ),
        (
            {"chosen": [TURN, {"role": "assistant", "content": "Yes."}], "rejected": [TURN]},
            "an empty side",
            "no message that the other has not",
        ),
        (
            {
                "chosen": [TURN, {"role": "assistant", "content": "Yes."}],
                "rejected": [{"role": "user", "content": "Ho?"}, {"role": "assistant", "content": "No."}],
            },
            "not a pair",
            "answer different prompts",
        ),
        ({**GOOD, "margin": "much"}, "no margin", "its margin is 'much'"),
        ({**GOOD, "chosen": "Yes. " * 100}, "too long for a microbatch", r"Raise learner.microbatch_tokens to 5\d\d"),
    ],
)
def test_rows_that_are_no_pair(tmp_path: Path, row: Mapping[str, Any] | str, fault: str, why: str) -> None:
    """A pair that teaches nothing is learned from, a broken line ends in a traceback, or none knows which it was."""
    path = written(tmp_path / "pairs.jsonl", [GOOD, row, {**GOOD, "prompt": "Ho?"}])
    found = reader(path, most_rows=300)
    with pytest.raises(CorpusError, match=why) as caught:
        found.group(1)
    assert caught.value.fault == fault and "pairs.jsonl line 2" in str(caught.value)
    strict = CorpusConfig((str(path),))
    with pytest.raises(CorpusError, match="corpus.bad=count leaves such rows out"):
        CorpusStream([found], strict, 10_000, seed=0)
    lenient = CorpusStream([reader(path, most_rows=300)], CorpusConfig((str(path),), bad="count"), 10_000, seed=0)
    assert lenient.totals()["trained_rows"] == 2 and lenient.totals()[f"refused: {fault}"] == 1


def test_a_pair_at_the_limit_of_its_microbatch(tmp_path: Path) -> None:
    """Rows are counted otherwise than the pack lays them out: a pair that fits is refused, or another comes."""
    path = written(tmp_path / "pairs.jsonl", [GOOD])
    samples = [Sample(one.id, one.prompt_id, one.columns) for one in reader(path).group(0).trajectories]
    for share in (True, False):
        (m,) = pack(samples, count_prompts(samples), 4096, share, whole=True)
        config, rows = CorpusConfig((str(path),)), len(m.tokens_T)
        for most, fits in ((rows, True), (rows - 1, False)):
            (found,) = preferences_of(config, PreferenceConfig(), RENDERER, most_rows=most, share_prefix=share)
            if fits:
                assert found.group(0).trajectories
            else:
                with pytest.raises(CorpusError, match="too long|take"):
                    found.group(0)


def test_ratings(tmp_path: Path) -> None:
    """A label is read the wrong way round, or the answer that KTO's KL is taken of is to the same prompt."""
    rows: list[Any] = [
        {"prompt": "A", "completion": "a", "label": True},
        {"prompt": "A", "completion": "b", "label": False},
        {"prompt": "B", "completion": "c", "label": 1},
        {"prompt": "C", "completion": "d", "label": None},
    ]
    found = reader(written(tmp_path / "ratings.jsonl", rows), "kto")
    groups = [[(text, side) for _, text, side in said(found.group(number))] for number in range(3)]
    assert groups == [
        [("a<|im_end|>", 1), ("c<|im_end|>", -1)],  # around the beginning; line 4 has no label
        [("b<|im_end|>", 0), ("c<|im_end|>", -1)],  # line 1 has the same prompt
        [("c<|im_end|>", 1), ("b<|im_end|>", -1)],
    ]
    crossed = said(found.group(2))[1]
    assert crossed[0].count("B<|im_end|>") == 1 and "A" not in crossed[0]
    with pytest.raises(CorpusError, match="its label is None; true or false") as caught:
        found.group(3)
    assert caught.value.fault == "no label"
    alone = reader(written(tmp_path / "alone.jsonl", rows[:2]), "kto")
    with pytest.raises(ConfigError, match="all ratings of alone are of one prompt"):
        alone.group(0)


def test_what_the_system_says_beside_an_answer(tmp_path: Path) -> None:
    """A system field is dropped in silence, is trained, or answers under two systems are compared."""
    told, system = {"prompt": "Hi?", "system": "Be short."}, {"role": "system", "content": "Be short."}
    inside = {"prompt": [system, TURN], "chosen": "Yes.", "rejected": "No."}
    pair = reader(written(tmp_path / "a.jsonl", [told | {"chosen": "Yes.", "rejected": "No."}, inside]))
    assert said(pair.group(0)) == said(pair.group(1)) and "Be short." in said(pair.group(0))[0][0]
    other = {"prompt": "Ho?", "completion": "b", "label": False}
    rated = reader(written(tmp_path / "b.jsonl", [told | {"completion": "a", "label": True}, other]), "kto")
    asked, answer, _ = said(rated.group(0))[0]
    assert "Be short." in asked and answer == "a<|im_end|>"
    scores = [told | {"completion": "a", "score": 1}, {"prompt": "Hi?", "completion": "b", "score": 0}]
    assert len(reader(written(tmp_path / "c.jsonl", scores))) == 0


def test_settings_that_are_of_programs(tmp_path: Path) -> None:
    """corpus.turns or corpus.reward_at_least beside a file of pairs, heard by nobody."""
    path = str(written(tmp_path / "pairs.jsonl", [GOOD]))
    for name, value in (("turns", "last"), ("reward_at_least", 0.5)):
        config = CorpusConfig((path,), **{name: value})
        with pytest.raises(ConfigError, match=rf"corpus\.{name} is {value}, and preferences of a file"):
            preferences_of(config, PreferenceConfig(), RENDERER, most_rows=100)


def test_ratings_that_are_double(tmp_path: Path) -> None:
    """An answer that one liked and another did not is taken for a double; the same rating twice is not, for the sake of
    what stands beside it."""
    rows = [("A", "a", True), ("B", "b", True), ("A", "a", False), ("C", "c", True), ("B", "b", True)]
    keys = ("prompt", "completion", "label")
    path = written(tmp_path / "ratings.jsonl", [dict(zip(keys, row, strict=True)) for row in rows])
    stream = CorpusStream([reader(path, "kto")], CorpusConfig((str(path),)), 1000, seed=0)
    assert stream.totals() == {"rows": 5, "duplicates": 1, "trained_rows": 4}


def test_pairs_as_ratings(tmp_path: Path) -> None:
    """Of a pair that KTO learns from, a side is lost or rated as the other."""
    rows = [{"prompt": name, "chosen": f"good {name}", "rejected": f"bad {name}"} for name in "AB"]
    found = reader(written(tmp_path / "pairs.jsonl", rows), "kto")
    assert len(found) == 4 and found.place(3).endswith("line 2, rejected")
    sides = [said(found.group(number))[0][1:] for number in range(4)]
    assert sides == [("good A<|im_end|>", 1), ("bad A<|im_end|>", 0), ("good B<|im_end|>", 1), ("bad B<|im_end|>", 0)]


def test_scores(tmp_path: Path) -> None:
    """The worst is taken for the best, equal ones make a pair, or a margin that is too small does."""
    rows = [
        {"question": "A", "completion": text, "score": score}
        for text, score in (("a", 1), ("b", 3), ("c", 3), ("d", 0))
    ]
    rows += [{"question": "B", "completion": text, "score": 2.0} for text in "ef"]
    path, fields = written(tmp_path / "scores.jsonl", rows), [("prompt", "question")]

    def pairs(**preference: Any) -> list[tuple[str, str, float]]:
        found = reader(path, fields=fields, **preference)
        texts = []
        for number in range(len(found)):
            group = found.group(number)
            (_, better, _), (_, worse, _) = said(group)
            texts.append((better[0], worse[0], float(group.trajectories[0].columns["margins"][0])))
        return texts

    assert pairs() == [("b", "d", 3.0)]
    assert pairs(ranked="all") == [("b", "a", 2.0), ("b", "d", 3.0), ("c", "a", 2.0), ("c", "d", 3.0), ("a", "d", 1.0)]
    assert pairs(ranked="all", least_margin=2.5) == [("b", "d", 3.0), ("c", "d", 3.0)]
    assert reader(path, fields=fields).left_out["prompts whose answers do not differ enough"] == 1
    liked = reader(path, "kto", fields=fields, liked_at_least=2.0)
    assert [said(liked.group(number))[0][2] for number in range(6)] == [0, 1, 1, 0, 1, 1]
    with pytest.raises(ConfigError, match="Set preference.liked_at_least"):
        reader(path, "kto", fields=fields)
    with pytest.raises(CorpusError, match="A pair has prompt, chosen, rejected"):
        reader(written(tmp_path / "chats.jsonl", [{"messages": [TURN]}]))


def test_from_a_run(tmp_path: Path) -> None:
    """What a run sampled is tokenised anew, steps are compared with each other, or failed programs take part."""
    folder = tmp_path / "run" / "trajectories"
    folder.mkdir(parents=True)
    tokens = {text: RENDERER.tokenizer.encode(text, False) for text in (ASKED, "4<|im_end|>", "5<|im_end|>", "6")}

    def row(step: int, sibling: int, text: str, reward: float | None) -> dict[str, Any]:
        ids = [*tokens[ASKED], *tokens[text]]
        return {
            "program_id": f"p/{step}/{sibling}",
            "segment": 0,
            "prompt_id": "p",
            "prompt": [TURN],
            "context": ASKED,
            "answer": "4",
            "text": text,
            "reward": reward,
            "sampled_tokens": len(tokens[text]),
            "stop_reason": "stop_token",
            "failure": None if reward is not None else {"where": "reward", "reason": "nan"},
            "tokens": {"ids": ids, "chars": [], "sampled": [len(tokens[ASKED]), len(tokens[text])]},
        }

    written(
        folder / "step-1.jsonl", [row(1, 0, "6", 0.25), row(1, 1, "4<|im_end|>", 1.0), row(1, 2, "5<|im_end|>", None)]
    )
    written(folder / "step-2.jsonl", [row(2, 0, "4<|im_end|>", 1.0), row(2, 1, "4<|im_end|>", 1.0)])
    found = reader(tmp_path / "run")
    assert len(found) == 1
    group = found.group(0)
    assert said(group) == [(ASKED, "4<|im_end|>", 1), (ASKED, "6", 0)]
    assert np.array_equal(group.trajectories[1].columns["tokens"], [*tokens[ASKED], *tokens["6"]])
    assert group.trajectories[0].columns["margins"][0] == 0.75
    assert "advantages" not in group.trajectories[0].columns


def test_parquet(tmp_path: Path) -> None:
    """A Parquet file of pairs is refused for lack of messages, or its rows are others."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [GOOD, {**GOOD, "prompt": "Ho?", "margin": 2.0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    found = reader(tmp_path / "pairs.parquet")
    assert said(found.group(0)) == said(reader(written(tmp_path / "pairs.jsonl", rows)).group(0))
    with pytest.raises(CorpusError, match="row 2"):
        reader(tmp_path / "pairs.parquet", most_rows=9).group(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "simpo", "label_smoothing": 0.1}, "preference.label_smoothing is 0.1.*'simpo' does not read it"),
        ({"loss": "dpo", "target_margin": 1.0}, "preference.target_margin is 1.0"),
        ({"loss": "reward_model", "beta": 0.1}, "preference.beta is 0.1"),
        ({"loss": "robust_dpo"}, "without wrong pairs it is dpo"),
        ({"loss": "kto", "desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing would be learned"),
        ({"loss": "kto", "ranked": "all"}, "preference.ranked is all"),
        ({"loss": "ppo"}, "preference.loss is 'ppo'"),
        ({"loss": "dpo", "label_smoothing": 0.5}, "preference.label_smoothing is 0.5"),
    ],
)
def test_settings_that_no_loss_reads(settings: dict[str, Any], said: str) -> None:
    """A setting is given, and ignored in silence."""
    with pytest.raises(ConfigError, match=said):
        PreferenceConfig(**settings)
