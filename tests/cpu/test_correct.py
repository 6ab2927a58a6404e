"""Corrections: by hand, against the looped reference, and exactly nothing where nothing differs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import get_args

import pytest
import torch

from tandem.algo.config import NAIVE, AlgoConfig, CorrectionConfig, CorrectionWeight, Loss, Reject
from tandem.algo.correct import WEIGHTS, Correction, correct, rare_factor
from tandem.algo.loss import policy_loss, summarise
from tandem.algo.pack import count_prompts, pack
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.columns import Columns
from tandem.errors import ConfigError
from tandem.numerics.compare import same_bits
from tandem.types import Sample
from tests.reference_loss import reference_loss
from tests.samples import column, having, without

SETTINGS = [
    CorrectionConfig("decoupled", "none"),
    *(CorrectionConfig("decoupled", name, weight_high=1.5) for name in WEIGHTS),
    CorrectionConfig("decoupled", "icepop", weight_low=0.0, weight_high=1.2),
    *(CorrectionConfig(reject=(name,), geometric_width=0.2, k3_limit=0.03, veto_ratio=0.7, probability_limit=0.05)
      for name in get_args(Reject)),
    CorrectionConfig("decoupled", "token_tis", reject=("probability", "geometric"), geometric_width=0.3,
                     probability_limit=0.1),
]  # fmt: skip


def sample_of(
    name: str, behaviour: Sequence[float], proximal: Sequence[float] | None = None, advantage: float = 1.0
) -> Sample:
    """One prompt token, then an answer."""
    count = len(behaviour)
    columns = Columns.of(
        tokens=range(count + 1),
        loss_mask=(False,) + (True,) * count,
        advantages=(0.0,) + (advantage,) * count,
        logprobs=(0.0, *behaviour),
    )
    return Sample(name, name[0], columns if proximal is None else columns.having(proximal_logprobs=(0.0, *proximal)))


def batch_of(samples: Sequence[Sample]) -> MicrobatchTensors:
    (microbatch,) = pack(samples, count_prompts(samples), 10_000, share_prefix=False)
    return to_tensors(microbatch)


def corrected(config: CorrectionConfig, rhos: Sequence[Sequence[float]], behaviour: float = -1.0) -> Correction:
    """Of samples with these ratios, at one behaviour log-prob."""
    flat = torch.tensor([math.log(rho) for sample in rhos for rho in sample], dtype=torch.float64)
    lengths = torch.tensor([len(sample) for sample in rhos])
    return correct(config, flat + behaviour, torch.full_like(flat, behaviour), lengths)


@pytest.mark.parametrize(
    ("weight", "low", "high", "wanted", "truncated"),
    [
        ("none", None, None, [1, 1, 1], [0, 0, 0]),
        ("token_tis", None, None, [2, 0.25, 2], [1, 0, 1]),
        ("token_tis", None, 3.5, [3.5, 0.25, 3], [1, 0, 0]),
        ("sequence_tis", None, None, [1, 1, 3], [0, 0, 0]),
        ("sequence_tis", None, 2.0, [1, 1, 2], [0, 0, 1]),
        ("icepop", None, None, [4, 0, 3], [0, 0, 0]),
        ("icepop", 0.0, 3.5, [0, 0.25, 3], [0, 0, 0]),
        ("sequence_mis", None, None, [1, 1, 3], [0, 0, 0]),
        ("sequence_mis", None, 2.0, [1, 1, 0], [0, 0, 0]),
    ],
)
def test_weights_by_hand(weight, low, high, wanted, truncated) -> None:
    """A weight is of a token where it should be of a sample, is bounded on the wrong side, or has another bound.

    Samples with ratios (4, 1/4) and (3): products 1 and 3.
    """
    config = CorrectionConfig("decoupled", weight, weight_low=low, weight_high=high)
    found = corrected(config, [[4.0, 0.25], [3.0]])
    assert found.weight_N.tolist() == pytest.approx(wanted)
    assert found.truncated_N.int().tolist() == truncated
    assert found.kept_N.tolist() == [value > 0 for value in wanted]


@pytest.mark.parametrize(
    ("reject", "fields", "wanted"),
    [
        # Geometric means 1, sqrt 2.2, 0.9; means of rho - 1 - log rho: 1.125, 0.2058, 0.00536.
        ("geometric", {}, [1, 1, 0, 0, 0]),
        ("geometric", {"geometric_width": 0.2}, [1, 1, 0, 0, 1]),
        ("k3", {}, [0, 0, 0, 0, 1]),
        ("k3", {"k3_limit": 0.206}, [0, 0, 1, 1, 1]),
        ("veto", {}, [1, 1, 1, 1, 1]),
        ("veto", {"veto_ratio": 0.3}, [0, 0, 1, 1, 1]),
        # p_behaviour 0.2: p_learner 0.8, 0.05, 0.44, 0.2, 0.18.
        ("probability", {}, [0, 1, 1, 1, 1]),
        ("probability", {"probability_limit": 0.1}, [0, 0, 0, 1, 1]),
    ],
)
def test_rejections_by_hand(reject, fields, wanted) -> None:
    """A rejection looks at a token where it should look at a sample, or at the wrong side of its limit."""
    config = CorrectionConfig(reject=(reject,), **fields)
    found = corrected(config, [[4.0, 0.25], [2.2, 1.0], [0.9]], behaviour=math.log(0.2))
    assert found.kept_N.int().tolist() == wanted
    assert found.weight_N.tolist() == wanted


def test_veto_drops_the_whole_sample() -> None:
    """One token with rho below 1e-4 leaves its sample's other tokens in."""
    found = corrected(CorrectionConfig(reject=("veto",)), [[1.0, 9e-5], [1.0, 2e-4]])
    assert found.kept_N.tolist() == [False, False, True, True]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("loss", get_args(Loss))
def test_identity_where_nothing_differs(setting: CorrectionConfig, loss: str) -> None:
    """A correction changes a bit of an exact run's loss or gradient."""
    behaviour = torch.tensor([-0.1, -1.7, -3.3, -0.013, -7.9]).tolist()
    samples = [sample_of("p/0", behaviour[:2], advantage=1.5), sample_of("q/0", behaviour[2:], advantage=-0.7)]
    found = []
    for correction, scored in itertools.product((CorrectionConfig(), setting), (False, True)):
        proximal = [having(s, proximal_logprobs=column(s, "logprobs")) if scored else s for s in samples]
        leaf = torch.tensor(behaviour, requires_grad=True)
        result = policy_loss(AlgoConfig(loss=loss, correction=correction), leaf, batch_of(proximal))
        result.loss.backward()
        assert bool(result.correction.kept_N.all()) and not bool(result.correction.truncated_N.any())
        found.append((result.loss.detach(), leaf.grad))
    for value, grad in found[1:]:
        assert same_bits(value, found[0][0]) and grad is not None and same_bits(grad, found[0][1])


def random_samples(seed: int) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for name in ("p/0", "p/1", "q/0", "q/1", "r/0"):
        behaviour = [-rng.uniform(0.2, 3.0) for _ in range(rng.randint(1, 6))]
        proximal = [value + rng.gauss(0.0, 0.3) for value in behaviour]
        samples.append(sample_of(name, behaviour, proximal, rng.uniform(-2, 2)))
    return samples


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_loss_and_gradient_equal_reference(setting: CorrectionConfig, loss: str, scored: bool) -> None:
    """A weight has a gradient, meets another sample's tokens, or the clip's ratio is of the other form."""
    fields = {"aggregation": "token_mean", "rare_weight": 0.4, "clip_low": 0.2, "clip_high": 0.3}
    if loss == "gspo":  # the reference takes its sequence form: the token form's gradient where weights are a sample's
        fields |= {"aggregation": "sequence_mean", "rare_weight": 0.0}
        if setting.weight in ("token_tis", "icepop") or "probability" in setting.reject:
            return
    for seed in range(4):
        samples = random_samples(seed)
        rng = random.Random(seed + 100)
        values = [[p + rng.gauss(0.0, 0.3) for p in column(s, "proximal_logprobs")[1:]] for s in samples]
        if not scored:
            samples = [without(s, "proximal_logprobs") for s in samples]
        config = AlgoConfig(loss=loss, correction=setting, **fields)
        leaf = torch.tensor(list(itertools.chain(*values)), dtype=torch.float64, requires_grad=True)
        result = policy_loss(config, leaf, batch_of(samples))
        result.loss.backward()
        slow = torch.tensor(leaf.tolist(), dtype=torch.float64, requires_grad=True)
        pieces = torch.split(slow, [len(v) for v in values])
        wanted = reference_loss(config, samples, [torch.cat([torch.zeros(1).double(), piece]) for piece in pieces])
        (wanted + 0.0 * slow.sum()).backward()
        assert float(result.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-11, abs=1e-14)
        torch.testing.assert_close(leaf.grad, slow.grad, rtol=1e-9, atol=1e-13)


def test_masked_tokens_stay_in_the_denominators() -> None:
    """What is left of a masked batch is scaled up: one token of four kept has the gradient of a quarter."""
    config = AlgoConfig(correction=CorrectionConfig("decoupled", "icepop"))
    samples = [sample_of("p/0", [-1.0] * 4, [-9.0, -9.0, -9.0, -1.0], advantage=-1.0)]
    leaf = torch.tensor([-9.0, -9.0, -9.0, -1.0], dtype=torch.float64, requires_grad=True)
    result = policy_loss(config, leaf, batch_of(samples))
    result.loss.backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [0.0, 0.0, 0.0, 0.25]


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_behaviour_that_is_not_finite_masks_its_sample(setting: CorrectionConfig, bad: float) -> None:
    """One -inf from an engine makes the batch's loss NaN, or takes other samples out with it."""
    samples = [sample_of("p/0", [-1.0, bad]), sample_of("q/0", [-2.0])]
    config = AlgoConfig(correction=setting)
    leaf = torch.tensor([-1.0, -1.5, -2.0], requires_grad=True)
    result = policy_loss(config, leaf, batch_of(samples))
    result.loss.backward()
    assert leaf.grad is not None
    assert leaf.grad[:2].tolist() == [0.0, 0.0] and float(leaf.grad[2]) == pytest.approx(-1 / 3)
    assert int(result.correction.nonfinite_samples) == 1 and result.correction.kept_N.tolist() == [False, False, True]
    assert all(math.isfinite(value) for value in summarise([result]).values())


def test_weights_are_bounded_and_metrics_are_not() -> None:
    """exp of a log ratio of 800 is infinite in a weight, or its overflow is hidden from the metrics.

    Sums of log rho: 799.5 - 799 in the first sample, -799.5 in the second.
    """
    config = AlgoConfig(correction=CorrectionConfig("decoupled", "sequence_tis"))
    samples = [sample_of("p/0", [-800.0, -1.0]), sample_of("q/0", [-0.5])]
    leaf = torch.tensor([-0.5, -800.0, -800.0], dtype=torch.float64, requires_grad=True)
    result = policy_loss(config, leaf, batch_of(samples))
    result.loss.backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert result.correction.weight_N.tolist() == pytest.approx([math.exp(0.5), math.exp(0.5), 0.0])
    assert summarise([result])["kl"] == math.inf


@pytest.mark.parametrize("name", WEIGHTS)
def test_masks_see_how_far_a_ratio_is(name: str) -> None:
    """A clamp before the comparison lets ratios of e^-40 and e^40 pass bounds of e^-30 and e^30."""
    low = math.exp(-30.0) if name == "icepop" else None
    config = CorrectionConfig("decoupled", name, weight_low=low, weight_high=math.exp(30.0))
    gaps = torch.tensor([-40.0, 25.0, 40.0, 1e4], dtype=torch.float64)
    found = correct(config, gaps - 1.0, torch.full_like(gaps, -1.0), torch.ones(4, dtype=torch.int64))
    masks, below, beyond = name in ("icepop", "sequence_mis"), math.exp(-40.0), math.exp(30.0)
    wanted = [0.0 if name == "icepop" else below, math.exp(25.0), *[0.0 if masks else beyond] * 2]
    assert found.weight_N.tolist() == pytest.approx(wanted, rel=1e-12, abs=0.0)
    assert found.truncated_N.tolist() == [False, False, not masks, not masks]


def test_rare_tokens_by_hand() -> None:
    """The factor grows where it should shrink. p = 0.5 and 0.1 with a = 0.4: 0.8 and 0.64; it has no gradient."""
    learner = torch.tensor([math.log(0.5), math.log(0.1)], dtype=torch.float64, requires_grad=True)
    factor = rare_factor(learner, 0.4)
    assert factor.tolist() == pytest.approx([0.8, 0.64]) and not factor.requires_grad
    batch = batch_of([sample_of("p/0", learner.tolist())])
    policy_loss(AlgoConfig(rare_weight=0.4), learner, batch).loss.backward()
    assert learner.grad is not None and learner.grad.tolist() == pytest.approx([-0.4, -0.32])


def test_every_named_choice_exists() -> None:
    """A name that the config allows has no function behind it."""
    assert {"none", *WEIGHTS} == set(get_args(CorrectionWeight))
    assert NAIVE.naive and not CorrectionConfig().naive


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"form": "decoupld"}, "Did you mean decoupled"),
        ({"weight": "tis"}, "algo.correction.weight"),
        ({"weight": "token_tis"}, "count the mismatch twice"),
        ({"reject": ("vetoo",)}, "algo.correction.reject"),
        ({"reject": ("veto", "veto")}, "at most once"),
        ({"form": "decoupled", "weight": "token_tis", "weight_high": 0.5}, "weight_high is 0.5"),
        ({"form": "decoupled", "weight": "token_tis", "weight_high": math.inf}, "weight_high is inf"),
        ({"form": "decoupled", "weight": "token_tis", "weight_low": 0.5}, "only icepop"),
        ({"form": "decoupled", "weight": "icepop", "weight_low": 2.0}, "weight_low is 2.0"),
        ({"weight_high": 2.0}, "algo.correction.weight is 'none'"),
        ({"geometric_width": -1.0}, "geometric_width"),
        ({"k3_limit": math.nan}, "k3_limit"),
        ({"veto_ratio": 2.0}, "veto_ratio"),
        ({"probability_limit": 1.5}, "probability_limit"),
    ],
)
def test_wrong_correction_is_refused(fields: dict, says: str) -> None:
    """A wrong correction reaches the run, or its message does not name the setting."""
    with pytest.raises(ConfigError, match=says):
        CorrectionConfig(**fields)
