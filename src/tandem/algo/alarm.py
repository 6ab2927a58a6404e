"""Alarms on the drift between the policy that sampled and the policy that is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tandem.algo.config import CorrectionConfig
from tandem.config import Amount, section
from tandem.errors import ConfigError

Action = Literal["warn", "stop", "correct"]
Contributions = Mapping[str, Mapping[str, float]]  # metric -> sample id -> how much of the metric is that sample's

NAMED_TRAJECTORIES = 3  # at most, in an alarm


@dataclass(frozen=True, slots=True)
@section("alarms")
class AlarmConfig:
    """What to do about drift, and one threshold a metric of `algo/drift.py`; None switches a metric's alarm off.

    >>> AlarmConfig(action="stop").thresholds["k3"]
    0.01
    """

    action: Action = "warn"  # warn: report; stop: raise before the update; correct: turn algo.correction on
    mult_prob_error: Amount | None = 1.05  # mean exp |d log p|; NeMo-RL's threshold
    k1: Amount | None = 0.05  # |mean d log p|, nats; ours
    k3: Amount | None = 1e-2  # nats; the literature's for mixture-of-experts models, 1e-3 for dense bf16
    chi_square: Amount | None = 0.1  # mean rho^2 - 1; the literature's
    ess: Amount | None = 0.5  # effective share of the tokens, alarms below; the literature's
    ppl_gap: Amount | None = 0.05  # |ratio of perplexities - 1|; ours
    abs_max: Amount | None = 1.0  # largest |d log p|, nats; ours
    abs_p999: Amount | None = 0.5  # 99.9th percentile of |d log p|, nats; ours
    prob_max: Amount | None = 0.3  # largest |d p|; prime-rl masks a token beyond it
    prob_p999: Amount | None = 0.2  # 99.9th percentile of |d p|; ours
    rare_share: Amount | None = 0.5  # of the gradient, from tokens with p < 1e-3; ours
    masked: Amount | None = 0.05  # share of trained tokens that a mask or rejection took out; the literature's
    weight_clipped: Amount | None = 0.05  # share of trained tokens whose weight was truncated; the literature's

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that are on, by metric."""
        named = {name: getattr(self, name) for name in METRICS}
        return {name: value for name, value in named.items() if value is not None}


METRICS = tuple(name for name in AlarmConfig.__dataclass_fields__ if name != "action")
BELOW = frozenset({"ess"})  # alarms below its threshold; all others above
EITHER_SIDE = frozenset({"k1", "ppl_gap"})  # |value| is compared


@dataclass(frozen=True, slots=True)
class Alarm:
    """A metric beyond its threshold.

    >>> Alarm("k3", 0.25, 0.01, ("p/0", "q/3")).text()
    'k3 0.25 > 0.01; most of it in p/0, q/3'
    """

    metric: str
    value: float  # may be inf or nan
    threshold: float
    trajectories: tuple[str, ...]  # ids of the samples that contribute most, the first the most; at most three

    def text(self) -> str:
        """One line: metric, value, threshold, trajectories."""
        sign = "<" if self.metric in BELOW else ">"
        named = f"; most of it in {', '.join(self.trajectories)}" if self.trajectories else ""
        return f"{self.metric} {self.value:.3g} {sign} {self.threshold:g}{named}"


def check(alarms: AlarmConfig, metrics: Mapping[str, float], per_sample: Contributions) -> list[Alarm]:
    """The alarms of a step's metrics, in the order of the config's fields. inf and nan are beyond every threshold."""
    found = []
    for name, threshold in alarms.thresholds.items():
        if name not in metrics:
            continue
        value = abs(metrics[name]) if name in EITHER_SIDE else metrics[name]
        within = value >= threshold if name in BELOW else value <= threshold
        if within:
            continue
        shares = per_sample.get(name, {})
        ranked = sorted(
            (sample for sample, share in shares.items() if not share <= 0.0),
            key=lambda sample: (-shares[sample] if not math.isnan(shares[sample]) else -math.inf, sample),
        )
        found.append(Alarm(name, metrics[name], threshold, tuple(ranked[:NAMED_TRAJECTORIES])))
    return found


def check_correctable(alarms: AlarmConfig, correction: CorrectionConfig) -> None:
    """Refuse an action that has nothing to turn on. Raises ConfigError."""
    if alarms.action == "correct" and correction.naive:
        raise ConfigError(
            "alarms.action is 'correct' but algo.correction is decoupled without weight or reject: an alarm would turn "
            "nothing on. Set algo.correction.weight or algo.correction.reject, or alarms.action to warn or stop."
        )
