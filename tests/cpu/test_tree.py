"""Turns of programs as one tree: the log-probs of each sample alone to the bit, and the gradient of the copies."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tandem.algo import pack as pack_module
from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts, pack
from tandem.columns import Columns
from tandem.models.checkpoint import save_checkpoint
from tandem.models.decoder import Decoder
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner, score
from tandem.types import Microbatch, Sample
from tests.cpu.test_decoder import named_gradients

MakeDecoder = Callable[..., Decoder]


def folded(programs: int = 3, turns: int = 4, length: int = 9) -> list[Sample]:
    """Programs whose context starts anew at each turn, the earlier turns in it without what was thought in them."""
    rng = random.Random(0)

    def words(count: int) -> list[int]:
        return [rng.randrange(97) for _ in range(count)]

    asked, samples = words(length), []
    for i in range(programs):
        context = list(asked)
        for t in range(turns):
            thought, said, answer = words(3), words(4), words(length)
            mask = [False] * len(context) + [True] * 7
            columns = Columns.of(
                tokens=[*context, *thought, *said],
                loss_mask=mask,
                advantages=[rng.uniform(-2, 2) * m for m in mask],
                logprobs=[-rng.uniform(1, 6) * m for m in mask],
            )
            samples.append(Sample(f"p/{i}/{t}", "p", columns))
            context += said + answer
    return samples


def tree_and_copies(samples: list[Sample]) -> tuple[Microbatch, Microbatch]:
    (tree,), (copies,) = (pack(samples, count_prompts(samples), 10_000, share) for share in (True, False))
    assert len(tree.tokens_T) < 0.7 * len(copies.tokens_T) and tree.parent_S.max() > 0
    assert sorted(tree.sample_ids) == sorted(copies.sample_ids)
    return tree, copies


@pytest.fixture(autouse=True)
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "BRANCH", 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logprobs_of_a_tree_have_the_bits_of_each_sample_alone(kernel_path, make_decoder: MakeDecoder, dtype: str):
    """A row three branches down attends to a sibling's rows, to another position, or is summed in another order."""
    decoder, samples = make_decoder(dtype), folded()
    tree, _ = tree_and_copies(samples)
    found = dict(zip(tree.sample_ids, score(decoder, tree, 1.0).split(tree.sample_tokens.tolist()), strict=True))
    for sample in samples:
        (alone,) = pack([sample], count_prompts([sample]), 10_000)
        assert torch.equal(found[sample.id], score(decoder, alone, 1.0)), sample.id


def gradients(decoder: Decoder, microbatch: Microbatch) -> dict[str, torch.Tensor]:
    Learner(decoder, LearnerConfig(), PolicyGradient(AlgoConfig(), 1.0), 10).backward(microbatch)
    return named_gradients(decoder)


def test_gradient_of_a_tree_against_each_sample_in_fp64(any_path, make_decoder: MakeDecoder, tmp_path: Path):
    """A shared row lacks the gradient of a branch, or has one twice.

    Transformers in fp64 sums -A log p over the samples one by one. Ours is fp32 through two layers.
    """
    import transformers

    decoder, samples = make_decoder(tied_embeddings=False), folded()
    samples = [
        Sample(s.id, s.prompt_id, s.columns.having(logprobs=alone_logprobs(decoder, s))) for s in samples
    ]  # ratios of 1
    tree, copies = tree_and_copies(samples)
    save_checkpoint(tmp_path / "model", decoder.spec, dict(decoder.export()), None, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        tokens = torch.tensor(sample.columns["tokens"].tolist())
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        total = total - (torch.tensor(sample.columns["advantages"][1:].copy()) * logprobs).sum()
        count += int(sample.columns["loss_mask"].sum())
    (total / count).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for microbatch in (tree, copies):
        found = gradients(decoder, microbatch)
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            top = float(grad.abs().max())
            torch.testing.assert_close(found[name].double(), grad, atol=5e-5 * top, rtol=0, msg=name)


def alone_logprobs(decoder: Decoder, sample: Sample) -> list[float]:
    (alone,) = pack([sample], count_prompts([sample]), 10_000)
    values = iter(score(decoder, alone, 1.0).tolist())
    return [next(values) if trained else 0.0 for trained in sample.columns["loss_mask"]]
