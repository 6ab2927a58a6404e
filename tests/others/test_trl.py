"""Losses and their gradients beside TRL's trainers: the same rows, through either side's own template and tokeniser."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.algo import preference, supervised
from tandem.algo.config import PreferenceConfig
from tandem.algo.objective import Objective
from tandem.algo.pack import count_prompts
from tandem.algo.preference import Preference, RewardModel
from tandem.algo.supervised import NextToken
from tandem.corpus.config import CorpusConfig
from tandem.corpus.preferences import preferences_of
from tandem.corpus.sources import readers_of
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.program.render import Renderer
from tandem.train.config import LearnerConfig
from tandem.train.score import with_logprobs
from tandem.train.step import Learner
from tandem.types import Sample

HERE = Path(__file__).parent
VENV = HERE.parents[1] / ".venv-others" / "trl"
TEMPLATE = (  # nothing behind the end of a turn: TRL would train it
    "{% for m in messages %}{{ '' if loop.first else '\n' }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endfor %}{{ '\n<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
CONFIGS = {
    "dpo": PreferenceConfig("dpo", beta=0.1),
    "robust_dpo": PreferenceConfig("robust_dpo", beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceConfig("ipo", beta=0.7, length_normalised=True),
    "dpo by length": PreferenceConfig("dpo", beta=0.5, length_normalised=True),
    "simpo": PreferenceConfig("simpo", beta=2.0, target_margin=0.5),
    "kto": PreferenceConfig("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.8),
    "reward_model": PreferenceConfig("reward_model", margin_weight=1.0, center=0.1),
}


def written(folder: Path) -> None:
    """Models whose answers are far from even, and rows of unequal lengths."""
    for name, seed in (("policy", 1), ("reference", 2)):
        source = open_checkpoint(f"new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=256,seed={seed}")
        tokenizer = source.load_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tensors = {one: value * 6 if value.dim() == 2 else value for one, value in source.tensors()}
        (folder / name).mkdir()
        save_checkpoint(folder / name, source.spec, tensors, tokenizer, "float32")
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    save_file({"score.weight": head}, folder / "head.safetensors")
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice(("yes", "no", "17", "a word", "é")) for _ in range(rng.randint(1, 7)))

    pairs = [
        {"prompt": f"{n}: {text()}?", "chosen": text(), "rejected": text() + "!", "margin": n / 4} for n in range(6)
    ]
    rated = [{"prompt": f"{n}: {text()}?", "completion": text(), "label": n % 3 > 0} for n in range(6)]
    turns = [[("user", text()), ("assistant", text())] * (1 + n % 2) for n in range(6)]
    chats = [{"messages": [{"role": role, "content": said} for role, said in one]} for one in turns]
    for name, rows in (("pairs", pairs), ("ratings", rated), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With values.json and gradients.safetensors of TRL's."""
    if not (VENV / "installed").exists():
        pytest.skip(f"no {VENV}: `make test-others OTHERS=trl` makes it")
    found = tmp_path_factory.mktemp("trl")
    written(found)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(found / "hf"), "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [VENV / "bin/python", HERE / "trl_values.py", found]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


class Watched(Learner):
    """Keeps the gradients of its update, which moves nothing."""

    seen: dict[str, Tensor]

    def _apply(self, samples: Sequence[Sample], unit: float = 1.0) -> tuple[float, float]:
        self.seen = {
            name: weight.grad.clone() for name, weight in self.optimiser.model.weights() if weight.grad is not None
        }
        return super()._apply(samples, unit)


def model(folder: Path) -> tuple[Decoder, Renderer]:
    source = open_checkpoint(str(folder))
    return Decoder(source.spec, "float32").load(source.tensors()), Renderer(source.load_tokenizer())


def learned(
    folder: Path, objective: Objective, samples: Sequence[Sample]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What is measured, and the gradients, of all samples."""
    decoder, _ = model(folder / "policy")
    totals = count_prompts(samples)
    if "reference_logprobs" in objective.columns:
        samples = with_logprobs("reference_logprobs", model(folder / "reference")[0], samples, totals, 4096, 1.0)
    learner = Watched(decoder, LearnerConfig(lr=0.0), objective, 1)
    if learner.head is not None:
        head = load_file(folder / "head.safetensors")["score.weight"][0]
        learner.head.weight.value.copy_(head)
        learner.optimiser.state[preference.HEAD][0].copy_(head)
    report = learner.step(samples, totals)
    assert report is not None
    return report.measured.metrics, learner.seen


def compared(folder: Path, config: PreferenceConfig) -> tuple[Sample, ...]:
    name = "ratings" if config.loss == "kto" else "pairs"
    sources = CorpusConfig((str(folder / f"{name}.jsonl"),))
    (reader,) = preferences_of(sources, config, model(folder / "policy")[1], most_rows=4096)
    return preference.select([reader.group(number) for number in range(len(reader))]).samples


def check(folder: Path, name: str, metrics: dict[str, float], grads: dict[str, Tensor]) -> None:
    values = json.loads((folder / "values.json").read_text())
    theirs = {
        key.removeprefix(f"{name}/"): value
        for key, value in load_file(folder / "gradients.safetensors").items()
        if key.startswith(f"{name}/")
    }
    assert metrics["loss"] == pytest.approx(values[name], rel=2e-5)
    norms = [float(torch.cat([grad.flatten() for grad in some.values()]).norm()) for some in (grads, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 1e-3
    (embed,) = [value for key, value in theirs.items() if key.endswith("embed_tokens.weight")]
    assert float((grads["embed"] - embed).norm()) <= 1e-3 * float(embed.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_preferences_are_trls(folder: Path, name: str) -> None:
    """Another token is trained, or a sign, a length, a weight, a reference or a margin is elsewhere than TRL has it."""
    config = CONFIGS[name]
    objective = RewardModel(config) if config.loss == "reward_model" else Preference(config)
    check(folder, name, *learned(folder, objective, compared(folder, config)))


def test_orpos_odds_are_trls(folder: Path) -> None:
    """The odds ratio is of sums and not of means. (TRL's other term is a mean over all tokens, the prompts' too.)"""
    config = PreferenceConfig("orpo", beta=0.3)
    metrics, _ = learned(folder, Preference(config), compared(folder, config))
    values = json.loads((folder / "values.json").read_text())
    supervised_term = -metrics["chosen_reward"] / 0.3
    assert metrics["loss"] - supervised_term == pytest.approx(values["orpo"], rel=2e-5)


def test_fine_tuning_is_trls(folder: Path) -> None:
    """Other tokens of a chat are trained than the last answer's, or its end of turn is not."""
    sources = CorpusConfig((str(folder / "chats.jsonl"),), turns="last")
    (reader,) = readers_of(sources, model(folder / "policy")[1])
    chosen = supervised.select([reader.group(number) for number in range(len(reader))])
    check(folder, "next_token", *learned(folder, NextToken(), chosen.samples))


def test_another_loss_is_seen(folder: Path) -> None:
    """The comparison passes whatever is compared: a beta that is a tenth higher is another loss."""
    config = PreferenceConfig("dpo", beta=0.11)
    found = learned(folder, Preference(config), compared(folder, config))
    with pytest.raises(AssertionError):
        check(folder, "dpo", *found)
