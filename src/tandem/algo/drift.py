"""Drift between the policy that sampled and the policy that is trained: measured once a step, never clamped.

Of each trained token of the step's first update, d = log p_learner - log p_behaviour and rho = exp d, with the learner
as it was before the update. Formulas, sources and thresholds: docs/algorithms.md. NumPy, fp64. A metric may overflow to
inf; it is then inf, and its alarm fires.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RARE = 1e-3  # probability below which a token is rare
DECILES = 10

Array = np.ndarray

MEANINGS = {  # metric -> (unit, what it is)
    "mult_prob_error": ("1", "mean exp |Δ log p|"),
    "k1": ("nats", "mean log p of behaviour − learner, nats"),
    "k3": ("nats", "KL of behaviour to learner, nats a token"),
    "chi_square": ("1", "mean ρ² − 1"),
    "ess": ("share", "effective share of the tokens, unclamped"),
    "ppl_gap": ("1", "ratio of perplexities − 1"),
    "abs_max": ("nats", "largest |Δ log p|"),
    "abs_p999": ("nats", "99.9th percentile of |Δ log p|"),
    "prob_max": ("1", "largest |Δ p|"),
    "prob_p999": ("1", "99.9th percentile of |Δ p|"),
    "rare_share": ("share", "gradient from tokens with p < 0.001"),
    "masked": ("share", "trained tokens taken out by a mask or rejection"),
    "weight_clipped": ("share", "trained tokens whose weight was truncated"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Observations:
    """What the learner saw of N predictions. Log-probs are nats; the learner's are finite.

    >>> seen = Observations.of([-1.0, -2.0], [-1.0, -2.0], samples=["p/0", "p/0"])
    >>> measure(seen).metrics["k3"], measure(seen).metrics["ess"]
    (0.0, 1.0)
    """

    learner_N: Array
    behaviour_N: Array
    source_N: Array  # the learner's where the weights are not stale; nan: unknown
    unfiltered_N: Array  # the behaviour's where nothing was filtered
    gradient_N: Array  # |d loss / d log p|
    masked_N: Array  # bool
    truncated_N: Array  # bool
    sample_N: Array  # int64, index into sample_ids
    sample_ids: tuple[str, ...]

    @classmethod
    def of(
        cls,
        learner: Sequence[float],
        behaviour: Sequence[float],
        samples: Sequence[str],
        source: Sequence[float] | None = None,
        unfiltered: Sequence[float] | None = None,
        gradient: Sequence[float] | None = None,
    ) -> Observations:
        """From plain values, nothing masked; the gradient 1 a token where it is not given."""
        ids = tuple(dict.fromkeys(samples))
        none = np.zeros(len(learner), dtype=bool)
        return cls(
            np.array(learner, dtype=np.float64),
            np.array(behaviour, dtype=np.float64),
            np.array(learner if source is None else source, dtype=np.float64),
            np.array(behaviour if unfiltered is None else unfiltered, dtype=np.float64),
            np.ones(len(learner)) if gradient is None else np.array(gradient, dtype=np.float64),
            none,
            none,
            np.array([ids.index(sample) for sample in samples], dtype=np.int64),
            ids,
        )


def join(parts: Sequence[Observations]) -> Observations:
    """Those of several microbatches, whose samples are not the same, as one."""
    first = np.cumsum([0, *(len(part.sample_ids) for part in parts)])

    def all_of(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in parts])

    return Observations(
        all_of("learner_N"),
        all_of("behaviour_N"),
        all_of("source_N"),
        all_of("unfiltered_N"),
        all_of("gradient_N"),
        all_of("masked_N"),
        all_of("truncated_N"),
        np.concatenate([part.sample_N + start for part, start in zip(parts, first[:-1], strict=True)]),
        tuple(sample for part in parts for sample in part.sample_ids),
    )


@dataclass(frozen=True, slots=True)
class Drift:
    """A step's drift.

    >>> Drift({"k3": 0.0}, {}, (), {}).metrics["k3"]
    0.0
    """

    metrics: dict[str, float]
    error_budget: dict[
        str, float
    ]  # nats a token by cause (staleness, mismatch, sampling); masking is a share; nan: unknown
    by_length: tuple[dict[str, float], ...]  # a row a decile of the samples, shortest first
    per_sample: dict[str, dict[str, float]]  # metric -> sample id -> its contribution


def measure(seen: Observations) -> Drift:
    """Predictions of samples with a behaviour log-prob that is not finite count in "masked" and in nothing else."""
    num_samples = len(seen.sample_ids)
    broken_S = np.bincount(seen.sample_N, ~np.isfinite(seen.behaviour_N), num_samples) > 0
    measured_N = ~broken_S[seen.sample_N]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        tokens = _Tokens(seen, measured_N)
        shares = {
            "masked": float(seen.masked_N.mean()),
            "weight_clipped": float(seen.truncated_N.mean()),
            "nonfinite_samples": float(broken_S.sum()),
        }
        return Drift(
            {**tokens.metrics(), **shares},
            {**tokens.error_budget(), "masking": shares["masked"]},
            tuple(tokens.by_length()),
            {
                **tokens.per_sample(),
                "masked": _by_sample(seen, seen.masked_N),
                "weight_clipped": _by_sample(seen, seen.truncated_N),
            },
        )


def _by_sample(seen: Observations, values_N: Array) -> dict[str, float]:
    sums = np.bincount(seen.sample_N, values_N, len(seen.sample_ids))
    return dict(zip(seen.sample_ids, sums.tolist(), strict=True))


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else 0.0


def _max(values: Array) -> float:
    return float(values.max()) if len(values) else 0.0


def _p999(values: Array) -> float:
    """The smallest value that 99.9 % of the values do not exceed."""
    return float(np.quantile(values, 0.999, method="inverted_cdf")) if len(values) else 0.0


class _Tokens:
    """Per-token terms of the predictions that are measured."""

    def __init__(self, seen: Observations, measured_N: Array) -> None:
        self.ids = seen.sample_ids
        self.sample = seen.sample_N[measured_N]
        self.learner = seen.learner_N[measured_N]
        self.behaviour = seen.behaviour_N[measured_N]
        self.source = seen.source_N[measured_N]
        self.unfiltered = seen.unfiltered_N[measured_N]
        self.gap = self.learner - self.behaviour
        self.gap_probability = np.abs(np.exp(self.learner) - np.exp(self.behaviour))
        self.k3 = np.expm1(self.gap) - self.gap
        # ||e_a - p||_2 lies in [1 - p_a, sqrt(2) (1 - p_a)]; its lower end stands for it.
        self.gradient = seen.gradient_N[measured_N] * -np.expm1(self.learner)
        self.rare = np.where(np.exp(self.learner) < RARE, self.gradient, 0.0)

    def metrics(self) -> dict[str, float]:
        gap, distance = self.gap, np.abs(self.gap)
        return {
            "k1": -_mean(gap) + 0.0,
            "k3": _mean(self.k3),
            "mult_prob_error": _mean(np.exp(distance)) if len(gap) else 1.0,
            "abs_max": _max(distance),
            "abs_p999": _p999(distance),
            "prob_max": _max(self.gap_probability),
            "prob_p999": _p999(self.gap_probability),
            "chi_square": _mean(np.expm1(2.0 * gap)),
            "ess": self._ess(),
            "ppl_gap": float(np.expm1(-_mean(gap))),
            "rare_share": _share(self.rare, self.gradient),
        }

    def _ess(self) -> float:
        """(sum w)^2 / (N sum w^2) of w = rho, which a common factor does not change: the largest w is made 1."""
        if not len(self.gap):
            return 1.0
        weights = np.exp(self.gap - self.gap.max())
        return float(weights.sum() ** 2 / (len(weights) * np.square(weights).sum()))

    def error_budget(self) -> dict[str, float]:
        """Staleness and mismatch are nan where a token's source is unknown: the split of a part is not the whole's."""
        return {
            "staleness": _mean(np.abs(self.learner - self.source)),
            "mismatch": _mean(np.abs(self.source - self.behaviour)),
            "sampling": _mean(self.behaviour - self.unfiltered),
        }

    def per_sample(self) -> dict[str, dict[str, float]]:
        distance = np.abs(self.gap)
        direction = -1.0 if self.gap.sum() > 0 else 1.0
        sums = {
            "mult_prob_error": np.expm1(distance),
            "k3": self.k3,
            "chi_square": np.expm1(2.0 * self.gap),
            "ess": np.exp(2.0 * (self.gap - _max(self.gap))),
            "k1": direction * -self.gap,
            "ppl_gap": direction * -self.gap,
            "rare_share": self.rare,
        }
        maxima = {"abs_max": distance, "abs_p999": distance, "prob_max": self.gap_probability}
        maxima["prob_p999"] = self.gap_probability
        found: dict[str, Array] = {}
        for name, values in sums.items():
            found[name] = np.bincount(self.sample, values, len(self.ids))
        for name, values in maxima.items():
            found[name] = np.zeros(len(self.ids))
            np.maximum.at(found[name], self.sample, values)
        return {name: dict(zip(self.ids, values.tolist(), strict=True)) for name, values in found.items()}

    def by_length(self) -> list[dict[str, float]]:
        """Samples in order of length (predictions), cut into ten parts as equal as can be; none is empty."""
        lengths = np.bincount(self.sample, minlength=len(self.ids))
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        rows = []
        for members in np.array_split(order, DECILES):
            if not len(members):
                continue
            inside = np.isin(self.sample, members)
            rows.append(
                {
                    "samples": len(members),
                    "shortest": int(lengths[members[0]]),
                    "longest": int(lengths[members[-1]]),
                    "k3": _mean(self.k3[inside]),
                    "abs_mean": _mean(np.abs(self.gap[inside])),
                    "rare_share": _share(self.rare[inside], self.gradient[inside]),
                }
            )
        return rows


def _share(part: Array, whole: Array) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total else 0.0
