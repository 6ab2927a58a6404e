"""Constraints on a real decoder: the learner has the log-probs of the engine, whatever rows, pages and drafts are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.algo.pack import count_prompts, pack
from tandem.cli.main import main
from tandem.engine.batch import Sequence as LiveSequence
from tandem.engine.config import EngineConfig
from tandem.engine.draft import Drafter
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels import sample as sampler
from tandem.kernels.head import draw
from tandem.kernels.logprob import KeptSets, logprob_reference, token_logprobs
from tandem.kernels.sample import SamplingBatch, kept_sets
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Constraint, Request, Sample, Sampling, StopReason, Turn, is_mask, kept_ids, kept_of
from tests.drafting import Told, at_most
from tests.grammars import END, OTHER_END, grammars_of
from tests.samples import column, owners_of

for name in ("llguidance", "jsonschema_rs"):
    pytest.importorskip(name, reason="constraints are those of the extra serve")

TOKENS = (*map(chr, range(33, 127)), '",', END, OTHER_END)  # 97
STOP = (TOKENS.index(END), TOKENS.index(OTHER_END))
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "on": {"type": "boolean"}, "n": {"type": "integer"}},
    "required": ["name", "on"],
    "additionalProperties": False,
}
CONSTRAINTS = (
    Constraint("json_schema", json.dumps(SCHEMA)),
    Constraint("regex", "[^x]{3,9}(ab|cd)*"),
    Constraint("choice", '["yes", "yesterday", "no"]'),
    Constraint("json_object"),
    None,
)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 7, 500]),
    top_p=st.sampled_from([1.0, 1.0, 0.4, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(TOKENS[token] for token in tokens if token not in STOP)


def prompt(number: int) -> tuple[int, ...]:
    return tuple((7 * (number % 2) + 5 * j * j) % 97 for j in range(9))


def asked(number: int, sampling: Sampling, constraint: Constraint | None, new_tokens: int = 24) -> Request:
    sampling = replace(sampling, max_new_tokens=new_tokens, stop_token_ids=STOP)
    return Request(f"r{number}", "p", prompt(number), sampling, number, constraint=constraint)


def engine_of(decoder: Decoder, num_pages: int = 120, drafter: Drafter | None = None, **changes: Any) -> Engine:
    limits = {"page_tokens": 4, "batch_tokens": 40, "max_sequences": 6, "lookahead_tokens": 0}
    config = EngineConfig(**(limits | changes))
    engine = Engine(DecoderRunner(decoder, num_pages, 4, config), config, num_pages, 256, drafter=drafter)
    engine.grammars = grammars_of(TOKENS)
    return engine


def told(done: Sequence[Completion]) -> list[Any]:
    """All that a completion has, to the bit."""
    return [
        (one.stop_reason, one.failure, {name: list(map(str, array)) for name, array in one.columns.arrays.items()})
        for one in done
    ]


@pytest.fixture(params=["float32", "bfloat16"])
def decoder(request: pytest.FixtureRequest, make_decoder: Callable[..., Decoder], kernel_path: str) -> Decoder:
    return make_decoder(request.param)


def learned(decoder: Decoder, done: Sequence[Completion], temperature: float) -> list[list[float]]:
    """The learner's log-probs of each completion's tokens, from packs of it with the sets that came with it."""
    flat = [flatten(one.request_id, "p", prompt(i), (Turn(one),), 1.0) for i, one in enumerate(done)]
    samples, scored = [Sample(t.id, t.prompt_id, t.columns) for t in flat], dict[str, list[float]]()
    for microbatch in pack(samples, count_prompts(samples), 70):
        view = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S)
        tokens_T, rows_N = (torch.from_numpy(x.astype(np.int64)) for x in (microbatch.tokens_T, microbatch.rows_N))
        targets_N = torch.tensor(microbatch.predictions["tokens"].tolist())
        kept = microbatch.predictions["kept"].tolist() if "kept" in microbatch.predictions else None
        with torch.no_grad():
            hidden_NM = decoder.forward(tokens_T, view, rows_N)
            logprobs_N, _ = token_logprobs(hidden_NM, decoder.head, targets_N, temperature, kept)
        for name, value in zip(owners_of(microbatch), logprobs_N.tolist(), strict=True):
            scored.setdefault(name, []).append(value)
    return [scored[t.id] for t in flat]


@settings(max_examples=12)
@given(
    chosen=st.lists(st.tuples(samplings, st.sampled_from(CONSTRAINTS)), min_size=1, max_size=6),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
)
def test_the_learner_has_the_engines_log_probs(decoder, chosen, temperature):
    """A token's set is another than the learner is told, or summed in another order: the policy trained is another."""
    requests = [asked(i, replace(s, temperature=temperature), c) for i, (s, c) in enumerate(chosen)]
    done = engine_of(decoder).generate(requests)
    for one, scored, (sampling, constraint) in zip(done, learned(decoder, done, temperature), chosen, strict=True):
        assert [x.hex() for x in one.logprobs] == [x.hex() for x in scored]
        filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        assert ("kept" in one.columns) == (filters or constraint is not None)
        assert constraint is None or one.stop_reason in (StopReason.STOP_TOKEN, StopReason.LENGTH)


def test_texts_are_what_was_asked_and_end_there(make_decoder):
    """A random model writes what no schema allows, ends in the middle, or goes on behind the end."""
    from tandem.engine.constraint import unmet

    requests = [asked(i, Sampling(float(i % 3 > 0)), CONSTRAINTS[i % 4], 150) for i in range(24)]
    done = engine_of(make_decoder(), 600).generate(requests)
    ended = [(r, one) for r, one in zip(requests, done, strict=True) if one.stop_reason is StopReason.STOP_TOKEN]
    assert len(ended) > 12
    for one, completion in ended:
        assert one.constraint is not None and unmet(one.constraint, text_of(completion.tokens)) == ""
        assert completion.tokens[-1] in STOP and not {*completion.tokens[:-1]} & {*STOP}
        sets = column(completion, "kept") if "kept" in completion.columns else []
        alone = [i for i, kept in enumerate(sets) if len(kept_ids(kept)) == 1]
        assert all(completion.logprobs[i] == 0.0 for i in alone), "forced: probability 1"
    for one in done:
        if one.stop_reason is StopReason.LENGTH:
            assert unmet(requests[int(one.request_id[1:])].constraint, text_of(one.tokens)) != ""


def test_rows_beside_a_constraint_keep_their_bits(decoder):
    """A mask in the batch changes its neighbours, or a request alone is masked otherwise than among others."""
    requests = [asked(i, Sampling(float(i % 3)), CONSTRAINTS[i % 5]) for i in range(10)]
    together = engine_of(decoder).generate(requests)
    alone = [engine_of(decoder).generate([one])[0] for one in requests]
    assert told(together) == told(alone)
    bare = engine_of(decoder)
    bare.grammars = None
    assert told([bare.generate([requests[4]])[0]]) == told(together[4:5])


def test_a_preemption_in_the_middle_of_a_text(decoder):
    """A sequence that runs again starts its text anew in the matcher, or reads tokens twice."""
    long = Constraint("regex", '"[^"]{30,35}"(ab|cd)*')
    requests = [asked(i, Sampling(), long if i % 3 else CONSTRAINTS[3], 40) for i in range(6)]
    plenty, scarce = engine_of(decoder, 200), engine_of(decoder, 24)
    assert told(plenty.generate(requests)) == told(scarce.generate(requests))
    assert scarce.stats.preemptions > 1 and not plenty.stats.preemptions


def test_a_text_goes_on_in_another_request(decoder):
    """A text that was withdrawn half-way starts its constraint anew, so that two beginnings follow one another."""
    for i, constraint in enumerate(CONSTRAINTS[:4]):
        whole = asked(i, Sampling(), constraint)
        (done,) = engine_of(decoder).generate([whole])
        for count in range(1, len(done.tokens)):
            rest = replace(whole, tokens=whole.tokens + done.tokens[:count], carried=count)
            rest = replace(rest, sampling=replace(rest.sampling, max_new_tokens=24 - count))
            (after,) = engine_of(decoder).generate([rest])
            assert done.tokens == done.tokens[:count] + after.tokens
            assert done.logprobs[count:] == after.logprobs


@settings(max_examples=8)
@given(rights=st.lists(st.integers(0, 7), min_size=1, max_size=5), count=st.integers(1, 7))
def test_drafts_change_no_bit(decoder, rights, count):
    """A draft moves the matcher for good, what follows one is masked as if it were not there, or a wrong one stands."""
    requests = [asked(i, Sampling(float(i % 2)), CONSTRAINTS[i % 5]) for i in range(6)]
    plain = engine_of(decoder).generate(requests)
    known, turn = {one.request_id: one.tokens for one in plain}, iter(range(10**9))

    def drafts(sequences: list[LiveSequence], most: list[int]) -> list[list[int]]:
        found = []
        for sequence, room in zip(sequences, most, strict=True):
            right = rights[next(turn) % len(rights)]
            rest = [*known[sequence.request.id][sequence.num_drawn :], *range(room)][:room]
            found.append([token if i < right else (token + 1) % 97 for i, token in enumerate(rest)])
        return found

    engine = engine_of(decoder, drafter=Told(drafts), draft=at_most(count))
    assert told(engine.generate(requests)) == told(plain)
    assert engine.stats.drafted_tokens


def test_a_text_that_cannot_go_on_fails_alone(make_decoder):
    """A dead end stops the engine, or draws from nothing."""
    odd = asked(0, Sampling(), Constraint("regex", "é"))  # no token has its bytes
    done = engine_of(make_decoder()).generate([odd, asked(1, Sampling(), CONSTRAINTS[1])])
    assert [one.stop_reason is StopReason.FAILED for one in done] == [True, False]
    assert "constraint" in done[0].failure and not done[0].tokens


def test_an_engine_without_a_tokeniser_refuses_constraints(make_decoder):
    """A constraint is silently not held."""
    engine = engine_of(make_decoder())
    engine.grammars = None
    with pytest.raises(ConfigError, match="constraint, but this engine was given no tokeniser"):
        engine.submit(asked(0, Sampling(), CONSTRAINTS[0]))


def drawn_masks(rows: int, vocab: int, seed: int) -> tuple[bytes, ...]:
    """A kept set for two rows of three, of every size, in both forms; some rows share one."""
    rng = np.random.default_rng(seed)
    few = []
    for _ in range(3):
        bits_V = rng.random(vocab) < rng.choice([0.02, 0.5, 0.97])
        bits_V[rng.integers(vocab)] = True
        few.append(kept_of(np.packbits(np.pad(bits_V, (0, -vocab % 32)), bitorder="little").view(np.uint32)))
    return tuple(b"" if row % 3 == 2 else few[int(rng.integers(3))] for row in range(rows))


def allowed(mask: bytes, vocab: int) -> Tensor:
    found = torch.zeros(vocab, dtype=torch.bool)
    found[list(kept_ids(mask)) if mask else slice(None)] = True
    return found


@settings(max_examples=40)
@given(
    chosen=st.lists(samplings | st.just(Sampling(0.0)), min_size=1, max_size=7),
    vocab=st.sampled_from([5, 32, 97, 300]),
    seed=st.integers(0, 99),
)
def test_the_sampler_draws_as_if_the_model_had_said_so(any_path, chosen, vocab, seed):
    """A mask after top-k or top-p, a bit of another word, a set that is not what was drawn from."""
    logits_SV = 2 * torch.randn(len(chosen), vocab, generator=torch.Generator().manual_seed(seed))
    masks, rows = drawn_masks(len(chosen), vocab, seed), range(len(chosen))
    batch = SamplingBatch.stack(chosen, rows, [seed] * len(chosen), masks)
    plain = SamplingBatch.stack(chosen, rows, [seed] * len(chosen))
    restricted_SV = torch.stack([logits_SV[s].masked_fill(~allowed(masks[s], vocab), -torch.inf) for s in rows])
    tokens_S, logprobs_S = sampler.sample(logits_SV, batch)
    wanted = sampler.sample(restricted_SV, plain)
    assert torch.equal(tokens_S, wanted[0]) and torch.equal(logprobs_S, wanted[1])
    assert torch.equal(sampler.processed_logits(logits_SV, batch), sampler.processed_logits(restricted_SV, plain))
    reference = sampler.sample_reference(logits_SV, batch)
    assert torch.equal(tokens_S, reference[0])
    torch.testing.assert_close(logprobs_S, reference[1], atol=1e-5, rtol=1e-5)
    kept, unfiltered = kept_sets(logits_SV, tokens_S, batch)
    for s, sampling in enumerate(chosen):
        if sampling.greedy or not (masks[s] or plain.filters_S[s]):
            assert kept[s] is unfiltered[s] is None
            continue
        finite = np.flatnonzero(np.isfinite(sampler._filtered_row(restricted_SV, plain, s))).tolist()
        assert list(kept_ids(kept[s])) == finite and int(tokens_S[s]) in finite
        assert plain.filters_S[s] or kept[s] is masks[s], "of a mask alone, the mask itself"
        model = (logits_SV[s].double() / sampling.temperature).log_softmax(-1)[tokens_S[s]]
        assert unfiltered[s] == pytest.approx(float(model), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_whatever_its_mask(any_path, bad):
    """Weights gone wrong are hidden by a mask, and the model is served on."""
    logits_SV = torch.zeros(2, 40)
    logits_SV[1, 7] = bad
    only = np.array([3], np.uint32).tobytes()
    batch = SamplingBatch.stack([Sampling(), Sampling(0.0)], [0, 1], [0, 0], (only, only))
    with pytest.raises(NonFiniteError, match="row 1"):
        sampler.sample(logits_SV, batch)


def test_a_batch_with_a_mask_is_not_drawn_in_the_head(any_path):
    """The pass that never writes the logits draws a masked row from all of them, a greedy one too."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(2, 8, generator=generator),
        Weight(torch.randn(40, 8, generator=generator), matrix=True),
    )
    only = np.array([11, 12], np.uint32).tobytes()
    for sampling in (Sampling(), Sampling(0.0)):
        tokens_S, _ = draw(hidden, weight, SamplingBatch.stack([sampling] * 2, [0, 1], [0, 0], (only, only)))
        assert {*tokens_S.tolist()} <= {11, 12}


@settings(max_examples=15)
@given(
    rows=st.integers(1, 20),
    vocab=st.sampled_from([5, 64, 70, 500, 513]),
    temperature=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_under_masks(any_path, rows, vocab, temperature, seed):
    """A gradient outside the mask, a normaliser of the whole vocabulary in it, another row's mask.

    fp32, as in test_kept.py: V E = 2^-24 (V + M + 40) of sums of V terms of at most 1, times |weight| <= 3 sqrt M.
    """
    generator, width = torch.Generator().manual_seed(seed), 12
    hidden = torch.randn(rows, width, generator=generator)
    value = torch.randn(vocab, width, generator=generator) / width**0.5
    masks, rng = drawn_masks(rows, vocab, seed), np.random.default_rng(seed)
    targets_N = torch.tensor([int(rng.choice(allowed(mask, vocab).nonzero()[:, 0].numpy())) for mask in masks])
    grad_N = torch.randn(rows, generator=generator)
    h64, w64 = hidden.double().requires_grad_(), value.double().requires_grad_()
    wanted, entropy = logprob_reference(h64, w64, targets_N, temperature, masks)
    gradients = torch.autograd.grad(wanted, (h64, w64), grad_N.double())
    weight = Weight(value, matrix=True)
    weight.grad = torch.zeros_like(value)
    hidden.requires_grad_()
    logprobs_N, entropy_N = token_logprobs(hidden, weight, targets_N, temperature, masks)
    logprobs_N.backward(grad_N)
    bound = 2.0**-24 * (vocab + width + 40) / temperature * 20
    assert hidden.grad is not None
    pairs = ((logprobs_N, wanted), (entropy_N, entropy), (hidden.grad, gradients[0]), (weight.grad, gradients[1]))
    for got, expected in pairs:
        torch.testing.assert_close(got.detach().double(), expected.detach(), atol=bound, rtol=bound)
    as_ids = [np.array(kept_ids(mask)).tobytes() if mask else b"" for mask in masks]
    assert torch.equal(token_logprobs(hidden.detach(), weight, targets_N, temperature, as_ids)[0], logprobs_N.detach())


def test_rows_share_a_mask_in_the_learner():
    """A text in one state costs a mask a token: 6 KB each at 49,152 tokens, 50 MB a microbatch."""
    wide = kept_of(np.full(4, 2**32 - 1, np.uint32))
    other = bytes([254, *wide[1:]])
    assert is_mask(wide) and is_mask(other)
    sets = KeptSets.build((wide, other, b"", wide, wide), torch.tensor([5] * 5))
    assert sets.masks_UW.shape == (2, 4) and sets.numbers_N.tolist() == [0, 1, -1, 0, 0]
    assert sets.rows(slice(1, 4)).restrict(torch.zeros(3, 128), 0, 0)[:, 0].tolist() == [-torch.inf, 0.0, 0.0]
    with pytest.raises(AssertionError, match="row 1: target 0 is not in the mask"):
        KeptSets.build((wide, other), torch.tensor([0, 0]))


def test_generate_holds_a_schema(write_model, tmp_path, capsys):
    """--json-schema and --regex are read and not held, a text that was cut off looks whole, or both are taken."""
    write_model(tmp_path / "model", 10.0)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    asks = [
        "generate",
        str(tmp_path / "model"),
        "hello",
        "--temperature",
        "1",
        "--json-schema",
        str(tmp_path / "schema.json"),
    ]
    assert main([*asks, "--max-new-tokens", "200"]) == 0
    assert {"name", "on"} <= json.loads(capsys.readouterr().out).keys()
    assert main([*asks, "--max-new-tokens", "4", "--json"]) == 1
    printed = capsys.readouterr()
    assert "no JSON" in json.loads(printed.out)["unmet"] and "not what was asked for: it is no JSON" in printed.err
    assert main([*asks[:3], "--regex", "[0-9]{3}(a|b)"]) == 0
    assert capsys.readouterr().out.strip()[:3].isdigit()
    assert main([*asks, "--regex", "a"]) == 2
    assert "both --json-schema and --regex" in capsys.readouterr().err
    assert main([*asks[:3], "--json-schema", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
