"""A step of the learner whose batch comes in parts: the plain step's but for the order of its sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tandem.algo.config import AlgoConfig
from tandem.algo.loss import policy_loss
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import PromptTotal, count_prompts, denominators, pack
from tandem.algo.tensors import to_tensors
from tandem.models.decoder import Decoder
from tandem.train.step import ONE
from tandem.types import Microbatch
from tests.cpu.test_learner import close, learner_of, random_samples

MakeDecoder = Callable[..., Decoder]
AGGREGATIONS = {
    "token_mean": AlgoConfig(),
    "sequence_mean": AlgoConfig(aggregation="sequence_mean", loss="gspo"),
    "prompt_mean": AlgoConfig(aggregation="prompt_mean", loss="cispo"),
    "constant_mean": AlgoConfig(aggregation="constant_mean", constant_tokens=7),
}


def totals() -> tuple[PromptTotal, ...]:
    """Of the samples and of what is not trained of them: one prompt is not trained at all."""
    trained = (PromptTotal(one.prompt_id, one.tokens + 11, one.samples + 2) for one in count_prompts(random_samples()))
    return (*trained, PromptTotal("p9", 23, 4))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_its_loss_is_the_batch_s(aggregation: str) -> None:
    """A denominator that is left out, or is one of the part's: in fp64, where nothing else could differ."""
    algo, samples = AGGREGATIONS[aggregation], random_samples()
    (whole,) = pack(samples, totals(), 10_000)
    logprobs_N = torch.linspace(-4.0, -1.0, len(whole.rows_N), dtype=torch.float64)

    def gradient(microbatch: Microbatch, logprobs_N: torch.Tensor) -> tuple[float, torch.Tensor]:
        logprobs_N = logprobs_N.clone().requires_grad_()
        loss = policy_loss(algo, logprobs_N, to_tensors(microbatch, "cpu")).loss
        loss.backward()
        assert logprobs_N.grad is not None
        return float(loss.detach()), logprobs_N.grad

    wanted, wanted_N = gradient(whole, logprobs_N)
    unit, loss, first = 1.0 / PolicyGradient(algo, 1.0).divisor(denominators(totals())), 0.0, 0
    for prompt in ("p0", "p1", "p2", "p3"):
        members = [sample for sample in samples if sample.prompt_id == prompt]
        own = [total for total in totals() if total.prompt_id == prompt]
        (part,) = pack(members, own, 10_000)
        count = len(part.rows_N)
        value, found_N = gradient(replace(part, denominators=ONE), logprobs_N[first : first + count])
        loss += unit * value
        torch.testing.assert_close(unit * found_N, wanted_N[first : first + count], rtol=1e-14, atol=0)
        first += count
    assert loss == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("grad_clip", [1e-3, 1e9])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_its_update_is_the_plain_one(make_decoder: MakeDecoder, aggregation: str, grad_clip: float) -> None:
    """Gradients that are summed and not divided, that a clip or a norm sees undivided, or a part that is lost."""
    algo, samples, settings = AGGREGATIONS[aggregation], random_samples(), {"lr": 1e-3, "microbatch_tokens": 40}
    plain = learner_of(make_decoder(), algo, grad_clip=grad_clip, **settings)
    wanted = plain.step(samples, totals())
    streamed = learner_of(make_decoder(), algo, grad_clip=grad_clip, **settings)
    parts = streamed.begin()
    for prompts in (("p2",), ("p3", "p0"), ("p9",), ("p1",)):
        members = [sample for sample in samples if sample.prompt_id in prompts]
        streamed.add(parts, members, [total for total in totals() if total.prompt_id in prompts])
    found = streamed.finish(parts, totals())
    assert found is not None and wanted is not None
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5) and found.lr == wanted.lr
    assert found.measured.metrics == pytest.approx(wanted.measured.metrics, rel=1e-5, abs=1e-12)
    assert found.measured.clipped == wanted.measured.clipped
    moments = [
        {name: tensor.clone() for name, tensor in one.optimiser.tensors() if not name.startswith("master/")}
        for one in (streamed, plain)
    ]
    close(*moments)
    again = streamed.begin()  # nothing is left of it
    assert streamed.finish(again, totals()) is None and streamed.optimiser.updates == 1
    streamed.add(again, samples, totals())
    after = streamed.finish(again, totals())
    other = plain.step(samples, totals())
    assert after is not None and other is not None and after.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
