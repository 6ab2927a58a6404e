"""What `tandem numerics sensitivity` rounds, one tensor at a time: a matrix, rows that a product multiplies, keys or
values of a layer, the output head; each for the while of a forward pass in fp32.

Rows, heads of keys and values and logits are rounded each row of itself alone (`Format.by_row`), as they are where a
run rounds them; keys behind their rotation, as a cache keeps them, so a query sees its own key rounded too, but under
rules of many tokens at once (numerics/kv.py: `SpanRule`) and within sinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.kernels.attention import attention
from tandem.kernels.blocks import rounded_rows
from tandem.kernels.rounding import EIGHTS, Kept, Rounding, kept_of, rounding_of
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.layer import Layer, views
from tandem.models.view import Heads, PackView, turn_
from tandem.numerics.blocks import Format, format_of
from tandem.numerics.kv import SpanRule
from tandem.numerics.names import Ablated, check_kv_name, kv_parts

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS: tuple[Ablated, ...] = get_args(Ablated)
GROUP = 64  # of engine.weights int8 and int4
PRODUCTS = {"qkv": "x of q, k, v", "out": "x of o", "gate_up": "x of gate, up", "down": "x of down"}
HEAD = ("head", "x of head", "logits")
Apply = Callable[[Tensor], Tensor]


class Tally:
    """Signal and noise of what is rounded."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, x: Tensor, back: Tensor) -> Tensor:
        """The latter."""
        self.signal += float(x.double().square().sum())
        self.noise += float((x.double() - back.double()).square().sum())
        return back

    @property
    def decibels(self) -> float | None:
        """None where nothing is lost."""
        found = 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf
        return found if math.isfinite(found) else None


@dataclass(frozen=True, slots=True)
class Rounds:
    """What a format makes of a matrix, and of rows; None where nothing asks for it."""

    matrix: Apply | None
    rows: Apply | None
    kept: Kept | None = None  # of keys and values, where they have a rule that rows have not


def rounds_of(name: str, kinds: Sequence[Ablated]) -> Rounds:
    """Of fp32, bf16 or a name of model.weights, whose format behind the + is that of rows, keys and values, and logits.

    ConfigError for an unknown one, for one that rounds tiles where rows are asked for, and for rows that are not.
    """
    first, _, behind = name.partition("+")
    rows = [kind for kind in kinds if kind != "weights"]
    if behind and not rows:
        raise ConfigError(
            f"matrices alone are rounded, without their rows: leave +{behind} out, or add --tensors rows."
        )
    matrix = rows_of = None
    if "weights" in kinds or "logits" in kinds:
        matrix = partial(_plain, dtype=PLAIN[first]) if first in PLAIN else rounding_of(first).matrix
    named = behind or first
    if "kv" in rows and any(kv_parts(named)[1:]):
        check_kv_name("--format", named)
        if rows != ["kv"]:
            raise ConfigError(f"{named} is a rule of keys and values: leave all but kv out of --tensors.")
        return Rounds(matrix, None, kept_of(named))
    if rows:
        if named in PLAIN:
            return Rounds(matrix, partial(_plain, dtype=PLAIN[named]))
        try:
            rows_of = partial(rounded_rows, form=_row_format(named))
        except ConfigError as error:
            raise ConfigError(f"{' and '.join(rows)}: {error} Give a format of rows behind a +.") from error
    return Rounds(matrix, rows_of)


def _row_format(name: str) -> Format:
    if name == "w8a8":
        return EIGHTS
    return format_of(f"{name}_g{GROUP}" if name in ("int8", "int4") else name).by_row()


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def matrices(layer: Layer) -> Iterator[tuple[str, Weight, Tensor]]:
    """Of a layer: the column of each matrix, the weight that it lies in, and its part of the values."""
    for slot, weight in layer.weights():
        if slot.columns is None:
            continue
        for name, view in views(slot, weight):
            yield name.split(".")[-2].removesuffix("_proj"), weight, view


Trial = Callable[[Tally], AbstractContextManager[PackView]]  # gives the view that a pass runs with


def trials(
    layer: Layer, kinds: Sequence[Ablated], rounds: Rounds, bounds: Sequence[int]
) -> Iterator[tuple[str, Trial]]:
    """Of a layer: a column, and what holds its tensor rounded."""
    if "weights" in kinds and rounds.matrix is not None:
        for column, weight, view in matrices(layer):
            yield column, partial(_matrix, weight, view, rounds.matrix, bounds)
    if "rows" in kinds and rounds.rows is not None:
        for slot, weight in layer.weights():
            if slot.columns is not None:
                yield PRODUCTS[slot.name], partial(_rows, weight, rounds.rows, bounds)
    if "kv" in kinds:
        for place, column in enumerate(("keys", "values"), 1):
            yield column, partial(_cached, layer.index, (place,), rounds, bounds)


def cached_trial(rounds: Rounds, bounds: Sequence[int]) -> Trial:
    """Keys and values of all layers."""
    return partial(_cached, None, (1, 2), rounds, bounds)


@contextmanager
def _matrix(weight: Weight, view: Tensor, apply: Apply, bounds: Sequence[int], tally: Tally) -> Iterator[PackView]:
    kept = view.clone()
    view.copy_(tally.add(kept, apply(kept)))
    weight.repack()
    try:
        yield PackView(bounds)
    finally:
        view.copy_(kept)
        weight.repack()


class _Watched(Rounding):
    """Of rows alone, with what they lose."""

    apply: Apply
    tally: Tally

    def multiplied(self, x_TK: Tensor) -> Tensor:
        return self.tally.add(x_TK, self.apply(x_TK.contiguous()))


@contextmanager
def _rows(weight: Weight, apply: Apply, bounds: Sequence[int], tally: Tally) -> Iterator[PackView]:
    kept, watched = weight.rounding, _Watched()
    watched.apply, watched.tally = apply, tally
    weight.rounding = watched
    try:
        yield PackView(bounds)
    finally:
        weight.rounding = kept


class _CacheView(PackView):
    """Of which one layer's keys (place 1) or values (2) are rounded; None: of all layers."""

    def __init__(
        self, layer: int | None, places: Sequence[int], rounds: Rounds, bounds: Sequence[int], tally: Tally
    ) -> None:
        super().__init__(bounds)
        self.layer, self.places, self.rounds, self.tally = layer, places, rounds, tally

    def attend(self, layer: int, qkv_TW: Tensor, heads: Heads, tables: tuple[Tensor, Tensor]) -> Tensor:
        if self.layer not in (None, layer):
            return super().attend(layer, qkv_TW, heads, tables)
        qkv_TW, kept = qkv_TW.contiguous(), self.rounds.kept
        turn_(qkv_TW, self.positions_T, heads, tables)
        cut = list(heads.cut(qkv_TW))
        if kept is not None and kept.span is not None:
            return self._attend_spans(cut, replace(heads, kept=kept), kept.span)
        for place in self.places:
            one_TKD = cut[place].contiguous()
            if kept is not None:
                made_TKD = kept.rounded(one_TKD, self.positions_T)
            else:
                assert self.rounds.rows is not None
                made_TKD = self.rounds.rows(one_TKD.view(-1, heads.size)).view(one_TKD.shape)
            cut[place] = self.tally.add(one_TKD, made_TKD)
        return attention(cut[0], cut[1], cut[2], self.paths, heads.reach).flatten(1)

    def _attend_spans(self, cut: Sequence[Tensor], heads: Heads, rule: SpanRule) -> Tensor:
        spans = self.spans(heads)
        assert spans is not None
        rules = (rule.keys if 1 in self.places else None, rule.values if 2 in self.places else None)
        made = spans.with_copies(cut[1], cut[2], replace(rule, keys=rules[0], values=rules[1]))
        for place in self.places:
            self.tally.add(cut[place][spans.source_C], made[place - 1][len(cut[place]) :])
        return attention(cut[0], *made, spans.paths, heads.reach).flatten(1)


@contextmanager
def _cached(
    layer: int | None, places: Sequence[int], rounds: Rounds, bounds: Sequence[int], tally: Tally
) -> Iterator[PackView]:
    yield _CacheView(layer, places, rounds, bounds, tally)


def head_trials(
    decoder: Decoder, final_TM: Tensor, rounds: Rounds
) -> Iterator[tuple[str, Callable[[Tally], Callable[[slice], Tensor]]]]:
    """Of the output head: a column, and log-probs of rows [N, V] with its matrix, its rows or its logits rounded."""
    matrix, rows = rounds.matrix, rounds.rows
    assert matrix is not None and rows is not None

    def of_matrix(tally: Tally) -> Callable[[slice], Tensor]:
        value_VM = decoder.head.value
        turned_MV = tally.add(value_VM, matrix(value_VM)).T
        return lambda some: (final_TM[some] @ turned_MV).log_softmax(-1)

    def of_rows(tally: Tally) -> Callable[[slice], Tensor]:
        back_TM = tally.add(final_TM, rows(final_TM.contiguous()))
        return lambda some: decoder.logits(back_TM[some]).log_softmax(-1)

    def of_logits(tally: Tally) -> Callable[[slice], Tensor]:
        def after(some: slice) -> Tensor:
            exact = decoder.logits(final_TM[some])
            return tally.add(exact, rows(exact)).log_softmax(-1)

        return after

    yield from zip(HEAD, (of_matrix, of_rows, of_logits), strict=True)
