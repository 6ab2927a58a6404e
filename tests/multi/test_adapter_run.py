"""Runs that train an adapter: exact, resumed to the bit, saved for PEFT, served and read again; the weights stay."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tandem.config import override
from tandem.errors import CheckpointError, ConfigError, RunFolderError
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.program.pool import RunningEpisode
from tandem.run import local
from tandem.run.config import RunConfig
from tandem.run.model import load
from tandem.run.parts import build_parts, reference_of
from tests.display import Silent
from tests.samples import ended
from tests.sums import tiny_arithmetic

MODEL = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128"
SMALL = {
    "objective": "policy_gradient",
    "steps": "4",
    "model.source": MODEL,
    "task.heldout_size": "4",
    "evaluation.prompts": "4",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "3",
    "rollout.samples_per_prompt": "4",
    "rollout.max_new_tokens": "8",
    "learner.lr": "1e-2",
    "learner.warmup_steps": "0",
    "adapter.rank": "3",
}
ARMS = {
    "lora": {},
    "dora, reference": {"adapter.dora": "true", "algo.kl": "k3", "algo.kl_weight": "0.1"},
    "next token": {"objective": "next_token", "adapter.rslora": "true", "adapter.targets": "q_proj,down_proj"},
    "beside": {"asynchrony.mode": "one_off"},
    "lag": {"sync.lag": "1", "adapter.dora": "true"},
    "rounded": {"engine.weights": "int8", "engine.weight_group": "16"},
    "recomputed": {"learner.activation_checkpointing": "on", "adapter.dora": "true"},
    "engines": {"engine.replicas": "2"},
    "critic": {"algo.advantage": "gae", "critic.trunk_gradient": "0.5"},
}
EXACT = ("lora", "dora, reference", "recomputed", "engines", "critic")
RESUMED = ("dora, reference", "next token", "lag")


@pytest.fixture(autouse=True)
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ within a group, of a model that can do nothing."""

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 11) / 10)

    monkeypatch.setattr(RunningEpisode, "score", grade)


def config_of(**changes: str) -> RunConfig:
    return override(tiny_arithmetic(), {**SMALL, **changes})


def run(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    local.train(config, out=out, resume=None, display=Silent())
    return rows_of(out)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_resumed_to_the_bits_of_a_run_that_never_stopped(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is not learned, or not sampled from; moments or factors that begin anew on a resume; a weight of
    the model that is trained or saved beside it."""
    steps = 4 if arm in RESUMED else 2
    whole = config_of(**{**ARMS[arm], "steps": f"{steps}"})
    rows = run(whole, tmp_path / "whole")
    if arm in EXACT:
        assert all(row["mismatch"] == 0.0 for row in rows if row["step"])
    assert len({row["weights"] for row in rows}) == steps + 1
    end = tmp_path / "whole" / "checkpoints" / f"step-{steps}"
    first, plan = load_file(end / "adapter_model.safetensors"), json.loads((tmp_path / "whole/plan.json").read_text())
    assert any(float(tensor.abs().max()) > 0 for name, tensor in first.items() if "lora_B" in name)
    assert not list(end.glob("model*.safetensors")) and plan["trained"] < plan["parameters"] / 2
    state = load_file(end / "optimiser-00001.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 3 * plan["trained"]
    if arm not in RESUMED:
        return
    with monkeypatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: object) -> None:
            save(self, step, version)  # type: ignore[arg-type]
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        halves = override(whole, {"checkpoint.every": "2"})
        run(halves, tmp_path / "halves")
    assert rows_of(tmp_path / "halves")[-1]["step"] == 2
    local.train(halves, out=None, resume=tmp_path / "halves", display=Silent())
    second = load_file(tmp_path / "halves" / "checkpoints" / "step-4" / "adapter_model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_engines_in_processes_of_their_own(tmp_path: Path) -> None:
    """A worker's engine that has no adapter, or another base."""
    rows = run(config_of(**{"workers.backend": "local", "steps": "2"}), tmp_path / "apart")
    assert [row["weights"] for row in rows] == [row["weights"] for row in run(config_of(steps="2"), tmp_path / "here")]
    assert all(row["mismatch"] == 0.0 for row in rows if row["step"])


def test_a_run_is_asked_and_trained_further(tmp_path: Path) -> None:
    """A run folder that answers as its base does; a source whose numbers are not where the next run begins."""
    save_checkpoint(
        tmp_path / "model",
        open_checkpoint(MODEL).spec,
        dict(open_checkpoint(MODEL).tensors()),
        open_checkpoint(MODEL).load_tokenizer(),
        "bfloat16",
    )
    base = {"model.source": str(tmp_path / "model")}
    config = config_of(**base, **{"adapter.dora": "true"})
    rows = run(config, tmp_path / "run")
    trained = tmp_path / "run" / "checkpoints" / "step-4"
    asked = load(tmp_path / "run")
    assert asked.parts.publisher.version is not None
    assert asked.parts.publisher.version.digest == rows[-1]["weights"]
    texts = [load(source).generate(["1 + 2 ="], max_new_tokens=8)[0].text for source in (tmp_path / "model", trained)]
    assert texts[0] != texts[1] == asked.generate(["1 + 2 ="], max_new_tokens=8)[0].text
    further = override(
        config_of(**base, **{"adapter.rank": "0"}),
        {"adapter.source": str(trained), "algo.kl": "k3", "algo.kl_weight": "0.1"},
    )
    parts = build_parts(further.model, further.engine, run=further)
    assert parts.publisher.version is not None and parts.publisher.version.digest == rows[-1]["weights"]
    assert parts.decoder.adapter is not None and parts.decoder.adapter.base.source == str(tmp_path / "model")
    reference = reference_of(parts, further, lambda source: pytest.fail("a second model is loaded"))
    worn = parts.decoder.adapter
    assert reference([], [], 64, 1.0) == () and parts.decoder.adapter is worn
    with pytest.raises(ConfigError, match="is an adapter of .*set model.source to .* and adapter.source to"):
        build_parts(override(further, {"model.source": str(trained)}).model, further.engine, run=further)
    with pytest.raises(ConfigError, match=r"adapter_config.json decides adapter.alpha"):
        again = override(further, {"adapter.alpha": "3"})
        build_parts(again.model, again.engine, run=again)


def test_a_reference_that_was_written_anew_is_not_resumed_with(tmp_path: Path) -> None:
    """Log-probs of another adapter than the run began with, in silence; a run that needs none and can't go on without
    it; a run that is no source."""
    run(config_of(steps="1"), tmp_path / "first")
    copy = tmp_path / "copy"
    copytree(tmp_path / "first" / "checkpoints" / "step-1", copy)
    given = {"adapter.rank": "0", "steps": "1", "checkpoint.every": "1"}
    refers = {"algo.kl": "k3", "algo.kl_weight": "0.1"}
    kept = config_of(**given, **refers, **{"adapter.source": str(copy)})
    free = config_of(**given, **{"adapter.source": str(tmp_path / "first")})
    run(kept, tmp_path / "kept")
    run(free, tmp_path / "free")
    rmtree(tmp_path / "first")
    local.train(override(free, {"steps": "2"}), out=None, resume=tmp_path / "free", display=Silent())
    assert rows_of(tmp_path / "free")[-1]["step"] == 2
    rmtree(copy)
    copytree(tmp_path / "free" / "checkpoints" / "step-2", copy)
    with pytest.raises(
        RunFolderError, match="adapter.source .* now, and the run began with .* it was trained on, or written anew"
    ):
        local.train(override(kept, {"steps": "2"}), out=None, resume=tmp_path / "kept", display=Silent())


def test_another_base_is_not_resumed_on(tmp_path: Path) -> None:
    """An adapter goes on, on weights that it was never trained on."""
    source = open_checkpoint(MODEL)
    tensors = dict(source.tensors())
    save_checkpoint(tmp_path / "model", source.spec, tensors, source.load_tokenizer(), "bfloat16")
    config = config_of(**{"model.source": str(tmp_path / "model"), "steps": "1"})
    run(config, tmp_path / "run")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_checkpoint(tmp_path / "model", source.spec, tensors, source.load_tokenizer(), "bfloat16")
    with pytest.raises(CheckpointError, match="the model was changed"):
        local.train(override(config, {"steps": "2"}), out=None, resume=tmp_path / "run", display=Silent())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.kernels": "library"}, "model.kernels is library: adapters go with exact alone"),
        ({"adapter.targets": "lm_head"}, "adapter.targets names lm_head"),
        ({"adapter.rank": "0", "adapter.dora": "true"}, "adapter is configured, but adapter.rank is 0"),
        ({"adapter.rank_pattern": "q_proj=0"}, "adapter.rank_pattern gives q_proj 0"),
        ({"adapter.rank_pattern": "*=1"}, "which is no expression"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    """A setting that is passed over, or a run that fails in its first step."""
    with pytest.raises(ConfigError, match=says):
        run(config_of(**changes), tmp_path / "run")
