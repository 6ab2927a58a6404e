"""A drafter of attention and recurrent layers: its rows and gradients by hand, its files, and its drafts on pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.algo.pack import count_prompts, pack
from tandem.columns import Columns
from tandem.engine.batch import Sequence
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ModelError
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.speculate.config import Mixer
from tandem.speculate.files import open_drafter, save_drafter
from tandem.speculate.mixed import Mixed, MixedSpec
from tandem.speculate.pages import Span
from tandem.speculate.recurrent import Gru, Rule
from tandem.speculate.snapshots import MixedDrafter, Snapshots
from tandem.types import Microbatch, Sample, WeightVersion
from tests.cpu.test_draft import ASKED, CHUNKS, columns
from tests.cpu.test_draft_eagle import IDS, by_hand
from tests.cpu.test_eagle import TEXTS, ByHand, hold_to_autograd

MIXERS: tuple[Mixer, ...] = ("linear", "attention", "gru")


def mixed_of(decoder: Decoder, ids: list[int] | None = None, mixers: tuple[Mixer, ...] = MIXERS) -> Mixed:
    """One whose norms are not 1 and whose layers are all different; gates are from nearly shut to nearly open."""
    spec = MixedSpec.new(decoder.spec, mixers, (0, 2), len(ids) if ids else 0)
    mixed = Mixed(spec, decoder.embed, torch.tensor(ids) if ids else None).begin(decoder.norm, decoder.head)
    generator = torch.Generator().manual_seed(3)
    for _, weight in mixed.weights():
        weight.value.add_(0.2 * torch.randn(weight.value.shape, generator=generator))
    mixed.repack()
    return mixed


@pytest.fixture(scope="module")
def microbatch() -> Microbatch:
    columns = [Columns.of(tokens=text, loss_mask=tuple(place >= 2 for place in range(len(text)))) for text in TEXTS]
    samples = [Sample(f"p/{number}", "p", one) for number, one in enumerate(columns)]
    (one,) = pack(samples, count_prompts(samples), 64)
    return one


class MixedByHand(ByHand):
    """The layers' inputs and states one row at a time, in fp64 and differentiable."""

    def __init__(self, decoder: Decoder, mixed: Mixed, microbatch: Microbatch) -> None:
        super().__init__(decoder, mixed, microbatch)
        self.mixers = mixed.spec.mixers
        self.input, self.memory = cache(self._input), cache(self._memory)

    def _state(self, step: int, row: int) -> Tensor:
        return self.input(len(self.mixers), step, row)

    def _input(self, layer: int, step: int, row: int) -> Tensor:
        """Of a layer; of one behind the last: what the last norm reads."""
        w = self.weights
        if layer == 0:
            embed_M, feature_M = self.eagle.embed.value[self.tokens[row]].double(), self.feature(step, row)
            both = self._norm(embed_M, "token_norm.weight"), self._norm(feature_M, "hidden_norm.weight")
            return feature_M + w["join.weight"] @ torch.cat(both)
        name = f"layers.{layer - 1}."
        kind = {"attention": "self_attn", "gru": "gru", "linear": "linear_attn"}[self.mixers[layer - 1]]
        read = self._attended(layer - 1, step, row) if kind == "self_attn" else self.memory(layer - 1, step, row)[1]
        x = self.input(layer - 1, step, row) + w[f"{name}{kind}.o_proj.weight"] @ read
        y = self._norm(x, f"{name}post_attention_layernorm.weight")
        gate, up = (w[f"{name}mlp.{n}_proj.weight"] @ y for n in ("gate", "up"))
        return x + w[f"{name}mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)

    def _entered(self, layer: int, step: int, row: int, kind: str, which: str) -> Tensor:
        x = self._norm(self.input(layer, step, row), f"layers.{layer}.input_layernorm.weight")
        name = f"layers.{layer}.{kind}.{which}_proj."
        return self.weights[f"{name}weight"] @ x + self.weights.get(f"{name}bias", torch.zeros(1))

    def _heads(self, layer: int, step: int, row: int, kind: str) -> list[Tensor]:
        size = self.eagle.spec.model.head_size
        return [self._entered(layer, step, row, kind, which).view(-1, size) for which in "qkv"]

    def _attended(self, layer: int, step: int, row: int) -> Tensor:
        path, own = self.paths[row], self.eagle.spec.model
        seen = [(max(0, step - (len(path) - 1 - place)), one) for place, one in enumerate(path)]
        each = [self._heads(layer, *one, "self_attn") for one in seen]
        keys = torch.stack([self._turn(k, place) for place, (_, k, _) in enumerate(each)])
        values, query = torch.stack([v for _, _, v in each]), self._turn(each[-1][0], len(path) - 1)
        keys, values = (x.repeat_interleave(own.heads // own.kv_heads, 1) for x in (keys, values))
        scores = torch.einsum("hd,phd->hp", query, keys) / own.head_size**0.5
        return torch.einsum("hp,phd->hd", scores.softmax(-1), values).flatten()

    def _memory(self, layer: int, step: int, row: int) -> tuple[Tensor, Tensor]:
        """The state behind a row, and what is read of it."""
        before = self.memory(layer, max(step - 1, 0), self.paths[row][-2])[0] if len(self.paths[row]) > 1 else 0.0
        kind = {"gru": "gru", "linear": "linear_attn"}[self.mixers[layer]]
        gate = self._entered(layer, step, row, kind, "gate")
        z = 0.5 + 0.5 * gate / (1.0 + gate.abs())
        if kind == "gru":
            state = (1.0 - z) * before + z * self._entered(layer, step, row, kind, "state")
            return state, state
        query, key, value = self._heads(layer, step, row, kind)
        state = (1.0 - z[:, None, None]) * before + z[:, None, None] * torch.einsum("kd,ke->kde", key, value)
        wide = state.repeat_interleave(len(query) // len(key), 0)
        return state, torch.einsum("hd,hde->he", query, wide).flatten() / query.shape[1] ** 0.5


@pytest.mark.parametrize("mixers", [MIXERS, ("gru",)], ids=["three", "gru"])
def test_a_rows_state_is_of_its_own_drafts(mixers, make_decoder, any_path, microbatch) -> None:
    """A state that goes on from a sibling's row, from another anchor's draft, or over a text's end; a gate or a sum
    that is not the formula's."""
    decoder = make_decoder("float32", layers=4)
    mixed = mixed_of(decoder, mixers=mixers)
    hand, steps = MixedByHand(decoder, mixed, microbatch), mixed.steps(microbatch, 4)
    tapped_TLM = hand.tapped_TX.float().view(len(hand.tokens), 2, -1)
    made = 0
    for number, (read_nM, own_n) in enumerate(mixed.unroll(steps, tapped_TLM, torch.tensor(hand.tokens))):
        for read_M, own in zip(read_nM, own_n.tolist(), strict=True):
            expected_M = hand._norm(hand.state(number, int(microbatch.rows_N[own])), "norm.weight")
            torch.testing.assert_close(read_M.double(), expected_M, rtol=2e-4, atol=2e-4)
            made += 1
    assert made > 30


def test_gradients_are_autograds(make_decoder, microbatch) -> None:
    """A gradient that a state does not carry back to the rows and steps before, or a bias that does not learn."""
    decoder = make_decoder("float32", layers=4)
    hold_to_autograd("kl", decoder, mixed_of(decoder, IDS), microbatch, MixedByHand)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_comes_back_to_the_same_bits(dtype, make_decoder, tmp_path: Path) -> None:
    """A tensor, a pattern or a token map that is lost on the way; a folder of another pattern is read all the same."""
    decoder = make_decoder(dtype, layers=4)
    mixed = mixed_of(decoder, IDS)
    save_drafter(tmp_path / "a", mixed)
    again = open_drafter(tmp_path / "a", decoder)
    assert isinstance(again, Mixed) and again.spec == mixed.spec and torch.equal(again.ids_V, mixed.ids_V)
    save_drafter(tmp_path / "b", again)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a/config.json").read_text())
    for wrong, said in ((["gru", "gru", "gru"], "linear_attn"), (["gru"], "one a layer"), (["lstm"] * 3, "lstm")):
        (tmp_path / "a/config.json").write_text(json.dumps(config | {"mixers": wrong}))
        with pytest.raises(ModelError, match=said):
            open_drafter(tmp_path / "a", decoder)


class TextView(PackView):
    """Of one text, whose states are gone through a row at a time."""

    def recur(self, layer: int, entered_TW: Tensor, rule: Rule) -> Tensor:
        state_1X, reads = torch.zeros(1, rule.numbers), []
        for row_1W in entered_TW.split(1):
            state_1X, read_1Y = rule.advance(state_1X, row_1W)
            reads.append(read_1Y)
        return torch.cat(reads).to(entered_TW.dtype)


class Noted(MixedDrafter):
    """Holds drafts to those by hand, and what a text is drafted from to what it was before."""

    made = checked = 0
    on = True

    def __init__(self, *given: Any, known: dict[tuple[int, ...], bytes]) -> None:
        super().__init__(*given)
        self.known, self.again = known, 0
        self._texts: list[tuple[int, ...]] = []

    def _from(self, sequences: list[Sequence], spans: list[Span]) -> list[Span]:
        spans = super()._from(sequences, spans)
        self._texts = [tuple(s.tokens[: one.end]) for s, one in zip(sequences, spans, strict=True) if one.tokens]
        return spans

    def _run(self, rows, feature_TM):  # type: ignore[no-untyped-def]
        state_TM = super()._run(rows, feature_TM)
        for text, end in zip(self._texts if self.on else [], rows.row_start_S[1:].tolist(), strict=False):
            bits = state_TM[end - 1].contiguous().view(torch.uint8).numpy().tobytes()
            self.again += text in self.known
            assert self.known.setdefault(text, bits) == bits, text
        self._texts = []
        return state_TM

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        found = super().draft(sequences, most)
        for sequence, count, drafts in zip(sequences, most, found, strict=True):
            self.made += 1
            if drafts and self.on and self.checked < 16 and (self.made % 8 == 0 or sequence.num_drawn < 2):
                self.checked += 1
                by = by_hand(self.decoder, self.module, sequence, count, TextView)
                assert drafts == by, (sequence.request.id, drafts)
        return found


def engine_of(decoder: Decoder, mixed: Mixed | None, num_pages: int = 200, **changes: Any) -> Engine:
    limits = {"page_tokens": 4, "batch_tokens": 40, "max_sequences": 6, "lookahead_tokens": 0} | changes
    draft = DraftConfig("mixed", 3, "fixed", model="a drafter of the test") if mixed is not None else DraftConfig()
    config = EngineConfig(**limits, draft=draft)
    runner = DecoderRunner(decoder, num_pages, 4, config)
    if mixed is not None:
        runner.drafter = noted = Noted(mixed, runner, num_pages, config, known={})
        noted.decoder = decoder
    return Engine(runner, config, num_pages, decoder.spec.max_position)


@pytest.mark.parametrize(
    ("dtype", "ids", "pages", "changes"),
    [("float32", IDS, 200, {"layers": 4}), ("bfloat16", None, 30, CHUNKS)],
    ids=["whole", "chunks"],
)
def test_drafts_are_those_of_the_text_and_change_nothing(
    dtype: str, ids: list[int] | None, pages: int, changes: dict[str, Any], make_decoder: Callable[..., Decoder]
) -> None:
    """A draft made from the state of another position, of a page's former owner, of drafts that did not stand or of a
    preempted sequence; a hit or a company that changes a bit of it; or a token, log-prob or kept set that changes."""
    decoder = make_decoder(dtype, **changes)
    plain = engine_of(decoder, None).generate(ASKED)
    engine = engine_of(decoder, mixed_of(decoder, ids), pages)
    for _ in range(2):  # the second time on pages that the first wrote
        assert columns(engine.generate(ASKED)) == columns(plain)
        engine.check_integrity()
        drafting = engine.scheduler.drafting
        assert not drafting.off, drafting.off
    drafter = drafting.drafter
    assert isinstance(drafter, Noted) and drafter.checked == 16
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 0 and engine.stats.cached_tokens > 0
    assert drafter.found_tokens > 0 and drafter.again > 40
    assert (engine.stats.preemptions > 0) == (pages == 30)


def test_states_of_other_weights_or_of_lost_memory_are_not_read(make_decoder: Callable[..., Decoder]) -> None:
    """After an update of the model or between the phases of a run, drafts go on from states that are of before."""
    decoder = make_decoder("float32", layers=4)
    engine = engine_of(decoder, mixed_of(decoder, IDS), 40)
    noted = engine.scheduler.drafting.drafter
    assert isinstance(noted, Noted)
    for one in ASKED[:4]:
        engine.submit(one)
    for _ in range(4):
        engine.step()
    decoder.load(dict(make_decoder("float32", seed=10, layers=4).export()).items())
    engine.receive(WeightVersion(1, "digest 1"))
    noted.on = False  # texts that began under the old weights are of both
    while engine.has_work:
        engine.step()
    noted.on, plain = True, engine_of(decoder, None).generate(ASKED[:4])
    for _ in range(2):
        noted.known.clear()
        noted.checked = 8
        done = engine.generate(ASKED[:4])
        assert [(one.tokens, one.logprobs) for one in done] == [(one.tokens, one.logprobs) for one in plain]
        assert noted.checked == 16
        assert not engine.scheduler.drafting.off, engine.scheduler.drafting.off
        engine.release_memory()
        for memory in [*noted.snapshots.slabs, *(pool.keys for pool in noted.pools)]:
            memory.fill_(float("nan"))  # large memory would be zeros


class Words(Gru):
    """The state says which tokens it has seen, in which order: exact in fp32 for six of them."""

    def advance(self, state_nX: Tensor, entered_nW: Tensor) -> tuple[Tensor, Tensor]:
        state_nX = state_nX * 10 + entered_nW
        return state_nX, state_nX


def read(snapshots: Snapshots, spans: list[Span], texts: list[list[int]]) -> list[list[int]]:
    """What is read of each row of a pass."""
    spans, scan = snapshots.scan(spans, texts)
    assert scan is not None
    rows = torch.tensor([[float(token)] for span in spans for token in span.tokens])
    found = scan.recur(0, rows, Words(1)).long().flatten().tolist()
    ends = np.cumsum([0, *(len(span.tokens) for span in spans)])
    return [found[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


def test_states_of_pages_are_of_the_position_that_is_asked_for() -> None:
    """A sibling goes on before its page is written, or from what the page's last owner left; a shorter or longer pass
    over a shared block leaves a state that is taken for another position's."""
    kept = Snapshots(5, 2, [1])
    stale = [7, 7, 7, 7]
    assert read(kept, [Span(0, stale, [1, 2])], [stale]) == [[7, 77, 777, 7777]]
    one, other = [1, 2, 3, 4, 5], [1, 2, 3, 4, 6]
    spans = [Span(0, one, [1, 2, 3]), Span(4, [6], [1, 2, 4])]  # the second reads what the first writes, in this pass
    assert read(kept, spans, [one, other]) == [[1, 12, 123, 1234, 12345], [12346]]
    assert kept.end_P.tolist() == [-1, 2, 4, 5, 5]
    one, other = [*one, 8], [*other, 9]
    assert read(kept, [Span(5, [9], [1, 2, 4]), Span(5, [8], [1, 2, 3])], [other, one]) == [[123469], [123458]]
    # A page of a block that two write, one to its end: who stopped before it begins the block again.
    both = [Span(2, [3, 4], [1, 2]), Span(2, [3], [1, 2])]
    assert read(kept, both, [one[:4], one[:3]]) == [[123, 1234], [123]]
    assert read(kept, [Span(3, [4], [1, 2])], [one[:4]]) == [[123, 1234]]
    assert read(kept, [Span(2, [3], [1, 2])], [one[:3]]) == [[123]]
    assert read(kept, [Span(4, [5], [1, 2, 3])], [one[:5]]) == [[123, 1234, 12345]]
    kept.forget()
    assert read(kept, [Span(4, [5], [1, 2, 3])], [one[:5]]) == [[1, 12, 123, 1234, 12345]]
