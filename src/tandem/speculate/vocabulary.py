"""What drafts are drawn from: a drafter's output head, or the rows of it whose tokens are drawn most.

The head is most of a small drafter: of SmolLM2's 49,152 tokens, 4,096 are nearly all of what a task's answers are made
of, and a head of those is a twelfth (FR-Spec, Zhao et al., 2502.14856). The target's own head stays whole, so a token
that is not kept is drawn all the same; it is never drafted. Noise is that of each token's own id.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.errors import ConfigError
from tandem.kernels.head import draw
from tandem.kernels.linear import logits
from tandem.kernels.sample import SamplingBatch, sample
from tandem.kernels.weight import Weight


class Ranking:
    """How often each token was drawn, of the latest so many.

    >>> ranking = Ranking(vocab=9, latest=4, always=[8])
    >>> ranking.add([5, 5, 7, 3]); ranking.most(3).tolist()
    [3, 5, 8]
    """

    def __init__(self, vocab: int, latest: int, always: Iterable[int]) -> None:
        """always: that are kept however rare they are, stop tokens."""
        self.counts_V = np.zeros(vocab, dtype=np.int64)
        self.latest, self.always, self.total = latest, sorted(set(always)), 0
        self._texts: deque[array[int]] = deque()

    def add(self, tokens: Sequence[int]) -> None:
        known = array(
            "q", [token for token in tokens if token < len(self.counts_V)]
        )  # the target may have more, padded
        self._texts.append(known)
        self.total += len(known)
        np.add.at(self.counts_V, known, 1)
        while self.total > self.latest and len(self._texts) > 1:
            oldest = self._texts.popleft()
            self.total -= len(oldest)
            np.add.at(self.counts_V, oldest, -1)

    def most(self, count: int) -> NDArray[np.int64]:
        """Ids of so many tokens, ascending: those that are always kept, and of the others the most frequent, ties by
        lower id, which merges of byte pairs make the more frequent one."""
        order_V = np.argsort(-self.counts_V, kind="stable")
        others = order_V[~np.isin(order_V, self.always)][: max(0, count - len(self.always))]
        return np.sort(np.concatenate([others, np.array(self.always, dtype=np.int64)]))


class DraftHead:
    """Draws drafts. Whole until a subset of its rows is kept, by `keep` or by what is counted.

    weight: [V, M]. vocab: ids from there on are never drafted. kept: rows that are to be kept, 0: all. ranking: of the
    tokens that are drawn, by which they are chosen.
    """

    def __init__(self, weight: Weight, vocab: int, kept: int = 0, ranking: Ranking | None = None) -> None:
        self._weight, self._vocab, self._kept, self.ranking = weight, vocab, kept, ranking
        self._ids_N: Tensor | None = None  # int64, ascending
        self._rows = weight
        self._counted = 0  # since the rows were chosen
        self.seen = self.covered = 0  # tokens that were drawn since some were chosen, and those of them that are kept
        if vocab < weight.value.shape[0]:
            self._choose(np.arange(vocab))

    @staticmethod
    def of_rows(rows: Weight, ids_N: Tensor, vocab: int) -> DraftHead:
        """A head that has rows of these tokens of `vocab` alone, [N, M]."""
        made = DraftHead(rows, vocab, 0, Ranking(vocab, 0, ()))  # which counts what it covers, and chooses nothing
        made._ids_N = ids_N
        return made

    @property
    def ids(self) -> list[int] | None:
        """That are kept; None: all."""
        return None if self._ids_N is None else self._ids_N.tolist()

    def keep(self, ids: Iterable[int]) -> None:
        """The rows of these tokens and those that are always kept from now on, whatever is drawn."""
        always = self.ranking.always if self.ranking is not None else []
        self._choose(np.unique(np.array([*ids, *always], dtype=np.int64)))
        self._kept = 0

    def _choose(self, ids_N: NDArray[np.int64]) -> None:
        self._ids_N = torch.from_numpy(ids_N)
        whole_VM = self._weight.served()
        self._rows = Weight(whole_VM[self._ids_N.to(whole_VM.device)], matrix=True)
        self._rows.narrow = self._weight.narrow
        self._counted = 0

    def drawn(self, tokens: Sequence[int]) -> None:
        """The target drew these. Rows are chosen anew as often as what is counted changes by a quarter, and at first
        when as many tokens were drawn as are kept."""
        if self.ranking is None:
            return
        if self._ids_N is not None:
            self.seen += len(tokens)
            self.covered += int(np.isin(np.array(tokens, dtype=np.int64), self._ids_N.numpy()).sum())
        if not self._kept:
            return
        self.ranking.add(tokens)
        self._counted += len(tokens)
        if self._counted >= max(self._kept, self.ranking.total // 4):
            self._choose(self.ranking.most(self._kept))

    def draw(self, hidden_NM: Tensor, sampling: SamplingBatch) -> list[int]:
        """A token for each row of final hidden states, with the noise that the target has for it. NonFiniteError."""
        if self._ids_N is None:
            return draw(hidden_NM, self._rows, sampling)[0].tolist()
        all_NV = torch.full((len(sampling), self._vocab), -torch.inf, device=hidden_NM.device)
        all_NV[:, self._ids_N] = logits(hidden_NM, self._rows)
        return sample(all_NV, sampling)[0].tolist()


def read_ids(path: Path, vocab: int) -> list[int]:
    """The tokens of a map as SGLang and vLLM read it: a file of torch with a list or a tensor of ids. ConfigError."""
    try:
        found = torch.load(path, weights_only=True)
        ids = [int(one) for one in (found.flatten().tolist() if isinstance(found, Tensor) else found)]
    except Exception as error:  # recorded boundary: torch's own, of any kind
        raise ConfigError(
            f"engine.draft.vocabulary_of {path} is no list of token ids ({error}). Give a file that torch.save wrote "
            "of one, or a text, or a run."
        ) from error
    wrong = [one for one in ids if not 0 <= one < vocab]
    if wrong or not ids:
        what = f"{wrong[0]}, outside the vocabulary of {vocab}" if wrong else "none"
        raise ConfigError(f"engine.draft.vocabulary_of {path} has token ids of another model: {what}.")
    return ids
