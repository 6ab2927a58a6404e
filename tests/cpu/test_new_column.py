"""A value of tokens that is one line in COLUMNS and then gets lost on its way to the learner."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tandem import columns
from tandem.algo import pack as pack_module
from tandem.algo.pack import count_prompts, pack
from tandem.algo.tensors import to_tensors
from tandem.columns import Column, Columns
from tandem.types import Sample


def test_a_new_column_reaches_the_loss_and_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column is one line for numbers of fp64 alone: others are missing in the loss without a word, those of rows
    lie beside other rows, or the tokens of a part that lacks one are filled with another shape."""
    made = {
        "weights": Column(np.float32, "of a token", absent=1.0),
        "hints": Column(bool, "of a token", absent=False),
        "experts": Column(np.int32, "chosen, two a token", absent=-1, rows=True, ndim=2),
    }
    monkeypatch.setattr(columns, "COLUMNS", {**columns.COLUMNS, **made})
    monkeypatch.setattr(pack_module, "COLUMNS", columns.COLUMNS)
    samples = []
    for name, answer in (("p/0", (7, 8)), ("p/1", (7, 9, 3)), ("q/0", (5,))):
        prompt = (1, 2, 3) if name[0] == "p" else (4,)
        tokens, mask = (*prompt, *answer), [False] * len(prompt) + [True] * len(answer)
        held = Columns.of(tokens=tokens, loss_mask=mask, logprobs=[0.0] * len(tokens), advantages=[0.0] * len(tokens))
        if name != "q/0":
            experts = [[token, position] for position, token in enumerate(tokens)]
            held = held.having(weights=[0.5 * token for token in tokens], hints=mask, experts=experts)
        samples.append(Sample(name, name[0], held))
    (microbatch,) = pack(samples, count_prompts(samples), 64)
    batch = to_tensors(microbatch)
    assert {name: batch[name].dtype for name in ("weights", "hints")} == {"weights": torch.float32, "hints": torch.bool}
    assert batch["weights"].tolist() == [0.5 * t if t != 5 else 1.0 for t in batch.targets_N.tolist()]
    assert batch["hints"].tolist() == [t != 5 for t in batch.targets_N.tolist()]
    assert "experts" not in batch.columns_N and batch.columns_T["experts"].dtype == torch.int32
    position_T = np.concatenate(
        [
            first + np.arange(stop - start)
            for first, (start, stop) in zip(microbatch.first_S, pairwise(microbatch.segments_S.tolist()), strict=True)
        ]
    )
    expected = [[-1, -1] if t == 4 else [t, p] for t, p in zip(batch.tokens_T.tolist(), position_T, strict=True)]
    assert batch.columns_T["experts"].tolist() == expected
