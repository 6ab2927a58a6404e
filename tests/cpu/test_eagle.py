"""A drafter of one layer in training: its rows by hand, its losses by hand and by autograd, its files."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.algo.pack import count_prompts, pack
from tandem.columns import Columns
from tandem.errors import ModelError
from tandem.kernels.norm import rms_norm_reference
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.speculate import training
from tandem.speculate.config import DrafterConfig
from tandem.speculate.eagle import Eagle
from tandem.speculate.files import open_eagle, save_eagle
from tandem.speculate.losses import LOSSES, Pair, log_match, overlap, teacher_of
from tandem.speculate.training import DrafterObjective
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Microbatch, Sample
from tests.cpu.test_draft_eagle import IDS, eagle_of
from tests.samples import paths_of

TEXTS = ((5, 9, 2, 11, 4, 8), (5, 9, 2, 11, 30, 31, 32), (5, 9, 50))  # the first two begin alike, and share rows
CONFIG = DrafterConfig(steps=3, loss="kl", decay=0.5, temperature=0.8)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """All tokens behind the second are predicted."""
    columns = [Columns.of(tokens=text, loss_mask=tuple(place >= 2 for place in range(len(text)))) for text in TEXTS]
    return [Sample(f"p/{number}", "p", one) for number, one in enumerate(columns)]


@pytest.fixture(scope="module")
def microbatch(samples: list[Sample]) -> Microbatch:
    (one,) = pack(samples, count_prompts(samples), 64)
    assert len(one.tokens_T) < sum(map(len, TEXTS))
    return one


class ByHand:
    """The states of all steps, one row at a time, in fp64 and differentiable: no mask, no pack, lists of keys."""

    def __init__(self, decoder: Decoder, eagle: Eagle, microbatch: Microbatch) -> None:
        self.eagle, self.paths = eagle, paths_of(microbatch)
        self.tokens = microbatch.tokens_T.tolist()
        self.weights = {name: one.detach().double().clone().requires_grad_() for name, one in eagle.export()}
        view, kept = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S), dict[int, Tensor]()
        with torch.no_grad():
            self.hidden_TM = decoder.forward(torch.tensor(self.tokens), view, watch=kept.__setitem__).double()
        self.tapped_TX = torch.cat([kept[layer].double() for layer in eagle.layers], 1)
        self.state, self.keyed = cache(self._state), cache(self._keyed)

    def _norm(self, x_M: Tensor, name: str) -> Tensor:
        return rms_norm_reference(x_M, self.weights[name], self.eagle.spec.model.norm_eps)

    def _turn(self, x_HD: Tensor, position: int) -> Tensor:
        cos, sin = (table[position].double() for table in self.eagle.tables)
        low, high = x_HD.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def feature(self, step: int, row: int) -> Tensor:
        if len(self.paths[row]) == 1:
            assert step == 0
            return torch.zeros(self.eagle.spec.model.width, dtype=torch.float64)
        before = self.paths[row][-2]
        return self.state(step - 1, before) if step else self.weights["fc.weight"] @ self.tapped_TX[before]

    def _keyed(self, step: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Turned query and key, and value, of a row."""
        embed_M = self.eagle.embed.value[self.tokens[row]].double()
        feature_M = self._norm(self.feature(step, row), "midlayer.hidden_norm.weight")
        x = torch.cat([self._norm(embed_M, "midlayer.input_layernorm.weight"), feature_M])
        size, position = self.eagle.spec.model.head_size, len(self.paths[row]) - 1
        q, k, v = ((self.weights[f"midlayer.self_attn.{n}_proj.weight"] @ x).view(-1, size) for n in "qkv")
        return self._turn(q, position), self._turn(k, position), v

    def _state(self, step: int, row: int) -> Tensor:
        path, own = self.paths[row], self.eagle.spec.model
        seen = [(max(0, step - (len(path) - 1 - place)), one) for place, one in enumerate(path)]
        keys, values = (torch.stack([self.keyed(*one)[part] for one in seen]) for part in (1, 2))
        group = own.heads // own.kv_heads
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("hd,phd->hp", self.keyed(step, row)[0], keys) / math.sqrt(own.head_size)
        attended = torch.einsum("hp,phd->hd", scores.softmax(-1), values).flatten()
        feature_M = self.feature(step, row)
        if self.eagle.spec.norm_first:
            feature_M = self._norm(feature_M, "midlayer.hidden_norm.weight")
        x = feature_M + self.weights["midlayer.self_attn.o_proj.weight"] @ attended
        y = self._norm(x, "midlayer.post_attention_layernorm.weight")
        gate, up = (self.weights[f"midlayer.mlp.{n}_proj.weight"] @ y for n in ("gate", "up"))
        return x + self.weights["midlayer.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)

    def pair(self, step: int, row: int, target: int, head: Tensor, temperature: float) -> Pair:
        ids = list(range(97)) if self.eagle.ids_V is None else self.eagle.ids_V.tolist()
        logp_V = ((self.hidden_TM[row] @ head.double().T) / temperature).log_softmax(-1)[ids]
        read_M = self._norm(self.state(step, row), "norm.weight")
        logq_V = ((self.weights["lm_head.weight"] @ read_M) / temperature).log_softmax(-1)
        return Pair(logp_V[None], logq_V[None], torch.tensor([ids.index(target) if target in ids else -1]))


def random_eagle(decoder: Decoder, ids: list[int] | None = None, norm_first: bool = False) -> Eagle:
    """One whose norms are not 1 and whose layers are all different."""
    eagle = eagle_of(decoder, ids, (0, 2))
    eagle.spec = replace(eagle.spec, norm_first=norm_first)
    generator = torch.Generator().manual_seed(3)
    for _, weight in eagle.weights():
        weight.value.add_(0.2 * torch.randn(weight.value.shape, generator=generator))
    eagle.repack()
    return eagle


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_rows_path_is_its_own_drafts(norm_first, make_decoder, any_path, microbatch) -> None:
    """A draft that sees the true keys of what it drafted itself, another anchor's drafts, a sibling's rows, or a
    feature of another position."""
    decoder = make_decoder("float32", layers=4)
    eagle = random_eagle(decoder, norm_first=norm_first)
    hand, steps = ByHand(decoder, eagle, microbatch), eagle.steps(microbatch, 4)
    tapped_TLM = hand.tapped_TX.float().view(len(hand.tokens), 2, -1)
    made = 0
    for number, (read_nM, own_n) in enumerate(eagle.unroll(steps, tapped_TLM, torch.tensor(hand.tokens))):
        for read_M, own in zip(read_nM, own_n.tolist(), strict=True):
            expected_M = hand._norm(hand.state(number, int(microbatch.rows_N[own])), "norm.weight")
            torch.testing.assert_close(read_M.double(), expected_M, rtol=2e-4, atol=2e-4)
            made += 1
    assert made == sum(len(text) - 2 for text in TEXTS) * 2 + (4 + 5 + 1 - 3) + (4 + 5 - 2 - 2)


@pytest.mark.parametrize(
    ("loss", "ids", "compiled"), [*((loss, IDS, True) for loss in LOSSES), ("kl", None, True), ("match", IDS, False)]
)
def test_loss_and_gradients_are_autograds(loss, ids, compiled, make_decoder, on_reference, microbatch) -> None:
    """A gradient that a step does not send back through its own path, a head that is learned from wrong rows, a teacher
    that is normalised over the pruned vocabulary, another temperature."""
    with nullcontext() if compiled else on_reference():
        _hold_to_autograd(loss, ids, make_decoder, microbatch)


def _hold_to_autograd(loss, ids, make_decoder, microbatch) -> None:
    decoder = make_decoder("float32", layers=4)
    hold_to_autograd(loss, decoder, random_eagle(decoder, ids), microbatch, ByHand)


def hold_to_autograd(loss: str, decoder: Decoder, eagle: Eagle, microbatch: Microbatch, by: type[ByHand]) -> None:
    config = replace(CONFIG, loss=loss)
    learner = Learner(decoder, LearnerConfig(), DrafterObjective(config, lambda _: eagle, save_eagle), 1)
    before = {name: weight.value.clone() for name, weight in decoder.weights()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "teacher_of", lambda hidden_NM, *more: teacher_of(_plain(hidden_NM), *more))
        result = learner.backward(microbatch)
    hand = by(decoder, eagle, microbatch)
    total, match, covered = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    rows, targets = microbatch.rows_N.tolist(), microbatch.predictions["tokens"].tolist()
    for step in range(config.steps):
        for row, target in zip(rows, targets, strict=True):
            if len(hand.paths[row]) > step:
                pair = hand.pair(step, row, target, decoder.head.value, config.temperature)
                total = total + config.decay**step * LOSSES[loss](pair).sum() / len(rows)
                match += float(log_match(pair).detach().exp() * pair.known_n) if step == 1 else 0.0
                covered += float(pair.logp_nV.exp().sum()) if step == 0 else 0.0
    torch.testing.assert_close(result.loss, total, rtol=1e-4, atol=1e-5)
    assert float(result.sums["accept_2"]) == pytest.approx(match, rel=1e-3)
    assert float(result.sums["coverage"]) == pytest.approx(covered, rel=1e-5)
    total.backward()
    found = {name: weight.grad for name, weight in eagle.weights()}
    for (slot, _), (name, grad) in zip(eagle._slots(), found.items(), strict=True):
        expected = torch.cat([hand.weights[one.name.removeprefix("model.")].grad for one in slot.stored])
        scale = float(expected.abs().max())
        torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=2e-4 * scale + 1e-9, msg=name)
    assert all(torch.equal(weight.value, before[name]) for name, weight in decoder.weights())
    assert all(weight.grad is None for _, weight in decoder.weights())


def _plain(hidden_NM: Tensor) -> Tensor:
    assert not hidden_NM.requires_grad, "the model's pass keeps what only its own gradients need"
    return hidden_NM


def test_losses_of_two_tokens() -> None:
    """An overlap, a match or a loss that is not the formula's. p = (0.5, 0.3) of what the drafter knows, q = (0.2,
    0.8); the text has the first token, then one that the drafter lacks."""
    p, q = torch.tensor([[0.5, 0.3]] * 2).log(), torch.tensor([[0.2, 0.8]] * 2).log()
    pair = Pair(p, q, torch.tensor([0, -1]))
    alpha = 0.2 + 0.3
    assert overlap(pair).tolist() == pytest.approx([alpha] * 2)
    # 1 / (max(p0, q0 p0 / q0) + max(p1, q1 p0 / q0) + what is outside) = 1 / (0.5 + 2.0 + 0.2)
    assert float(log_match(pair).exp()[0]) == pytest.approx(1 / 2.7)
    kl = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.8) - 0.8 * math.log(0.8)
    weight = math.exp(-3 * alpha)
    expected = {
        "ce": [-math.log(0.2), 0.0],
        "kl": [kl] * 2,
        "tv": [1 - alpha] * 2,
        "lk": [-math.log(alpha)] * 2,
        "lk_hybrid": [weight * kl + (1 - weight) * (1 - alpha)] * 2,
        "match": [math.log(2.7), 0.0],
    }
    assert {name: loss(pair).tolist() for name, loss in LOSSES.items()} == {
        name: pytest.approx(value, abs=1e-6) for name, value in expected.items()
    }


def test_a_match_is_as_likely_as_it_happens() -> None:
    """The chance of a match is another than that of two draws with one noise: what accepted_length is made of."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 12, generator=generator, dtype=torch.float64) * 1.5
    logp, logq = logits.log_softmax(-1)
    logq = logq[:9].log_softmax(-1)  # the drafter lacks three
    noise = -(-torch.rand(400_000, 12, generator=generator, dtype=torch.float64).log()).log()
    drawn, drafted = (logp + noise).argmax(-1), (logq + noise[:, :9]).argmax(-1)
    for token in range(9):
        pair = Pair(logp[None, :9], logq[None], torch.tensor([token]))
        of_it = drafted[drawn == token] == token
        error = math.sqrt(0.25 / len(of_it))
        assert float(log_match(pair).exp()) == pytest.approx(float(of_it.double().mean()), abs=5 * error)


def test_accepted_length_is_of_whole_chains(make_decoder, samples) -> None:
    """A chain that runs from one text into the next, or counts what no step could make."""
    decoder = make_decoder("float32", layers=4)
    eagle = random_eagle(decoder)
    learner = Learner(decoder, LearnerConfig(), DrafterObjective(CONFIG, lambda _: eagle, save_eagle), 1)
    found = learner.measure(samples, count_prompts(samples))
    stood, begun = dict[int, float](), dict[int, int]()
    for number, sample in enumerate(samples):
        (one,) = pack([sample], count_prompts([sample]), 64)
        hand, rows, targets = ByHand(decoder, eagle, one), one.rows_N.tolist(), one.predictions["tokens"].tolist()
        pairs = [(row, target) for row, target in zip(rows, targets, strict=True)]
        for first in range(len(pairs) - CONFIG.steps + 1):
            chain, begun[number] = 1.0, begun.get(number, 0) + 1
            for step in range(CONFIG.steps):
                pair = hand.pair(step, *pairs[first + step], decoder.head.value, CONFIG.temperature)
                chain *= float(log_match(pair).detach().exp())
                stood[number] = stood.get(number, 0.0) + chain
    total, count = sum(stood.values()), sum(begun.values())
    assert count == 2 + 3 and found["accepted_length"] == pytest.approx(1 + total / count, rel=1e-4)
    errors = [stood[number] - total / count * begun[number] for number in stood]
    half = 1.959964 * math.sqrt(sum(x * x for x in errors) * 2) / count
    assert found["accepted_length_high"] - found["accepted_length"] == pytest.approx(half, rel=1e-3)


# Of vLLM's vllm/model_executor/models/llama_eagle3.py, commit 00bd1493b3e8: what load_weights takes, `midlayer.` being
# its `layers.0.`, with d2t and t2d; embed_tokens may be absent and is then the target's.
VLLM_NAMES = {
    *(f"midlayer.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"midlayer.{x}.weight" for x in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
    *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_comes_back_to_the_same_bits(dtype, make_decoder, tmp_path: Path) -> None:
    """A tensor under a name that vLLM does not know, another token map, layers counted otherwise, bits that change."""
    decoder = make_decoder(dtype, layers=4)
    eagle = random_eagle(decoder, IDS, norm_first=True)
    save_eagle(tmp_path / "a", eagle)
    config, tensors = json.loads((tmp_path / "a/config.json").read_text()), load_file(tmp_path / "a/model.safetensors")
    assert {*tensors} == VLLM_NAMES and config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3] and config["draft_vocab_size"] == len(IDS)
    assert (tensors["d2t"] + torch.arange(len(IDS))).tolist() == IDS == tensors["t2d"].nonzero()[:, 0].tolist()
    again = open_eagle(tmp_path / "a", decoder)
    assert again.spec == eagle.spec and again.ids_V is not None and again.ids_V.tolist() == IDS
    for (name, one), (_, other) in zip(eagle.export(), again.export(), strict=True):
        assert torch.equal(one, other), name
    save_eagle(tmp_path / "b", again)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_reads_what_speculators_publishes(make_decoder, tmp_path: Path) -> None:
    """The layout of vllm-project/speculators: the layer's settings within, layers.0 for midlayer, an embedding."""
    decoder = make_decoder("float32", layers=4)
    eagle = random_eagle(decoder, IDS)
    save_eagle(tmp_path, eagle)
    path, tensors = tmp_path / "config.json", load_file(tmp_path / "model.safetensors")
    config = json.loads(path.read_text())
    own = ("draft_vocab_size", "norm_before_residual", "eagle_aux_hidden_state_layer_ids", "target_hidden_size")
    outer = {name: config.pop(name) for name in own} | {"architectures": ["Eagle3Speculator"]}
    path.write_text(json.dumps(outer | {"transformer_layer_config": config, "speculators_model_type": "eagle3"}))
    renamed = {name.replace("midlayer.", "layers.0."): one for name, one in tensors.items()}
    renamed["embed_tokens.weight"] = decoder.embed.value.clone()
    save_file(renamed, tmp_path / "model.safetensors")
    again = open_eagle(tmp_path, decoder)
    assert again.spec == eagle.spec
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(eagle.export(), again.export(), strict=True))


@pytest.mark.parametrize(
    ("changes", "tensors", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "is of LlamaForCausalLM; drafters that are read"),
        ({"norm_before_fc": True}, {}, "norm_before_fc is True, which changes the pass"),
        ({"hidden_size": 64, "target_hidden_size": 64}, {}, "drafts for a model of width 64 and 97 tokens"),
        ({"vocab_size": 96}, {}, "Choose one that was trained for it"),
        ({"num_hidden_layers": 2}, {}, "has 2 layers; supported: drafters of one"),
        ({}, {"d2t": None}, "no d2t that says which"),
        ({}, {"d2t": torch.zeros(len(IDS), dtype=torch.int64)}, "t2d and d2t name different tokens"),
        ({}, {"lm_head.weight": None}, "lacks 1 tensors, lm_head.weight first"),
        ({}, {"fc.weight": torch.zeros(32, 96)}, r"fc.weight has shape \[32, 96\]; the drafter needs \[32, 64\]"),
        ({}, {"embed_tokens.weight": torch.ones(97, 32)}, "brings an embedding of its own"),
        ({}, {"layers.1.mlp.up_proj.weight": torch.ones(1)}, "is unknown to a drafter of EAGLE-3"),
    ],
)
def test_a_wrong_file_says_why(
    changes: dict[str, Any], tensors: dict[str, Any], said: str, make_decoder, tmp_path: Path
) -> None:
    """A drafter of another model, or a damaged one, that drafts all the same; or a traceback for the user."""
    decoder = make_decoder("float32", layers=4)
    save_eagle(tmp_path, random_eagle(decoder, IDS))
    path, held = tmp_path / "config.json", load_file(tmp_path / "model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    kept = {name: one for name, one in (held | tensors).items() if one is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        open_eagle(tmp_path, decoder)
