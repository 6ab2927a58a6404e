"""What tiny runs computed, to the bit: a change that claims no numerical effect leaves tests/goldens/runs.json alone.

A deliberate change writes it anew, in a commit that says why: `pytest tests/multi/test_goldens.py --write-goldens`.
Bits hang on what multiplies matrices, so they are kept by matrix unit; a unit that has none yet is skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.kernels.build.load import matrix_unit
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig
from tests.display import Silent

GOLDENS = Path(__file__).parents[1] / "goldens" / "runs.json"
STEPS = 3
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")

FP32 = {"model.dtype": "float32"}
TURNS = {"rollout.max_turns": "3", "rollout.max_new_tokens": "8"}
RUNS: dict[str, dict[str, str]] = {
    "grpo": {},
    "grpo, float32": FP32,
    "gspo with kl": {
        "algo.loss": "gspo",
        "algo.kl": "k3",
        "algo.kl_weight": "0.05",
        "algo.aggregation": "sequence_mean",
    },
    "gspo with kl, float32": {"algo.loss": "gspo", "algo.kl": "k3", "algo.kl_weight": "0.05", **FP32},
    "lag, corrected": {
        "sync.lag": "1",
        "algo.correction.form": "decoupled",
        "algo.correction.weight": "token_tis",
        "algo.updates_per_step": "2",
    },
    "top-p": {"rollout.top_p": "0.8", "algo.loss": "cispo", "algo.advantage": "rloo"},
    "hybrid attention": {"model.source": "hybrid"},
    "hybrid attention, float32": {"model.source": "hybrid", "algo.advantage": "dr_grpo", **FP32},
    "turns": TURNS,
    "turns, float32": {**TURNS, "algo.advantage": "reinforce_pp_baseline", **FP32},
}
TASK = '''
from tandem.program.environment import Environment
from tandem.types import Message, Prompt


class Sums(Environment):
    """Sums; what follows a wrong answer hangs on it."""

    def prompt(self, split, index):
        a, b = index % 7, index // 7 % 7
        asked = f"{a}+{b}={split[0]}" * (1 + index % 3)
        return Prompt(f"{split}/{index}", (Message("user", asked),), {"answer": a + b})

    def reward(self, prompt, text):
        return sum(map(ord, text)) % 11

    def observe(self, prompt, turns):
        return None if self.reward(prompt, turns[-1].content) < 3 else [Message("user", f"{len(turns)} no")]
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A task, a model, and a model whose first layer has a sliding window."""
    folder = tmp_path_factory.mktemp("goldens")
    (folder / "sums.py").write_text(TASK)
    write_model(folder / "model", scale=10)
    write_model(folder / "hybrid", scale=10)
    path = folder / "hybrid" / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 12, "head_dim": 8}
    config |= {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "hybrid" / "model.safetensors")
    for layer, name in itertools.product(range(2), ("q_norm", "k_norm")):
        tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = 1 + 0.125 * torch.arange(8)
    save_file(tensors, folder / "hybrid" / "model.safetensors")
    return folder


def run(home: Path, changes: dict[str, str], out: Path) -> dict[str, Any]:
    """Bits of a run: of each step, and of the fp32 state after the last, which no rounding hides."""
    named = {**changes, "model.source": str(home / changes.get("model.source", "model"))}
    config = RunConfig(
        name="golden",
        steps=STEPS,
        model=ModelConfig("replaced"),
        task=TaskConfig(f"{home / 'sums.py'}:Sums", heldout_size=8),
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=6, max_new_tokens=20),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=500),
        evaluation=EvaluationConfig(prompts=4),
    )
    code, folder = local.train(override(config, named), out=out, resume=None, display=Silent())
    assert code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [
        {
            "loss": float(row["loss"]).hex(),
            "grad_norm": float(row["grad_norm"]).hex(),
            "reward": float(row["reward"]).hex(),
            "tokens": row["tokens"],
            "weights": row["weights"],
        }
        for row in rows
        if row["step"]
    ]
    evaluations = [row["evaluation"]["reward"] for row in rows if "evaluation" in row]
    first = [json.loads(line) for line in (folder / "trajectories" / "step-1.jsonl").read_text().splitlines()]
    observations = sum(row["text"].count("<|im_start|>user\n") for row in first)
    state = digest(folder / "checkpoints" / f"step-{STEPS}")
    return {"steps": steps, "state": state, "evaluations": evaluations, "observations": observations}


def digest(checkpoint: Path) -> str:
    """Of all tensors of a checkpoint, by name: weights, fp32 masters and moments."""
    tensors = {
        f"{path.name} {name}": t
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, t in load_file(path).items()
    }
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode() + bytes(tensors[name].contiguous().view(torch.uint8).flatten().tolist()))
    return hashed.hexdigest()[:32]


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_of_a_run(home: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    """A change that should have left the numbers alone moved a loss, a gradient norm or a bit of the weights."""
    unit, goldens = matrix_unit(), json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}
    if request.config.getoption("--write-goldens"):
        goldens.setdefault(unit, {})[name] = run(home, RUNS[name], tmp_path / "run")
        GOLDENS.write_text(json.dumps(goldens, indent=1) + "\n")
        return
    if name not in goldens.get(unit, {}):
        pytest.skip(f"no golden for {unit}; --write-goldens makes one")
    found = run(home, RUNS[name], tmp_path / "run")
    assert found == goldens[unit][name]


def test_goldens_have_no_run_that_is_gone() -> None:
    """A run left the table above and its golden stayed, or its golden says nothing: no step that trained."""
    for unit, runs in json.loads(GOLDENS.read_text()).items():
        assert set(runs) == set(RUNS), unit
        for name, golden in runs.items():
            assert len({step["weights"] for step in golden["steps"]}) == STEPS, (unit, name)
            assert (golden["observations"] > 0) == ("rollout.max_turns" in RUNS[name]), (unit, name)
