"""Preference losses by hand and against a plain twin, their independence of the packing, and the reward model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.algo import preference
from tandem.algo.config import PreferenceConfig
from tandem.algo.objective import Outputs
from tandem.algo.pack import count_prompts, pack
from tandem.algo.preference import PAIR_LOSSES, Preference, RewardHead, RewardModel
from tandem.algo.tensors import to_tensors
from tandem.columns import Columns
from tandem.errors import ConfigError, ModelError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.train import reward
from tandem.train.checkpoint import RunState, seal
from tandem.train.config import LearnerConfig
from tandem.train.score import with_logprobs
from tandem.train.step import Learner
from tandem.types import Microbatch, Sample
from tests.reference_preference import pair_loss, rating_loss
from tests.samples import having, paths_of

MakeDecoder = Callable[..., Decoder]
VOCAB = 11
CONFIGS = [
    PreferenceConfig("dpo"),
    PreferenceConfig("dpo", beta=0.4, label_smoothing=0.1, length_normalised=True),
    PreferenceConfig("robust_dpo", label_smoothing=0.2),
    PreferenceConfig("ipo"),
    PreferenceConfig("ipo", beta=0.7, length_normalised=True),
    PreferenceConfig("orpo", beta=0.3),
    PreferenceConfig("simpo"),
    PreferenceConfig("simpo", sft_weight=0.7),
]
NAMES = [f"{config.loss} {number}" for number, config in enumerate(CONFIGS)]


def sample_of(
    prompt_id: str, sibling: int, prompt: Sequence[int], answer: Sequence[int], preferred: int, **more: Sequence[float]
) -> Sample:
    columns = Columns.of(
        tokens=(*prompt, *answer),
        loss_mask=[False] * len(prompt) + [True] * len(answer),
        preferred=[0] * len(prompt) + [preferred] * len(answer),
        **more,
    )
    return Sample(f"{prompt_id}/{sibling}/0", prompt_id, columns)


def random_pairs(count: int = 5, vocab: int = VOCAB, referred: bool = True, longest: int = 7) -> list[Sample]:
    """Pairs whose sides have other lengths and often begin alike; two of three with the rejected one first by bytes."""
    rng = random.Random(7)
    samples = []
    for n in range(count):
        prompt = [rng.randrange(vocab) for _ in range(2 + n % 4)]
        shared = [rng.randrange(vocab) for _ in range(n % 3)]
        for side in (1, 0):
            answer = [*shared, *(rng.randrange(vocab) for _ in range(rng.randint(1, longest)))]
            one = sample_of(f"pairs/{n}", 1 - side, prompt, answer, side)
            if referred:
                values = [0.0] * len(prompt) + [-rng.uniform(0.2, 3.0) for _ in answer]
                one = having(one, reference_logprobs=values)
            samples.append(one)
    return samples


def bigram(weight: Tensor, context: Sequence[int], target: int) -> Tensor:
    """A model in which every token of the path matters."""
    logits = sum(weight[token] * (0.3 + 0.1 * p) for p, token in enumerate(context))
    return torch.log_softmax(logits, dim=-1)[target]


def outputs_of(weight: Tensor, m: Microbatch) -> Outputs:
    contexts = [m.tokens_T[path].tolist() for path in paths_of(m)]
    predicted = zip(m.rows_N.tolist(), m.predictions["tokens"].tolist(), strict=True)
    logprobs_N = torch.stack([bigram(weight, contexts[row], target) for row, target in predicted])
    scores = logprobs_N, torch.zeros_like(logprobs_N)
    return Outputs(torch.zeros(0), None, lambda: scores)  # type: ignore[arg-type]


def answer_of(weight: Tensor, sample: Sample) -> list[Tensor]:
    tokens = sample.columns["tokens"].tolist()
    return [bigram(weight, tokens[:p], tokens[p]) for p in np.flatnonzero(sample.columns["loss_mask"]).tolist()]


def reference_of(sample: Sample) -> list[float]:
    values: list[float] = sample.columns["reference_logprobs"][sample.columns["loss_mask"]].tolist()
    return values


def fresh() -> Tensor:
    drawn = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def by_hand(config: PreferenceConfig, margin: float = 0.0) -> tuple[float, Tensor, dict[str, float]]:
    """Chosen: two tokens of -1, the reference's of -1.5. Rejected: one of -3, the reference's -2. So the sums are
    -2 and -3, h is 1 and -1, h a token 0.5 and -1."""
    samples = [
        sample_of("p", 0, (1,), (2, 3), 1, reference_logprobs=(0.0, -1.5, -1.5)),
        sample_of("p", 1, (1,), (4,), 0, reference_logprobs=(0.0, -2.0)),
    ]
    (m,) = pack(samples, count_prompts(samples), 64, whole=True)
    order = [0.0 if name.startswith("p/0") else 1.0 for name in m.sample_ids]
    given = [-1.0, -1.0, -3.0] if order == [0.0, 1.0] else [-3.0, -1.0, -1.0]
    logprobs_N = torch.tensor(given, dtype=torch.float64, requires_grad=True)
    objective = Preference(config)
    outputs = Outputs(torch.zeros(0), None, lambda: (logprobs_N, torch.ones(3)))  # type: ignore[arg-type]
    result = objective.loss(outputs, to_tensors(m))
    result.loss.backward()
    assert logprobs_N.grad is not None
    gradient = logprobs_N.grad if order == [0.0, 1.0] else logprobs_N.grad.flip(0)
    return float(result.loss.detach()), gradient, objective.measured([result]).metrics


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (PreferenceConfig("dpo", beta=0.5), 0.31326168751822286),  # log(1 + e^-1)
        (PreferenceConfig("dpo", beta=0.5, label_smoothing=0.1), 0.4132616875182229),  # 0.9 of it, 0.1 of log(1 + e)
        (PreferenceConfig("robust_dpo", beta=0.5, label_smoothing=0.1), 0.1882616875182229),  # (0.9 a - 0.1 b) / 0.8
        (PreferenceConfig("dpo", beta=0.5, length_normalised=True), 0.38687100611489994),  # log(1 + e^-0.75)
        (PreferenceConfig("dpo", beta=0.5, sft_weight=0.2), 0.5132616875182229),  # and 0.2 (2 / 2)
        (PreferenceConfig("ipo", beta=0.5), 1.0),  # (2 - 1)^2
        (PreferenceConfig("ipo", beta=0.25), 0.0),  # (2 - 2)^2
        (PreferenceConfig("ipo", beta=0.5, length_normalised=True), 0.25),  # (1.5 - 1)^2
        (PreferenceConfig("orpo"), 1.0086205744627859),  # 1 + 0.1 log(1 + e^(-0.541 + 2.949 ..)) of the log odds
        (PreferenceConfig("simpo"), 0.029750418272620566),  # 2 (-1) - 2 (-3) - 0.5 = 3.5: log(1 + e^-3.5)
        (PreferenceConfig("simpo", beta=0.5, target_margin=1.0), 0.6931471805599453),  # 1 - 1 = 0
    ],
)
def test_pairs_by_hand(config: PreferenceConfig, value: float) -> None:
    """A sign, a length, beta or the margin is elsewhere than in the paper."""
    assert by_hand(config)[0] == pytest.approx(value, rel=1e-12, abs=1e-15)


def test_gradients_and_figures_by_hand() -> None:
    """The gradient is of the other side or of the mean, or what is measured is not what is learned from."""
    _, gradient, metrics = by_hand(PreferenceConfig("dpo", beta=0.5))
    push = 0.5 * (1.0 - 1.0 / (1.0 + math.exp(-1.0)))  # beta sigmoid(-d), d = 0.5 (1 + 1)
    assert gradient.tolist() == pytest.approx([-push, -push, push], rel=1e-12)
    wanted = {"chosen_logprob": -2.0, "rejected_logprob": -3.0, "chosen_reward": 0.5, "rejected_reward": -0.5}
    wanted |= {"reward_margin": 1.0, "preference_accuracy": 1.0, "entropy": 1.0, "tokens": 3.0}
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    _, gradient, metrics = by_hand(PreferenceConfig("simpo", beta=0.5, target_margin=1.0))
    assert gradient.tolist() == pytest.approx([-0.125, -0.125, 0.25], rel=1e-12)  # sigmoid(0) beta / |y|
    assert (metrics["chosen_reward"], metrics["rejected_reward"]) == (-0.5, -1.5)
    assert by_hand(PreferenceConfig("ipo", beta=0.5))[1].tolist() == pytest.approx([2.0, 2.0, -2.0], rel=1e-12)


def test_every_loss_has_a_case() -> None:
    """A loss that is compared with nothing."""
    assert {config.loss for config in CONFIGS} == {*PAIR_LOSSES}


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_packed_pairs_are_the_twin(config: PreferenceConfig) -> None:
    """A pair's sides are mixed up in the pack, its loss hangs on the microbatch, or shared rows change the gradient."""
    samples = random_pairs(16)
    weight = fresh()
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        policy = answer_of(weight, chosen), answer_of(weight, rejected)
        reference = reference_of(chosen), reference_of(rejected)
        total = total + pair_loss(config, policy, reference) / (len(samples) // 2)
    total.backward()
    wanted = float(total.detach())
    assert weight.grad is not None
    for budget, share, least in ((1000, True, 1), (1000, False, 1), (90, True, 2), (24, True, 5), (26, False, 8)):
        again = fresh()
        microbatches = pack(samples, count_prompts(samples), budget, share, whole=True)
        assert len(microbatches) >= least, (budget, len(microbatches))
        objective = Preference(config)
        results = [objective.loss(outputs_of(again, m), to_tensors(m)) for m in microbatches]
        torch.stack([result.loss for result in results]).sum().backward()
        assert objective.measured(results).metrics["loss"] == pytest.approx(wanted, rel=1e-12)
        assert again.grad is not None
        torch.testing.assert_close(again.grad, weight.grad, rtol=1e-10, atol=1e-12)


def ratings(count: int = 6) -> list[Sample]:
    """Every other one liked, each with the answer of the one before to its prompt."""
    pairs = random_pairs(count)
    kept = [one for n, one in enumerate(pairs) if n % 2 == 0]
    answers = [one.columns["tokens"][one.columns["loss_mask"]].tolist() for one in kept]
    rng, samples = random.Random(3), []
    for n, one in enumerate(kept):
        prompt = one.columns["tokens"][~one.columns["loss_mask"]].tolist()
        for sibling, (answer, side) in enumerate(((answers[n], n % 2), (answers[n - 1], -1))):
            values = [0.0] * len(prompt) + [-rng.uniform(0.2, 3.0) for _ in answer]
            samples.append(sample_of(f"ratings/{n}", sibling, prompt, answer, side, reference_logprobs=values))
    return samples


def h_of(weight: Tensor, sample: Sample) -> float:
    return math.fsum(float(x.detach()) for x in answer_of(weight, sample)) - math.fsum(reference_of(sample))


@pytest.mark.parametrize("lowered", [0.0, 9.0])
def test_kto_is_the_twin(lowered: float) -> None:
    """KTO's KL is of a microbatch and not of the batch, has a gradient, goes below 0, or the mismatched are trained."""
    config = PreferenceConfig("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    samples = [having(one, reference_logprobs=one.columns["reference_logprobs"] - lowered) for one in ratings()]
    weight = fresh()
    kl = max(0.0, math.fsum(h_of(weight, one) for one in samples[1::2]) / (len(samples) // 2))
    assert (kl > 0) == bool(lowered)
    total = torch.zeros((), dtype=torch.float64)
    for n, one in enumerate(samples[::2]):
        loss = rating_loss(config, answer_of(weight, one), reference_of(one), bool(n % 2), kl)
        total = total + loss / (len(samples) // 2)
    total.backward()

    def score(name: str, chosen: Sequence[Sample]) -> tuple[Sample, ...]:
        def values(one: Sample) -> np.ndarray:
            filled = np.zeros(len(one.columns))
            filled[one.columns["loss_mask"]] = [float(x.detach()) for x in answer_of(weight, one)]
            return filled

        return tuple(having(one, **{name: values(one)}) for one in chosen)

    for budget, least in ((1000, 1), (20, 2), (10, 4)):
        again, step = fresh(), Preference(config).begin()
        kept = step.prepare(tuple(samples), score)
        assert [one.id for one in kept] == [one.id for one in samples[::2]]
        microbatches = pack(kept, count_prompts(samples), budget, whole=True)
        assert len(microbatches) >= least
        results = [step.loss(outputs_of(again, m), to_tensors(m)) for m in microbatches]
        torch.stack([result.loss for result in results]).sum().backward()
        metrics = step.measured(results).metrics
        assert metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-12)
        assert metrics["kl_mismatched"] == pytest.approx(kl, rel=1e-12)
        assert weight.grad is not None and again.grad is not None
        torch.testing.assert_close(again.grad, weight.grad, rtol=1e-10, atol=1e-12)


def test_kto_by_hand() -> None:
    """Weights of the two kinds are exchanged, or the KL is on the wrong side of one of them.

    beta 0.5, z 0.2: h 1 liked gives 1 - sigmoid(0.4), h -1 not liked, of weight 1.5, 1.5 (1 - sigmoid(0.6)).
    """
    config = PreferenceConfig("kto", beta=0.5, undesirable_weight=1.5)
    answers = preference.Answers(
        *(torch.tensor(x, dtype=torch.float64) for x in ([-2.0, -3.0], [-3.0, -2.0], [2.0, 1.0]))
    )
    found = preference.kto(config, answers, torch.tensor([True, False]), 0.2)
    assert found.tolist() == pytest.approx([0.401312339887548, 0.5315155406613069], rel=1e-12)


def test_bradley_terry_by_hand() -> None:
    """The margin has the wrong sign, or the centre is not of the sum. r 1.5 and 0.5, margin 0.25; the sum is 2."""
    chosen, rejected, margins = (torch.tensor([x], dtype=torch.float64) for x in (1.5, 0.5, 0.25))
    for config, value in (
        (PreferenceConfig("reward_model"), 0.31326168751822286),
        (PreferenceConfig("reward_model", margin_weight=1.0), 0.38687100611489994),
        (PreferenceConfig("reward_model", margin_weight=1.0, center=0.1), 0.7868710061149),
    ):
        found = preference.bradley_terry(config, chosen, rejected, margins)
        assert found.tolist() == pytest.approx([value], rel=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "reward_model"])
def test_pairs_that_are_none(make_decoder: MakeDecoder, loss: str) -> None:
    """A lone answer, two chosen ones, ratings or a pair that fits into no microbatch train on something."""
    config = PreferenceConfig(loss)
    objective = RewardModel(config) if loss == "reward_model" else Preference(config)
    learner = Learner(make_decoder(), LearnerConfig(microbatch_tokens=64), objective, 1)
    samples = random_pairs(3)
    twice = [samples[0], having(samples[1], preferred=[1] * len(samples[1].columns)), *samples[2:]]
    for wrong in (samples[:-1], twice, ratings(3)):
        with pytest.raises(ConfigError, match="needs a chosen and a rejected answer to each prompt"):
            learner.step(wrong, count_prompts(wrong))
    small = replace(learner.config, microbatch_tokens=6)
    learner.config = small
    with pytest.raises(ConfigError, match=r"2 answers to pairs/\d+ are compared.*learner.microbatch_tokens to \d+"):
        learner.step(samples, count_prompts(samples))
    with pytest.raises(ConfigError, match="ratings, each with an answer to another prompt"):
        Learner(make_decoder(), LearnerConfig(), Preference(PreferenceConfig("kto")), 1).step(
            samples, count_prompts(samples)
        )


class Watched(Learner):
    """Keeps the gradients of its last update."""

    seen: dict[str, Tensor]

    def _apply(self, samples: Sequence[Sample], unit: float = 1.0) -> tuple[float, float]:
        grads = ((name, weight.grad) for name, weight in self.optimiser.model.weights())
        self.seen = {name: grad.clone() for name, grad in grads if grad is not None}
        return super()._apply(samples, unit)


def watched(make_decoder: MakeDecoder, loss: str, budget: int) -> tuple[Watched, list[Sample]]:
    """A learner that stands still, and 16 pairs or ratings."""
    samples = ratings(16) if loss == "kto" else random_pairs(16, 97, longest=12)
    config = PreferenceConfig(loss)
    objective = RewardModel(config) if loss == "reward_model" else Preference(config)
    learner = Watched(make_decoder(), LearnerConfig(microbatch_tokens=budget, lr=0.0), objective, 1)
    if learner.head is not None:
        learner.head.weight.value.normal_(generator=torch.Generator().manual_seed(0))
        learner.optimiser.state[preference.HEAD][0].copy_(learner.head.weight.value)
    return learner, samples


def near(grads: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert grads.keys() == whole.keys() and max(float(grad.abs().max()) for grad in whole.values()) > 1e-3
    for name, grad in grads.items():
        assert float((grad - whole[name]).norm()) <= 1e-4 * float(whole[name].norm()), name


@pytest.mark.parametrize("loss", ["dpo", "kto", "simpo", "reward_model"])
def test_gradient_of_a_decoder_is_of_no_split(make_decoder: MakeDecoder, loss: str) -> None:
    """The weights' gradients hang on how many microbatches there are: 1, 2 or 8."""
    found = []
    splits = ((4096, 1, 1), (80, 2, 3), (16, 7, 16)) if loss == "kto" else ((4096, 1, 1), (200, 2, 3), (36, 7, 16))
    for budget, least, most in splits:
        learner, samples = watched(make_decoder, loss, budget)
        report = learner.step(samples, count_prompts(samples))
        assert report is not None and least <= report.microbatches <= most, report
        found.append((report.measured.metrics["loss"], learner.seen))
    (loss_of_one, whole), *others = found
    for value, grads in others:
        assert value == pytest.approx(loss_of_one, rel=1e-6)
        near(grads, whole)


@pytest.mark.parametrize("loss", ["dpo", "kto", "simpo", "reward_model"])
def test_two_workers_add_up(make_decoder: MakeDecoder, loss: str) -> None:
    """A worker that has every other prompt of a batch divides by its own pairs, or KTO's KL is of its own ratings."""
    one, samples = watched(make_decoder, loss, 4096)
    report = one.step(samples, count_prompts(samples))
    assert report is not None
    loss_of_two, summed = 0.0, dict[str, Tensor]()
    for worker in (0, 1):
        learner, samples = watched(make_decoder, loss, 80)
        totals = count_prompts(samples)
        step = learner.objective.begin()  # what hangs on the whole batch is known before it is dealt out
        prepared = step.prepare(tuple(samples), learner._scorer(samples, totals))
        mine = {total.prompt_id for total in totals[worker::2]}
        for microbatch in learner._pack([sample for sample in prepared if sample.prompt_id in mine], totals):
            loss_of_two += float(learner._backward(microbatch, step)[0].loss.detach())
        for name, weight in learner.optimiser.model.weights():
            assert weight.grad is not None
            summed[name] = summed[name] + weight.grad if worker else weight.grad.clone()
    assert loss_of_two == pytest.approx(report.measured.metrics["loss"], rel=1e-6)
    near(summed, one.seen)


def test_the_first_step_is_at_log_2(make_decoder: MakeDecoder) -> None:
    """The reference is not the policy that a run begins with, or has other bits than the learner."""
    decoder = make_decoder()
    samples = random_pairs(4, 97, referred=False)
    totals = count_prompts(samples)
    samples = with_logprobs("reference_logprobs", decoder, samples, totals, 31, 1.0)
    learner = Learner(decoder, LearnerConfig(lr=1e-3), Preference(PreferenceConfig("dpo")), 9)
    first = learner.step(samples, totals)
    assert first is not None and first.measured.metrics["loss"] == pytest.approx(math.log(2.0), rel=1e-12)
    assert first.measured.metrics["reward_margin"] == 0.0
    assert first.measured.metrics["preference_accuracy"] == 0.5  # all tie
    for _ in range(8):
        last = learner.step(samples, totals)
    assert last is not None and last.measured.metrics["loss"] < 0.6
    assert last.measured.metrics["preference_accuracy"] == 1.0


def test_rewards_are_transformers(make_decoder: MakeDecoder, tmp_path: Path) -> None:
    """A reward is of another token's state than Transformers' classifier reads, or hangs on the pack; a checkpoint
    lacks the head, or a model that has none is taken for a reward model."""
    import transformers

    source = open_checkpoint("new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128")
    tokenizer, decoder = source.load_tokenizer(), Decoder(source.spec, "float32").load(source.tensors())
    learner = Learner(decoder, LearnerConfig(lr=1e-2), RewardModel(PreferenceConfig("reward_model", head_lr=0.1)), 20)
    samples = random_pairs(6, 200, referred=False)
    totals = count_prompts(samples)
    reports = [learner.step(samples, totals) for _ in range(12)]
    assert reports[0] is not None and reports[-1] is not None
    assert reports[0].measured.metrics["loss"] == pytest.approx(math.log(2.0), rel=1e-12)  # the head is 0 at first
    assert reports[-1].measured.metrics["preference_accuracy"] == 1.0
    learner.save(tmp_path, tokenizer, RunState(12, 12, "", {}))
    with pytest.raises(ModelError, match="is no reward model"):
        reward.load(tmp_path / "absent", decoder)
    with pytest.raises(ModelError, match="a reward head is 31 wide, and its model 32"):
        RewardHead(decoder, torch.zeros(31))

    again = open_checkpoint(str(tmp_path))
    head = reward.load(tmp_path, Decoder(again.spec, "float32").load(again.tensors()))
    ours = reward.rewards(head, samples, 4096)
    assert ours == reward.rewards(head, samples, 9)
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(head.weight.value[None])
        for value, sample in zip(ours, samples, strict=True):
            tokens = torch.tensor(sample.columns["tokens"].tolist())[None]
            assert value == pytest.approx(float(model(tokens).logits[0, 0]), rel=1e-4, abs=1e-5)

    other = Learner(
        Decoder(source.spec, "float32").load(source.tensors()),
        LearnerConfig(lr=1e-2),
        RewardModel(PreferenceConfig("reward_model", head_lr=0.1)),
        20,
    )
    seal(tmp_path)
    other.load(tmp_path)
    ones = [learner.step(samples, totals), other.step(samples, totals)]
    assert ones[0] is not None and ones[1] is not None and ones[0].measured == ones[1].measured
