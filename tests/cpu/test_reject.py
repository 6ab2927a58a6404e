"""Drafts accepted by their probability: tokens are distributed as without them; their log-probs are the model's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2

from tandem.config import override
from tandem.engine import reject
from tandem.engine.batch import Sequence
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.reject import NONE, Trials, judged, proposed
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError, RunFolderError, TandemWarning
from tandem.kernels.sample import SamplingBatch, sample
from tandem.models.decoder import Decoder
from tandem.numerics.random import Stream
from tandem.recipes.smollm2_arithmetic_cpu import smollm2_arithmetic_cpu
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run.config import check_training
from tandem.run.folder import RunFolder
from tandem.types import Request, Sampling
from tests.cpu.test_constraint import learned, prompt
from tests.drafting import Told, at_most

VOCAB = 5
TRIALS = 30_000
# Of a token: logits of the target after each token (the first row: after the prompt), and those of a drafter.
FIRST = [[0.3, 1.2, -0.5, 0.9, -1.4]]
TARGET = torch.from_numpy(np.concatenate([FIRST, np.random.default_rng(3).normal(0, 1.2, (VOCAB, VOCAB))])).float()
DRAFTED = TARGET + torch.from_numpy(np.random.default_rng(4).normal(0, 0.8, (VOCAB + 1, VOCAB))).float()
SAMPLINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top-k": Sampling(temperature=1.4, top_k=3),
    "top-p": Sampling(top_p=0.8),
    "min-p, masked": Sampling(min_p=0.15),
}
MASK = np.array([0, 1, 2, 4], np.uint32).tobytes()  # of "min-p, masked"


def rows(sampling: Sampling, name: str, position: int, trials: int = TRIALS) -> SamplingBatch:
    """As many requests, by seed, that draw the token of a position."""
    masks = {"masks": [MASK] * trials} if "masked" in name else {}
    return SamplingBatch.stack([sampling] * trials, range(trials), [position] * trials, **masks)


def filtered(logits: torch.Tensor, sampling: Sampling, name: str) -> NDArray[np.float64]:
    """The distribution that is drawn from, by hand."""
    p = logits.double().numpy() / sampling.temperature
    if "masked" in name:
        p[[v for v in range(VOCAB) if v not in np.frombuffer(MASK, np.uint32)]] = -np.inf
    p = np.exp(p - p.max())
    order = np.argsort(-p, kind="stable")
    kept = len(order) if not sampling.top_k else sampling.top_k
    mass = np.cumsum(p[order[:kept]])
    kept = min(kept, int(np.argmax(mass >= sampling.top_p * mass[-1])) + 1) if sampling.top_p < 1 else kept
    p[order[kept:]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def pairs(name: str, kind: str, shared_noise: bool = False) -> tuple[NDArray[np.int64], float]:
    """How often each pair of tokens was drawn of many requests that are drafted two tokens and verified in one step;
    and how many drafts stood of those that were judged. kind: how drafts are made and verified."""
    sampling = SAMPLINGS[name]
    first, second = (rows(sampling, name, position) for position in (7, 8))
    if kind == "sure":  # of a drafter that gives no probabilities: the likeliest token, whatever the noise
        x, y = (DRAFTED[0].argmax().repeat(TRIALS), DRAFTED[1 + DRAFTED[0].argmax()].argmax().repeat(TRIALS))
        q_x = q_y = None
    elif kind == "match":
        x, _ = sample(DRAFTED[:1].repeat(TRIALS, 1), first)
        y, _ = sample(DRAFTED[1 + x], second)
        q_x = q_y = None
    else:
        x, q_x = proposed(DRAFTED[:1].repeat(TRIALS, 1), first)
        y, q_y = proposed(DRAFTED[1 + x], second)
        if kind == "unfiltered":  # what was drawn is filtered, and what it is said to be drawn from is not
            q_x, q_y = torch.softmax(DRAFTED[:1].repeat(TRIALS, 1), 1), torch.softmax(DRAFTED[1 + x], 1)
    steps = [TARGET[:1].repeat(TRIALS, 1), TARGET[1 + x]]

    def verified(step: int, drafts: torch.Tensor, q: torch.Tensor | None) -> torch.Tensor:
        batch = (first, second)[step]
        if kind == "match":
            return sample(steps[step], batch)[0]
        places = np.full(TRIALS, NONE) if q is None else np.arange(TRIALS)
        return judged(steps[step], batch, Trials(drafts.numpy(), places, torch.empty(0, 0) if q is None else q))[0]

    one, two = verified(0, x, q_x), verified(1, y, q_y)
    stood = one == x
    two = torch.where(stood, two, sample(TARGET[1 + one], second)[0])  # else the next step draws it, without a draft
    counts = np.zeros((VOCAB, VOCAB), np.int64)
    np.add.at(counts, (one.numpy(), two.numpy()), 1)
    return counts, float(stood.float().mean())


def wanted(name: str) -> NDArray[np.float64]:
    """The probability of each pair."""
    sampling = SAMPLINGS[name]
    first = filtered(TARGET[0], sampling, name)
    return first[:, None] * np.stack([filtered(TARGET[1 + v], sampling, name) for v in range(VOCAB)])


def gate(counts: NDArray[np.int64], p: NDArray[np.float64]) -> tuple[float, float]:
    """(p-value of chi-square, total variation); a pair that cannot be is a p-value of 0."""
    total, seen = counts.sum(), p > 0
    if counts[~seen].any():
        return 0.0, 1.0
    expected = p[seen] * total
    statistic = ((counts[seen] - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, seen.sum() - 1)), float(0.5 * np.abs(counts / total - p).sum())


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("reject", name) for name in SAMPLINGS), ("match", "plain"), ("match", "top-p"), ("sure", "temperature")]
    + [("sure", "min-p, masked")],
)
def test_pairs_are_distributed_as_without_drafts(kind: str, name: str) -> None:
    """A drafter's distribution, or its noise, is seen in what is drawn."""
    counts, stood = pairs(name, kind)
    p_value, distance = gate(counts, wanted(name))
    assert p_value > 1e-4 and distance < 0.014, (p_value, distance)
    p, q = (filtered(logits[0], SAMPLINGS[name], name) for logits in (TARGET, DRAFTED))
    if kind == "reject":
        assert abs(stood - np.minimum(p, q).sum()) < 0.012  # 1 - TV(p, q)
    if kind == "sure":
        assert abs(stood - p[int(DRAFTED[0].argmax())]) < 0.012
    if kind == "match":
        shared = np.minimum(p, q).sum()
        assert shared / (2 - shared) - 0.012 < stood < 1  # Daliri, Musco, Suresh: (1 - TV) / (1 + TV) at least


@pytest.mark.parametrize("name", ["top-k", "temperature"])
def test_the_gate_sees_a_q_that_was_not_drawn_from(name: str) -> None:
    """What drafts were drawn from is told without temperature and filters, and nothing notices."""
    p_value, distance = gate(pairs(name, "unfiltered")[0], wanted(name))
    assert p_value < 1e-6 and distance > 0.015, (p_value, distance)


@pytest.mark.parametrize("noise", [Stream.RESIDUAL, Stream.ACCEPT])
def test_the_gate_sees_noise_that_is_shared(noise: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft's noise draws what takes its place, or tests it, and nothing notices."""
    monkeypatch.setattr(reject, "Stream", Shared(noise))
    p_value, distance = gate(pairs("plain", "reject")[0], wanted("plain"))
    assert p_value < 1e-6 and distance > 0.01, (p_value, distance)


class Shared:
    """Streams of which one is the proposal's."""

    def __init__(self, one: Stream) -> None:
        self.ACCEPT, self.RESIDUAL, self.PROPOSAL = Stream.ACCEPT, Stream.RESIDUAL, Stream.PROPOSAL
        setattr(self, one.name, Stream.PROPOSAL)


def engine_of(decoder: Decoder, drafter: Told | None, num_pages: int = 400, **changes: Any) -> Engine:
    limits = {"page_tokens": 4, "batch_tokens": 300, "max_sequences": 40, "draft": at_most(3, verify="reject")}
    config = EngineConfig(**(limits | changes))
    return Engine(DecoderRunner(decoder, num_pages, 4, config), config, num_pages, 256, drafter=drafter)


class Known(NamedTuple):
    """A drafter that knows a distribution after each token, and draws from it as the request is drawn."""

    logits_VV: torch.Tensor
    told: list[list[torch.Tensor]]

    def drafter(self) -> Told:
        return Told(self.drafts, probabilities=lambda sequences: [torch.stack(q) if q else None for q in self.told])

    def drafts(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        self.told[:] = [[] for _ in sequences]
        found = []
        for sequence, count, told in zip(sequences, most, self.told, strict=True):
            tokens = sequence.tokens[-1:]
            for place in range(count):
                sampling, position = sequence.request.sampling, len(sequence.tokens) + place
                batch = SamplingBatch.stack([sampling], [sequence.request.seed], [position])
                token, q_SV = proposed(self.logits_VV[tokens[-1:]], batch)
                tokens.append(int(token))
                told.append(q_SV[0])
            found.append(tokens[1:])
        return found


def known(vocab: int, seed: int = 0) -> Known:
    return Known(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)), [])


def test_an_engines_texts_are_distributed_as_without_drafts(make_decoder) -> None:
    """A draft is judged by another's q, or at another's row, between the drafter and the draw."""
    sampling = Sampling(temperature=1.6, top_k=4)
    decoder = make_decoder("float32", vocab_size=6)
    asked = [Request(f"{i}", "p", (1, 2, 3), replace(sampling, max_new_tokens=5), i) for i in range(1500)]
    engine = engine_of(decoder, known(6).drafter())
    done = engine.generate(asked)
    stats = engine.stats
    assert 0.2 < stats.accepted_tokens / stats.drafted_tokens < 0.8
    seen, p = Counter(one.tokens[:3] for one in done), dict[tuple[int, ...], float]()
    for one in done:
        p[one.tokens[:3]] = float(np.exp(sum(one.logprobs[:3])))
    frequent = {tokens for tokens, chance in p.items() if chance * len(done) > 5}
    expected = np.array([*(p[tokens] for tokens in frequent), 1 - sum(p[tokens] for tokens in frequent)]) * len(done)
    counts = np.array([*(seen[tokens] for tokens in frequent), sum(seen[t] for t in seen.keys() - frequent)])
    assert len(frequent) > 15 and chi2.sf(((counts - expected) ** 2 / expected).sum(), len(frequent)) > 1e-3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.7, top_k=40, top_p=0.98)])
def test_the_learner_has_the_log_probs(make_decoder, sampling: Sampling) -> None:
    """What is recorded is a draft's probability under its drafter, or before filters, or of another token."""
    decoder = make_decoder("bfloat16")
    asked = [Request(f"r{i}", "p", prompt(i), replace(sampling, max_new_tokens=20), i) for i in range(6)]
    engine = engine_of(decoder, known(97).drafter())
    done = engine.generate(asked)
    assert engine.stats.accepted_tokens
    for one, scored in zip(done, learned(decoder, done, sampling.temperature), strict=True):
        assert [x.hex() for x in one.logprobs] == [x.hex() for x in scored]
    again = [engine_of(decoder, known(97).drafter()).generate([one])[0] for one in asked]
    assert [(one.tokens, one.logprobs) for one in again] == [(one.tokens, one.logprobs) for one in done]
    other = engine_of(decoder, known(97, 1).drafter()).generate(asked)
    assert [one.tokens for one in other] != [one.tokens for one in done], "texts hang on drafts"


def test_a_greedy_text_is_that_without_drafts(make_decoder) -> None:
    """A draft that is not the likeliest stands with some probability."""
    decoder = make_decoder("bfloat16")
    asked = [Request(f"r{i}", "p", prompt(i), Sampling(temperature=0.0, max_new_tokens=20), i) for i in range(4)]
    plain = engine_of(decoder, None, draft=DraftConfig()).generate(asked)
    told = {one.request_id: [*one.tokens, 0, 0, 0] for one in plain}
    rest = Told(lambda s, most: [told[one.request.id][one.num_drawn :][:n] for one, n in zip(s, most, strict=True)])
    for drafter in (known(97).drafter(), rest):
        done = engine_of(decoder, drafter).generate(asked)
        assert [(one.tokens, one.logprobs) for one in done] == [(one.tokens, one.logprobs) for one in plain]


def test_a_row_that_cannot_be_drawn_from_fails_alone(make_decoder) -> None:
    """A row that is not finite takes its neighbours along, or they lose their drafts."""
    decoder = make_decoder("float32")
    runner = DecoderRunner(decoder, 8, 4)
    hidden_SM = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    sampling = SamplingBatch.stack([Sampling()] * 4, range(4), [5, 6, 7, 8])
    trials = Trials(np.array([3, 4, 5, NONE]), np.full(4, NONE), torch.empty(0, 0))
    whole = runner.drawn(hidden_SM, sampling, trials)
    hidden_SM[1] = torch.nan
    found = runner.drawn(hidden_SM, sampling, trials)
    assert list(found.failed) == [1]
    assert [found.tokens[row] for row in (0, 2, 3)] == [whole.tokens[row] for row in (0, 2, 3)]


@pytest.mark.parametrize("fault", ["a draft of no probability", "no distribution", "raises"])
def test_a_q_that_cannot_be_switches_the_drafter_off(make_decoder, fault: str) -> None:
    """A drafter's wrong distribution bends the texts, or ends the run."""
    decoder, asked = make_decoder("float32"), [Request("r", "p", (1, 2, 3), Sampling(max_new_tokens=9), 4)]

    def q(sequences: list[Sequence]) -> list[torch.Tensor | None]:
        if fault == "raises":
            raise ValueError("no weights")
        q_NV = torch.full((3, 97), 1 / 96 if fault == "a draft of no probability" else 1 / 50)
        q_NV[:, 7] = 0 if fault == "a draft of no probability" else 1 / 50
        return [q_NV for _ in sequences]

    engine = engine_of(decoder, Told(lambda s, most: [[7] * n for n in most], probabilities=q))
    with pytest.warns(TandemWarning, match="switched off"):
        (done,) = engine.generate(asked)
    (plain,) = engine_of(decoder, None, draft=DraftConfig()).generate(asked)
    assert done.tokens == plain.tokens and engine.stats.drafted_tokens == 0


def test_branches_are_matched() -> None:
    """Drafts side by side are accepted by probability, each with its own, and the text is of no distribution."""
    with pytest.raises(ConfigError, match="engine.draft.verify to match, or engine.draft.branches to 1"):
        DraftConfig("suffix", branches=2, verify="reject")
    with pytest.raises(ConfigError, match="charged to nobody"):
        EngineConfig(draft=DraftConfig("suffix", branches=2), order="shares")


def test_runs_that_draw_a_text_twice_match() -> None:
    """A replay, a second replica or a resume draws other texts than were learned from, since drafts are others."""
    with pytest.raises(ConfigError, match="engine.draft.verify to match, or engine.replicas to 1"):
        EngineConfig(draft=DraftConfig("suffix", verify="reject"), replicas=2)
    judged = override(smollm2_arithmetic_cpu(), {"engine.draft.by": "suffix", "engine.draft.verify": "reject"})
    check_training(judged)
    with pytest.raises(ConfigError, match="engine.draft.verify is reject and asynchrony.mode full"):
        check_training(override(judged, {"asynchrony.mode": "full"}))


def test_resume_keeps_drafts_that_texts_hang_on(tmp_path):
    """A run whose drafts are accepted by probability goes on with others, and is another run."""
    config = override(tiny_arithmetic(), {"engine.draft.by": "lookup"})
    judged = override(config, {"engine.draft.verify": "reject"})
    for name, saved, given in (("a", config, judged), ("b", judged, config)):
        RunFolder.create(tmp_path / name, saved).close()
        with pytest.raises(RunFolderError, match="engine.draft.verify: "):
            RunFolder.open(tmp_path / name, given)
    with pytest.raises(RunFolderError, match="engine.draft.tokens: 8 -> 4"):
        RunFolder.open(tmp_path / "b", override(judged, {"engine.draft.tokens": "4"}))
    RunFolder.open(tmp_path / "b", judged).close()
