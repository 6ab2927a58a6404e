"""Rows of metrics.jsonl with a key that nothing explains.

The table in docs/configs.md is written by `pytest tests/multi/test_rows.py --write-docs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest

from tandem.config import override
from tandem.program.pool import RunningEpisode
from tandem.report import plots
from tandem.run import local
from tandem.run.config import RunConfig
from tandem.run.rows import KEYS
from tandem.speculate.config import MOST_STEPS
from tests.display import Silent
from tests.samples import ended
from tests.sums import tiny_arithmetic
from tests.tables import check_table

OPEN = {name.removesuffix("/*") for name in KEYS if name.endswith("/*")}  # objects whose keys are names of parts
SMALL = {
    "steps": "2",
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128",
    "task.heldout_size": "4",
    "evaluation.prompts": "2",
    "rollout.prompts_per_step": "3",
    "rollout.max_new_tokens": "8",
    "learner.warmup_steps": "0",
}
POLICY = {
    "objective": "policy_gradient",
    "rollout.samples_per_prompt": "4",
    "rollout.top_p": "0.9",
    "rollout.max_turns": "2",
    "rollout.extra_prompts": "1",
    "engine.draft.by": "lookup",
    "engine.draft.tokens": "2",
    "engine.draft.lengths": "fixed",
    "engine.replicas": "2",
    "sync.lag": "1",
    "algo.kl": "k3",
    "algo.kl_weight": "0.01",
    "algo.price.budget": "4",
    "algo.fairness.weights": "inverse",
    "alarms.action": "correct",
    "algo.correction.form": "decoupled",
    "algo.correction.weight": "token_tis",
    "evaluation.stop_reward": "0.01",
    "steps": "6",
}

AHEAD = {"asynchrony.mode": "full", "sync.lag": "0", "rollout.extra_prompts": "0"}
SPENT = {
    "objective": "policy_gradient",
    "rollout.samples_per_prompt": "4",
    "rollout.redraws": "1",
    "algo.filter_zero_variance": "true",
    "select.window": "8",
    "select.fresh": "3",
    "select.first_samples": "2",
}
TAUGHT = {"objective": "distil", "distil.teacher": f"{SMALL['model.source']},seed=1", "distil.text_weight": "1"}
OWN_SAMPLES = {"distil.text_weight": "0", "distil.on_policy": "true", "distil.hidden": "last"}


def keys(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if name in OPEN:
            yield f"{name}/*"
        elif name == "workers":
            yield f"{name}/*/*"
        elif name == "engines":
            yield from {f"{name}/*/{key}" for counts in value.values() for key in counts}
        elif isinstance(value, dict):
            yield from (f"{name}/{key}" for key in value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from (f"{name}/{key}" for part in value for key in part)
        elif not (name in ("error_budget", "by_length") and not value):  # those of texts are empty
            yield name


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The keys of the rows of a run by objective."""

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 11))

    def of(config: RunConfig) -> set[str]:
        _, folder = local.train(config, out=tmp_path_factory.mktemp("rows") / "run", resume=None, display=Silent())
        return {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in keys(json.loads(line))}

    texts = override(tiny_arithmetic(), SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningEpisode, "score", grade)  # rewards that differ within a group
        with_critic = override(texts, {**POLICY, "algo.advantage": "gae", "steps": "2"})
        ahead = override(texts, {**POLICY, **AHEAD, "steps": "2"})
        spent = override(texts, SPENT)
        policy = of(override(texts, POLICY)) | of(with_critic) | of(ahead) | of(spent)
        path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
        rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(8)]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        corpus = override(texts, {"corpus.sources": str(path), "corpus.heldout_tasks": "2"})
        by_chat = override(corpus, {"supervised.reduction": "sequence_mean"})
        rows = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": f"{n}."} for n in range(8)]
        path.with_name("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = {"objective": "preference", "corpus.sources": str(path.with_name("pairs.jsonl"))}
        dpo = override(corpus, pairs)
        kto = override(corpus, {**pairs, "preference.loss": "kto"})
        preferred = of(dpo) | of(kto)
        own = {**TAUGHT, **OWN_SAMPLES, "distil.bad_weight": "-1", "distil.good_reward": "5"}
        distil = of(override(texts, TAUGHT)) | of(override(texts, own | {"rollout.samples_per_prompt": "4"}))
        spans = {"distil.text_weight": "0", "distil.spans": "true", "distil.divergence": "k1+"}
        distil |= of(override(corpus, TAUGHT | {"distil.hidden": "last"})) | of(override(corpus, TAUGHT | spans))
        written = of(texts) | of(by_chat)
        eagle = {"objective": "drafter", "steps": "1"}
        drafter = of(override(corpus, {**eagle, "drafter.steps": str(MOST_STEPS)}))
        drafter |= of(override(corpus, {**eagle, "drafter.steps": "1"}))
        found = {"next_token": written, "policy_gradient": policy, "preference": preferred, "distil": distil}
        return found | {"drafter": drafter}


def test_every_key_of_a_row_is_in_the_table(found) -> None:
    """A row with a key that the table does not explain, or a line of the table that no run writes."""
    assert found["next_token"] <= set(KEYS), found["next_token"] - set(KEYS)
    assert found["policy_gradient"] <= set(KEYS), found["policy_gradient"] - set(KEYS)
    assert found["preference"] <= set(KEYS), found["preference"] - set(KEYS)
    assert not {"reward", "kl", "mismatch", "ratio_max"} & found["next_token"] and "loss" in found["next_token"]
    assert found["distil"] <= set(KEYS), found["distil"] - set(KEYS)
    assert found["drafter"] <= set(KEYS), found["drafter"] - set(KEYS)
    assert set(KEYS) - set().union(*found.values()) == {"output_lost/*"}


def test_the_report_reads_keys_of_the_table() -> None:
    """A curve of a name that rows no longer have, and that is drawn as nothing."""
    read = {
        name
        for curves in (plots.UPDATE, plots.ANSWERS, plots.LIMITS, plots.PREFERENCE, plots.TEACHER)
        for name, _, _ in curves
    }
    assert read <= set(KEYS), read - set(KEYS)


def table() -> str:
    lines = [
        "The keys of a row, from `run/rows.py`; `part/key` is `key` of the object `part`, of each entry of a list.",
        "",
        "| key | unit | meaning |",
        "|---|---|---|",
    ]
    escaped = {name: meaning.replace("|", "\\|") for name, (_, meaning) in KEYS.items()}
    return "\n".join([*lines, *(f"| `{name}` | {KEYS[name].unit} | {escaped[name]} |" for name in KEYS)])


def test_the_table_in_the_docs_is_this_one(request: pytest.FixtureRequest) -> None:
    """Docs that lack a key of a row, or give it another unit."""
    check_table(request, "docs/configs.md", "rows", table())
