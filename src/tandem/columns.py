"""Values of tokens by name, a NumPy array each: what Completion, Trajectory, Sample and Microbatch hold.

A column is one line in COLUMNS; whoever makes its values puts them in, whoever needs them asks by name, and nothing on
the way names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Column:
    """How a column is stored, and what stands for the tokens of a part that lacks it.

    >>> COLUMNS["versions"].absent
    -1
    """

    dtype: type[np.generic] | type[object] | type[bool]
    meaning: str
    absent: Any = None  # a value; None: all parts have the column or none has
    absent_as: str = ""  # or the column whose values stand in
    rows: bool = False  # the learner's forward pass has it at every row; else the loss has it at each trained token
    ndim: int = 1  # 2: a token has several numbers, as many as all tokens of a batch have


COLUMNS: Mapping[str, Column] = {
    "tokens": Column(np.int32, "token id"),
    "loss_mask": Column(bool, "the policy sampled the token", absent=False),
    "logprobs": Column(np.float64, "behaviour log-prob, nats, of the distribution really sampled from", absent=0.0),
    "versions": Column(np.int32, "weight step that sampled the token; -1: it was not sampled", absent=-1),
    "kept": Column(object, 'bytes: the ids that it was drawn from (kept_ids); b"": nothing was filtered', absent=b""),
    "unfiltered_logprobs": Column(np.float64, "log-prob before top-k, top-p and min-p", absent_as="logprobs"),
    "likely": Column(object, 'bytes: the most likely tokens (likely_tokens); b"": nobody asked', absent=b""),
    "advantages": Column(np.float64, "0.0 where the token is not trained", absent=0.0),
    "reference_logprobs": Column(np.float64, "of the reference policy, where a KL term asks for them"),
    "preferred": Column(
        np.int32,
        "of a sample: 1 it was chosen or liked, 0 it was not; -1: the answer to another prompt (KTO)",
        absent=0,
    ),
    "margins": Column(np.float64, "of a pair: by how much the chosen one is better, where that is known", absent=0.0),
    "proximal_logprobs": Column(np.float64, "the learner's own, before the step's first update"),
    "source_logprobs": Column(np.float64, "the learner's forward under the weights that sampled"),
    "turns": Column(np.int32, "turn of its program that sampled the token; -1: none did", absent=-1),
    "step_rewards": Column(np.float64, "at the last token of a turn: what it earned", absent=0.0),
    "states": Column(object, "text, at the last token of a turn: the state that it was taken in", absent=""),
    "values": Column(np.float64, "the critic's, before the token, by its weights before the step's first update"),
    "returns": Column(np.float64, "what the critic should have said"),
    "failed": Column(bool, "of a turn that did not do what it should: an error, a repetition", absent=False),
    "loss_weights": Column(np.float64, "of the token in the batch's loss; below 0: made less likely", absent=0.0),
    "teacher_ids": Column(np.int32, "the teacher's most likely tokens in the token's place", ndim=2),
    "teacher_logprobs": Column(np.float32, "the teacher's, of those, and of all others together", ndim=2),
    "spans": Column(np.int32, "which span of equal text a token is of, by another model's tokens; -1: none", absent=-1),
    "span_logprobs": Column(np.float64, "at the last token of a span: the teacher's log-prob of its text", absent=0.0),
    "distil_weights": Column(np.float64, "of the distance of hidden states from the teacher's", absent=1.0),
    "selection_weights": Column(np.float64, "of the sample's group, for how likely it was to be kept; mean 1"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Columns of equal length. Arrays are read-only.

    >>> seen = Columns.of(tokens=(5, 2), logprobs=(-0.1, -0.7))
    >>> Columns.concat([Columns.of(tokens=(9,)), seen])["logprobs"].tolist()
    [0.0, -0.1, -0.7]
    """

    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, **values: Sequence[Any] | Array) -> Columns:
        """From sequences; each gets its column's dtype. An array that has it is not copied: its owner leaves it be."""
        return cls({}).having(**values)

    def having(self, **values: Sequence[Any] | Array) -> Columns:
        """These columns and others, or others in place of them."""
        made = dict(self.arrays)
        for name, given in values.items():
            assert name in COLUMNS, f"{name} is no column; columns: {', '.join(COLUMNS)}"
            array = np.asarray(given, dtype=COLUMNS[name].dtype)
            assert array.ndim == COLUMNS[name].ndim, f"{name} has shape {array.shape}"
            made[name] = _frozen(array.view())
        lengths = {name: len(array) for name, array in made.items()}
        assert len(set(lengths.values())) <= 1, f"columns of different lengths: {lengths}"
        return Columns(made)

    @classmethod
    def concat(cls, parts: Sequence[Columns]) -> Columns:
        """One after another. A column that some parts lack is filled up as COLUMNS says."""
        names = [name for name in COLUMNS if any(name in part.arrays for part in parts)]
        like = {name: next(part.arrays[name] for part in parts if name in part.arrays) for name in names}
        whole = {name: np.concatenate([part._or_absent(name, like[name]) for part in parts]) for name in names}
        return cls({name: _frozen(array) for name, array in whole.items()})

    def _or_absent(self, name: str, like: Array) -> Array:
        if name in self.arrays:
            return self.arrays[name]
        column = COLUMNS[name]
        if column.absent_as:
            return self._or_absent(column.absent_as, like)
        assert column.absent is not None, f"some parts lack {name}, and nothing can stand for it"
        return np.full((len(self), *like.shape[1:]), column.absent, dtype=column.dtype)

    def slice(self, start: int, stop: int | None = None) -> Columns:
        """Tokens [start, stop)."""
        return Columns({name: array[start:stop] for name, array in self.arrays.items()})

    def take(self, places: Array) -> Columns:
        """The tokens at `places`, in their order."""
        return Columns({name: _frozen(array[places]) for name, array in self.arrays.items()})

    def without(self, *names: str) -> Columns:
        """All but these."""
        assert COLUMNS.keys() >= set(names), f"{names} are not all columns; columns: {', '.join(COLUMNS)}"
        return Columns({name: array for name, array in self.arrays.items() if name not in names})

    def get(self, name: str) -> Array | None:
        """The column, or None."""
        assert name in COLUMNS, f"{name} is no column; columns: {', '.join(COLUMNS)}"
        return self.arrays.get(name)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __len__(self) -> int:
        """Tokens."""
        for array in self.arrays.values():
            return len(array)
        return 0

    def __eq__(self, other: object) -> bool:
        """Same columns with the same values; NaN equals NaN."""
        if not isinstance(other, Columns):
            return NotImplemented
        return self.arrays.keys() == other.arrays.keys() and all(
            np.array_equal(array, other.arrays[name], equal_nan=array.dtype.kind == "f")
            for name, array in self.arrays.items()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """NumPy's arrays come back writable: they are frozen again."""
        return _restored, (dict(self.arrays),)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; of a column of objects, their pointers."""
        return sum(array.nbytes for array in self.arrays.values())


def ranges(starts: Array, lengths: Array) -> Array:
    """starts[0], starts[0] + 1, ... lengths[0] of them, then those of the next.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _restored(arrays: dict[str, Array]) -> Columns:
    return Columns.of(**arrays)


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array
