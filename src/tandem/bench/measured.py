"""What this machine's kernels take, from rates that were measured on it, each with a name (bench/rates.py takes them).

A kernel works on tiles of at most ROWS rows by PANEL columns. A step of the reduction of a tile has a rate for each
number of rows, whatever matrix it belongs to, and so has what a tile takes at its end. A product takes its busiest
thread's tiles, or the time in which its matrix comes from memory where that is longer, since panels are read ahead;
then what is computed of each number beside: exponentials of a softmax or a SwiGLU, noise and exponentials of the head,
turning of operands in the backward pass. What is elementwise takes its instructions or its bytes, at the bandwidth of
the smallest cache that holds what a call touches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.bench.devices import Device, Served
from tandem.bench.operations import Operation, Work, weight_bytes
from tandem.kernels.forward import FEW
from tandem.kernels.sizes import PANEL
from tandem.models.spec import ModelSpec

ROWS = 6  # of a tile: LANE_ROWS in tile.h
PAIR = {"bf16": 2, "fp32": 1, "int8": 4}  # inputs of a step
FORM = 2  # of the file


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds and bytes a second; of one thread where all compute, unless it says "all".

    >>> Measured.known("nowhere", Path("/nonexistent")) is None
    True
    """

    machine: str
    taken: str  # day and hour
    threads: int
    memory_bytes: float
    cache_bytes: tuple[float, float]  # second level, all cores'; third
    read_bytes_s: float  # from memory, all
    read_one_bytes_s: float  # from memory, by one thread alone
    write_bytes_s: float  # to memory, all
    cached_bytes_s: tuple[float, float]  # read from the second level, and the third: all
    flop_s: Mapping[str, float]  # of a product 2048 cubed, all, by arithmetic
    tile_s: Mapping[str, tuple[float, ...]]  # a step of a tile, by arithmetic, of 1, 2, ... ROWS rows
    tile_end_s: Mapping[str, float]  # what a tile of ROWS rows takes beside its steps: stored, rounded
    number_s: Mapping[str, float]  # of each number, by NUMBERS
    call_s: float  # of a kernel that has nothing to do: Python, and threads that start
    wait_s: float  # of an operation of an engine's pass that has nothing to do: threads that wait for each other

    @classmethod
    def known(cls, machine: str, folder: Path) -> Measured | None:
        """As kept in a folder; None where nothing of this machine is, or another version of it."""
        try:
            read = json.loads(_file(machine, folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(read, dict) or read.pop("form", None) != FORM or read.get("machine") != machine:
            return None
        for name in ("cache_bytes", "cached_bytes_s"):
            read[name] = tuple(read[name])
        return cls(**read | {"tile_s": {key: tuple(value) for key, value in read["tile_s"].items()}})

    def keep(self, folder: Path) -> Path:
        """Write it into a folder."""
        path = _file(self.machine, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self) | {"form": FORM}, indent=1), encoding="utf-8")
        return path

    def device(self) -> Device:
        """For a plain roofline."""
        source = f"measured on {self.machine}, {self.taken}"
        return Device("this", self.machine, self.memory_bytes, self.read_bytes_s, self.flop_s, (), source)

    def seconds(self, one: Operation, spec: ModelSpec, served: Served, work: Work) -> tuple[float, str]:
        """Of an operation's calls in all, and what takes them: products, memory, or numbers (what is elementwise)."""
        trains = work.phase == "train"
        streams = self._bandwidth(weight_bytes(spec, served))  # a step's matrices follow each other through the caches
        if one.kind == "attention":
            found = self._attention(one, streams, trains)
        elif one.kind in ("product", "head"):
            found = self._product(one, served, streams)
        else:
            found = self._elementwise(one, work)
        # An engine's pass is one call, in which threads wait for each other; each kernel of a learner is one.
        return found[0] + one.calls * (self.call_s if trains else self.wait_s), found[1]

    def _bandwidth(self, touched_bytes: float) -> float:
        for holds, rate in zip(self.cache_bytes, self.cached_bytes_s, strict=True):
            if touched_bytes <= holds / 2:
                return rate
        return self.read_bytes_s

    def tiles_s(self, rows: int, columns: int, depth: int, arithmetic: str) -> float:
        """The busiest thread's tiles of a product [rows, depth] x [columns, depth]."""
        panels, (whole, rest) = -(-columns // PANEL), divmod(rows, ROWS)
        steps, of_rows, end = -(-depth // PAIR[arithmetic]), self.tile_s[arithmetic], self.tile_end_s[arithmetic]
        one = whole * (steps * of_rows[ROWS - 1] + end)
        one += steps * of_rows[rest - 1] + end * rest / ROWS if rest else 0.0
        tiles = panels * (whole + (rest > 0))
        return one * panels * math.ceil(tiles / self.threads) / tiles

    def _product(self, one: Operation, served: Served, streams: float) -> tuple[float, str]:
        rows, columns, depth = one.shape
        size = served.other_bytes
        computed = self.tiles_s(rows, columns, depth, one.arithmetic)
        read = served.matrix_bytes(columns, depth) if one.kind == "product" else float(size * columns * depth)
        turned = 0
        eights = one.arithmetic == "int8"  # whose operands are turned as they are rounded, in operations of their own
        if one.name.startswith("input gradient"):  # the matrix is turned first
            read, turned = float((1 if eights else size) * columns * depth), 0 if eights else columns * depth
        elif one.name.startswith("weight gradient"):  # both operands are turned; sums in fp32 come and go
            read, turned = 8.0 * rows * columns, 0 if eights else depth * (rows + columns)
        elif one.name == "head: log-probs backward":  # two products, and logits that were kept
            computed, read = 2 * computed, size * columns * (rows + depth) + 8.0 * columns * depth
            turned = columns * depth
        beside = self.number_s["turn"] * turned * one.calls
        if one.numbers:
            beside += self.number_s[NUMBERS_OF[one.name]] * one.numbers
        computed, memory = one.calls * computed, one.calls * read / streams
        return max(computed, memory) + beside / self.threads, "memory" if memory > computed else "products"

    def _attention(self, one: Operation, streams: float, trains: bool) -> tuple[float, str]:
        rows, size, _ = one.shape
        number_s, tile = self.number_s, min(ROWS, rows)
        if one.name == "attention backward":
            each = number_s["attention backward, a channel"] * size + number_s["attention backward, a score"]
        else:  # scores and values: a step of a tile each PAIR channels, and PAIR keys of 64 channels
            each = self.tile_s[one.arithmetic][tile - 1] * 2 * size / PAIR[one.arithmetic] / (tile * PANEL)
            each += number_s["softmax"] + (number_s["turn"] * 2 * size / rows if trains else 0.0)
        # A block of keys is asked for while the one before is computed, and the first of a sequence when it is needed:
        # with few queries a key head, memory's time is not hidden.
        computed, memory = each * one.numbers / self.threads, one.bytes / streams
        return computed + memory, "memory" if memory > computed else "products"

    def _elementwise(self, one: Operation, work: Work) -> tuple[float, str]:
        # What a learner keeps, and what an optimiser passes over, has left the caches before it is read again.
        touched = one.bytes if work.phase == "train" else one.bytes / one.calls
        shares = 1 if one.name == "norms" and work.rows <= FEW else self.threads  # few rows: every thread norms all
        computed, memory = (
            self.number_s[NUMBERS_OF[one.name]] * one.numbers / shares,
            one.bytes / self._bandwidth(touched),
        )
        return max(computed, memory), "memory" if memory > computed else "numbers"


# What is computed of each number of an operation, beside products: a key of `number_s`.
NUMBERS_OF = {
    "embedding": "copy",
    "norms": "norm",
    "norm": "norm",
    "norm backward": "norm backward",
    "rotate and store": "rotate and store",
    "rotation": "rotation",
    "rounding of activations": "rounding",
    "gate, up, SwiGLU": "swiglu",
    "swiglu": "swiglu",
    "swiglu backward": "swiglu backward",
    "head, sampling": "draw",
    "head: log-probs, entropy": "log-prob",
    "head: log-probs backward": "log-prob backward",
    "gradient norm": "gradient norm",
    "AdamW": "AdamW",
    "AdamW, moments in 8 bits": "AdamW, moments in 8 bits",
    "AdamW, no masters": "AdamW, no masters",
    "AdamW, moments in 8 bits, no masters": "AdamW, moments in 8 bits, no masters",
    "rounding of gradients": "drawn rounding",
    "rounding of rows, turned": "rounding of columns",
    "turning of weights": "rounding of columns",
    "packing of weights": "packing",
}
NUMBERS = (
    *dict.fromkeys(NUMBERS_OF.values()),
    "softmax",
    "turn",
    "attention backward, a channel",
    "attention backward, a score",
)


def _file(machine: str, folder: Path) -> Path:
    name = re.sub(r"[^\w.-]+", "_", machine)
    return folder / "rates" / f"{name}.json"
