"""A drafter on the target's hidden states, on pages: what it drafts, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.engine.batch import Sequence
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.kernels.sample import SamplingBatch
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.speculate.eagle import Eagle, EagleSpec
from tandem.speculate.states import EagleDrafter, head_of
from tests.cpu.test_draft import ASKED, CHUNKS, WINDOWS, columns

IDS = [token for token in range(97) if token % 5 != 3]


def eagle_of(decoder: Decoder, ids: list[int] | None = None, layers: tuple[int, ...] = ()) -> Eagle:
    """A new one."""
    spec = EagleSpec.of(decoder.spec, layers, len(ids) if ids else 0)
    return Eagle(spec, decoder.embed, torch.tensor(ids) if ids else None).begin(decoder.norm, decoder.head)


def tapped(decoder: Decoder, eagle: Eagle, tokens: list[int]) -> torch.Tensor:
    """The target's states [T, L, M] of a text by itself."""
    kept: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        decoder.forward(torch.tensor(tokens), PackView([0, len(tokens)]), watch=kept.__setitem__)
    return torch.stack([kept[layer] for layer in eagle.layers], 1)


def by_hand(
    decoder: Decoder, eagle: Eagle, sequence: Sequence, count: int, view: type[PackView] = PackView
) -> list[int]:
    """What is drafted of a text, the whole of it run anew for each draft: no page, no hit, nothing kept."""
    tokens, sampling = list(sequence.tokens), sequence.request.sampling
    known = len(tokens)
    with torch.no_grad():
        fused = eagle.fused(tapped(decoder, eagle, tokens[:-1])) if known > 1 else torch.empty(0, decoder.spec.width)
        features = [torch.zeros(decoder.spec.width, dtype=decoder.dtype), *fused]
        while len(tokens) < known + count:
            state_TM = eagle.step(torch.stack(features), torch.tensor(tokens), view([0, len(tokens)]))
            how = SamplingBatch.stack([sampling], [sequence.request.seed], [len(tokens)])
            tokens += head_of(eagle).draw(eagle.read(state_TM[-1:]), how)
            features.append(state_TM[-1])
            if tokens[-1] in sampling.stop_token_ids:
                break
    return tokens[known:]


class Noted(EagleDrafter):
    """Holds a text's first, and every fourth, to the one by hand."""

    made = checked = 0

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        found = super().draft(sequences, most)
        for sequence, count, drafts in zip(sequences, most, found, strict=True):
            self.made += 1
            if drafts and (self.made % 4 == 0 or sequence.num_drawn < 3):
                self.checked += 1
                assert drafts == by_hand(self.decoder, self.module, sequence, count), (sequence.request.id, drafts)
        return found


def engine_of(decoder: Decoder, eagle: Eagle | None, num_pages: int = 200, **changes: Any) -> Engine:
    limits = {"page_tokens": 4, "batch_tokens": 40, "max_sequences": 6, "lookahead_tokens": 0} | changes
    draft = DraftConfig("eagle3", 3, "fixed", model="a drafter of the test") if eagle is not None else DraftConfig()
    config = EngineConfig(**limits, draft=draft)
    runner = DecoderRunner(decoder, num_pages, 4, config)
    if eagle is not None:
        runner.drafter = noted = Noted(eagle, runner, num_pages, config)
        noted.decoder = decoder
    return Engine(runner, config, num_pages, decoder.spec.max_position)


@pytest.mark.parametrize(
    ("dtype", "ids", "pages", "changes"),
    [("float32", IDS, 200, {"layers": 4}), ("bfloat16", None, 40, WINDOWS), ("bfloat16", IDS, 30, CHUNKS)],
    ids=["whole", "windows", "chunks"],
)
def test_drafts_are_those_of_the_text_and_change_nothing(
    dtype: str, ids: list[int] | None, pages: int, changes: dict[str, Any], make_decoder: Callable[..., Decoder]
) -> None:
    """A draft made of another position's states, of a slot that a hit left unwritten, of a draft that did not stand or
    of a preempted sequence's; or a token, log-prob or kept set that a drafter changes."""
    decoder = make_decoder(dtype, **changes)
    eagle = eagle_of(decoder, ids, (0, 2))
    plain = engine_of(decoder, None).generate(ASKED)
    engine = engine_of(decoder, eagle, pages)
    for _ in range(2):  # the second time on pages that the first wrote
        assert columns(engine.generate(ASKED)) == columns(plain)
        engine.check_integrity()
        drafting = engine.scheduler.drafting
        assert not drafting.off, drafting.off
    assert isinstance(drafting.drafter, Noted) and drafting.drafter.checked > 40
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 0 and engine.stats.cached_tokens > 0
    drafter = drafting.drafter
    assert drafter.ingested_tokens > 0 and drafter.found_tokens > 0
    assert 0 < drafter.covered_tokens < drafter.seen_tokens or not ids
    assert (engine.stats.preemptions > 0) == (pages < 200)
