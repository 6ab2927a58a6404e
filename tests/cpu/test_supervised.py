"""Likelihood of what is written: weights, reductions and a gradient that hangs on no split."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from tandem.algo.config import Reduction, SupervisedConfig
from tandem.algo.pack import count_prompts, pack
from tandem.algo.supervised import SURE, NextToken, select, unlikely
from tandem.columns import Columns
from tandem.errors import ConfigError, NonFiniteError
from tandem.models.decoder import Decoder
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner, score
from tandem.types import Group, Prompt, Trajectory
from tests.reference_loss import reference_likelihood
from tests.samples import having

MakeDecoder = Callable[..., Decoder]
CONFIGS = [
    SupervisedConfig(reduction=reduction, **more)
    for reduction, more in itertools.product(
        get_args(Reduction),
        ({}, {"weights": "reward"}, {"weights": "advantage", "beta": 0.5, "weight_max": 1.5}, {"unlikelihood": 0.25}),
    )
]


def groups() -> list[Group]:
    """Programs of unequal lengths, one of two segments, one with a turn that failed, one that all failed."""
    rng = random.Random(0)

    def columns(before: int, after: int, failed: Sequence[int] = (), advantage: float = 0.0) -> Columns:
        mask = [False] * before + [True] * after
        made = Columns.of(
            tokens=[rng.randrange(97) for _ in mask],
            loss_mask=mask,
            advantages=[advantage * trained for trained in mask],
        )
        return made.having(failed=[place in failed for place in range(len(mask))]) if failed else made

    made = []
    for number, (lengths, reward, failed) in enumerate(
        [((5, 3), 1.0, ()), ((4, 17), 0.25, ()), ((9, 6), 0.0, ()), ((3, 11), 0.5, (3, 4, 5)), ((6, 2), 2.0, (6, 7))]
    ):
        name = f"p{number}"
        own = Trajectory(name, name, columns(*lengths, failed, reward - 0.75), reward)
        more = [replace(own, columns=columns(7, 8, (), reward - 0.75), segment=1)] if number == 1 else []
        made.append(Group(Prompt(name, ()), (own, *more)))
    return made


def gradients(decoder: Decoder, samples, budget: int) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients by weight, and how many microbatches gave them."""
    learner = Learner(decoder, LearnerConfig(), NextToken(), 1)
    microbatches = pack(samples, count_prompts(samples), budget, False)
    loss = math.fsum(float(learner.backward(one).loss.detach()) for one in microbatches)
    return loss, {name: weight.grad.clone() for name, weight in decoder.weights()}, len(microbatches)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.reduction}, {c.weights}, {c.unlikelihood:g}")
def test_loss_is_the_slow_one(make_decoder: MakeDecoder, config: SupervisedConfig) -> None:
    """A mean over other tokens, sequences or trajectories than its name says; a marked token that is learned; a reward,
    an advantage or an unlikelihood that weighs other tokens."""
    decoder = make_decoder()
    written = [one for group in groups() for one in group.trajectories]
    plain = select(groups(), SupervisedConfig(unlikelihood=1.0))  # all of them
    logprobs = {sample.id: torch.zeros(len(sample.columns), dtype=torch.float64) for sample in plain.samples}
    for sample in plain.samples:
        (microbatch,) = pack([sample], count_prompts([sample]), 1000)
        logprobs[sample.id][torch.tensor(sample.columns["loss_mask"])] = score(decoder, microbatch, 1.0).double()
    wanted = reference_likelihood(config, written, [logprobs[one.id] for one in written])
    chosen = select(groups(), config)
    loss, _, _ = gradients(decoder, chosen.samples, 1000)
    assert loss == pytest.approx(float(wanted), rel=1e-6)
    trained = {sample.id for sample in chosen.samples}
    assert trained == {name for name, fate in chosen.fates.items() if fate == "trained"}
    assert chosen.fates["p4/0"] == ("trained" if config.unlikelihood else "masked")
    assert ("p2/0" in trained) == (config.weights != "reward")  # a reward of 0 gives no gradient


def close(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of fp32 sums."""
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        top = float(wanted[name].abs().max())
        assert top > 0, name
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=3e-5 * top, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("config", CONFIGS[::5], ids=lambda c: f"{c.reduction}, {c.weights}, {c.unlikelihood:g}")
def test_no_split_changes_the_gradient(make_decoder: MakeDecoder, config: SupervisedConfig) -> None:
    """A mean of means: microbatches, or two workers with a part of the batch each, that are normalised by their own
    tokens."""
    samples = [
        replace(sample, id=f"{copy}-{sample.id}", prompt_id=f"{copy}-{sample.prompt_id}")
        for copy in range(2)
        for sample in select(groups(), config).samples
    ]
    loss, whole, count = gradients(make_decoder(), samples, 10_000)
    assert count == 1
    rows = sum(len(one.columns) - 1 for one in samples)
    for budget, least in ((rows // 2 + 8, 2), (rows // 8 + 12, 5)):
        again, split, count = gradients(make_decoder(), samples, budget)
        assert count >= least and again == pytest.approx(loss, rel=1e-6)
        close(split, whole)
    halves = [gradients(make_decoder(), samples[start::2], 10_000)[:2] for start in (0, 1)]
    assert sum(part for part, _ in halves) == pytest.approx(loss, rel=1e-6)
    close({name: halves[0][1][name] + halves[1][1][name] for name in whole}, whole)


def test_eight_microbatches(make_decoder: MakeDecoder) -> None:
    """A batch of 1, 2 and 8 microbatches, one after the other, with three gradients."""
    rng = random.Random(1)
    written = []
    for number in range(8):
        mask = [False] * 4 + [True] * 4
        columns = Columns.of(tokens=[rng.randrange(97) for _ in mask], loss_mask=mask)
        written.append(Group(Prompt(f"p{number}", ()), (Trajectory(f"p{number}", f"p{number}", columns),)))
    samples = select(written).samples
    found = [gradients(make_decoder(), samples, budget) for budget in (56, 28, 7)]
    assert [count for _, _, count in found] == [1, 2, 8]
    for _, grads, _ in found[1:]:
        close(grads, found[0][1])


def test_what_all_begin_with_runs_once(make_decoder: MakeDecoder) -> None:
    """A system message of all chats run again for each, or with another gradient where it is shared."""
    rng = random.Random(2)
    system, written = [rng.randrange(97) for _ in range(20)], []
    for number in range(6):
        own = [rng.randrange(97) for _ in range(7)]
        columns = Columns.of(tokens=[*system, *own], loss_mask=[False] * 23 + [True] * 4)
        written.append(Group(Prompt(f"p{number}", ()), (Trajectory(f"p{number}", f"p{number}", columns),)))
    chosen = select(written)
    decoder, plain = make_decoder(), make_decoder()
    learner = Learner(decoder, LearnerConfig(), NextToken(), 1)
    microbatches = pack(chosen.samples, chosen.prompts, 50)
    for microbatch in microbatches:
        learner.backward(microbatch)
    assert sorted(len(one.tokens_T) for one in microbatches) == [26, 50]  # 20 + 6, 20 + 5 x 6
    _, wanted, _ = gradients(plain, chosen.samples, 10_000)
    close({name: weight.grad for name, weight in decoder.weights()}, wanted)


def test_by_hand() -> None:
    """Weights of two sequences with 1 and 4 tokens: of all reductions, on paper."""

    def written(count: int, name: str, program: str, segment: int) -> Trajectory:
        return Trajectory(program, name, Columns.of(tokens=[0] * (count + 1), loss_mask=[False] + [True] * count),
                          segment=segment)  # fmt: skip

    pair = [Group(Prompt("p", ()), (written(1, "p", "p/0", 0), written(4, "p", "p/0", 1))),
            Group(Prompt("q", ()), (written(4, "q", "q/0", 0),))]  # fmt: skip
    wanted = {
        "token_mean": [1 / 9, 1 / 9, 1 / 9],
        "sequence_mean": [1 / 3, 1 / 12, 1 / 12],
        "trajectory_mean": [1 / 10, 1 / 10, 1 / 8],
        "sqrt_mean": [1 / 5, 1 / 10, 1 / 10],
    }
    for reduction, weights in wanted.items():
        found = select(pair, SupervisedConfig(reduction=reduction))
        assert [float(one.columns["loss_weights"][-1]) for one in found.samples] == pytest.approx(weights)
        assert [float(one.columns["loss_weights"][0]) for one in found.samples] == [0.0] * 3


def test_unlikelihood_has_no_infinity() -> None:
    """A token that is sure has an infinite loss, or past some place no gradient."""
    logprobs = torch.tensor([-3.0, -0.7, -1e-3, -1e-12, 0.0], dtype=torch.float64, requires_grad=True)
    loss = unlikely(logprobs)
    loss.sum().backward()
    assert torch.allclose(loss[:2], -torch.log(1 - torch.exp(logprobs[:2])))
    assert loss.isfinite().all() and (loss.diff() > 0).all()
    assert logprobs.grad is not None
    slope = math.exp(SURE) / (1 - math.exp(SURE))
    assert logprobs.grad[2:].tolist() == pytest.approx([slope] * 3) and slope == pytest.approx(99.0)
    assert logprobs.grad[0].item() == pytest.approx(math.exp(-3) / (1 - math.exp(-3)))


def test_weights_that_are_not_there() -> None:
    """A chat weighed by the advantage 0 that nobody gave it; a reward below 0 that turns the loss around."""
    plain = Trajectory("p", "p", Columns.of(tokens=(1, 2), loss_mask=(False, True)), reward=-1.0)
    group = [Group(Prompt("p", ()), (plain,))]
    with pytest.raises(ConfigError, match="there is none: only programs of a run"):
        select(group, SupervisedConfig(weights="advantage"))
    with pytest.raises(ConfigError, match="the reward is -1: .* corpus.reward_at_least=0"):
        select(group, SupervisedConfig(weights="reward"))


def test_nothing_to_learn_is_no_update(make_decoder: MakeDecoder) -> None:
    """A step whose rows are all marked ends in an error, or moves the weights."""
    columns = Columns.of(tokens=(1, 2), loss_mask=(False, True), failed=(False, True))
    chosen = select([Group(Prompt("p", ()), (Trajectory("p", "p", columns),))])
    assert chosen.samples == () and chosen.fates == {"p/0": "masked"}
    learner = Learner(make_decoder(), LearnerConfig(), NextToken(), 1)
    assert learner.step(chosen.samples, chosen.prompts) is None and learner.updates == 0


def test_held_out_is_measured_without_learning(make_decoder: MakeDecoder) -> None:
    """A held-out loss that leaves gradients behind, or is another than the loss of a step on the same samples."""
    decoder = make_decoder()
    learner = Learner(decoder, LearnerConfig(lr=0.0, microbatch_tokens=20), NextToken(), 1)
    chosen = select(groups(), SupervisedConfig(reduction="sequence_mean"))
    found = learner.measure(chosen.samples, chosen.prompts)
    assert all(weight.grad is None or not weight.grad.any() for _, weight in decoder.weights())
    report = learner.step(chosen.samples, chosen.prompts)
    assert report is not None
    for name in ("loss", "nll", "entropy", "tokens"):
        assert found[name] == pytest.approx(report.measured.metrics[name], rel=1e-6), name
    assert np.isfinite(found["loss"]) and found["nll"] != found["loss"]


def test_a_loss_that_is_not_finite_names_its_sample(make_decoder: MakeDecoder) -> None:
    """An update by NaN, or an error that does not say of which row."""
    chosen = select(groups()[:1])
    broken = [having(sample, loss_weights=[math.nan] * len(sample.columns)) for sample in chosen.samples]
    learner = Learner(make_decoder(), LearnerConfig(), NextToken(), 1)
    with pytest.raises(NonFiniteError, match=r"its samples: p0/0"):
        learner.step(broken, chosen.prompts)
    assert learner.updates == 0
    chosen = select(groups())  # one microbatch, and a token that p3 alone reads
    token = next(token for token in range(97) if not any(token in one.columns["tokens"] for one in chosen.samples))
    (odd,) = [sample for sample in chosen.samples if sample.id == "p3/0"]
    odd = having(odd, tokens=[token, *odd.columns["tokens"][1:]])
    decoder = make_decoder(tied_embeddings=False)
    dict(decoder.weights())["embed"].value[token] = math.nan
    learner = Learner(decoder, LearnerConfig(), NextToken(), 1)
    with pytest.raises(NonFiniteError, match=r"its samples: p3/0\."):
        learner.step([odd if sample.id == odd.id else sample for sample in chosen.samples], chosen.prompts)
    assert learner.updates == 0
