"""What a server is asked, and what came: lengths, arrivals, percentiles, and the account of every call."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tandem.bench.client import Ask, Result
from tandem.errors import WorldError

FIRST_TOKEN, LAST_TOKEN = 100, 40_000  # ids that prompts are made of: text in SmolLM2's vocabulary


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts: of mean exp(mu + sigma^2 / 2) before they are cut to [least, most].

    >>> round(Lengths(40.0, 1.0, 4, 512).mu, 6)
    3.188879
    """

    mean: float
    sigma: float
    least: int
    most: int

    @property
    def mu(self) -> float:
        return math.log(self.mean) - self.sigma**2 / 2

    def draw(self, rng: random.Random) -> int:
        return min(max(round(rng.lognormvariate(self.mu, self.sigma)), self.least), self.most)

    def __str__(self) -> str:
        return (
            f"exp(N({self.mu:.2f}, {self.sigma:g})), mean {self.mean:g}, rounded and cut to {self.least} to {self.most}"
        )


# A quarter of ShareGPT's means, 161 tokens in and 338 out, as vLLM's paper has them (arXiv 2309.06180, section 6.1).
SHAREGPT_IN, SHAREGPT_OUT = Lengths(40.0, 1.0, 4, 512), Lengths(84.0, 0.8, 4, 512)


def prompt(length: int, rng: random.Random) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]


def sharegpt(count: int, seed: int) -> list[Ask]:
    """Calls of ShareGPT-like lengths; the same for every side that has this seed."""
    rng = random.Random(f"sharegpt/{seed}")
    return [Ask(prompt(SHAREGPT_IN.draw(rng), rng), SHAREGPT_OUT.draw(rng)) for _ in range(count)]


def uniform(count: int, length: int, new: int, seed: int, *, seeded: bool = False) -> list[Ask]:
    """Calls of one length. seeded: with a seed each."""
    rng = random.Random(f"uniform/{seed}")
    return [Ask(prompt(length, rng), new, seed=rng.getrandbits(31) if seeded else None) for _ in range(count)]


def poisson(asks: Sequence[Ask], rate: float, seed: int) -> list[Ask]:
    """The calls, due one after another with independent exponential gaps of mean 1 / rate seconds, the first at 0."""
    rng, due_s, due = random.Random(f"poisson/{seed}"), 0.0, []
    for ask in asks:
        due.append(Ask(ask.prompt, ask.new, due_s, ask.seed))
        due_s += rng.expovariate(rate)
    return due


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99, between the two nearest values as numpy does.

    >>> percentiles([1.0, 3.0, 2.0])["p50"]
    2.0
    """
    if not len(values):
        return {"p50": math.nan, "p99": math.nan}
    half, high = np.percentile(np.asarray(values, dtype=np.float64), [50, 99])
    return {"p50": float(half), "p99": float(high)}


def account(result: Result, asked: int) -> Counter[str]:
    """Outcomes of a plan's calls. WorldError where one was lost, refused, or is in no account."""
    found = Counter(one.outcome for one in result.answers)
    if len(result.answers) != asked or found["answered"] != asked:
        why = Counter(one.said for one in result.answers if one.outcome != "answered")
        said = "; ".join(f"{count} x {text}" for text, count in why.most_common(3))
        raise WorldError(
            f"of {asked} calls {found['answered']} were answered, {found['refused']} refused and "
            f"{asked - found['answered'] - found['refused']} lost: {said or 'the client has no account of them'}."
        )
    return found


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Of the answers of several runs of one plan: rates by the median run, times over all answers.

    ttft_s: from when a call was due to its first token; itl_s: between two events of a stream; tpot_s: (last - first) /
    (tokens - 1) of a stream; e2e_s: from when it was due to its end; user_tok_s: 1 / tpot_s.
    """
    answers = [one for result in results for one in result.answers]
    tpot_s = [
        spent_s / (one.tokens - 1)
        for one in answers
        if one.tokens > 1 and (spent_s := one.came_s[-1] - one.came_s[0]) > 0
    ]
    return {
        "calls": len(answers),
        "tok_s": statistics.median(map(rate, results)),
        "call_s": statistics.median(len(result.answers) / wall_s(result) for result in results),
        "ttft_s": percentiles([one.came_s[0] - one.due_s for one in answers]),
        "itl_s": percentiles([later - sooner for one in answers for sooner, later in pairwise(one.came_s)]),
        "tpot_s": percentiles(tpot_s),
        "e2e_s": percentiles([one.end_s - one.due_s for one in answers]),
        "user_tok_s": statistics.median(1 / spent_s for spent_s in tpot_s) if tpot_s else math.nan,
        "client_cpu_s": statistics.median(result.cpu_s for result in results),
        "wall_s": statistics.median(map(wall_s, results)),
    }


def wall_s(result: Result) -> float:
    """From the first call's sending to the last one's end."""
    return max(one.end_s for one in result.answers) - min(one.sent_s for one in result.answers)


def rate(result: Result) -> float:
    """Output tokens a second."""
    return sum(one.tokens for one in result.answers) / wall_s(result)
