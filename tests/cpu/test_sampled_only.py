"""No token that the policy did not sample has a gradient, by the gradient itself and not by the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.algo import pack as pack_module
from tandem.algo.advantage import samples_from_groups
from tandem.algo.config import AlgoConfig
from tandem.algo.credit import with_gae
from tandem.algo.loss import clipped_value_loss, policy_loss
from tandem.algo.pack import PromptTotal, pack
from tandem.algo.tensors import to_tensors
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.types import Group, Prompt, Sample
from tests.samples import SAMPLED, Drawn, drawn_programs, having, paths_of, program_of

VOCAB = 400
SETTINGS = {
    "trajectory": {"advantage": "dr_grpo"},
    "step": {"advantage": "dr_grpo", "credit": "step", "discount": 0.9},
    "gigpo": {"advantage": "rloo", "credit": "gigpo", "discount": 0.9},
    "gae": {"advantage": "gae", "discount": 0.9, "gae_lambda": 0.9},
    "kl": {"advantage": "dr_grpo", "kl": "k3", "kl_weight": 0.1},
}


def batch_of(name: str, programs: Sequence[Drawn]) -> tuple[AlgoConfig, tuple[Sample, ...], tuple[PromptTotal, ...]]:
    config = AlgoConfig(**SETTINGS[name], clip_low=1.0, clip_high=1e9)  # no clip hides a token
    trajectories = tuple(t for n, program in enumerate(programs) for t in program_of(program, n, "p"))
    selection = samples_from_groups(config, [Group(Prompt("p", ()), trajectories)])
    samples = selection.samples
    if config.needs_reference:
        samples = tuple(having(s, reference_logprobs=[-2.0] * len(s.columns)) for s in samples)
    if config.needs_critic:
        samples = with_gae(config, [having(s, values=[0.25] * len(s.columns)) for s in samples])
    return config, samples, selection.prompts


def said_by_the_policy(programs: Sequence[Drawn]) -> set[tuple[str, int, int]]:
    """(sample, position, token) of what was sampled, from how the programs were played."""
    found = set()
    for n, program in enumerate(programs):
        for trajectory in program_of(program, n, "p"):
            tokens = trajectory.columns["tokens"].tolist()
            found |= {(trajectory.id, p, token) for p, token in enumerate(tokens) if token < SAMPLED}
    return found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=25, deadline=None)
@given(programs=st.lists(drawn_programs(), min_size=2, max_size=4))
def test_gradients_at_every_position_and_token(name: str, share: bool, programs: list[Drawn]) -> None:
    """A loss reads the log-prob of a token that a tool, a user or a prompt wrote, at whatever place it stands."""
    config, samples, prompts = batch_of(name, programs)
    said = said_by_the_policy(programs)
    for sample in samples:
        assert {(sample.id, p, t) for p, t in enumerate(sample.columns["tokens"].tolist()) if t < SAMPLED} <= said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "BRANCH", 1)
        microbatches = pack(samples, prompts, 60, share)
    seen = 0
    for microbatch in microbatches:
        batch = to_tensors(microbatch)
        # Of every row the log-prob of every token that could follow it, each a number of its own.
        every_TV = torch.randn(len(batch.tokens_T), VOCAB, dtype=torch.float64).log_softmax(1).requires_grad_()
        value_T = torch.zeros(len(batch.tokens_T), dtype=torch.float64, requires_grad=True)
        loss = policy_loss(config, every_TV[batch.rows_N, batch.targets_N], batch).loss
        if config.needs_critic:
            loss = loss + clipped_value_loss(value_T[batch.rows_N], batch["values"], batch["returns"], 0.2)[0].sum()
        loss.backward()
        assert every_TV.grad is not None
        follows = {
            (tuple(path), token)
            for path, token in zip(follow_paths(microbatch), microbatch.predictions["tokens"].tolist(), strict=True)
        }
        contexts = [tuple(microbatch.tokens_T[path].tolist()) for path in paths_of(microbatch)]
        written = {
            (tuple(sample.columns["tokens"][:p].tolist()), token)
            for sample in samples
            for s, p, token in said
            if s == sample.id
        }
        for row, token in every_TV.grad.nonzero().tolist():
            assert token < SAMPLED and (contexts[row], token) in written
            seen += 1
        if value_T.grad is not None:
            for (row,) in value_T.grad.nonzero().tolist():
                assert any(context == contexts[row] for context, _ in written)
        assert follows <= written
    assert seen or not samples or all(not s.columns["advantages"].any() for s in samples)


def follow_paths(microbatch) -> list[list[int]]:
    """Tokens before each target."""
    paths = paths_of(microbatch)
    return [microbatch.tokens_T[paths[row]].tolist() for row in microbatch.rows_N.tolist()]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs=st.lists(drawn_programs(), min_size=2, max_size=3))
def test_a_decoder_is_not_taught_what_others_wrote(make_decoder: Callable[..., Decoder], programs: list[Drawn]) -> None:
    """The gradient at the model's logits, of all positions, asks for a token that was observed."""
    decoder = make_decoder(vocab_size=VOCAB)
    config, samples, prompts = batch_of("trajectory", programs)
    for microbatch in pack(samples, prompts, 200):
        batch = to_tensors(microbatch)
        view = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S)
        with torch.no_grad():
            logits_TV = decoder.logits(decoder.forward(batch.tokens_T, view)).double()
        logits_TV.requires_grad_()
        policy_loss(config, logits_TV.log_softmax(1)[batch.rows_N, batch.targets_N], batch).loss.backward()
        assert logits_TV.grad is not None
        contexts = [tuple(microbatch.tokens_T[path].tolist()) for path in paths_of(microbatch)]
        asked = {(contexts[row]) for row in logits_TV.grad.abs().sum(1).nonzero().flatten().tolist()}
        wrote = {
            tuple(s.columns["tokens"][:p].tolist())
            for s in samples
            for name, p, _ in said_by_the_policy(programs)
            if name == s.id
        }
        assert asked <= wrote
