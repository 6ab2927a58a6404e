"""The learner's step: gradients that do not depend on the packing, and updates that are refused before they harm."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from tandem.algo.config import AlgoConfig
from tandem.algo.loss import summarise
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts, pack
from tandem.columns import Columns
from tandem.errors import ConfigError, NonFiniteError
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention
from tandem.numerics.compare import same_bits
from tandem.numerics.digest import tensor_digest
from tandem.train.config import LearnerConfig
from tandem.train.score import with_logprobs
from tandem.train.step import Learner, score
from tandem.types import Reach, Sample
from tests.samples import SCORED, column, having, owners_of

MakeDecoder = Callable[..., Decoder]


def random_samples(prompts: int = 4, siblings: int = 2, prompt_tokens: int = 9, answer_tokens: int = 6) -> list[Sample]:
    """All of one length; siblings begin alike; some advantages on a token of its own."""
    rng = random.Random(0)
    samples = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(97) for _ in range(prompt_tokens))
        for g in range(siblings):
            mask = (False,) * prompt_tokens + (True,) * answer_tokens
            columns = Columns.of(
                tokens=prompt + tuple(rng.randrange(97) for _ in range(answer_tokens)),
                loss_mask=mask,
                advantages=[rng.uniform(-2, 2) if trained else 0.0 for trained in mask],
                logprobs=[-rng.uniform(1, 6) if trained else 0.0 for trained in mask],
            )
            samples.append(Sample(f"p{p}/{g}", f"p{p}", columns))
    return samples


def learner_of(decoder: Decoder, algo: AlgoConfig | None = None, temperature: float = 1.0, **settings) -> Learner:
    return Learner(
        decoder, LearnerConfig(**settings), PolicyGradient(algo or AlgoConfig(), temperature), total_updates=10
    )


def gradients(decoder: Decoder, samples: list[Sample], budget: int, share: bool, algo: AlgoConfig, **settings):
    """Gradients by weight, and the number of microbatches and rows."""
    learner = learner_of(decoder, algo, **settings)
    microbatches = pack(samples, count_prompts(samples), budget, share)
    for microbatch in microbatches:
        learner.backward(microbatch)
    grads = {name: weight.grad.clone() for name, weight in decoder.weights()}
    return grads, len(microbatches), sum(len(m.tokens_T) for m in microbatches)


def close(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of fp32 sums: at most a few hundred terms of 2^-24 each, relative to the largest."""
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        top = float(wanted[name].abs().max())
        assert top > 0, name
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=3e-5 * top, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
def test_split_into_microbatches(make_decoder: MakeDecoder, loss, aggregation):
    """A batch of 2 or 8 microbatches has another gradient than the same batch whole."""
    samples = random_samples()
    algo = AlgoConfig(loss=loss, aggregation=aggregation, clip_low=0.9, clip_high=1e3)
    whole, count, rows = gradients(make_decoder(), samples, 10_000, False, algo)
    assert count == 1
    for budget, wanted in ((rows // 2, 2), (rows // 8, 8)):
        split, count, _ = gradients(make_decoder(), samples, budget, False, algo)
        assert count == wanted
        close(split, whole)


def test_shared_prefix(any_path, make_decoder: MakeDecoder):
    """The rows that siblings share get one sample's gradient, or another forward pass."""
    samples, algo = random_samples(siblings=4), AlgoConfig()
    plain, _, rows = gradients(make_decoder(), samples, 10_000, False, algo)
    shared, count, fewer = gradients(make_decoder(), samples, 10_000, True, algo)
    assert count == 1 and fewer < rows
    close(shared, plain)
    some, count, _ = gradients(make_decoder(), samples, 40, True, algo)
    assert count > 2
    close(some, plain)


def test_paths_have_the_same_gradient(kernel_path, on_reference, make_decoder: MakeDecoder):
    """A kernel's gradient of some tensor is not that of the fall-back without a compiler: its sign, or a neighbour's.

    Norms of q and k, biases and a window included.
    """
    changes = {"qk_norm": True, "attention_bias": True, "attention": (LayerAttention(Reach(window=7)),)}
    grads, _, _ = gradients(make_decoder(**changes), random_samples(), 10_000, True, AlgoConfig())
    with on_reference():
        wanted, _, _ = gradients(make_decoder(**changes), random_samples(), 10_000, True, AlgoConfig())
    close(grads, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing(make_decoder: MakeDecoder, dtype):
    """Layers run again in the backward pass give another gradient than layers kept."""
    samples, algo = random_samples(), AlgoConfig()
    kept, _, _ = gradients(make_decoder(dtype), samples, 10_000, True, algo)
    again, _, _ = gradients(make_decoder(dtype), samples, 10_000, True, algo, activation_checkpointing="on")
    for name, grad in again.items():
        assert same_bits(grad, kept[name]), name


def test_temperature_is_of_the_policy(make_decoder: MakeDecoder):
    """The learner scores at temperature 1 what was sampled at another."""
    decoder, samples = make_decoder(), random_samples()
    (microbatch,) = pack(samples, count_prompts(samples), 10_000)
    learner = learner_of(decoder, temperature=0.5)
    hot, cold = score(decoder, microbatch, 1.0), score(decoder, microbatch, 0.5)
    assert float((hot - cold).abs().max()) > 0.1
    result = learner.backward(microbatch)
    behaviour = torch.tensor(microbatch.predictions["logprobs"]).float()
    largest = float((cold - behaviour).abs().max())
    assert summarise([result])["mismatch"] == pytest.approx(largest, rel=1e-5)


def spoilt(samples: list[Sample], **fields: float) -> list[Sample]:
    """The last trained token of the third sample changed."""
    sample = samples[2]
    changed = {name: [*column(sample, name)[:-1], value] for name, value in fields.items()}
    return [*samples[:2], having(sample, **changed), *samples[3:]]


@pytest.mark.parametrize("fields", [{"advantages": math.nan}, {"advantages": math.inf}])
def test_loss_that_is_not_finite(make_decoder: MakeDecoder, fields):
    """A NaN or infinite loss reaches the optimiser, or the message does not name the samples."""
    refuses(make_decoder(), spoilt(random_samples(), **fields), "the loss of a microbatch is", "p1/0")


def test_gradient_that_is_not_finite(make_decoder: MakeDecoder):
    """A finite loss whose gradient overflows reaches the optimiser."""
    algo = AlgoConfig(aggregation="constant_mean", constant_tokens=1, clip_high=1e30)
    samples = spoilt(random_samples(), advantages=3e38, logprobs=-20.0)
    refuses(make_decoder(), samples, "the gradient norm is", "p3/1", algo)


def refuses(decoder: Decoder, samples: list[Sample], message: str, named: str, algo: AlgoConfig | None = None) -> None:
    """The first step is good, the second is refused and leaves everything as the first left it."""
    learner = learner_of(decoder, algo, lr=1e-3, microbatch_tokens=40)
    good = random_samples()
    assert learner.step(good, count_prompts(good)) is not None
    weights = tensor_digest(decoder.export())
    state = tensor_digest((name, tensor.clone()) for name, tensor in learner.optimiser.tensors())
    with pytest.raises(NonFiniteError, match=message) as caught:
        learner.step(samples, count_prompts(samples))
    assert named in str(caught.value)
    assert tensor_digest(decoder.export()) == weights
    assert tensor_digest(learner.optimiser.tensors()) == state and learner.optimiser.updates == 1
    assert learner.step(good, count_prompts(good)) is not None and tensor_digest(decoder.export()) != weights


def test_step_moves_the_policy_towards_the_advantage(make_decoder: MakeDecoder):
    """The sign of the loss or of the update."""
    decoder = make_decoder()
    samples = random_samples()
    (microbatch,) = pack(samples, count_prompts(samples), 10_000)
    before = score(decoder, microbatch, 1.0)
    rescored = []
    for sample in samples:
        own = [p for p, name in zip(before.tolist(), owners_of(microbatch), strict=True) if name == sample.id]
        rescored.append(having(sample, logprobs=[*column(sample, "logprobs")[: -len(own)], *own]))
    report = learner_of(decoder, lr=1e-4).step(rescored, count_prompts(rescored))
    moved = (score(decoder, microbatch, 1.0) - before) * torch.tensor(microbatch.predictions["advantages"])
    assert (
        report is not None
        and float(moved.sum()) > 0
        and report.measured.metrics["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    )


@pytest.mark.parametrize("name", SCORED)
def test_with_logprobs(kernel_path, make_decoder: MakeDecoder, name):
    """Log-probs of another model, another sample, put on another token, or in another field."""
    reference, samples = make_decoder(seed=1), random_samples()
    masks = [column(sample, "loss_mask") for sample in samples]
    holed = [
        having(sample, loss_mask=[*mask[:-3], False, *mask[-2:]]) for sample, mask in zip(samples, masks, strict=True)
    ]
    scored = with_logprobs(name, reference, holed, count_prompts(holed), 40, 0.7)
    assert [s.id for s in scored] == [s.id for s in holed]
    for sample in scored:
        (alone,) = pack([sample], count_prompts([sample]), 10_000)
        values = iter(score(reference, alone, 0.7).tolist())
        assert column(sample, name) == [next(values) if trained else 0.0 for trained in column(sample, "loss_mask")]
        assert next(values, None) is None


def test_rates_by_hand():
    """A warm-up off by one, a schedule that ends elsewhere than at final_share."""
    warm = LearnerConfig(lr=1.0, warmup_steps=4)
    assert [warm.rate(u, 10) for u in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = LearnerConfig(lr=1.0, warmup_steps=2, schedule="linear", final_share=0.2)
    assert [linear.rate(u, 12) for u in (2, 7, 12, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    cosine = LearnerConfig(lr=1.0, schedule="cosine", final_share=0.5)
    assert [cosine.rate(u, 8) for u in (0, 2, 4, 8)] == pytest.approx([1.0, 0.5 + 0.25 * (1 + 0.5**0.5), 0.75, 0.5])


def test_steps_use_the_schedule_and_the_clip(make_decoder: MakeDecoder):
    """The rate stands still over updates, or the first update has the rate of the second."""
    samples = random_samples()
    learner = learner_of(make_decoder(), AlgoConfig(updates_per_step=2), lr=1e-3, warmup_steps=4)
    reports = [learner.step(samples, count_prompts(samples)) for _ in range(2)]
    assert [report.lr for report in reports if report] == [5e-4, 1e-3]  # of the last of two updates
    assert learner.optimiser.updates == 4


@pytest.mark.parametrize(
    "fields", [{"lr": -1.0}, {"lr": math.nan}, {"schedule": "cosin"}, {"grad_clip": 0.0}, {"beta2": 1.0}]
)
def test_settings_that_are_wrong(fields):
    """A learner starts with a setting that ruins the run hours later."""
    (name,) = fields
    with pytest.raises(ConfigError, match=f"learner.*{name}"):
        LearnerConfig(**fields)
