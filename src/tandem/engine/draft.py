"""Tokens that may follow a context, to be run with its last one and kept where the model draws them too.

A draft stands if and only if it is the token that the model draws at its position. Noise depends on (seed, position,
token id) alone, and a row's bits on no other row, so tokens and log-probs are those of a run without drafts, to the
bit: a drafter decides how many steps it takes, and nothing else.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.engine.batch import Sequence

LONGEST, SHORTEST = 4, 2  # tokens at a context's end that are looked for


class Drafter:
    """Who drafts for the sequences of one engine."""

    found_tokens = 0  # of contexts, that one with pages of its own found there; since it was made
    ingested_tokens = 0  # of contexts, that it ran itself
    seen_tokens = 0  # of ended answers, while it drafted of a part of the vocabulary alone
    covered_tokens = 0  # of those, that are in that part

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        """Live sequences that run one token each, and how many drafts each may get -> its drafts, ids of the
        vocabulary. Sequences are as they were at the last call or longer, and come in any company and order."""
        raise NotImplementedError

    def branches(self, sequences: list[Sequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        """As `draft`, but of each sequence up to `width` drafts that may follow it, the likeliest first: paths of a
        tree, of which one at most will be what the model draws."""
        return [[drafts] for drafts in self.draft(sequences, most)]

    def probabilities(self, sequences: list[Sequence]) -> list[Tensor | None]:
        """Of what `draft` just gave for these sequences, under engine.draft.verify=reject: what each draft was drawn
        from, with engine/reject.py's `proposed`: [drafts, V] fp32. None where drafts are sure. Whether a draft is given
        must not hang on the draft itself, or texts are distributed otherwise than the model says."""
        return [None] * len(sequences)

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended, with all that it drew; it is drafted for no more."""

    def release_memory(self) -> None:
        """Nothing is live, and what the engine's pages hold is lost: the memory of what lies beside them may go too."""


class PromptLookup(Drafter):
    """What followed the last tokens of a context where it had them before; of the most of them, and the latest time.

    2,000 tokens take 37 us (Saxena, "Prompt Lookup Decoding", 2023).
    """

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [lookup(sequence.tokens, count) for sequence, count in zip(sequences, most, strict=True)]

    def branches(self, sequences: list[Sequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        asked = zip(sequences, most, width, strict=True)
        return [lookups(sequence.tokens, count, wide) for sequence, count, wide in asked]


def lookup(tokens: list[int], most: int) -> list[int]:
    """At most so many tokens that followed the last ones before.

    >>> lookup([5, 6, 7, 8, 9, 6, 7], 2), lookup([5, 6, 7], 2), lookup([6, 7, 6, 7], 3)
    ([8, 9], [], [6, 7])
    """
    return next(iter(lookups(tokens, most, 1)), [])


def lookups(tokens: list[int], most: int, width: int) -> list[list[int]]:
    """What followed the last ones each time before, the most of them and the latest first; at most `width` that differ.

    >>> lookups([6, 7, 1, 6, 7, 2, 6, 7, 1, 6, 7], 2, 3)
    [[2, 6], [1, 6]]
    """
    found: list[list[int]] = []
    context = array("i", tokens)
    size, raw = context.itemsize, context.tobytes()
    for count in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        ending, before = raw[-count * size :], len(raw) - 1
        while (before := raw.rfind(ending, 0, before)) >= 0:
            if before % size == 0:
                start = before // size + count
                followed = tokens[start : start + most]
                if followed and followed not in found:
                    found.append(followed)
                if len(found) >= width or not most:
                    return found
            before += len(ending) - 1
    return found
