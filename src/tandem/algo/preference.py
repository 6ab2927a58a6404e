"""Preference learning: of two answers to a prompt one is better, or an answer was liked or not.

A sample's `preferred` says which it is; both of a pair are in one microbatch (pack.py). All sums are fp64, a pair's
loss hangs on that pair alone, and what hangs on the whole batch (KTO's KL) is known before the first gradient: the
split into microbatches changes the gradient by rounding only.

Of an answer y to x, with policy pi and reference ref: log pi(y|x) is the sum of its trained tokens' log-probs, the end
of turn included, |y| their number, h = log pi(y|x) - log ref(y|x); y_w is the chosen answer, y_l the rejected one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tandem.algo.advantage import Selection
from tandem.algo.config import PreferenceConfig, PreferenceLoss
from tandem.algo.correct import sample_sum
from tandem.algo.loss import LossResult
from tandem.algo.objective import Measured, Outputs, Score
from tandem.algo.pack import count_prompts
from tandem.algo.tensors import MicrobatchTensors
from tandem.errors import ConfigError, ModelError
from tandem.kernels.weight import Weight
from tandem.types import Denominators, Group, Sample

if TYPE_CHECKING:
    from tandem.models.decoder import Decoder

HEAD = "reward_head"  # its name among the weights
CHOSEN, REJECTED, MISMATCHED = 1, 0, -1  # of the column `preferred`


class Answers(NamedTuple):
    """Whole answers, fp64 [S] each."""

    logprobs: Tensor  # nats, of the policy
    references: Tensor  # of the reference; 0 where the loss has none
    tokens: Tensor  # trained


def ratio(config: PreferenceConfig, answers: Answers) -> Tensor:
    """h, or h / |y| where it is normalised (length-normalised DPO of Tulu 3, arXiv 2411.15124, section 5.1)."""
    h = answers.logprobs - answers.references
    return h / answers.tokens if config.length_normalised else h


def reward(config: PreferenceConfig, answers: Answers) -> Tensor:
    """What the loss takes answers to be worth, [S].

    dpo, robust_dpo, ipo, kto   beta h                   DPO, arXiv 2305.18290, equation 5
    orpo, simpo                 beta log pi(y|x) / |y|   SimPO, arXiv 2405.14734, equation 4
    """
    if config.needs_reference:
        return config.scale * ratio(config, answers)
    return config.scale * answers.logprobs / answers.tokens


PairLoss = Callable[[PreferenceConfig, Answers, Answers], Tensor]  # chosen, rejected, [P] each -> [P]


def dpo(config: PreferenceConfig, chosen: Answers, rejected: Answers) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d), d = beta (h_w - h_l), e label_smoothing.

    DPO, arXiv 2305.18290, equation 7; with e above 0 conservative DPO (Mitchell, ericmitchell.ai/cdpo.pdf, equation 3).
    """
    d, e = reward(config, chosen) - reward(config, rejected), config.label_smoothing
    return (1.0 - e) * softplus(-d) + e * softplus(d)


def robust_dpo(config: PreferenceConfig, chosen: Answers, rejected: Answers) -> Tensor:
    """(-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2e): DPO's loss in expectation where a share e of the pairs
    is the wrong way round. Chowdhury et al., arXiv 2403.00409, equation 9."""
    d, e = reward(config, chosen) - reward(config, rejected), config.label_smoothing
    return ((1.0 - e) * softplus(-d) - e * softplus(d)) / (1.0 - 2.0 * e)


def ipo(config: PreferenceConfig, chosen: Answers, rejected: Answers) -> Tensor:
    """(h_w - h_l - 1 / (2 beta))^2. IPO, arXiv 2310.12036, equation 17, whose h are sums over the answer; TRL's are
    means, which length_normalised gives."""
    return (ratio(config, chosen) - ratio(config, rejected) - 0.5 / config.scale).square()


def orpo(config: PreferenceConfig, chosen: Answers, rejected: Answers) -> Tensor:
    """-log p_w - beta log sigmoid(log odds(p_w) - log odds(p_l)), odds(p) = p / (1 - p), log p = log pi(y|x) / |y|.

    ORPO, arXiv 2403.07691, equations 3 to 7 (beta is its lambda). The supervised term is the chosen answer's alone.
    """
    p_w, p_l = (answers.logprobs / answers.tokens for answers in (chosen, rejected))
    return -p_w + config.scale * softplus(_log_odds(p_l) - _log_odds(p_w))


def _log_odds(logprob: Tensor) -> Tensor:
    """Of a probability that is 1 to the last bit too: its odds end at 1e9, where they have no gradient."""
    below = logprob.clamp(max=-1e-9)
    return below - torch.log(-torch.expm1(below))


def simpo(config: PreferenceConfig, chosen: Answers, rejected: Answers) -> Tensor:
    """-log sigmoid(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma). SimPO, arXiv 2405.14734,
    equation 6."""
    return softplus(config.gamma - (reward(config, chosen) - reward(config, rejected)))


PAIR_LOSSES: dict[str, PairLoss] = {"dpo": dpo, "robust_dpo": robust_dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo}
assert {*PAIR_LOSSES, "kto", "reward_model"} == {*get_args(PreferenceLoss)}, f"{get_args(PreferenceLoss)}"


def kto(config: PreferenceConfig, answers: Answers, liked_S: Tensor, kl: float) -> Tensor:
    """weight (1 - sigmoid(beta (h - z))) of what was liked, weight (1 - sigmoid(beta (z - h))) of the others, [S].

    KTO, arXiv 2402.01306, equations 7 and 8. z, `kl`, has no gradient: the mean of h over answers paired with the
    prompt of another one, and no less than 0 (section 4.1).
    """
    ahead = config.scale * (ratio(config, answers) - kl)
    desirable, undesirable = (torch.full_like(ahead, w) for w in (config.desirable_weight, config.undesirable_weight))
    return torch.where(liked_S, desirable * torch.sigmoid(-ahead), undesirable * torch.sigmoid(ahead))


def bradley_terry(config: PreferenceConfig, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l - margin_weight m) + center (r_w + r_l)^2, [P], of rewards.

    InstructGPT, arXiv 2203.02155, equation 1; the margin m is Llama 2's, arXiv 2307.09288, equation 2; the centre
    Eisenstein et al.'s, arXiv 2312.09244, equation 6.
    """
    gap = chosen - rejected - config.margin_weight * margins
    return softplus(-gap) + config.center * (chosen + rejected).square()


def select(groups: Sequence[Group]) -> Selection:
    """All answers of written groups, to train."""
    answers = [trajectory for group in groups for trajectory in group.trajectories]
    samples = tuple(Sample(one.id, one.prompt_id, one.columns) for one in answers)
    return Selection(samples, count_prompts(samples), {sample.id: "trained" for sample in samples})


class _Step:
    """What the steps of all preference losses have alike."""

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        check_pairs(samples)
        return samples

    def observe(self, *given: Any) -> None: ...

    def accept(self, results: Sequence[LossResult], observed: Sequence[Any]) -> bool:
        return True

    def measured(self, results: Sequence[LossResult]) -> Measured:
        """Means: of what was chosen over the chosen, and so on."""
        sums = {name: math.fsum(float(result.sums[name]) for result in results) for name in results[0].sums}
        metrics = {"loss": sums.pop("loss"), "tokens": sums["tokens"]}
        counts: dict[str, float] = {}
        for name in {*MEANS_OVER.values()} & sums.keys():
            counts[name] = sums.pop(name)
        for name, value in sums.items():
            over = counts[MEANS_OVER[name]]
            if over:
                metrics[name] = value / over
        return Measured(metrics)


# A metric -> the count that its sum is divided by.
MEANS_OVER: Mapping[str, str] = {
    "entropy": "tokens",
    "preference_accuracy": "pairs",
    "reward_margin": "pairs",
    "chosen_logprob": "chosen",
    "chosen_reward": "chosen",
    "rejected_logprob": "rejected",
    "rejected_reward": "rejected",
}


class Preference(_Step):
    """A loss of pairs: the mean of PAIR_LOSSES over the batch's. `sft_weight` adds -log pi(y_w|x) / |y_w| of each (RPO,
    arXiv 2404.19733)."""

    temperature = 1.0
    updates_per_step = 1
    samples = False

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self.columns = frozenset({"tokens", "loss_mask", "preferred"})
        if config.needs_reference:
            self.columns |= {"reference_logprobs"}

    def begin(self) -> Preference | KtoStep:
        return KtoStep(self.config) if self.config.loss == "kto" else self

    def divisor(self, totals: Denominators) -> int:
        """Pairs; of KTO, ratings, each of which comes with an answer to another prompt."""
        return totals.samples // 2

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """The sum over the microbatch's pairs / pairs of the whole batch."""
        answers = answers_of(outputs, batch)
        chosen, rejected = (Answers(*(part[side] for part in answers)) for side in sides_of(batch))
        loss_P = PAIR_LOSSES[self.config.loss](self.config, chosen, rejected)
        if self.config.sft_weight:
            loss_P = loss_P - self.config.sft_weight * chosen.logprobs / chosen.tokens
        rewards = [reward(self.config, side).detach() for side in (chosen, rejected)]
        sums = dict(_counts(outputs)) | dict(_of_pairs(*rewards))
        sums |= {"chosen_logprob": chosen.logprobs.detach().sum(), "rejected_logprob": rejected.logprobs.detach().sum()}
        return _result(loss_P.sum() / self.divisor(batch.denominators), sums)


class KtoStep(_Step):
    """A step of KTO. Its KL is of the whole batch, and so estimated before the first gradient."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self.kl = 0.0  # nats an answer

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        """Without the answers to other prompts, of which the KL is estimated."""
        apart = tuple(sample for sample in samples if _side(sample) == MISMATCHED)
        kept = tuple(sample for sample in samples if _side(sample) != MISMATCHED)
        if len(apart) != len(kept):
            raise ConfigError(
                f"KTO learns from ratings, each with an answer to another prompt, and this batch has {len(kept)} and "
                f"{len(apart)}. Let corpus.sources read ratings, or choose another preference.loss."
            )
        ahead = [_over_reference(sample) for sample in score("proximal_logprobs", apart)]
        self.kl = max(0.0, math.fsum(ahead) / len(ahead))
        return kept

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """The sum over the microbatch's ratings / ratings of the whole batch."""
        answers = answers_of(outputs, batch)
        liked_S = preferred_of(batch) == CHOSEN
        loss_S = kto(self.config, answers, liked_S, self.kl)
        sums = dict(_counts(outputs))
        for side, which_S in (("chosen", liked_S), ("rejected", ~liked_S)):
            sums[side] = which_S.sum()
            sums[f"{side}_logprob"] = answers.logprobs.detach()[which_S].sum()
            sums[f"{side}_reward"] = reward(self.config, answers).detach()[which_S].sum()
        return _result(loss_S.sum() / (batch.denominators.samples // 2), sums)

    def measured(self, results: Sequence[LossResult]) -> Measured:
        """Margin of the means, and the KL."""
        metrics = _Step.measured(self, results).metrics
        if {"chosen_reward", "rejected_reward"} <= metrics.keys():
            metrics["reward_margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
        return Measured(metrics | {"kl_mismatched": self.kl})


class RewardHead:
    """r = w . h of the hidden state at an answer's last token, in fp64; a model's weights and this one more."""

    def __init__(self, trunk: Decoder, first_M: Tensor | None = None) -> None:
        """first_M: what it begins with; zeros else. ModelError where that is another model's."""
        self.trunk = trunk
        if first_M is None:
            first_M = torch.zeros(trunk.spec.width)
        if first_M.shape != (trunk.spec.width,):
            raise ModelError(f"a reward head is {len(first_M)} wide, and its model {trunk.spec.width}.")
        self.weight = Weight(first_M.float().to(trunk.device), matrix=False)

    def __call__(self, hidden_SM: Tensor) -> Tensor:
        """[S]. The head's gradient goes to its `grad`."""
        head = self.weight.value.detach().double()
        if torch.is_grad_enabled():
            head = head.requires_grad_()
            head.register_hook(self._take)
        return (hidden_SM.double() * head).sum(dim=1)  # not a product, whose sums hang on how many rows there are

    def _take(self, gradient: Tensor) -> None:
        assert self.weight.grad is not None
        self.weight.grad += gradient.float()

    def weights(self) -> Iterator[tuple[str, Weight]]:
        yield from self.trunk.weights()
        yield HEAD, self.weight

    def repack(self) -> None:
        self.trunk.repack()


class RewardModel(_Step):
    """Bradley-Terry on a scalar head over the model, which learns with it."""

    temperature = 1.0
    updates_per_step = 1
    samples = False
    columns = frozenset({"tokens", "loss_mask", "preferred"})

    def __init__(self, config: PreferenceConfig, first: Callable[[], Tensor | None] = lambda: None) -> None:
        """first: the head [M] to begin with, asked for once there is a model; None: zeros."""
        self.config, self._first = config, first
        self.head: RewardHead | None = None  # until there is a model

    def over(self, decoder: Decoder) -> RewardHead:
        """The model with a head, which is this objective's from now on."""
        self.head = RewardHead(decoder, self._first())
        return self.head

    def begin(self) -> RewardModel:
        return self

    def divisor(self, totals: Denominators) -> int:
        return totals.samples // 2

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        check_pairs(samples)
        return tuple(judged(sample) for sample in samples)

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """The sum over the microbatch's pairs / pairs of the whole batch."""
        assert self.head is not None, "no model has this head"
        rewards_S = self.head(outputs.hidden_NM)
        margins = batch.get("margins")
        chosen_P, rejected_P = sides_of(batch)
        margins_P = torch.zeros_like(rewards_S[chosen_P]) if margins is None else margins[chosen_P]
        loss_P = bradley_terry(self.config, rewards_S[chosen_P], rewards_S[rejected_P], margins_P)
        sums = dict(_of_pairs(rewards_S.detach()[chosen_P], rewards_S.detach()[rejected_P]))
        sums["tokens"] = torch.tensor(float(len(rewards_S)))
        return _result(loss_P.sum() / self.divisor(batch.denominators), sums)


def judged(sample: Sample) -> Sample:
    """With its last token once more, and that alone to predict: the state that predicts it is that at the end.

    >>> from tandem.columns import Columns
    >>> seen = Sample("p/0", "p", Columns.of(tokens=(1, 2, 7), loss_mask=(False, True, True)))
    >>> judged(seen).columns["tokens"].tolist(), judged(seen).columns["loss_mask"].tolist()
    ([1, 2, 7, 7], [False, False, False, True])
    """
    columns = sample.columns
    end = int(np.flatnonzero(columns["loss_mask"])[-1]) + 1
    places = np.append(np.arange(end), end - 1)
    mask = np.arange(end + 1) == end
    return dataclasses.replace(sample, columns=columns.take(places).having(loss_mask=mask))


def answers_of(outputs: Outputs, batch: MicrobatchTensors) -> Answers:
    """The microbatch's samples as wholes."""
    references_N = batch.get("reference_logprobs")
    logprobs_S = sample_sum(outputs.logprobs_N.double(), batch.sample_tokens)
    references_S = (
        torch.zeros_like(logprobs_S) if references_N is None else sample_sum(references_N, batch.sample_tokens)
    )
    return Answers(logprobs_S, references_S, batch.sample_tokens.double())


def preferred_of(batch: MicrobatchTensors) -> Tensor:
    """[S], of each sample."""
    ends_S = batch.sample_tokens.cumsum(0)
    return batch["preferred"][ends_S - batch.sample_tokens]


def sides_of(batch: MicrobatchTensors) -> tuple[Tensor, Tensor]:
    """Places among the samples of each pair's chosen one and of its rejected one, [P] each.

    A prompt's samples lie side by side, as many chosen as rejected (`check_pairs`), and where a pair comes twice in a
    batch either rejected one is right: so the first chosen one goes with the first rejected, and so on.
    """
    preferred_S = preferred_of(batch)
    chosen_P, rejected_P = ((preferred_S == side).nonzero()[:, 0] for side in (CHOSEN, REJECTED))
    assert 2 * len(chosen_P) == 2 * len(rejected_P) == len(preferred_S), batch.sample_ids
    return chosen_P, rejected_P


def check_pairs(samples: Sequence[Sample]) -> None:
    """ConfigError unless each prompt has one chosen and one rejected answer (or each as often as the other)."""
    sides = Counter((sample.prompt_id, _side(sample)) for sample in samples)
    for (prompt_id, side), count in sides.items():
        if side == MISMATCHED or count != sides[prompt_id, REJECTED if side == CHOSEN else CHOSEN]:
            raise ConfigError(
                f"a loss of pairs needs a chosen and a rejected answer to each prompt, and {prompt_id} has "
                f"{sides[prompt_id, CHOSEN]} and {sides[prompt_id, REJECTED]}. Let corpus.sources name pairs, or set "
                "preference.loss to kto, which learns from ratings."
            )


def _counts(outputs: Outputs) -> Iterator[tuple[str, Tensor]]:
    yield "tokens", torch.tensor(float(len(outputs.logprobs_N)))
    yield "entropy", outputs.entropy_N.detach().double().sum()


def _of_pairs(chosen_P: Tensor, rejected_P: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of rewards."""
    for name in ("pairs", "chosen", "rejected"):
        yield name, torch.tensor(float(len(chosen_P)))
    yield "chosen_reward", chosen_P.sum()
    yield "rejected_reward", rejected_P.sum()
    yield "reward_margin", (chosen_P - rejected_P).sum()
    right_P = (chosen_P > rejected_P).double() + 0.5 * (chosen_P == rejected_P).double()  # by chance, where they tie
    yield "preference_accuracy", right_P.sum()


def _result(loss: Tensor, sums: dict[str, Tensor]) -> LossResult:
    return LossResult(loss, {"loss": loss.detach(), **sums}, {}, None)


def _side(sample: Sample) -> int:
    return int(sample.columns["preferred"][sample.columns["loss_mask"]][0])


def _over_reference(sample: Sample) -> float:
    """h of a scored sample."""
    columns = sample.columns
    mask = columns["loss_mask"]
    return math.fsum(columns["proximal_logprobs"][mask] - columns["reference_logprobs"][mask])
