"""Losses against hand-worked cases and the looped reference, and their independence of the packing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.algo.advantage import ADVANTAGES, samples_from_groups
from tandem.algo.config import Advantage, Aggregation, AlgoConfig, CorrectionConfig, Kl, Loss
from tandem.algo.loss import KL_ESTIMATORS, LOSSES, LossResult, policy_loss, summarise
from tandem.algo.pack import PromptTotal, count_prompts, pack, split_updates
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.columns import Columns
from tandem.types import Group, Microbatch, Prompt, Sample, Trajectory
from tests.reference_loss import reference_loss
from tests.samples import column, having, owners_of, paths_of, trained

AGGREGATIONS = [("token_mean", None), ("sequence_mean", None), ("prompt_mean", None), ("constant_mean", 7)]
VOCAB = 11


def random_samples(seed: int, drift: float = 0.6) -> list[Sample]:
    """3 prompts, 4 siblings each, 1 to 6 answer tokens with holes in the mask, one zero advantage."""
    rng = random.Random(seed)
    samples = []
    for p in range(3):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(3 + p))
        for g in range(4):
            answer = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 6)))
            mask = (False,) * len(prompt) + tuple(rng.random() < 0.8 for _ in answer[1:]) + (True,)
            advantage = 0.0 if (p, g) == (1, 2) else rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 2.0)
            columns = Columns.of(
                tokens=prompt + answer,
                loss_mask=mask,
                advantages=[advantage if m else 0.0 for m in mask],
                logprobs=[-rng.uniform(0.2, 0.2 + 4 * drift) if m else 0.0 for m in mask],
                reference_logprobs=[-rng.uniform(0.2, 2.0) if m else 0.0 for m in mask],
            )
            samples.append(Sample(f"p{p}/{g}", f"p{p}", columns))
    return samples


def bigram_logprob(weight: Tensor, context: Sequence[int], target: int) -> Tensor:
    """A model in which every token of the path matters: logits are position-weighted sums of rows of `weight`."""
    logits = sum(weight[token] * (0.3 + 0.1 * p) for p, token in enumerate(context))
    return torch.log_softmax(logits, dim=-1)[target]


def learner_logprobs(weight: Tensor, m: Microbatch) -> Tensor:
    contexts = [m.tokens_T[path].tolist() for path in paths_of(m)]
    predicted = zip(m.rows_N.tolist(), m.predictions["tokens"].tolist(), strict=True)
    return torch.stack([bigram_logprob(weight, contexts[row], target) for row, target in predicted])


def packed_loss(config: AlgoConfig, weight: Tensor, microbatches: list[Microbatch]) -> tuple[Tensor, list[LossResult]]:
    results = [policy_loss(config, learner_logprobs(weight, m), to_tensors(m)) for m in microbatches]
    return torch.stack([result.loss for result in results]).sum(), results


def reference_with_model(config: AlgoConfig, weight: Tensor, samples: Sequence[Sample]) -> Tensor:
    logprobs = [
        torch.stack(
            [
                bigram_logprob(weight, tokens[:p], tokens[p]) if mask else torch.zeros((), dtype=torch.float64)
                for p, mask in enumerate(column(s, "loss_mask"))
            ]
        )
        for s in samples
        for tokens in [column(s, "tokens")]
    ]
    return reference_loss(config, samples, logprobs)


def gradient(loss: Callable[[Tensor], Tensor], seed: int = 0) -> tuple[float, Tensor]:
    weight = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight.requires_grad_(True)
    value = loss(weight)
    value.backward()
    assert weight.grad is not None
    return float(value.detach()), weight.grad


def config_of(loss: str, aggregation: str, constant: int | None, kl: str = "none", **fields: float) -> AlgoConfig:
    return AlgoConfig(
        loss=loss,
        aggregation=aggregation,
        constant_tokens=constant,
        kl=kl,
        kl_weight=0.0 if kl == "none" else 0.3,
        **fields,
    )


def one_batch(
    advantages: Sequence[float],
    behaviour: Sequence[float],
    lengths: Sequence[int],
    reference: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
) -> MicrobatchTensors:
    """Samples of the given lengths after a prompt token; all but the advantages per prediction, in order."""
    samples, start = [], 0
    names = prompts or ["p"] * len(lengths)
    for i, (length, name) in enumerate(zip(lengths, names, strict=True)):
        stop = start + length
        columns = Columns.of(
            tokens=(0, *range(10 * i + 1, 10 * i + 1 + length)),
            loss_mask=(False,) + (True,) * length,
            advantages=(0.0,) + (advantages[i],) * length,
            logprobs=(0.0, *behaviour[start:stop]),
        )
        if reference:
            columns = columns.having(reference_logprobs=(0.0, *reference[start:stop]))
        samples.append(Sample(f"{name}/{i}", name, columns))
        start = stop
    (m,) = pack(samples, count_prompts(samples), 1000)
    return to_tensors(m)


def value_and_gradient(config: AlgoConfig, logprobs: Sequence[float], batch: MicrobatchTensors) -> tuple[float, list]:
    learner = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    result = policy_loss(config, learner, batch)
    result.loss.backward()
    assert learner.grad is not None
    return float(result.loss.detach()), learner.grad.tolist()


def test_ppo_by_hand() -> None:
    """The clip is on the wrong side for an advantage's sign, or clip_low and clip_high are swapped.

    Ratios 1.5, 1.1, 0.5, 0.9 with A = 2, range [0.8, 1.3]: surrogates 2.6 (clipped), 2.2, 1.0, 1.8; mean 1.9.
    With A = -1: -1.5, -1.1, -0.8 (clipped), -0.9; mean -1.075. Both over 8 tokens: -(7.6 - 4.3) / 8.
    """
    ratios = [1.5, 1.1, 0.5, 0.9]
    batch = one_batch([2.0, -1.0], [-1.0] * 8, [4, 4])
    config = AlgoConfig(clip_low=0.2, clip_high=0.3)
    value, grad = value_and_gradient(config, [-1.0 + math.log(r) for r in ratios * 2], batch)
    assert value == pytest.approx(-(7.6 - 4.3) / 8)
    assert grad == pytest.approx([0.0, -2.2 / 8, -1.0 / 8, -1.8 / 8, 1.5 / 8, 1.1 / 8, 0.0, 0.9 / 8])


def test_gspo_by_hand() -> None:
    """The sequence ratio is a product or an arithmetic mean, or is clipped token by token.

    Sample 0: ratios 4 and 1/4, geometric mean 1, A = 1: not clipped. Sample 1: ratios 2 and 8, s = 4, A = -1: not
    clipped below. Sample 2: one ratio 2, A = 1: clipped at 1.5. Sequence mean of -1, 4, -1.5.
    """
    batch = one_batch([1.0, -1.0, 1.0], [-2.0] * 5, [2, 2, 1])
    config = AlgoConfig(loss="gspo", clip_low=0.5, clip_high=0.5, aggregation="sequence_mean")
    value, grad = value_and_gradient(config, [-2.0 + math.log(r) for r in (4.0, 0.25, 2.0, 8.0, 2.0)], batch)
    assert value == pytest.approx((-1.0 + 4.0 - 1.5) / 3)
    assert grad == pytest.approx([-1 / 6, -1 / 6, 4 / 6, 4 / 6, 0.0])


def test_cispo_by_hand() -> None:
    """A clipped token loses its gradient, or the gradient flows through the weight.

    Ratios 3 and 0.5, range [0.75, 2]: weights 2 and 0.75, A = 1.5, log-probs -1 + log ratio, over 2 tokens.
    """
    logprobs = [-1.0 + math.log(3.0), -1.0 + math.log(0.5)]
    batch = one_batch([1.5], [-1.0, -1.0], [2])
    config = AlgoConfig(loss="cispo", clip_low=0.25, clip_high=1.0)
    value, grad = value_and_gradient(config, logprobs, batch)
    assert value == pytest.approx(-1.5 * (2.0 * logprobs[0] + 0.75 * logprobs[1]) / 2)
    assert grad == pytest.approx([-1.5, -1.5 * 0.75 / 2])


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        ("k1", math.log(2.0), math.log(2.0)),
        ("k2", 0.5 * math.log(2.0) ** 2, math.log(2.0)),
        ("k3", math.log(2.0) - 0.5, 0.5),
    ],
)
def test_kl_by_hand(kl: str, value: float, slope: float) -> None:
    """An estimator has learner and reference swapped, or k1 keeps a gradient that is zero in expectation.

    pi / ref = 2, advantage 0: the loss is the KL term alone.
    """
    batch = one_batch([0.0], [-1.0], [1], reference=[-1.0 - math.log(2.0)])
    found, grad = value_and_gradient(AlgoConfig(kl=kl, kl_weight=0.5), [-1.0], batch)
    assert found == pytest.approx(0.5 * value)
    assert grad == pytest.approx([0.5 * slope])


@pytest.mark.parametrize(
    ("aggregation", "constant", "expected"),
    [
        ("token_mean", None, [1 / 5] * 5),
        ("sequence_mean", None, [1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6]),
        ("prompt_mean", None, [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4]),
        ("constant_mean", 10, [1 / 30] * 5),
    ],
)
def test_aggregations_by_hand(aggregation: str, constant: int | None, expected: list[float]) -> None:
    """A mean is taken over the wrong set. Lengths 1, 2 (prompt p) and 2 (prompt q): A = -1 gives the coefficients."""
    batch = one_batch([-1.0] * 3, [-1.0] * 5, [1, 2, 2], prompts=["p", "p", "q"])
    _, grad = value_and_gradient(config_of("ppo", aggregation, constant), [-1.0] * 5, batch)
    assert grad == pytest.approx(expected)


def test_weights_multiply_without_gradient() -> None:
    """A correction weight is ignored, or misses the KL term.

    rho 1/2 and e^2, of which the second is held to 2: weights 1/2 and 2, proximal the learner's own, KL slopes 1/2.
    """
    behaviour, reference = [-1.0 + math.log(2.0), -3.0], [-1.5, -1.5]
    batch = one_batch([-1.0], behaviour, [2], reference=reference)
    correction = CorrectionConfig("decoupled", "token_tis")
    _, grad = value_and_gradient(AlgoConfig(kl="k2", kl_weight=1.0, correction=correction), [-1.0, -1.0], batch)
    assert grad == pytest.approx([0.5 * (1.0 + 0.5) / 2, 2.0 * (1.0 + 0.5) / 2])


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
@pytest.mark.parametrize("kl", get_args(Kl))
def test_loss_and_gradient_equal_reference(loss: str, aggregation: str, constant: int | None, kl: str) -> None:
    """Loss or gradient departs from the looped definition."""
    config = config_of(loss, aggregation, constant, kl, clip_low=0.2, clip_high=0.3)
    for seed in range(3):
        samples = random_samples(seed)
        microbatches = pack(samples, count_prompts(samples), 25)
        assert len(microbatches) > 1
        value, grad = gradient(lambda w: packed_loss(config, w, microbatches)[0], seed)  # noqa: B023
        wanted, wanted_grad = gradient(lambda w: reference_with_model(config, w, samples), seed)  # noqa: B023
        assert value == pytest.approx(wanted, rel=1e-12)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kl", ["none", "k3"])
def test_selection_weights_multiply_the_whole_loss_of_a_sample(kl: str) -> None:
    """A weight that misses the KL term, reaches another sample's tokens in a shared pack, or gets a gradient."""
    config = config_of("ppo", "sequence_mean", None, kl)
    weighed = {"p0": 0.5, "p1": 2.0, "p2": 1.25}
    samples = [having(one, selection_weights=[weighed[one.prompt_id]] * len(one.columns)) for one in random_samples(1)]
    microbatches = pack(samples, count_prompts(samples), 25)
    value, grad = gradient(lambda w: packed_loss(config, w, microbatches)[0], 1)
    wanted, wanted_grad = gradient(lambda w: reference_with_model(config, w, samples), 1)
    plain, _ = gradient(lambda w: reference_with_model(config, w, random_samples(1)), 1)
    assert value == pytest.approx(wanted, rel=1e-12) and abs(value - plain) > 0.01
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-13)


def microbatches_of(samples: list[Sample], count: int, share: bool) -> list[Microbatch]:
    """Exactly `count` microbatches, of whole samples dealt out in turn (siblings land apart)."""
    prompts = count_prompts(samples)
    packs = [pack(samples[start::count], prompts, 10_000, share) for start in range(count)]
    return [m for one in packs for m in one]


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
def test_split_and_sharing_change_nothing(loss: str, aggregation: str, constant: int | None) -> None:
    """The gradient depends on the number of microbatches, or on whether siblings share the prompt's rows."""
    config = config_of(loss, aggregation, constant, "k3")
    samples = random_samples(5)
    value, grad = gradient(lambda w: packed_loss(config, w, microbatches_of(samples, 1, False))[0])
    for count in (1, 2, 8):
        for share in (False, True):
            microbatches = microbatches_of(samples, count, share)
            assert len(microbatches) == count
            found, found_grad = gradient(lambda w: packed_loss(config, w, microbatches)[0])  # noqa: B023
            assert found == pytest.approx(value, rel=1e-13)
            torch.testing.assert_close(found_grad, grad, rtol=1e-11, atol=1e-14)


def test_metrics_do_not_depend_on_the_split() -> None:
    """A metric is averaged per microbatch, or a maximum is summed."""
    samples, config = random_samples(2), AlgoConfig(kl="k3", kl_weight=0.1)
    weight = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = summarise(packed_loss(config, weight, microbatches_of(samples, 1, True))[1])
    split = summarise(packed_loss(config, weight, microbatches_of(samples, 8, False))[1])
    assert whole == pytest.approx(split, rel=1e-12)


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_dropped_zero_advantage_samples_leave_the_gradient(
    loss: str, aggregation: str, constant: int | None, advantage: str
) -> None:
    """Not running zero-advantage samples rescales the gradient of the batch."""
    rng = random.Random(3)
    groups = []
    for p, rewards in enumerate([(1.0, 0.5, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)]):
        members = []
        for g, reward in enumerate(rewards):
            answer = rng.randint(1, 5)
            mask = (False, False) + (True,) * answer
            tokens = (p, 1, *(rng.randrange(VOCAB) for _ in range(answer)))
            logprobs = tuple(-rng.uniform(1.0, 3.0) if m else 0.0 for m in mask)
            columns = Columns.of(tokens=tokens, loss_mask=mask, logprobs=logprobs)
            members.append(Trajectory(f"p{p}/{g}", f"p{p}", columns, reward))
        groups.append(Group(Prompt(f"p{p}", ()), tuple(members)))
    config = replace(config_of(loss, aggregation, constant), advantage=advantage)
    selection = samples_from_groups(config, groups)
    everyone = samples_from_groups(replace(config, kl="k3", kl_weight=1e-300), groups)
    assert len(selection.samples) == 5 and len(everyone.samples) == 9
    microbatches = pack(selection.samples, selection.prompts, 1000)
    value, grad = gradient(lambda w: packed_loss(config, w, microbatches)[0])
    wanted, wanted_grad = gradient(lambda w: reference_with_model(config, w, everyone.samples))
    assert value == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-14)


def test_identity_at_ratio_one() -> None:
    """On policy the ratio is not exactly 1, KL not exactly 0, or the three losses differ in gradient."""
    behaviour = [float(x) for x in torch.tensor([-0.1, -1.7, -3.3, -0.013, -7.9])]  # fp32 values
    learner = torch.tensor(behaviour, dtype=torch.float32)
    batch = one_batch([1.5, -0.5], behaviour, [2, 3])
    gradients = []
    for loss in get_args(Loss):
        leaf = learner.clone().requires_grad_(True)
        result = policy_loss(AlgoConfig(loss=loss), leaf, batch, entropy_N=torch.full((5,), 2.0))
        result.loss.backward()
        gradients.append(leaf.grad)
        metrics = summarise([result])
        assert metrics["ratio"] == metrics["ratio_max"] == 1.0
        assert metrics["kl"] == metrics["mismatch"] == metrics["ratio_error"] == 0.0
        assert metrics["clip_fraction"] == 0.0 and metrics["entropy"] == 2.0 and metrics["tokens"] == 5.0
    assert gradients[0].dtype == torch.float32
    for grad in gradients:
        assert grad.tolist() == pytest.approx([-0.3, -0.3, 0.1, 0.1, 0.1])


def test_metrics_by_hand() -> None:
    """A drift metric has the wrong sign or set. Ratios 2 and 1/4, A = 1 and -1: both tokens are clipped."""
    batch = one_batch([1.0, -1.0], [-1.0, -1.0], [1, 1])
    learner = torch.tensor([-1.0 + math.log(2.0), -1.0 - math.log(4.0)], dtype=torch.float64)
    metrics = summarise([policy_loss(AlgoConfig(), learner, batch)])
    expected = {
        "loss": -(1.28 - 0.8) / 2,
        "tokens": 2.0,
        "ratio": 1.125,
        "kl": (1.0 - math.log(2.0) - 0.75 + math.log(4.0)) / 2,
        "clip_fraction": 1.0,
        "ratio_max": 2.0,
        "ratio_error": 1.0,
        "mismatch": math.log(4.0),
        "taken_out": 0.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-15)


def test_enormous_ratio_stays_finite() -> None:
    """exp of a log ratio of 2000 makes the loss infinite and stops the run for one token."""
    batch = one_batch([-1.0, 1.0], [-2000.0, -0.5], [1, 1])
    for loss in get_args(Loss):
        value, grad = value_and_gradient(AlgoConfig(loss=loss), [-0.5, -2000.0], batch)
        assert math.isfinite(value) and all(map(math.isfinite, grad))


FAR = st.one_of(st.floats(-1e4, 1e4), st.floats(-25.0, 25.0), st.sampled_from([-1e4, -20.0, 0.0, 20.0, 20.5, 1e4]))


@settings(max_examples=200, deadline=None)
@given(distance=FAR, single=st.booleans(), kl=st.sampled_from(sorted(KL_ESTIMATORS)))
def test_kl_pulls_from_any_distance(distance: float, single: bool, kl: str) -> None:
    """Beyond a clamp the gradient's sign turns and pushes the policy away from its reference, or is gone.

    By hand: k1 and k2 have the slope log pi - log ref; k3 has 1 - ref / pi, with ref / pi at most e^20.
    """
    learner = torch.tensor([-2e4], dtype=torch.float32 if single else torch.float64, requires_grad=True)
    gap = float(learner.detach().double() - (-2e4 + distance))  # log pi - log ref
    batch = one_batch([0.0], [-2e4], [1], reference=[-2e4 + distance])
    result = policy_loss(AlgoConfig(kl=kl, kl_weight=1.0), learner, batch)
    result.loss.backward()
    assert learner.grad is not None and bool(result.loss.isfinite())
    slope = gap if kl != "k3" else -math.expm1(min(-gap, 20.0))
    assert float(learner.grad) == pytest.approx(slope, rel=1e-6 if single else 1e-12, abs=1e-15)
    assert math.copysign(1.0, float(learner.grad)) == math.copysign(1.0, gap) or abs(gap) < 1e-15


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(FAR, min_size=1, max_size=4),
    advantage=st.sampled_from([-1.5, 1.5]),
    loss=st.sampled_from(sorted(LOSSES)),
)
def test_far_ratios_have_the_reference_gradient(gaps: list[float], advantage: float, loss: str) -> None:
    """What should push hardest, an unlikely token that the learner took to and that earned less, has no gradient."""
    columns = Columns.of(
        tokens=range(len(gaps) + 1),
        loss_mask=(False,) + (True,) * len(gaps),
        advantages=(0.0,) + (advantage,) * len(gaps),
        logprobs=(0.0, *(-2e4 - gap for gap in gaps)),
    )
    sample = Sample("p/0", "p", columns)
    config = AlgoConfig(loss=loss)
    (m,) = pack([sample], count_prompts([sample]), 1000)
    learner = torch.full((len(gaps),), -2e4, dtype=torch.float64, requires_grad=True)
    policy_loss(config, learner, to_tensors(m)).loss.backward()
    twin = torch.full((len(gaps) + 1,), -2e4, dtype=torch.float64, requires_grad=True)
    (reference_loss(config, [sample], [twin]) + 0.0 * twin.sum()).backward()  # it is constant where all is clipped
    assert learner.grad is not None and twin.grad is not None and bool(learner.grad.isfinite().all())
    torch.testing.assert_close(learner.grad, twin.grad[1:], rtol=1e-9, atol=1e-300)
    assert bool((learner.grad * advantage <= 0).all())
    if loss == "ppo" and advantage < 0:
        assert bool((learner.grad[torch.tensor(gaps) > 0] > 0).all())


def test_updates_have_their_own_denominators() -> None:
    """An update of half the prompts is divided by the whole step's tokens."""
    samples, config = random_samples(4), AlgoConfig(aggregation="prompt_mean")
    for members, totals in split_updates(samples, count_prompts(samples), 2):
        value, _ = gradient(lambda w: packed_loss(config, w, pack(members, totals, 30))[0])  # noqa: B023
        wanted, _ = gradient(lambda w: reference_with_model(config, w, members))  # noqa: B023
        assert value == pytest.approx(wanted, rel=1e-12)


def test_every_named_choice_exists() -> None:
    """A name that the config allows has no function behind it."""
    assert set(LOSSES) == set(get_args(Loss))
    assert {"gae", *ADVANTAGES} == set(get_args(Advantage))  # a critic's: algo/credit.py
    assert {"none", *KL_ESTIMATORS} == set(get_args(Kl))
    assert {name for name, _ in AGGREGATIONS} == set(get_args(Aggregation))


def test_missing_reference_is_refused() -> None:
    """A KL term without reference log-probs is silently left out."""
    batch = one_batch([1.0], [-1.0], [1])
    with pytest.raises(KeyError, match="reference_logprobs"):
        policy_loss(AlgoConfig(kl="k3", kl_weight=0.1), torch.tensor([-1.0]), batch)


def test_tensors_say_whose_each_prediction_is() -> None:
    """GSPO's sequence ratio is taken over a part of a sample or over two mixed, or a column is rounded on the way."""
    samples = random_samples(0)
    mixed = random.Random(1).sample(samples, len(samples))
    for m in pack(mixed, count_prompts(mixed), 40):
        tensors = to_tensors(m)
        assert [m.sample_ids[index] for index in tensors.sample_N.tolist()] == owners_of(m)
        members = [sample for name in m.sample_ids for sample in samples if sample.id == name]
        for name in ("advantages", "logprobs", "reference_logprobs"):
            assert tensors[name].tolist() == [column(s, name)[p] for s in members for p in trained(s)]
        assert tensors.targets_N.tolist() == [column(s, "tokens")[p] for s in members for p in trained(s)]
        assert tensors.sample_tokens.tolist() == [len(trained(s)) for s in members]
        assert tensors.get("proximal_logprobs") is None and tensors.kept_N is None
        with pytest.raises(AssertionError, match="proximal is no column"):
            tensors.get("proximal")


def test_prompt_totals_reach_the_loss() -> None:
    """prompt_mean divides by the prompt's trained tokens instead of those of the whole batch."""
    columns = Columns.of(tokens=(1, 2), loss_mask=(False, True), advantages=(0.0, -1.0), logprobs=(0.0, -1.0))
    sample = Sample("p/0", "p", columns)
    (m,) = pack([sample], (PromptTotal("p", 8, 2), PromptTotal("q", 5, 2)), 10)
    _, grad = value_and_gradient(AlgoConfig(aggregation="prompt_mean"), [-1.0], to_tensors(m))
    assert grad == pytest.approx([1 / 16])
