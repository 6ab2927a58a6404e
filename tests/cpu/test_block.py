"""A drafter of a block at a time: its blocks by hand, in training and on pages; its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tandem.algo.pack import count_prompts, pack
from tandem.columns import Columns
from tandem.engine.batch import Sequence
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ModelError
from tandem.kernels.norm import rms_norm_reference
from tandem.kernels.sample import SamplingBatch
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.speculate.block import Block, BlockSpec
from tandem.speculate.config import DrafterConfig
from tandem.speculate.files import open_drafter, save_drafter
from tandem.speculate.losses import LOSSES, Pair
from tandem.speculate.states import BlockDrafter, head_of
from tandem.speculate.training import DrafterObjective
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Sample
from tests.cpu.test_draft import ASKED, CHUNKS, WINDOWS, columns
from tests.cpu.test_draft_eagle import IDS
from tests.samples import paths_of

CONFIG = DrafterConfig("dflash", steps=3, loss="kl", decay=0.5)


def block_of(decoder: Decoder, ids: list[int] | None = None, depth: int = 2) -> Block:
    """One whose norms are not 1."""
    spec = BlockSpec.of(decoder.spec, (0, 2), 4, depth)
    made = Block(replace(spec, mask_token=7), decoder.embed, decoder.head, torch.tensor(ids) if ids else None)
    made.begin(decoder.norm)
    generator = torch.Generator().manual_seed(5)
    for _, weight in made.weights():
        weight.value.add_(0.2 * torch.randn(weight.value.shape, generator=generator))
    made.repack()
    return made


class ByHand:
    """What a block says behind a text, in fp64 and differentiable: every layer's keys in a list, no mask."""

    def __init__(self, decoder: Decoder, block: Block) -> None:
        self.decoder, self.block = decoder, block
        self.weights = {name: one.detach().double().clone().requires_grad_() for name, one in block.export()}

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm_reference(x, self.weights[name], self.block.spec.model.norm_eps)

    def _turn(self, x_THD: Tensor, positions: list[int]) -> Tensor:
        cos, sin = (table[positions].double()[:, None] for table in self.block.tables)
        low, high = x_THD.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def said(self, tokens: list[int]) -> Tensor:
        """[B, M], what the head reads, of a block that begins with the last token."""
        own, kept = self.block.spec.model, dict[int, Tensor]()
        with torch.no_grad():
            self.decoder.forward(torch.tensor(tokens), PackView([0, len(tokens)]), watch=kept.__setitem__)
        tapped = torch.cat([kept[layer].double() for layer in self.block.layers], 1)[:-1]
        context = self._norm(tapped @ self.weights["fc.weight"].T, "hidden_norm.weight")
        context = torch.cat([torch.zeros(1, own.width, dtype=torch.float64), context])
        ids = [tokens[-1]] + [self.block.spec.mask_token] * (self.block.spec.block - 1)
        x, known = self.block.embed.value[ids].double(), list(range(len(tokens)))
        behind = list(range(len(tokens), len(tokens) + len(ids)))
        for layer in range(own.layers):
            name, size = f"layers.{layer}", own.head_size

            def cut(rows: Tensor, which: str, name: str = name, size: int = size) -> Tensor:
                return (rows @ self.weights[f"{name}.self_attn.{which}_proj.weight"].T).view(len(rows), -1, size)

            normed = self._norm(x, f"{name}.input_layernorm.weight")
            q, k, k_context = cut(normed, "q"), cut(normed, "k"), cut(context, "k")
            q = self._turn(self._norm(q, f"{name}.self_attn.q_norm.weight"), behind)
            k = self._turn(self._norm(torch.cat([k_context, k]), f"{name}.self_attn.k_norm.weight"), known + behind)
            v = torch.cat([cut(context, "v"), cut(normed, "v")])
            k, v = (one.repeat_interleave(own.heads // own.kv_heads, 1) for one in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
            attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            x = x + attended @ self.weights[f"{name}.self_attn.o_proj.weight"].T
            y = self._norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up, down = (self.weights[f"{name}.mlp.{one}_proj.weight"] for one in ("gate", "up", "down"))
            x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return self._norm(x, "norm.weight")


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "pruned"])
def test_loss_and_gradients_are_autograds(ids, make_decoder) -> None:
    """A block that sees another's masks, a later token's states or a sibling's rows; a prediction of another place; a
    gradient that does not come back to the context; a head or a model that learns."""
    texts = ((5, 9, 2, 11, 4, 8), (5, 9, 2, 11, 30, 31, 32), (5, 9, 50))
    samples = [
        Sample(f"p/{n}", "p", Columns.of(tokens=text, loss_mask=tuple(at >= 2 for at in range(len(text)))))
        for n, text in enumerate(texts)
    ]
    (microbatch,) = pack(samples, count_prompts(samples), 64)
    decoder = make_decoder("float32", layers=4)
    block = block_of(decoder, ids)
    learner = Learner(decoder, LearnerConfig(), DrafterObjective(CONFIG, lambda _: block, save_drafter), 1)
    result = learner.backward(microbatch)
    hand, total, tokens = ByHand(decoder, block), torch.zeros((), dtype=torch.float64), microbatch.tokens_T.tolist()
    kept = list(range(97)) if ids is None else ids
    with torch.no_grad():
        view = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S)
        hidden_TM = decoder.forward(torch.tensor(tokens), view).double()
    head, paths = decoder.head.value.double(), paths_of(microbatch)
    rows, targets, first = microbatch.rows_N.tolist(), microbatch.predictions["tokens"].tolist(), 0
    for count in microbatch.sample_tokens.tolist():
        for begin in range(count):  # steps // 2 is 1: at every place
            said_BM = hand.said([tokens[row] for row in paths[rows[first + begin]]])
            for step in range(min(CONFIG.steps, count - begin)):
                at = first + begin + step
                logp = (hidden_TM[rows[at]] @ head.T).log_softmax(-1)[kept]
                logq = (said_BM[step + 1] @ head[kept].T).log_softmax(-1)
                place = kept.index(targets[at]) if targets[at] in kept else -1
                loss = LOSSES["kl"](Pair(logp[None], logq[None], torch.tensor([place]))).sum()
                total = total + CONFIG.decay**step * loss / len(rows)
        first += count
    torch.testing.assert_close(result.loss, total, rtol=1e-4, atol=1e-5)
    total.backward()
    found = {name: weight.grad for name, weight in block.weights()}
    for (slot, _), (name, grad) in zip(block._slots(), found.items(), strict=True):
        names = [one.name.removeprefix("model.") for one in slot.stored]
        expected = torch.cat([hand.weights[one].grad for one in names])
        scale = float(expected.abs().max())
        torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=2e-4 * scale + 1e-9, msg=name)
    assert decoder.head.grad is None and block.head.grad is None


class Noted(BlockDrafter):
    """Holds a text's first, and every fourth, to that of the whole text, run anew in the house's own pass."""

    made = checked = 0

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        found = super().draft(sequences, most)
        for sequence, count, drafts in zip(sequences, most, found, strict=True):
            self.made += 1
            if drafts and (self.made % 4 == 0 or sequence.num_drawn < 3):
                self.checked += 1
                assert drafts == self.expected(sequence, count), (sequence.request.id, drafts)
        return found

    def expected(self, sequence: Sequence, count: int) -> list[int]:
        tokens, sampling = list(sequence.tokens), sequence.request.sampling
        columns = Columns.of(tokens=(*tokens, 0), loss_mask=(False,) * len(tokens) + (True,))
        sample = Sample("p/0", "p", columns)
        (microbatch,) = pack([sample], count_prompts([sample]), 4096)
        kept: dict[int, Tensor] = {}
        with torch.no_grad():
            ids = torch.tensor(tokens)
            self.decoder.forward(ids, PackView([0, len(tokens)]), watch=kept.__setitem__)
            tapped_TLM = torch.stack([kept[layer] for layer in self.module.layers], 1)
            blocks = self.module.steps(microbatch, 3)
            blocks.own_AB[:, 1:] = torch.arange(3)  # all of its places, though the text ends here
            read = [rows_nM[0] for rows_nM, _ in self.module.unroll(blocks, tapped_TLM, ids)]
        found: list[int] = []
        for place in range(min(count, 3)):
            how = SamplingBatch.stack([sampling], [sequence.request.seed], [len(tokens) + place])
            found += head_of(self.module).draw(read[place][None], how)
            if found[-1] in sampling.stop_token_ids:
                break
        return found


def engine_of(decoder: Decoder, block: Block | None, num_pages: int = 200) -> Engine:
    draft = DraftConfig("dflash", 3, "fixed", model="a drafter of the test") if block is not None else DraftConfig()
    config = EngineConfig(page_tokens=4, batch_tokens=40, max_sequences=6, lookahead_tokens=0, draft=draft)
    runner = DecoderRunner(decoder, num_pages, 4, config)
    if block is not None:
        runner.drafter = noted = Noted(block, runner, num_pages, config)
        noted.decoder = decoder
    return Engine(runner, config, num_pages, decoder.spec.max_position)


@pytest.mark.parametrize(
    ("dtype", "ids", "pages", "changes"),
    [("float32", IDS, 200, {"layers": 4}), ("bfloat16", None, 40, WINDOWS), ("bfloat16", IDS, 30, CHUNKS)],
    ids=["whole", "windows", "chunks"],
)
def test_drafts_are_those_of_the_text_and_change_nothing(
    dtype: str, ids: list[int] | None, pages: int, changes: dict[str, Any], make_decoder
) -> None:
    """A block that sees a slot of an earlier block, of a hit that left it unwritten or of a preempted sequence; or a
    token, log-prob or kept set that a drafter changes."""
    decoder = make_decoder(dtype, **changes)
    plain = engine_of(decoder, None).generate(ASKED)
    engine = engine_of(decoder, block_of(decoder, ids), pages)
    for _ in range(2):
        assert columns(engine.generate(ASKED)) == columns(plain)
        engine.check_integrity()
        assert not engine.scheduler.drafting.off, engine.scheduler.drafting.off
    drafter = engine.scheduler.drafting.drafter
    assert isinstance(drafter, Noted) and drafter.checked > 40
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 0 and engine.stats.cached_tokens > 0
    assert (engine.stats.preemptions > 0) == (pages < 200)


# Of vLLM's vllm/model_executor/models/qwen3_dflash.py, commit 1d87942bf4aa: what DFlashQwen3Model.load_weights takes
# where embedding and head are the target's.
VLLM_NAMES = {
    *(
        f"layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (
            *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
        )
    ),
    *("fc.weight", "hidden_norm.weight", "norm.weight"),
}


def test_a_file_comes_back_to_the_same_bits(make_decoder, tmp_path: Path) -> None:
    """A tensor under a name that vLLM does not know, layers counted otherwise, another mask, bits that change."""
    decoder = make_decoder("bfloat16", layers=4)
    block = block_of(decoder)
    save_drafter(tmp_path / "a", block)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert {*load_file(tmp_path / "a/model.safetensors")} == VLLM_NAMES and config["block_size"] == 4
    assert config["dflash_config"] == {"mask_token_id": 7, "target_layer_ids": [0, 2]}
    again = open_drafter(tmp_path / "a", decoder)
    assert isinstance(again, Block) and again.spec == block.spec
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(block.export(), again.export(), strict=True))
    config["dflash_config"]["causal"] = True
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="causal is True, which changes the pass"):
        open_drafter(tmp_path / "a", decoder)
