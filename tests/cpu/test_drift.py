"""Drift metrics by hand and against loops, the error budget, and what the learner does about them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from tandem.algo.alarm import METRICS, AlarmConfig, check, check_correctable
from tandem.algo.config import NAIVE, AlgoConfig, CorrectionConfig
from tandem.algo.drift import Observations, join, measure
from tandem.algo.objective import Measured, PolicyGradient
from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.errors import AlarmError, ConfigError, ParityError
from tandem.models.decoder import Decoder
from tandem.numerics.digest import tensor_digest
from tandem.train.config import LearnerConfig
from tandem.train.score import with_logprobs, with_sources
from tandem.train.step import Learner
from tandem.types import Sample
from tests.samples import column, having, trained, without

MakeDecoder = Callable[..., Decoder]
TIS = AlgoConfig(correction=CorrectionConfig("decoupled", "token_tis"))
OFF = AlarmConfig(**dict.fromkeys(METRICS))  # type: ignore[arg-type]


def test_metrics_by_hand() -> None:
    """A metric is of the inverse ratio, of the clamped one, or a mean where a maximum belongs.

    p_learner 1/2, 1/4 and p_behaviour 1/4, 1/2: d = log 2, -log 2, rho = 2, 1/2.
    """
    half, quarter = math.log(0.5), math.log(0.25)
    found = measure(Observations.of([half, quarter], [quarter, half], ["p/0", "p/1"])).metrics
    wanted = {
        "k1": 0.0,
        "k3": 0.25,
        "mult_prob_error": 2.0,
        "abs_max": math.log(2.0),
        "abs_p999": math.log(2.0),
        "prob_max": 0.25,
        "prob_p999": 0.25,
        "chi_square": 1.125,
        "ess": 2.5**2 / (2 * 4.25),
        "ppl_gap": 0.0,
        "rare_share": 0.0,
        "masked": 0.0,
        "weight_clipped": 0.0,
        "nonfinite_samples": 0.0,
    }
    assert found == pytest.approx(wanted, abs=1e-15)
    one_sided = measure(Observations.of([half], [quarter], ["p/0"])).metrics
    assert one_sided["k1"] == pytest.approx(-math.log(2.0)) and one_sided["ppl_gap"] == pytest.approx(-0.5)


def random_observations(seed: int, tokens: int = 3000, samples: int = 37, spread: float = 0.4) -> Observations:
    rng = np.random.default_rng(seed)
    learner = -rng.exponential(2.5, tokens)
    behaviour = np.minimum(learner + rng.normal(0.0, spread, tokens), -1e-9)
    owner = np.sort(rng.integers(0, samples, tokens))
    return dataclasses.replace(
        Observations.of(
            learner.tolist(),
            behaviour.tolist(),
            [f"p/{index}" for index in owner],
            (learner + rng.normal(0.0, 0.1, tokens)).tolist(),
            (behaviour - rng.exponential(0.2, tokens)).tolist(),
            rng.exponential(1.0, tokens).tolist(),
        ),
        masked_N=rng.random(tokens) < 0.1,
        truncated_N=rng.random(tokens) < 0.2,
    )


def test_metrics_equal_loops() -> None:
    """A vectorised metric departs from its definition."""
    seen = random_observations(0)
    learner, behaviour, gradient = seen.learner_N.tolist(), seen.behaviour_N.tolist(), seen.gradient_N.tolist()
    pairs = list(zip(learner, behaviour, strict=True))
    rhos = [math.exp(new - old) for new, old in pairs]
    norms = [size * (1 - math.exp(new)) for size, new in zip(gradient, learner, strict=True)]
    distances = sorted(abs(new - old) for new, old in pairs)
    count = len(pairs)
    wanted = {
        "k1": sum(old - new for new, old in pairs) / count,
        "k3": sum(rho - 1 - math.log(rho) for rho in rhos) / count,
        "mult_prob_error": sum(math.exp(distance) for distance in distances) / count,
        "abs_max": distances[-1],
        "abs_p999": distances[math.ceil(0.999 * count) - 1],
        "prob_max": max(abs(math.exp(new) - math.exp(old)) for new, old in pairs),
        "prob_p999": sorted(abs(math.exp(new) - math.exp(old)) for new, old in pairs)[math.ceil(0.999 * count) - 1],
        "chi_square": sum(rho * rho for rho in rhos) / count - 1,
        "ess": sum(rhos) ** 2 / (count * sum(rho * rho for rho in rhos)),
        "ppl_gap": math.exp(-sum(learner) / count) / math.exp(-sum(behaviour) / count) - 1,
        "rare_share": sum(n for n, new in zip(norms, learner, strict=True) if math.exp(new) < 1e-3) / sum(norms),
        "masked": sum(seen.masked_N.tolist()) / count,
        "weight_clipped": sum(seen.truncated_N.tolist()) / count,
        "nonfinite_samples": 0.0,
    }
    drift = measure(seen)
    assert drift.metrics == pytest.approx(wanted, rel=1e-10)
    assert 0.0 < drift.metrics["rare_share"] < 1.0
    source, unfiltered = seen.source_N.tolist(), seen.unfiltered_N.tolist()
    assert drift.error_budget == pytest.approx(
        {
            "staleness": sum(abs(new - mid) for new, mid in zip(learner, source, strict=True)) / count,
            "mismatch": sum(abs(mid - old) for mid, old in zip(source, behaviour, strict=True)) / count,
            "sampling": sum(old - raw for old, raw in zip(behaviour, unfiltered, strict=True)) / count,
            "masking": wanted["masked"],
        }
    )


def test_nothing_differs() -> None:
    """An exact run shows drift by rounding."""
    learner = (-np.random.default_rng(0).exponential(2.0, 100)).tolist()
    drift = measure(Observations.of(learner, learner, ["p/0"] * 100))
    exact = {"mult_prob_error": 1.0, "ess": 1.0}
    for name, value in drift.metrics.items():
        assert name == "rare_share" or value == exact.get(name, 0.0), name
    assert set(drift.error_budget.values()) == {0.0}


def test_by_length_by_hand() -> None:
    """A decile mixes short and long samples, or is of tokens instead of samples.

    20 samples of 1 to 20 tokens, out of order; only those of 19 and 20 differ, by log 2.
    """
    lengths = random.Random(0).sample(range(1, 21), 20)
    owners = [f"p/{length}" for length in lengths for _ in range(length)]
    behaviour = [-1.0 - (math.log(2.0) if owner in ("p/19", "p/20") else 0.0) for owner in owners]
    rows = measure(Observations.of([-1.0] * len(owners), behaviour, owners)).by_length
    assert [(row["samples"], row["shortest"], row["longest"]) for row in rows] == [
        (2, 2 * k + 1, 2 * k + 2) for k in range(10)
    ]
    assert [row["k3"] for row in rows] == pytest.approx([0.0] * 9 + [1 - math.log(2.0)])
    assert [row["abs_mean"] for row in rows] == pytest.approx([0.0] * 9 + [math.log(2.0)])
    assert len(measure(Observations.of([-1.0], [-1.0], ["p/0"])).by_length) == 1


def test_joined_microbatches_are_the_batch() -> None:
    """Samples of two microbatches are taken for one another."""
    seen = random_observations(1, tokens=400, samples=10)
    parts = []
    for members in (range(4), range(4, 10)):
        inside = np.isin(seen.sample_N, members)
        fields = {name: getattr(seen, name)[inside] for name in Observations.__slots__ if name.endswith("_N")}
        fields["sample_N"] = fields["sample_N"] - members[0]
        parts.append(Observations(**fields, sample_ids=seen.sample_ids[members[0] : members[-1] + 1]))
    assert measure(join(parts)) == measure(seen)


def test_overflow_reaches_the_row_and_the_alarm() -> None:
    """An infinite k3 raises, is clamped, or passes below its threshold."""
    drift = measure(Observations.of([-1.0, -1.0], [-1.0, -900.0], ["p/0", "p/1"]))
    assert drift.metrics["k3"] == drift.metrics["chi_square"] == math.inf
    assert drift.metrics["ess"] == 0.5 and drift.metrics["abs_max"] == 899.0
    alarms = {alarm.metric: alarm for alarm in check(AlarmConfig(), drift.metrics, drift.per_sample)}
    assert alarms["k3"].value == math.inf and alarms["k3"].trajectories == ("p/1",)
    assert alarms["k3"].text() == "k3 inf > 0.01; most of it in p/1"
    json.dumps(alarms["k3"].text(), allow_nan=False)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_behaviour_that_is_not_finite_is_counted(bad: float) -> None:
    """A sample without behaviour log-probs turns every metric into NaN, or is not counted."""
    seen = Observations.of([-1.0, -1.0, -2.0], [-1.0, bad, -2.0], ["p/0", "p/0", "q/0"])
    drift = measure(dataclasses.replace(seen, masked_N=np.array([True, True, False])))
    assert drift.metrics["nonfinite_samples"] == 1.0 and drift.metrics["k3"] == 0.0
    assert drift.metrics["masked"] == drift.error_budget["masking"] == pytest.approx(2 / 3)
    (alarm,) = check(AlarmConfig(), drift.metrics, drift.per_sample)
    assert (alarm.metric, alarm.trajectories) == ("masked", ("p/0",))
    everything = measure(Observations.of([-1.0], [bad], ["p/0"]))
    assert all(math.isfinite(value) for value in everything.metrics.values())


def test_alarms_by_hand() -> None:
    """An alarm fires on its threshold, on the wrong side of it, or names the samples that contribute least."""
    metrics = {"k3": 0.01, "ess": 0.49, "ppl_gap": -0.06, "abs_max": math.nan, "prob_max": 0.1}
    shares = {"ess": {"p/0": 1.0, "p/1": 4.0, "p/2": 0.0, "p/3": 3.0, "p/4": 2.0}, "abs_max": {"p/0": math.nan}}
    found = check(AlarmConfig(), metrics, shares)
    assert [(a.metric, a.threshold, a.trajectories) for a in found] == [
        ("ess", 0.5, ("p/1", "p/3", "p/4")),
        ("ppl_gap", 0.05, ()),
        ("abs_max", 1.0, ("p/0",)),
    ]
    assert found[0].text() == "ess 0.49 < 0.5; most of it in p/1, p/3, p/4"
    assert check(OFF, metrics, shares) == []


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"masked", "weight_clipped"}))
def test_alarms_name_the_sample_that_drifts(name: str) -> None:
    """A metric's alarm names samples by another metric."""
    rng = random.Random(0)
    owners = [f"p/{index}" for index in range(8) for _ in range(20)]
    learner = [-rng.uniform(0.5, 2.0) - (8.0 if owner == "p/5" else 0.0) for owner in owners]
    behaviour = [value + rng.gauss(0, 1e-3) for value in learner]
    behaviour[105] = learner[105] - 3.0
    learner[105] = -0.5
    drift = measure(Observations.of(learner, behaviour, owners))
    found = check(dataclasses.replace(OFF, **{name: 1.0 if name == "ess" else 1e-9}), drift.metrics, drift.per_sample)
    assert [alarm.trajectories[0] for alarm in found] == ["p/5"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"action": "halt"}, "alarms.action"), ({"k3": math.nan}, "alarms.k3 is nan"), ({"ess": -1.0}, "alarms.ess")],
)
def test_wrong_alarms_are_refused(fields: dict, says: str) -> None:
    """A threshold that never fires, or always does, reaches the run."""
    with pytest.raises(ConfigError, match=says):
        AlarmConfig(**fields)


def test_correcting_with_nothing_is_refused() -> None:
    """Alarms are to turn a correction on, and the correction is to ignore the mismatch."""
    with pytest.raises(ConfigError, match="nothing on"):
        check_correctable(AlarmConfig(action="correct"), NAIVE)
    check_correctable(AlarmConfig(action="correct"), CorrectionConfig())
    check_correctable(AlarmConfig(), NAIVE)


def samples_by(decoder: Decoder, prompts: int = 4, siblings: int = 2) -> list[Sample]:
    """Samples whose behaviour log-probs are the decoder's own; it draws one advantage a sample."""
    rng = random.Random(0)
    samples = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(97) for _ in range(9))
        for g in range(siblings):
            answer = tuple(rng.randrange(97) for _ in range(rng.randint(3, 8)))
            mask = (False,) * 9 + (True,) * len(answer)
            advantage = rng.uniform(-2, 2)
            advantages = [advantage if m else 0.0 for m in mask]
            columns = Columns.of(
                tokens=prompt + answer, loss_mask=mask, advantages=advantages, logprobs=(0.0,) * len(mask)
            )
            samples.append(Sample(f"p{p}/{g}", f"p{p}", columns))
    scored = with_logprobs("source_logprobs", decoder, samples, count_prompts(samples), 10_000, 1.0)
    return [sampled_as(s, "source_logprobs") for s in scored]


def sampled_as(sample: Sample, name: str) -> Sample:
    """As if these log-probs were the engine's."""
    return without(having(sample, logprobs=column(sample, name)), name)


def last_off(sample: Sample, change: float) -> Sample:
    """The engine's log-prob of the last token off by `change`."""
    *before, last = column(sample, "logprobs")
    return having(sample, logprobs=[*before, last + change])


def noisy(samples: list[Sample], size: float, only: str = "") -> list[Sample]:
    """Behaviour log-probs off by normal noise, of the samples whose id begins with `only`."""
    rng = random.Random(1)

    def spoilt(sample: Sample) -> Sample:
        values = column(sample, "logprobs")
        for p in trained(sample):
            values[p] = min(values[p] + rng.gauss(0, size), 0.0)
        return having(sample, logprobs=values)

    return [spoilt(s) if s.id.startswith(only) else s for s in samples]


def learner_of(decoder: Decoder, algo: AlgoConfig | None = None, lr: float = 1e-3, **fields) -> Learner:
    objective = PolicyGradient(algo or AlgoConfig(), 1.0, **fields)
    return Learner(decoder, LearnerConfig(lr=lr, microbatch_tokens=40), objective, total_updates=10)


def step(learner: Learner, samples: list[Sample]) -> Measured:
    report = learner.step(samples, count_prompts(samples))
    assert report is not None
    return report.measured


def test_lag_is_staleness(kernel_path, make_decoder: MakeDecoder) -> None:
    """Stale weights are booked as mismatch, or as nothing."""
    old, decoder = make_decoder(), make_decoder()
    samples = samples_by(old)
    learner = learner_of(decoder)
    assert step(learner, samples).error_budget == dict.fromkeys(("staleness", "mismatch", "sampling", "masking"), 0.0)
    stale = with_logprobs("source_logprobs", old, samples, count_prompts(samples), 10_000, 1.0)
    report = step(learner, list(stale))
    assert report.error_budget["staleness"] > 1e-3
    assert {report.error_budget[name] for name in ("mismatch", "sampling", "masking")} == {0.0}


def test_each_token_is_scored_by_the_version_that_sampled_it(kernel_path, make_decoder: MakeDecoder) -> None:
    """A batch of two versions scored by one: staleness booked as mismatch; or a split that nobody can know is shown."""
    old, decoder = make_decoder(), make_decoder()
    step(learner_of(decoder), samples_by(decoder))
    _, _, *older = samples_by(old)
    first, second, *_ = samples_by(decoder)
    (place,) = trained(second)[-1:]  # this one began under the old weights and ended under the new
    under_old = with_logprobs("source_logprobs", old, [second], count_prompts([second]), 10_000, 1.0)[0]
    begun = column(under_old, "source_logprobs")
    begun[place] = column(second, "logprobs")[place]
    by_token = [4 if at == place else 2 for at in range(len(second.columns))]
    samples = [having(first, versions=[4] * len(first.columns)), having(second, versions=by_token, logprobs=begun)]
    samples += [having(sample, versions=[2] * len(sample.columns)) for sample in older]
    totals = count_prompts(samples)
    found = with_sources({4: decoder, 2: old}, samples, totals, 40, 1.0)
    for sample, scored in zip(samples, found, strict=True):
        assert column(scored, "source_logprobs") == column(sample, "logprobs")
    learner = learner_of(decoder)
    unknown = step(learner_of(decoder, lr=0.0), list(with_sources({4: decoder}, samples, totals, 40, 1.0)))
    assert all(math.isnan(unknown.error_budget[name]) for name in ("staleness", "mismatch"))
    assert math.isfinite(unknown.metrics["k3"]) and unknown.error_budget["sampling"] == 0.0
    report = step(learner, list(found))
    assert report.error_budget["mismatch"] == 0.0 and report.error_budget["staleness"] > 1e-3


def test_noise_is_mismatch(kernel_path, make_decoder: MakeDecoder) -> None:
    """An engine that computes something else is booked as staleness, or as nothing."""
    decoder = make_decoder()
    report = step(learner_of(decoder), noisy(samples_by(decoder), 0.05))
    assert 0.02 < report.error_budget["mismatch"] < 0.08
    assert {report.error_budget[name] for name in ("staleness", "sampling", "masking")} == {0.0}
    assert report.metrics["mismatch"] == report.metrics["abs_max"] > 0.05
    assert report.metrics["kl"] == report.metrics["k3"] > 0.0


def test_filters_are_sampling(kernel_path, make_decoder: MakeDecoder) -> None:
    """Kept sets are not replayed, so a filtered run shows mismatch; or what the filter gave is not measured."""
    decoder = make_decoder()
    rng = random.Random(2)
    plain = samples_by(decoder)
    filtered = []
    for sample in plain:
        sets = [
            np.array(sorted({token, *rng.sample(range(97), 20)}), np.uint32).tobytes() if mask else b""
            for token, mask in zip(column(sample, "tokens"), column(sample, "loss_mask"), strict=True)
        ]
        filtered.append(having(sample, kept=sets, unfiltered_logprobs=column(sample, "logprobs")))
    scored = with_logprobs("proximal_logprobs", decoder, filtered, count_prompts(filtered), 40, 1.0)
    samples = [sampled_as(s, "proximal_logprobs") for s in scored]
    report = step(learner_of(decoder, exact=True), samples)
    assert report.error_budget["sampling"] > 0.1 and report.error_budget["mismatch"] == 0.0


def test_masks_are_masking(make_decoder: MakeDecoder) -> None:
    """A rejected token still has a gradient, or is not counted as masked."""
    decoder = make_decoder()
    samples = noisy(samples_by(decoder), 3.0, only="p1/0")
    (odd,) = (s for s in samples if s.id == "p1/0")
    algo = AlgoConfig(correction=CorrectionConfig(reject=("k3",)))
    report = step(learner_of(decoder, algo), samples)
    share = len(trained(odd)) / sum(len(trained(s)) for s in samples)
    assert report.error_budget["masking"] == report.metrics["masked"] == pytest.approx(share)
    assert "p1/0" in next(alarm for alarm in report.alarms if alarm.metric == "masked").trajectories


def state_of(learner: Learner) -> tuple[str, str, int]:
    optimiser = learner.optimiser
    return tensor_digest(learner.decoder.export()), tensor_digest(optimiser.tensors()), optimiser.updates


def test_an_exact_run_that_differs_stops(kernel_path, make_decoder: MakeDecoder) -> None:
    """A run that declares no departure trains on log-probs that are not its own, or stops after the update."""
    learner = learner_of(make_decoder(), exact=True)
    samples = samples_by(learner.decoder)
    before = state_of(learner)
    spoilt = [last_off(s, -1e-6) if s.id in ("p1/0", "p2/1") else s for s in samples]
    with pytest.raises(
        ParityError, match=r"2 of \d+ tokens .*1e-06 nats.* p1/0, p2/1.*[Nn]othing was updated"
    ) as error:
        step(learner, spoilt)
    assert "p0" not in str(error.value) and state_of(learner) == before
    missing = [last_off(s, math.nan) if s.id == "p3/0" else s for s in samples]
    with pytest.raises(ParityError, match=r"1 of \d+ tokens .*inf nats.* p3/0"):
        step(learner, missing)
    report = step(learner, samples)
    assert report.metrics["ratio_error"] == report.metrics["mismatch"] == 0.0 and state_of(learner) != before


@pytest.mark.parametrize("correction", [CorrectionConfig(), TIS.correction])
def test_exactness_is_of_the_first_update(kernel_path, make_decoder: MakeDecoder, correction) -> None:
    """The learner's own movement in a step is taken for a difference between engine and learner."""
    algo = AlgoConfig(correction=correction, updates_per_step=2)
    report = step(learner_of(make_decoder(), algo, exact=True), samples_by(make_decoder()))
    assert report.metrics["ratio_error"] > 0.0 == report.metrics["mismatch"] == report.metrics["kl"]


def test_stop_comes_before_the_update(make_decoder: MakeDecoder) -> None:
    """A run with alarms.action stop updates the weights once more."""
    learner = learner_of(make_decoder(), alarms=AlarmConfig(action="stop", rare_share=None))
    samples = samples_by(learner.decoder)
    step(learner, samples)
    again = noisy(samples_by(learner.decoder), 0.5, only="p2")
    before = state_of(learner)
    with pytest.raises(AlarmError, match=r"k3 .* > 0.01; most of it in p2/.*No update was made"):
        step(learner, again)
    assert state_of(learner) == before


def weights_after(decoder: Decoder, samples: list[Sample], algo: AlgoConfig, **fields) -> tuple[str, Measured]:
    learner = learner_of(decoder, algo, **fields)
    report = step(learner, samples)
    return tensor_digest(decoder.export()), report


@pytest.mark.parametrize("updates", [1, 2])
def test_correct_holds_back_until_an_alarm(make_decoder: MakeDecoder, updates: int) -> None:
    """The correction acts without an alarm, or an alarmed step's weights are not those of the corrected step."""
    algo = dataclasses.replace(TIS, updates_per_step=updates)
    naive = dataclasses.replace(algo, correction=NAIVE)
    held = AlarmConfig(action="correct", rare_share=None)
    quiet, loud = (noisy(samples_by(make_decoder()), size) for size in (1e-3, 0.8))
    found, report = weights_after(make_decoder(), quiet, algo, alarms=held)
    assert report.metrics["corrected"] == 0.0 and not report.alarms
    assert found == weights_after(make_decoder(), quiet, naive, alarms=OFF)[0]
    assert found != weights_after(make_decoder(), quiet, algo, alarms=OFF)[0]
    found, report = weights_after(make_decoder(), loud, algo, alarms=held)
    assert report.metrics["corrected"] == 1.0 and "k3" in {alarm.metric for alarm in report.alarms}
    assert found == weights_after(make_decoder(), loud, algo, alarms=OFF)[0]
    assert found != weights_after(make_decoder(), loud, naive, alarms=OFF)[0]


def test_proximal_is_before_the_first_update(make_decoder: MakeDecoder) -> None:
    """The decoupled ratio of a second update is theta over itself, so its clip never acts.

    rho of the second update's prompts is that of the weights before the first.
    """
    samples = samples_by(make_decoder())
    algo = dataclasses.replace(TIS, updates_per_step=2)
    with_pass = weights_after(make_decoder(), samples, algo, lr=0.05)
    assert with_pass[1].metrics["ratio_error"] > 0.05
    given = with_logprobs("proximal_logprobs", make_decoder(), samples, count_prompts(samples), 10_000, 1.0)
    without = dataclasses.replace(algo, correction=CorrectionConfig())  # behaviour is proximal here: the same loss
    assert with_pass[0] == weights_after(make_decoder(), list(given), without, lr=0.05)[0]


def test_one_update_needs_no_pass(make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoupled form scores every batch twice where theta is proximal."""
    monkeypatch.setattr("tandem.train.step.with_logprobs", lambda *args: pytest.fail("a scoring pass"))
    step(learner_of(make_decoder(), TIS), samples_by(make_decoder()))
    algo = AlgoConfig(updates_per_step=2)
    step(learner_of(make_decoder(), algo), samples_by(make_decoder()))


@pytest.mark.parametrize("updates", [1, 3])
def test_order_of_arrival_does_not_matter(make_decoder: MakeDecoder, updates: int) -> None:
    """The weights depend on which group came first."""
    algo = AlgoConfig(updates_per_step=updates)
    samples = samples_by(make_decoder(), prompts=5, siblings=3)
    found = set()
    for seed in range(3):
        mixed = random.Random(seed).sample(samples, len(samples))
        found.add(weights_after(make_decoder(), mixed, algo)[0])
    assert len(found) == 1


def test_rare_share_by_hand(make_decoder: MakeDecoder) -> None:
    """The share counts the gradient of masked tokens, or loses the learner's 1 - p."""
    logs = [math.log(1e-4), math.log(0.5), math.log(0.9)]
    seen = Observations.of(logs, logs, ["p/0"] * 3, gradient=[2.0, 4.0, 10.0])
    rare, rest = 2.0 * (1 - 1e-4), 4.0 * 0.5 + 10.0 * 0.1
    assert measure(seen).metrics["rare_share"] == pytest.approx(rare / (rare + rest))
    decoder = make_decoder()
    samples = samples_by(decoder)
    learner = learner_of(decoder, AlgoConfig(aggregation="token_mean"))
    tokens = sum(len(trained(s)) for s in samples)
    pairs = [
        (math.exp(column(s, "logprobs")[p]), abs(column(s, "advantages")[p]) / tokens)
        for s in samples
        for p in trained(s)
    ]
    norms = [(p, size * (1 - p)) for p, size in pairs]
    wanted = sum(n for p, n in norms if p < 1e-3) / sum(n for _, n in norms)
    assert step(learner, samples).metrics["rare_share"] == pytest.approx(wanted, rel=1e-4)
