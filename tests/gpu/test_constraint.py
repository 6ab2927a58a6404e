"""Masks on the device: rows that have one wait for their draws, and all rows keep their bits."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine import graph
from tandem.engine.batch import Sequence as LiveSequence
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.kernels import choice
from tandem.kernels.logprob import KeptSets, token_logprobs
from tandem.kernels.sample import SamplingBatch, kept_sets, processed_logits, sample
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.types import Completion, Constraint, Request, Sampling, kept_ids, kept_of
from tests.drafting import Told, at_most
from tests.grammars import END, OTHER_END, grammars_of

pytest.importorskip("llguidance", reason="constraints are those of the extra serve")

TOKENS = (*string.ascii_letters, *'{}":,012345', "ab", END, OTHER_END)[:67]
STOP = (TOKENS.index(END), TOKENS.index(OTHER_END))
FORMS = (
    Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}'),
    None,
    Constraint("regex", "[a-z]{3,7}[0-5]"),
    Constraint("choice", '["abba", "abc", "b"]'),
)


def engine_of(decoder: Decoder, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 128, "max_sequences": 16, "lookahead_tokens": 4, **settings}
    )
    engine = Engine(DecoderRunner(decoder, 64, config.page_tokens, config), config, 64, decoder.spec.max_position)
    engine.grammars = grammars_of(TOKENS)
    return engine


def requests(new: int = 9) -> list[Request]:
    """Every third is greedy, every fourth has no constraint, and one filters too."""
    asked = []
    for i in range(6):
        sampling = Sampling(float(i % 3), top_k=5 * (i == 4), max_new_tokens=new, stop_token_ids=STOP)
        asked.append(Request(f"r{i}", "p", tuple(range(i + 1, 2 * i + 4)), sampling, seed=i, constraint=FORMS[i % 4]))
    return asked


def told(done: list[Completion]) -> list[Any]:
    return [(one.stop_reason, {name: list(map(str, x)) for name, x in one.columns.arrays.items()}) for one in done]


class OneAtATime:
    """A runner that is waited for before the next batch is planned."""

    def __init__(self, runner: DecoderRunner) -> None:
        self.layout, self.run = runner.layout, runner.run


@pytest.mark.parametrize("settings", [{}, {"batch_tokens": 16}])
def test_masks_wait_for_the_draws_they_hang_on(make_decoder, settings):
    """A step is started with masks of the draw before the last, or what it runs ahead is read as text."""
    ahead, plain = engine_of(make_decoder(), **settings), engine_of(make_decoder(), **settings)
    ahead.runner.device_steps = graph.DeviceSteps(ahead.runner, lambda run: (run(), run)[1])  # type: ignore[attr-defined]
    plain.runner = OneAtATime(plain.runner)  # type: ignore[arg-type]
    done = ahead.generate(requests())
    assert told(done) == told(plain.generate(requests()))
    assert told(done) == told([engine_of(make_decoder(), **settings).generate([one])[0] for one in requests()])
    assert not ahead.has_work
    for one, asked in zip(done, requests(), strict=True):
        texts = "".join(TOKENS[token] for token in one.tokens if token not in STOP)
        assert asked.constraint != FORMS[3] or texts in ("abba", "abc", "b")


def test_drafts_beside_masks_draw_the_same(make_decoder):
    """A draft's row is masked as if the draft were not there."""
    plain = [engine_of(make_decoder()).generate([one])[0] for one in requests()]
    known = {one.request_id: [*one.tokens, *range(4)] for one in plain}

    def drafter(sequences: list[LiveSequence], most: list[int]) -> list[list[int]]:
        ahead = [known[s.request.id][s.num_drawn :][:count] for s, count in zip(sequences, most, strict=True)]
        return [[*tokens[:2], *[(token + 1) % 67 for token in tokens[2:]]] for tokens in ahead]

    engine = engine_of(make_decoder(), draft=at_most(4))
    engine.scheduler.drafting.drafter = Told(drafter)
    assert told(engine.generate(requests())) == told(plain)
    assert engine.stats.accepted_tokens > 6


def test_the_learner_has_the_log_probs_of_the_draws(device):
    """A masked row is summed in another order where it is learned than where it is drawn."""
    rng = np.random.default_rng(0)
    hidden = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(device)
    weight = Weight(torch.randn(67, 16, generator=torch.Generator().manual_seed(1)).to(device), matrix=True)
    masks = []
    for share in (0.05, 0.5, 0.95) * 8:
        bits = rng.random(96) < share
        bits[67:], bits[int(rng.integers(67))] = False, True
        masks.append(kept_of(np.packbits(bits, bitorder="little").view(np.uint32)))
    masks[5] = b""
    from tandem.kernels.linear import logits

    batch = SamplingBatch.stack([Sampling(0.7)] * 24, range(24), [3] * 24, masks)
    tokens, logprobs = sample(logits(hidden, weight), batch)
    assert all(token in kept_ids(mask) for token, mask in zip(tokens.tolist(), masks, strict=True) if mask)
    scored, _ = token_logprobs(hidden, weight, tokens, 0.7, masks)
    assert torch.equal(scored, logprobs)
    sets = KeptSets.build(masks, tokens)
    whole = sets.restrict(torch.zeros(24, 67, device=device), 0, 0)
    assert torch.equal(sets.restrict(torch.zeros(7, 40, device=device), 9, 27), whole[9:16, 27:])


def test_masked_rows_are_those_of_the_cpu(device, monkeypatch):
    """A mask on the device drops other tokens than beside the CPU, or after the filters."""
    logits_SV = 2 * torch.randn(9, 300, generator=torch.Generator().manual_seed(4))
    rng, masks = np.random.default_rng(2), []
    for row in range(9):
        bits = rng.random(320) < rng.choice([0.03, 0.6])
        bits[300:], bits[7] = False, True
        masks.append(b"" if row == 4 else kept_of(np.packbits(bits, bitorder="little").view(np.uint32)))
    some = [Sampling(), Sampling(0.0), Sampling(top_k=9), Sampling(0.5, top_p=0.8), Sampling(min_p=0.1)]
    batch = SamplingBatch.stack([replace(some[i % 5]) for i in range(9)], range(9), [1] * 9, masks)
    tokens = sample(logits_SV.to(device), batch)[0].cpu()
    kept, sets = (
        processed_logits(logits_SV.to(device), batch).cpu(),
        kept_sets(logits_SV.to(device), tokens.to(device), batch),
    )
    monkeypatch.setattr(choice, "_asked", lambda: "")
    assert torch.equal(tokens, sample(logits_SV, batch)[0])
    assert torch.equal(kept, processed_logits(logits_SV, batch)) and sets[0] == kept_sets(logits_SV, tokens, batch)[0]
