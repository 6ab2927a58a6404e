"""The critic: its head's gradient, what of it reaches the policy, its warm-up, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from tandem.algo.config import AlgoConfig
from tandem.algo.loss import clipped_value_loss, policy_loss
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts, pack
from tandem.algo.tensors import to_tensors
from tandem.columns import Columns
from tandem.errors import ConfigError
from tandem.models.decoder import Decoder
from tandem.numerics.compare import same_bits
from tandem.numerics.digest import tensor_digest
from tandem.train.config import CriticConfig, LearnerConfig
from tandem.train.critic import Critic, ValueModel, judged
from tandem.train.score import hidden_states
from tandem.train.step import Learner
from tandem.types import Sample
from tests.samples import column, having, trained

MakeDecoder = Callable[..., Decoder]
ALGO = AlgoConfig(advantage="gae")


def samples_of(count: int = 4, length: int = 12) -> tuple[Sample, ...]:
    """What `samples_from_groups` gives for a critic: rewards at the last token."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        mask = [False] * 4 + [True] * (length - 4)
        columns = Columns.of(
            tokens=torch.randint(97, (length,), generator=generator).numpy(),
            loss_mask=mask,
            logprobs=[-2.0 * m for m in mask],
            step_rewards=[0.0] * (length - 1) + [float(i % 2)],
        )
        samples.append(Sample(f"p{i // 2}/0/{i % 2}/0", f"p{i // 2}", columns))
    return tuple(samples)


def learner_of(
    decoder: Decoder,
    config: CriticConfig | None = None,
    own: Decoder | None = None,
    algo: AlgoConfig = ALGO,
    **settings,
) -> Learner:
    learning = LearnerConfig(**{"lr": 1e-3, "microbatch_tokens": 64, **settings})
    critic = Critic(own or decoder, config or CriticConfig(), learning, own=own is not None)
    return Learner(decoder, learning, PolicyGradient(algo, 1.0), 10, critic=critic)


def step(learner: Learner, samples: Sequence[Sample] | None = None) -> dict[str, float]:
    """Score, credit, learn: a step of a run."""
    given = samples_of() if samples is None else tuple(samples)
    prompts = count_prompts(given)
    assert learner.critic is not None
    report = learner.step(learner.critic.credit(ALGO, given, prompts), prompts)
    assert report is not None
    return report.measured.metrics


def test_the_head_against_autograd(make_decoder: MakeDecoder) -> None:
    """The head's gradient is not that of its values, is lost between microbatches, or has the hidden state's size."""
    model = ValueModel(make_decoder(), own=False)
    generator = torch.Generator().manual_seed(0)
    width = len(model.head.value) - 1
    model.head.value.normal_(generator=generator)
    model.head.grad = torch.zeros_like(model.head.value)
    hidden = torch.randn(5, width, generator=generator).bfloat16()
    head = model.head.value.double().requires_grad_()
    wanted = torch.nn.functional.normalize(hidden.double()) @ head[:-1] + head[-1]
    weights = torch.randn(5, generator=generator).double()
    (wanted * weights).sum().backward()
    for _ in range(2):
        found = model(hidden)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        (found * weights).sum().backward()
    assert head.grad is not None
    torch.testing.assert_close(model.head.grad, 2 * head.grad.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(10 * hidden.float()), wanted, rtol=1e-2, atol=1e-2)


def test_value_loss_against_a_loop() -> None:
    """The clip takes the smaller of the two errors, or cuts an error that grew back."""
    cases = [(value, before, goal) for value in (-1.0, 0.1, 0.5, 2.0) for before in (0.0, 0.4) for goal in (-0.5, 0.6)]
    value_N, before_N, returns_N = (torch.tensor(x, dtype=torch.float64) for x in zip(*cases, strict=True))
    loss_N, clipped_N = clipped_value_loss(value_N, before_N, returns_N, 0.2)
    for loss, clipped, (value, before, goal) in zip(loss_N.tolist(), clipped_N.tolist(), cases, strict=True):
        near = min(max(value, before - 0.2), before + 0.2)
        assert loss == pytest.approx(max((value - goal) ** 2, (near - goal) ** 2) / 2)
        assert clipped == (abs(near - goal) > abs(value - goal))


def test_values_do_not_know_who_rides_along(make_decoder: MakeDecoder) -> None:
    """A value has other bits in another pack, so that weights depend on the order in which groups came."""
    learner = learner_of(make_decoder(width=64))
    assert learner.critic is not None
    learner.critic.model.head.value.normal_(generator=torch.Generator().manual_seed(1))
    samples = [s for length in (9, 14, 30) for s in samples_of(4, length)]
    samples = [replace(s, id=f"p{i}/0/0/0", prompt_id=f"p{i}") for i, s in enumerate(samples)]
    prompts = count_prompts(samples)
    found = [{s.id: s for s in learner.critic.credit(ALGO, part, prompts)} for part in (samples, samples[::-1])]
    alone = {s.id: learner.critic.credit(ALGO, [s], count_prompts([s]))[0] for s in samples}
    for name, sample in found[0].items():
        for column_of in ("values", "returns", "advantages"):
            assert column(sample, column_of) == column(found[1][name], column_of)
        assert column(sample, "values") == column(alone[name], "values")


@pytest.mark.parametrize("share", [False, True])
def test_a_batch_in_microbatches_against_each_sample_alone(make_decoder: MakeDecoder, share: bool) -> None:
    """The value loss is a mean of microbatches, an observation has a value to learn, or V is read a token late."""
    learner = learner_of(
        make_decoder("float32"), CriticConfig(clip=0.05), make_decoder("float32", seed=1), share_prefix=share
    )
    critic = learner.critic
    assert critic is not None
    critic.model.head.value.normal_(generator=torch.Generator().manual_seed(1))
    samples = []
    for s in samples_of(4, 24):
        mask = [p in (5, 6, 7, 12, 13, 20) for p in range(24)]
        samples.append(having(s, loss_mask=mask, step_rewards=[0.5 * (p == 7) + float(p == 20) for p in range(24)]))
    prompts = count_prompts(samples)
    credited = critic.credit(ALGO, samples, prompts)
    before = [having(s, values=[v + 0.1 * (p % 3) for p, v in enumerate(column(s, "values"))]) for s in credited]
    microbatches = pack(before, prompts, 32, share)
    assert len(microbatches) > 1
    values = [learner.backward(microbatch).sums["value_loss"] for microbatch in microbatches]
    found = {name: weight.grad.clone() for name, weight in critic.model.weights()}
    learner._zero_grad()
    count, total = sum(len(trained(s)) for s in before), 0.0
    for s in before:
        (one,) = pack([s], count_prompts([s]), 1000, share_prefix=False)
        hidden_NM = hidden_states(critic.model.trunk, one, to_tensors(one, "cpu"))
        head = critic.model.head.value.double()
        assert len(hidden_NM) == len(trained(s))
        value_N = torch.nn.functional.normalize(hidden_NM.double()) @ head[:-1] + head[-1]
        loss = torch.zeros((), dtype=torch.float64)
        for n, p in enumerate(trained(s)):
            old, goal = column(s, "values")[p], column(s, "returns")[p]
            assert float(value_N[n].detach()) == pytest.approx(column(s, "values")[p] - 0.1 * (p % 3))
            near = old + (value_N[n] - old).clamp(-0.05, 0.05)
            loss = loss + torch.maximum((value_N[n] - goal) ** 2, (near - goal) ** 2) / 2
        total += float(loss.detach())
        (loss / count).backward()
    assert sum(map(float, values)) == pytest.approx(total)
    for name, weight in critic.model.trunk.weights():
        assert weight.grad is not None
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-6)


def test_the_clip_is_about_the_values_before_the_step(make_decoder: MakeDecoder) -> None:
    """Values are taken anew before each update, and the clip never acts; or it acts before anything has moved."""
    clipped = {}
    for updates in (1, 2):
        learner = learner_of(make_decoder(), CriticConfig(clip=1e-4), algo=replace(ALGO, updates_per_step=updates))
        assert learner.critic is not None
        learner.critic.model.head.value.fill_(0.1)
        clipped[updates] = step(learner)["value_clip_fraction"]
        assert learner.critic.optimiser.updates == updates
    assert clipped[1] == 0.0 < clipped[2] <= 0.5  # the second half of the batch


def test_kl_is_paid_token_by_token(make_decoder: MakeDecoder) -> None:
    """The penalty has the other sign, waits for the end, is in the loss too, or is not finite as a log-prob is."""
    reference = [-2.0 - 0.1 * p for p in range(12)]
    samples = [having(s, reference_logprobs=reference) for s in samples_of()]
    samples[3] = having(
        samples[3], logprobs=[-math.inf if p == 6 else v for p, v in enumerate(column(samples[3], "logprobs"))]
    )
    prompts, d = count_prompts(samples), [0.1 * p for p in range(12)]
    for kl, cost in (("k1", lambda x: x), ("k2", lambda x: x * x / 2), ("k3", lambda x: math.exp(-x) - 1 + x)):
        algo = replace(ALGO, kl=kl, kl_weight=0.5, kl_in_reward=True, discount=0.9)
        learner = learner_of(make_decoder(), CriticConfig(), algo=algo)
        assert learner.critic is not None
        credited = learner.critic.credit(algo, samples, prompts)
        for i, s in enumerate(credited):
            goal, goals = 0.0, {}
            for p in reversed(range(4, 12)):  # a head of zeros: A = returns to go
                paid = 0.0 if (i, p) == (3, 6) else 0.5 * cost(d[p])
                goal = float(p == 11) * (i % 2) - paid + 0.9 * goal
                goals[p] = goal
            assert {p: column(s, "returns")[p] for p in trained(s)} == pytest.approx(goals)
            assert all(v == 0.0 for p, v in enumerate(column(s, "returns")) if p < 4)
    (microbatch,) = pack(credited[:2], count_prompts(credited[:2]), 1000)
    logprobs_N, batch = torch.full((16,), -2.0, dtype=torch.float64), to_tensors(microbatch, "cpu")
    paid, none = policy_loss(algo, logprobs_N, batch), policy_loss(ALGO, logprobs_N, batch)
    assert float(paid.loss) == float(none.loss) and float(paid.sums["kl_reference"]) > 0


def gradients(decoder: Decoder, config: CriticConfig | None) -> dict[str, torch.Tensor]:
    """Of a credited batch, by weight of the policy."""
    credited = learner_of(decoder, config or CriticConfig()).critic.credit(
        ALGO, samples_of(), count_prompts(samples_of())
    )
    goals = [having(s, returns=[1.0 + p for p in range(len(s.columns))]) for s in credited]
    learner = learner_of(decoder, config or CriticConfig())
    assert learner.critic is not None
    learner.critic.model.head.value.fill_(0.1)
    if config is None:
        learner.critic = None
    (microbatch,) = pack(goals, count_prompts(goals), 1000)
    learner.backward(microbatch)
    return {name: weight.grad.clone() for name, weight in decoder.weights()}


def test_what_of_the_value_loss_reaches_the_policy(make_decoder: MakeDecoder) -> None:
    """A stopped gradient moves the policy, or a scaled one is not in proportion."""
    alone, stopped = (gradients(make_decoder("float32"), config) for config in (None, CriticConfig()))
    assert all(same_bits(alone[name], stopped[name]) for name in alone)
    whole, half = (gradients(make_decoder("float32"), CriticConfig(trunk_gradient=g)) for g in (1.0, 0.5))
    moved = 0
    for name in alone:
        top = float(whole[name].abs().max())
        torch.testing.assert_close(half[name] - alone[name], (whole[name] - alone[name]) / 2, rtol=0, atol=1e-4 * top)
        moved += not torch.equal(whole[name], alone[name])
    assert moved > len(alone) / 2


@pytest.mark.parametrize("own", [False, True])
def test_only_the_critic_learns_while_it_warms_up(make_decoder: MakeDecoder, own: bool) -> None:
    """The policy moves by advantages of a critic that knows nothing, or its schedule has run ahead."""
    decoder = make_decoder()
    learner = learner_of(decoder, CriticConfig(warmup_steps=2), make_decoder(seed=1) if own else None, warmup_steps=5)
    assert learner.critic is not None
    digests, heads = [tensor_digest(decoder.export())], [learner.critic.model.head.value.clone()]
    trunks = [tensor_digest(learner.critic.model.trunk.export())]
    for _ in range(3):
        step(learner)
        digests.append(tensor_digest(decoder.export()))
        heads.append(learner.critic.model.head.value.clone())
        trunks.append(tensor_digest(learner.critic.model.trunk.export()))
    assert digests[0] == digests[1] == digests[2] != digests[3]
    assert all(not torch.equal(a, b) for a, b in zip(heads, heads[1:], strict=False))
    assert trunks[0] == trunks[1] and (trunks[1] != trunks[2]) == own  # a head of zeros passes nothing on
    assert learner.optimiser.updates == 1 and learner.critic.optimiser.updates == 3


@pytest.mark.parametrize("own", [False, True])
def test_a_critic_learns_what_states_are_worth(make_decoder: MakeDecoder, own: bool) -> None:
    """The values do not move towards the returns: a sign, another token's return, or a rate at which no head moves."""
    learner = learner_of(make_decoder(), CriticConfig(), make_decoder(seed=1) if own else None, lr=2e-5)
    found = [step(learner) for _ in range(60)]
    assert found[-1]["value_loss"] < 0.5 * found[0]["value_loss"]
    assert found[0]["explained_variance"] == 0.0 < found[-1]["explained_variance"] <= 1.0


def test_what_a_critic_knew_by_hand() -> None:
    """Untrained tokens are counted, or the variance is about zero. Returns 1, 3; values 1, 2: 1 - (1/4) / 1."""
    columns = Columns.of(tokens=(1, 2, 3), loss_mask=(False, True, True), values=(9, 1, 2), returns=(-9, 1, 3))
    sample = Sample("p/0/0/0", "p", columns)
    assert judged([sample]) == {"explained_variance": 0.75, "values_mean": 1.5, "returns_mean": 2.0}
    assert judged([having(sample, returns=(5.0, 1.0, 1.0))])["explained_variance"] == 0.0
    assert trained(sample) == [1, 2]


def test_settings_that_do_nothing() -> None:
    """A gradient into a trunk that is not the policy's is asked for, and nothing says that it goes nowhere."""
    with pytest.raises(ConfigError, match="only the head learns"):
        CriticConfig(model_lr=1e-5)
    with pytest.raises(ConfigError, match="layers of its own"):
        CriticConfig(model="somewhere", trunk_gradient=0.5)
    assert replace(CriticConfig(), trunk_gradient=0.5).trunk_gradient == 0.5
