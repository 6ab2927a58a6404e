"""Training on texts, from scratch: the second objective, the model it starts from, and what takes rollouts' place."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tandem.algo.pack import count_prompts, pack
from tandem.algo.supervised import NextToken, select
from tandem.config import override
from tandem.corpus.solutions import written
from tandem.errors import CapacityError, ModelError, TaskError
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.scratch import Shape
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.recipes.tiny_arithmetic import tiny_arithmetic as recipe
from tandem.run import local
from tandem.run.config import RunConfig
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Message, Prompt
from tests.display import Silent
from tests.sums import tiny_arithmetic

SOURCE = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128"
SMALL = {
    "model.source": SOURCE,
    "task.heldout_size": "8",
    "evaluation.prompts": "4",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "4",
    "rollout.max_new_tokens": "8",
}


def small(**changes: str) -> RunConfig:
    return override(tiny_arithmetic(), {**SMALL, **changes})


def prompts() -> list[Prompt]:
    return [Prompt(f"p/{n}", (Message("user", f"{n} + 1 ="),), {}) for n in (3, 40)]


def test_loss_is_transformers(tmp_path: Path) -> None:
    """The loss or a gradient is of other tokens than the solution and its end of turn, or of another mean."""
    import transformers

    source = open_checkpoint(SOURCE)
    tokenizer = source.load_tokenizer()
    decoder = Decoder(source.spec, "float32").load(source.tensors())
    renderer = Renderer(tokenizer)
    chosen = select(written(prompts(), ["3 + 1 = 4", "40 + 1 = 41"], renderer, 128))
    assert [tokenizer.decode(s.columns["tokens"][s.columns["loss_mask"]].tolist()) for s in chosen.samples] == [
        "3 + 1 = 4<|im_end|>",
        "40 + 1 = 41<|im_end|>",
    ]
    learner = Learner(decoder, LearnerConfig(lr=0.0), NextToken(), 1)
    microbatches = pack(chosen.samples, chosen.prompts, 30)
    assert len(microbatches) > 1 and chosen.prompts == count_prompts(chosen.samples)
    ours = math.fsum(float(learner.backward(microbatch).loss.detach()) for microbatch in microbatches)

    save_checkpoint(tmp_path / "model", source.spec, dict(decoder.export()), tokenizer, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for sample in chosen.samples:
        tokens = torch.tensor(sample.columns["tokens"].tolist())
        mask = torch.tensor(sample.columns["loss_mask"].tolist())
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        total = total - logprobs.gather(1, tokens[1:, None])[:, 0][mask[1:]].sum()
        count += int(mask.sum())
    (total / count).backward()
    assert ours == pytest.approx(float(total.detach() / count), rel=1e-5)
    theirs = dict(model.named_parameters())
    gradient = dict(decoder.weights())["layers.1.down"].grad
    assert gradient is not None
    torch.testing.assert_close(gradient, theirs["model.layers.1.mlp.down_proj.weight"].grad, rtol=1e-3, atol=1e-5)


def test_a_run_from_scratch_learns_and_resumes(tmp_path: Path) -> None:
    """The loss stays, rows claim rewards that nobody gave, or a resumed run has other weights than one not stopped."""
    whole = small(steps="12", **{"learner.lr": "3e-3", "learner.warmup_steps": "0"})
    code, folder = local.train(whole, out=tmp_path / "whole", resume=None, display=Silent())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and rows[0]["evaluation"]["prompts"] == 4
    assert abs(rows[1]["loss"] - math.log(259)) < 0.5 and rows[-1]["loss"] < 0.9 * rows[1]["loss"]
    assert all("reward" not in row and row["trained_tokens"] > 0 for row in rows[1:])
    tokens = json.loads((folder / "ledger.json").read_text())["tokens"]
    assert tokens["total"] == tokens["evaluated"] > 0  # to train on, nothing was sampled
    halves = dataclasses.replace(whole, checkpoint=dataclasses.replace(whole.checkpoint, every=5))
    with pytest.MonkeyPatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: object) -> None:
            save(self, step, version)  # type: ignore[arg-type]
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        local.train(halves, out=tmp_path / "halves", resume=None, display=Silent())
    stopped = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert stopped[-1]["step"] == 5
    local.train(halves, out=None, resume=tmp_path / "halves", display=Silent())
    resumed = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert resumed[-1]["weights"] == rows[-1]["weights"]


def test_the_text_is_the_seed() -> None:
    """Two new models of one source differ, another seed gives the same, or matrices are not as wide as they say."""
    drawn, again = (dict(open_checkpoint(SOURCE).tensors()) for _ in range(2))
    other = dict(open_checkpoint(f"{SOURCE},seed=1").tensors())
    assert all(torch.equal(tensor, again[name]) for name, tensor in drawn.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(drawn[name], other[name])
    assert not torch.equal(drawn[name], drawn[name.replace("up", "gate")])
    assert float(drawn[name].std()) == pytest.approx(32**-0.5, rel=0.05)
    assert float(drawn["model.layers.0.mlp.down_proj.weight"].std()) == pytest.approx((48 * 4) ** -0.5, rel=0.05)
    assert sum(tensor.numel() for tensor in dict(open_checkpoint("new:").tensors()).values()) == 4_788_224


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("new:widht=32", "no 'widht'. Did you mean width"),
        ("new:width=x", "width is 'x'; give a whole number"),
        ("new:width=-2", "give a whole number"),
        ("new:layers=0", "layers is 0; allowed: 1 to 256"),
        ("new:layers=99999", "allowed: 1 to 256"),
        ("new:width=30", "30 does not divide into 4 heads"),
        ("new:kv_heads=3", "4 query heads do not divide into 3"),
    ],
)
def test_sources_that_are_no_shape(text: str, said: str) -> None:
    """A misspelt shape trains another model, or ends in a traceback."""
    with pytest.raises(ModelError, match=said.replace(".", r"\.")):
        Shape.read(text).spec()


def test_any_bytes_come_back() -> None:
    """A byte has no token, or a control token spelled in no text of the template is made of its characters."""
    tokenizer = open_checkpoint("new:").load_tokenizer()
    text = bytes(range(256)).decode("latin-1") + "é→漢"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12 + 3 = 15")) == 11
    assert tokenizer.encode("<|im_end|>") == [2] and tokenizer.stop_token_ids == (2,)


def test_texts_that_do_not_fit_or_are_not_there(tmp_path: Path) -> None:
    """A long text is cut in silence; a task without solutions trains on something else."""
    renderer = Renderer(open_checkpoint("new:").load_tokenizer())
    with pytest.raises(CapacityError, match="the text of p/3 has .* tokens and the model 16 positions"):
        written(prompts(), ["4", "41"], renderer, 16)
    (tmp_path / "own.py").write_text(
        "from tandem.program.environment import Environment\nfrom tandem.types import Message, Prompt\n\n\n"
        "class Own(Environment):\n    def prompt(self, split, index):\n"
        "        return Prompt(f'{split}/{index}', (Message('user', f'{split} {index}'),), {})\n\n"
        "    def reward(self, prompt, text):\n        return 0.0\n"
    )
    task = EnvironmentPool(TaskConfig(f"{tmp_path / 'own.py'}:Own", heldout_size=2))
    try:
        with pytest.raises(TaskError, match="Own has no solution of prompt .* Define solution"):
            task.solutions(task.batch(0, 1))
    finally:
        task.close()


def test_worked_steps_are_right() -> None:
    """A step of a worked sum is wrong, or an answer is not its end."""
    task = EnvironmentPool(dataclasses.replace(recipe().task, heldout_size=4))
    try:
        asked = task.batch(0, 50)
        for prompt, solution in zip(asked, task.solutions(asked), strict=True):
            steps = solution.split(" = ")
            assert prompt.messages[0].content == f"{steps[0]} =" and steps[-1] == prompt.record["answer"]
            assert len({eval(step) for step in steps}) == 1
    finally:
        task.close()
