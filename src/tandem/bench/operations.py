"""The operations of a decode step, a prefill or a training step, from a model's shape alone: their multiplications and
additions, the bytes that they read and write, and what a measured machine has to know of them (bench/measured.py).

Names are those of `tandem bench profile`. Products count 2 operations a multiplication and addition; a query at
position q meets q + 1 keys, fewer under a window or in chunks. Bytes are operands that come from memory once: matrices
as their format keeps them, rows of activations in and out, keys and values that are seen; what is elementwise counts by
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from tandem.bench.devices import THIS, Arithmetic, Device, Served, arithmetic_on, served_as
from tandem.models.parts import all_slots, kept_bytes, layer_slots, outer_slots
from tandem.models.spec import ModelSpec
from tandem.numerics.names import gradient_parts
from tandem.train.config import LearnerConfig
from tandem.types import Reach

Phase = Literal["decode", "prefill", "train"]
PHASES: tuple[Phase, ...] = ("decode", "prefill", "train")
Kind = Literal["product", "head", "attention", "elementwise", "optimiser"]
BLOCK, CHUNK = 64, 32  # keys that attention.h reduces at a time, and queries of a task of it
AS_TRAINED = LearnerConfig()
ATTENTION_BACKWARD = 2.5  # times the forward's products: scores again, and four gradients


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of work of a step, summed over its calls.

    >>> both = Operation("down", "product", 2.0, 3.0) + Operation("down", "product", 2.0, 3.0)
    >>> both.flop, both.bytes, both.calls
    (4.0, 6.0, 2)
    """

    name: str
    kind: Kind
    flop: float
    bytes: float
    arithmetic: Arithmetic = "bf16"
    calls: int = 1
    shape: tuple[int, int, int] = (0, 0, 0)  # of a call: rows, columns, depth; of attention: queries a key head, D, 0
    numbers: float = 0.0  # in all: elementwise; logits of a head; scores of attention

    def __add__(self, other: Operation) -> Operation:
        return replace(
            self,
            flop=self.flop + other.flop,
            bytes=self.bytes + other.bytes,
            calls=self.calls + other.calls,
            numbers=self.numbers + other.numbers,
        )

    def least_s(self, device: Device) -> float:
        """On a device by its published rates: the larger of both."""
        return max(self.flop / device.rates[self.arithmetic], self.bytes / device.bytes_s)

    def bound(self, device: Device) -> str:
        return "products" if self.flop / device.rates[self.arithmetic] > self.bytes / device.bytes_s else "memory"


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of a model: `batch` sequences at `context` (decode), or of `context` tokens each.

    >>> Work("prefill", 16, 1024).rows
    16384
    """

    phase: Phase
    batch: int
    context: int

    @property
    def rows(self) -> int:
        return self.batch if self.phase == "decode" else self.batch * self.context

    @property
    def tokens(self) -> int:
        """That a step takes further."""
        return self.rows

    def met(self, reach: Reach) -> int:
        """Pairs of a query and a key that it sees, in a layer of all queries."""
        if self.phase == "decode":
            return self.batch * (self.context + 1 - reach.first_seen(self.context))
        return self.batch * _met(reach, self.context)

    def keys(self, reach: Reach) -> int:
        """Keys that some query sees, of all sequences."""
        return self.met(reach) if self.phase == "decode" else self.rows


@cache
def _met(reach: Reach, length: int) -> int:
    if reach.window is None and reach.chunk is None:
        return length * (length + 1) // 2
    return sum(position + 1 - reach.first_seen(position) for position in range(length))


def operations(
    spec: ModelSpec, served: Served, work: Work, device: Device, learner: LearnerConfig = AS_TRAINED
) -> list[Operation]:
    """In the order of the pass, each name once. learner: of training, how gradients and the optimiser's state are."""
    trains = work.phase == "train"
    made = _training(spec, served, work, device, learner) if trains else _forward(spec, served, work, device)
    found: dict[str, Operation] = {}
    for one in made:
        found[one.name] = found[one.name] + one if one.name in found else one
    return list(found.values())


def total(found: list[Operation]) -> tuple[float, float]:
    """Operations and bytes."""
    return sum(one.flop for one in found), sum(one.bytes for one in found)


def _product(name: str, served: Served, arithmetic: Arithmetic, rows: int, columns: int, depth: int) -> Operation:
    size = served.other_bytes
    read = (
        rows
        * depth
        * (served.activation_bits / 8 if arithmetic == served.arithmetic and served.activation_bits else size)
    )
    moved = served.matrix_bytes(columns, depth) + read + rows * columns * size
    shape = (rows, columns, depth)
    return Operation(name, "product", 2.0 * rows * columns * depth, moved, arithmetic, shape=shape)


def _elementwise(name: str, numbers: float, moved: float, calls: int = 1) -> Operation:
    return Operation(name, "elementwise", 0.0, moved, numbers=numbers, calls=calls)


@cache
def scores_of(reach: Reach, first: int, last: int) -> int:
    """Scores that are computed of queries at the positions [first, last): CHUNK queries meet whole blocks of keys."""
    found = 0
    for start in range(first, last, CHUNK):
        end = min(last, start + CHUNK)
        found += (end - start) * (-(-end // BLOCK) - reach.first_seen(start) // BLOCK) * BLOCK
    return found


def _attention(spec: ModelSpec, work: Work, reach: Reach, size: int, calls: int = 1) -> Operation:
    """Of a layer: of all rows, or (drawn) of the last row of each sequence."""
    decodes = work.phase == "decode"
    met, keys = work.met(reach), work.keys(reach)
    span = (work.context, work.context + 1) if decodes else (0, work.context)
    moved = 2 * size * spec.head_size * (spec.kv_heads * keys + spec.heads * work.rows)
    tokens = min(CHUNK, span[1] - span[0])
    shape = (spec.heads // spec.kv_heads * tokens, spec.head_size, 0)
    flop, scores = 4.0 * met * spec.heads * spec.head_size, work.batch * spec.heads * scores_of(reach, *span)
    return Operation("attention", "attention", flop, moved, _wide(size), calls, shape, float(scores))


def _wide(size: int) -> Arithmetic:
    return "fp32" if size == 4 else "bf16"


def _forward(spec: ModelSpec, served: Served, work: Work, device: Device) -> Iterator[Operation]:
    """Of an engine's steps: behind the attention of the last layer there are only the rows that are drawn from."""
    size, width, rows, drawn = served.other_bytes, spec.width, work.rows, work.batch
    arithmetic = arithmetic_on(device, served)[0]
    heads = (spec.heads + 2 * spec.kv_heads) * spec.head_size
    rounds = served.activation_bits if arithmetic == served.arithmetic else 0.0
    shapes = _matrices(spec)
    ends = Work("decode", work.batch, work.context - 1) if work.phase == "prefill" else work
    yield _elementwise("embedding", rows * width, 2 * size * rows * width)
    for index, reach in enumerate(spec.reaches):
        last = index + 1 == spec.layers
        wide = drawn if last else rows
        yield _elementwise("norms", (rows + wide) * width, 2 * size * (rows + wide) * width, 2)
        for name, count in (("qkv", rows), ("out", wide), ("gate_up", wide), ("down", wide)):
            columns, depth = shapes[name]
            if rounds:
                moved = count * depth * (size + rounds / 8)
                yield _elementwise("rounding of activations", count * depth, moved)
            if name == "out":
                yield _elementwise("rotate and store", rows * heads, 2 * size * rows * heads)
                yield _attention(spec, ends if last else work, reach, size)
            made = _product(NAMES[name], served, arithmetic, count, columns, depth)
            if name == "gate_up":  # what it gives is read, and a half as wide is written
                act = count * spec.ff_width
                made = replace(made, bytes=made.bytes + 3 * size * act, numbers=float(act))
            yield made
    yield _elementwise("norms", drawn * width, 2 * size * drawn * width)
    yield _head("head, sampling", spec, drawn, size)


NAMES = {"qkv": "qkv", "out": "out", "gate_up": "gate, up, SwiGLU", "down": "down"}


def _matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's, by slot, in the order of the pass."""
    found = {}
    for slot in layer_slots(replace(spec, layers=1, attention=spec.attention[:1])):
        if slot.columns is not None:
            found[slot.name] = (slot.rows, slot.columns)
    return found


def _head(name: str, spec: ModelSpec, rows: int, size: int) -> Operation:
    vocab, width = spec.vocab_size, spec.width
    flop, moved = 2.0 * rows * vocab * width, size * (rows + vocab) * width
    return Operation(name, "head", flop, moved, _wide(size), shape=(rows, vocab, width), numbers=float(rows * vocab))


def microbatches(work: Work, learner: LearnerConfig) -> int:
    """Passes of a training step, each of whole samples."""
    each = max(1, learner.microbatch_tokens // work.context)
    return -(-work.batch // each)


def met_by_gradients(served: Served, gradients: str) -> Served:
    """learner.gradients as a format of the matrices and rows that a gradient meets, and behind the + of the gradient;
    same: the run's dtype."""
    if gradients in ("same", "int8"):
        plain = "fp32" if served.other_bytes == 4 else "bf16"
        return served_as("w8a8" if gradients == "int8" else plain)
    first, second, _ = gradient_parts(gradients)
    return served_as(f"{second}+{first}" if first != "same" else second)


def optimiser_name(learner: LearnerConfig) -> str:
    """As bench/measured.py knows AdamW's rates: by what the state keeps less of."""
    less = ["moments in 8 bits"] * (learner.moments != "float32") + ["no masters"] * (learner.masters != "float32")
    return ", ".join(("AdamW", *less))


def _gradients(
    name: str, shape: tuple[int, int, int], met: Served, arithmetic: Arithmetic, size: int
) -> Iterator[Operation]:
    """The two products of a matrix [columns, depth] and a pass's rows, their operands as wide as they are multiplied;
    and what becomes those operands, where they are rounded: both of dy, x, and the matrix along its other axis."""
    rows, columns, depth = shape
    rounds = met.activation_bits / 8 if arithmetic == met.arithmetic and met.activation_bits else 0.0
    wide = rounds or size
    once = _product(f"input gradient: {name}", met, arithmetic, rows, columns, depth)
    read = (met.matrix_bytes(depth, columns) if rounds else size * columns * depth) + rows * columns * wide
    yield replace(once, bytes=read + rows * depth * size, shape=(rows, depth, columns))
    grown = 8 * columns * depth + wide * rows * (columns + depth)  # a sum in fp32 read and written
    yield replace(once, name=f"weight gradient: {name}", bytes=float(grown), shape=(columns, depth, rows))
    if rounds:
        drawn, nearest = 2 * rows * columns, rows * depth
        yield _elementwise("rounding of gradients", drawn, drawn * (size + rounds), 2)
        yield _elementwise("rounding of rows, turned", nearest, nearest * (size + rounds))


def _training(
    spec: ModelSpec, served: Served, work: Work, device: Device, learner: LearnerConfig
) -> Iterator[Operation]:
    """Forward and backward in microbatches, and AdamW; nothing is predicted from a last token, which is not run.

    The forward's products are the format's (model.weights), those of gradients the learner's.
    """
    size, width, passes = served.other_bytes, spec.width, microbatches(work, learner)
    run = Work("train", work.batch, max(1, work.context - 1))
    met = met_by_gradients(served, learner.gradients)
    by = arithmetic_on(device, met)[0] if met.activation_bits else _wide(size)
    rows = run.rows
    each = -(-rows // passes)  # of a pass, about
    heads, inner = (spec.heads + 2 * spec.kv_heads) * spec.head_size, rows * spec.ff_width
    shapes, layers = _matrices(spec), spec.layers

    def beside(name: str, numbers: int, times: int, calls: int) -> Operation:
        return _elementwise(name, numbers, float(times * size * numbers), calls * passes)

    yield beside("embedding", rows * width, 2, 1)
    yield beside("norm", (2 * layers + 1) * rows * width, 2, 2 * layers + 1)
    yield beside("rotation", 2 * layers * rows * (heads - spec.kv_heads * spec.head_size), 2, 4 * layers)
    yield beside("swiglu", layers * inner, 3, layers)
    for reach in spec.reaches:
        once = _attention(spec, run, reach, size, passes)
        yield once
        flop, moved = ATTENTION_BACKWARD * once.flop, 2 * once.bytes
        yield replace(once, name="attention backward", flop=flop, bytes=moved)
    arithmetic = arithmetic_on(device, served)[0]
    rounds = served.activation_bits if arithmetic == served.arithmetic else 0.0
    for name, (columns, depth) in shapes.items():
        if rounds:
            numbers = layers * rows * depth
            yield _elementwise("rounding of activations", numbers, numbers * (size + rounds / 8), layers * passes)
        ahead = _product(name, served, arithmetic, each, columns, depth)
        behind = list(_gradients(name, (each, columns, depth), met, by, size))
        for _ in range(layers * passes):
            yield ahead
            yield from behind
    yield beside("swiglu backward", layers * inner, 6, layers)
    yield beside("norm backward", (2 * layers + 1) * rows * width, 3, 2 * layers + 1)
    for _ in range(passes):
        once = _head("head: log-probs, entropy", spec, each, size)
        yield replace(once, bytes=once.bytes + size * each * spec.vocab_size)  # exponentials, kept
        grown = size * (each + width) * spec.vocab_size + 8 * spec.vocab_size * width + 8 * each * width
        yield replace(once, name="head: log-probs backward", flop=2 * once.flop, bytes=float(grown))
    kept, tensors = parameters_of(spec), len(list(all_slots(spec)))
    yield Operation("gradient norm", "optimiser", 0.0, 4.0 * kept, calls=tensors, numbers=float(kept))
    # The gradient is read, the state read and written, and the weight written; where it is the master it is read too.
    moved = (4 + 2 * learner.state_bytes + size * (1 if learner.masters == "float32" else 2)) * kept
    yield Operation(optimiser_name(learner), "optimiser", 0.0, moved, calls=tensors, numbers=float(kept))
    matrices = layers * sum(n * k for n, k in shapes.values())
    if met.activation_bits and by == met.arithmetic:  # turned once an update
        moved, calls = matrices * (size + met.bits / 8), layers * len(shapes)
        yield Operation("turning of weights", "optimiser", 0.0, moved, calls=calls, numbers=float(matrices))
    if device.name == THIS:  # the form that its products read
        matrices += spec.vocab_size * width
        moved, calls = 2.0 * size * matrices, layers * len(shapes) + 1
        yield Operation("packing of weights", "optimiser", 0.0, moved, calls=calls, numbers=float(matrices))


@dataclass(frozen=True, slots=True)
class Room:
    """What a device's memory holds of a work, in bytes."""

    memory: float
    weights: float
    sequence: float  # keys and values of one at the context; of training, what is kept of a microbatch's rows
    training: float = 0.0  # gradients, master weights and moments; matrices as the backward pass multiplies them

    @property
    def fixed(self) -> float:
        return self.weights + self.training

    @property
    def devices(self) -> int:
        """That hold at least what is fixed and one sequence, divided evenly."""
        return max(1, -int(-(self.fixed + self.sequence) // (USABLE * self.memory)))

    @property
    def sequences(self) -> int:
        """That fit beside the weights, on one device; 0 where those alone do not."""
        left = USABLE * self.memory - self.fixed
        return max(0, int(left // self.sequence)) if self.sequence else 0


USABLE = 0.9  # of a device's memory: the rest is the program's own, and what is lost between allocations


def weight_bytes(spec: ModelSpec, served: Served) -> float:
    """Of all weights: matrices of layers in their format, the rest in bf16 (fp32 under fp32)."""
    outer = {slot.name: slot.size for slot in outer_slots(spec)}
    found = float(served.other_bytes * sum(outer.values()))
    for slot in layer_slots(spec):
        if slot.columns is None:
            found += served.other_bytes * slot.size
        else:
            found += served.matrix_bytes(slot.rows, slot.columns)
    return found


def parameters_of(spec: ModelSpec) -> int:
    """All numbers that a model has; a tied embedding once."""
    return sum(slot.size for slot in all_slots(spec))


def room(spec: ModelSpec, served: Served, work: Work, device: Device, learner: LearnerConfig = AS_TRAINED) -> Room:
    """Of a device for a work."""
    from tandem.plan.footprint import activation_bytes

    if work.phase == "train":
        size, rows = served.other_bytes, -(-work.rows // microbatches(work, learner))
        count, met = parameters_of(spec), met_by_gradients(served, learner.gradients)
        state = (4 + learner.state_bytes) * count
        if met.activation_bits and arithmetic_on(device, met)[0] == met.arithmetic:
            own = (slot for slot in layer_slots(spec) if slot.columns is not None)
            state += sum(met.matrix_bytes(slot.columns or 0, slot.rows) for slot in own)
        activations = float(activation_bytes(spec, rows, size, False))
        return Room(device.memory_bytes, float(size * count), activations, state)
    per_layer = kept_bytes(spec, "float32" if served.other_bytes == 4 else "bfloat16")
    kept = zip(per_layer, spec.reaches, strict=True)
    sequence = sum(each * min(work.context, reach.window or reach.chunk or work.context) for each, reach in kept)
    return Room(device.memory_bytes, weight_bytes(spec, served), float(sequence))
