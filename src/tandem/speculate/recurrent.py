"""Layers that keep a state in place of keys: a GRU whose gates do not read it (minGRU, arXiv 2410.01201) and linear
attention with a decay (arXiv 2006.16236), and their pass over the rows of a pack.

Both are one recurrence, s <- s + z (n - s): n is what a token has to say, z in (0, 1) how much of the state it
replaces. A gate is x / (1 + |x|), moved and scaled: all is of operations that IEEE 754 rounds exactly, each by itself,
and sums have one order. So a row's bits hang on no row beside it and on no length of a vector, and a state that is
taken up again goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.weight import Weight
from tandem.models.layer import DenseFeed, Part, Zeros
from tandem.models.parts import Slot, Stored, dense_slots
from tandem.models.spec import ModelSpec
from tandem.models.view import Heads, Tables, View
from tandem.speculate.config import Mixer
from tandem.speculate.steps import Step, StepView

MIXERS: tuple[Mixer, ...] = get_args(Mixer)
QUICKEST, SLOWEST = 0.5, 1 / 64  # what of a state a new drafter's channels replace in a token, from first to last


def share(x: Tensor) -> Tensor:
    """In (0, 1), rising.

    >>> share(torch.tensor([-3.0, 0.0, 1.0])).tolist()
    [0.125, 0.5, 0.75]
    """
    return 0.5 + 0.5 * (x / (1.0 + x.abs()))


def share_of(z: Tensor) -> Tensor:
    """The x whose share is z.

    >>> share_of(torch.tensor([0.125, 0.5, 0.75])).tolist()
    [-3.0, 0.0, 1.0]
    """
    y = 2.0 * z - 1.0
    return y / (1.0 - y.abs())


def added(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, halves on halves.

    >>> added(torch.tensor([[1.0, 2.0, 4.0]]), 1).tolist()
    [7.0]
    """
    while (size := x.shape[dim]) > 1:
        half = size // 2
        both = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat([both, x.narrow(dim, size - 1, 1)], dim) if size % 2 else both
    return x.squeeze(dim)


class Rule(Protocol):
    """How a state of X numbers goes on, in fp32 (or what is wider)."""

    numbers: int  # X

    def advance(self, state_nX: Tensor, entered_nW: Tensor) -> tuple[Tensor, Tensor]:
        """The states behind n tokens, each of another text, and what is read of them, [n, Y]. Differentiable."""
        ...


class Gru:
    """A number a channel; gates and what is new come from the token alone. Entered: gates, then what is new."""

    def __init__(self, width: int) -> None:
        self.numbers = width

    def advance(self, state_nX: Tensor, entered_nW: Tensor) -> tuple[Tensor, Tensor]:
        gate_nX, new_nX = entered_nW.to(state_nX.dtype).chunk(2, 1)
        state_nX = state_nX + share(gate_nX) * (new_nX - state_nX)
        return state_nX, state_nX


class LinearAttention:
    """A matrix a key head, of which queries read: what is new is k v^T. Entered: q, k, v, and a gate a key head."""

    def __init__(self, heads: Heads) -> None:
        self.heads, self.numbers = heads, heads.kv_heads * heads.size * heads.size

    def advance(self, state_nX: Tensor, entered_nW: Tensor) -> tuple[Tensor, Tensor]:
        heads, count = self.heads, len(state_nX)
        entered_nW = entered_nW.to(state_nX.dtype)
        query, key, value = heads.cut(entered_nW[:, : heads.width])
        z_nK11 = share(entered_nW[:, heads.width :])[:, :, None, None]
        state = state_nX.view(count, heads.kv_heads, heads.size, heads.size)
        state = state + z_nK11 * (key[..., None] * value[:, :, None, :] - state)
        query = query.reshape(count, heads.kv_heads, -1, heads.size, 1)
        read = added(query * state[:, :, None], 3) * heads.size**-0.5
        return state.flatten(1), read.flatten(1)


class RecurrentView(View, Protocol):
    """Where a pass finds states beside keys and values."""

    def recur(self, layer: int, entered_TW: Tensor, rule: Rule) -> Tensor:
        """Take each row's state, advance and remember it: what is read, [T, Y] in the dtype of `entered_TW`."""
        ...


class Recurrence(Part):
    """What stands in a layer where attention would; like it with the norm before and the residual."""

    norm: Weight
    enter: Weight
    enter_bias: Weight
    out: Weight

    def __init__(self, spec: ModelSpec, index: int, place: int, kind: Mixer, zeros: Zeros) -> None:
        """index: of the layer; place: of its state, among the drafter's."""
        super().__init__(recurrent_slots(spec, index, kind), spec.norm_eps, zeros)
        self.place = place
        self.rule: Rule = rule_of(spec, kind)

    def forward(self, hidden_TM: Tensor, view: RecurrentView, tables: Tables) -> Tensor:
        """Hidden states behind it."""
        entered_TW = linear(rms_norm(hidden_TM, self.norm, self.eps), self.enter, self.enter_bias)
        return linear(view.recur(self.place, entered_TW, self.rule), self.out, None, hidden_TM)

    def begin(self) -> None:
        """The biases of a new one: gates from quick to slow."""
        gates = next(one.rows for one in self.slots[2].stored if "gate_proj" in one.name)
        steps = torch.linspace(0.0, 1.0, gates) if gates > 1 else torch.tensor([0.5])
        x = share_of(QUICKEST * (SLOWEST / QUICKEST) ** steps).to(self.enter_bias.value.dtype)
        self.enter_bias.value.zero_()
        start = 0
        for one in self.slots[2].stored:
            if "gate_proj" in one.name:
                self.enter_bias.value[start : start + one.rows] = x
            start += one.rows


class RecurrentLayer:
    """A layer of a drafter."""

    def __init__(self, spec: ModelSpec, index: int, place: int, kind: Mixer, zeros: Zeros) -> None:
        self.index, self.mix = index, Recurrence(spec, index, place, kind, zeros)
        self.feed = DenseFeed(dense_slots(spec, index), spec.norm_eps, zeros)

    def weights(self) -> Iterator[tuple[Slot, Weight]]:
        """Of both parts, in the order of the forward pass."""
        yield from self.mix.weights()
        yield from self.feed.weights()

    def forward(self, hidden_TM: Tensor, view: RecurrentView, tables: Tables) -> Tensor:
        """Hidden states behind it."""
        return self.feed.forward(self.mix.forward(hidden_TM, view, tables))


def rule_of(spec: ModelSpec, kind: Mixer) -> Rule:
    """Of a layer that is not attention."""
    assert kind != "attention", kind
    return Gru(spec.width) if kind == "gru" else LinearAttention(Heads(spec.heads, spec.kv_heads, spec.head_size))


def recurrent_slots(spec: ModelSpec, index: int, kind: Mixer) -> tuple[Slot, ...]:
    """Of a `Recurrence`: norm, what enters, its bias, and out."""
    width, head = spec.width, spec.head_size
    if kind == "gru":
        name, read, sizes = "gru", width, {"gate": width, "state": width}
    else:
        name, read = "linear_attn", spec.heads * head
        sizes = {"q": read, "k": spec.kv_heads * head, "v": spec.kv_heads * head, "gate": spec.kv_heads}

    def stored(tensor: str, rows: int) -> Stored:
        return Stored(f"model.layers.{index}.{tensor}", "", rows)

    def entered(kind: str) -> tuple[Stored, ...]:
        return tuple(stored(f"{name}.{x}_proj.{kind}", rows) for x, rows in sizes.items())

    return (
        Slot("norm", (stored("input_layernorm.weight", width),)),
        Slot("enter", entered("weight"), width),
        Slot("enter_bias", entered("bias")),
        Slot("out", (stored(f"{name}.o_proj.weight", width),), read),
    )


class _Level(NamedTuple):
    """Rows of a pack at one position, none of which another's state waits for."""

    rows_n: Tensor  # int64: of the pack
    before_n: Tensor  # int64: places of the rows before them, in the level before


def levels_of(step: Step) -> tuple[list[_Level], Tensor]:
    """Those of a pack's own rows, by position, and the place of each row behind one another, int64 [T]."""
    order_T = torch.argsort(step.positions_n, stable=True)
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(len(order_T))
    found, start = list[_Level](), 0
    for count in torch.bincount(step.positions_n).tolist():
        rows_n = order_T[start : start + count]
        first = start - (len(found[-1].rows_n) if found else 0)
        found.append(_Level(rows_n, place_T[step.before_n[rows_n]] - first))
        start += count
    return found, place_T


class MixedStepView:
    """Where the rows of training's steps find keys, values and states (steps.py). Differentiable through all steps."""

    def __init__(self, attentions: int, heads: Heads, dtype: torch.dtype) -> None:
        self._keys = [StepView(heads, dtype) for _ in range(attentions)]
        self._states: dict[int, Tensor] = {}  # by place: behind each row of the step before
        self._levels: list[_Level] = []
        self.positions_T = torch.empty(0, dtype=torch.int64)

    def begin(self, step: Step) -> None:
        """The next pass is of this one; the first one is of a pack's own rows."""
        if not self._levels:
            self._levels, self._place_T = levels_of(step)
        self._step, self.positions_T = step, step.positions_n
        for view in self._keys:
            view.begin(step)

    def attend(self, layer: int, qkv_TW: Tensor, heads: Heads, tables: Tables) -> Tensor:
        return self._keys[layer].attend(0, qkv_TW, heads, tables)

    def recur(self, layer: int, entered_TW: Tensor, rule: Rule) -> Tensor:
        wide = torch.promote_types(entered_TW.dtype, torch.float32)
        if (before := self._states.get(layer)) is not None:
            self._states[layer], read = rule.advance(before[self._step.before_n], entered_TW)
            return read.to(entered_TW.dtype)
        states, reads = list[Tensor](), list[Tensor]()
        for number, level in enumerate(self._levels):
            zero = number == 0
            before = torch.zeros(len(level.rows_n), rule.numbers, dtype=wide) if zero else states[-1][level.before_n]
            state, read = rule.advance(before, entered_TW[level.rows_n])
            states.append(state)
            reads.append(read)
        self._states[layer] = torch.cat(states)[self._place_T]
        return torch.cat(reads)[self._place_T].to(entered_TW.dtype)
