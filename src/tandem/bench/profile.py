"""Where the time of a decode step, a prefill and a learner step goes: seconds, operations and bytes by operation.

torch.profiler takes the times: each compiled kernel is a span of its own (kernels/build.py), and Python's functions are
traced. A row of kind "kernel" is an operation; one of kind "host" is the time of a module of tandem's outside kernels
and outside other modules, torch's work for it included. The engine's forward is one call, of which C++ keeps the times.
Operands count as read or written once: where a share is above 100 %, they lay in a cache. On the CPU only: a GPU's
calls return before they have run.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.bench.sweep import fill_pages, start_decoding, stop_decoding
from tandem.bench.work import build_engine, build_learner, random_requests
from tandem.plan.roofline import Cost, Machine, decode_cost, measure, pairs, prefill_cost, timed, train_cost

if TYPE_CHECKING:
    from tandem.engine.engine import Engine
    from tandem.kernels.weight import Weight
    from tandem.models.decoder import Decoder
    from tandem.train.step import Learner
    from tandem.types import Sample

DECODES = (1, 64, 256)
CONTEXT = 100
TRIES = 8  # at a profile that can be read
STEPS = 8  # under the profiler; as many without it, half of them before and half after
PREFILL = (16, 1024)
LEARNER = (16, 256)
REST = "the rest: Python, torch"  # also host rows of less than SMALL of the whole
SMALL = 1e-3
WORK = "the work that is profiled"
FREE = Cost(0.0, 0.0)


def _product(size: int, rows: int, columns: int, depth: int) -> Cost:
    return Cost(2.0 * rows * columns * depth, size * (rows * columns + (rows + columns) * depth))


# Of each kernel: its row ("{}" is the weight that is multiplied by), and the cost of a call, by the bytes of an element
# and the integers that the kernel is handed. Attention's are no integers: its cost is the work's. A residual that a
# product adds is left out.
KERNELS: dict[str, tuple[str, Callable[..., Cost]]] = {
    "linear": ("{}", lambda size, _, *shape: _product(size, *shape)),
    "eights": ("{}", lambda size, _, rows, k: Cost(0, size * rows * k)),  # its columns are not told
    "fours": ("{}", lambda size, _, rows, k: Cost(0, size * rows * k)),
    "adapt": ("adapter", lambda size, _, rows, n, k: Cost(0, size * rows * (n + k))),  # its ranks are not told
    "adapted_input_gradient": ("input gradient: adapter", lambda size, _, *shape: _product(size, *shape)),
    "adapter_gradients": ("adapter gradients", lambda size, _x, _y, rows, n, k: Cost(0, size * rows * (n + k))),
    "input_gradient": ("input gradient: {}", lambda size, _, *shape: _product(size, *shape)),
    "accumulate": (
        "weight gradient: {}",
        lambda size, _x, _y, rows, n, k: Cost(2.0 * rows * n * k, 8 * n * k + size * rows * (n + k)),
    ),
    "attention": ("attention", lambda *_: FREE),
    "attention_int8": ("attention", lambda *_: FREE),
    "attention_int4": ("attention", lambda *_: FREE),
    "attention_coded": ("attention", lambda *_: FREE),
    "attention_backward": ("attention backward", lambda *_: FREE),
    "rotate": ("rotation", lambda size, _, rows, heads, width: Cost(0, 2 * size * rows * heads * width)),
    "norm": ("norm", lambda size, _x, _y, rows, width: Cost(0, 2 * size * rows * width)),
    "norm_backward": ("norm backward", lambda size, rows, width: Cost(0, 3 * size * rows * width)),
    "swiglu": ("swiglu", lambda size, rows, width: Cost(0, 3 * size * rows * width)),
    "swiglu_backward": ("swiglu backward", lambda size, rows, width: Cost(0, 6 * size * rows * width)),
    "draw": ("head, sampling", lambda size, _, rows, vocab, depth, *__: _head(size, rows, vocab, depth)),
    "logprob": ("head: log-probs, entropy", lambda size, _, rows, vocab, depth, *__: _head(size, rows, vocab, depth)),
    "logprob_backward": (
        "head: log-probs backward",  # gradients of the hidden states and of the head, from logits that were kept
        lambda size, rows, vocab, width: Cost(
            4.0 * rows * vocab * width, size * (rows + width) * vocab + 8 * vocab * width + 8 * rows * width
        ),
    ),
    "divergence": (
        "heads: divergence",  # both models' products, and the gradients at the student's logits
        lambda size, _x, _y, rows, vocab, depth, other, *__: (
            _head(size, rows, vocab, depth) + _head(size, rows, vocab, other)
        ),
    ),
    "top_tokens": (
        "teacher's head: likeliest tokens",
        lambda size, _, rows, vocab, depth, *__: _head(size, rows, vocab, depth),
    ),
    "divergence_backward": (
        "heads: divergence backward",
        lambda size, rows, vocab, width: Cost(
            4.0 * rows * vocab * width, size * (rows + width) * vocab + 8 * vocab * width + 8 * rows * width
        ),
    ),
    "input_gradient_eights": ("input gradients in 8 bits", lambda size, _, rows, n: Cost(0, size * rows * n)),
    "accumulate_eights": (
        "weight gradient: {}",
        lambda size, _x, _y, rows, n, k: Cost(2.0 * rows * n * k, 8 * n * k + size * rows * (n + k)),
    ),
    "turn_eights": ("turning of weights", lambda size, rows, columns, _: Cost(0, (size + 1) * rows * columns)),
    "adamw_few": ("AdamW", lambda size, numbers, *_: Cost(0, (4 + size) * numbers)),  # its state is not told
    "adamw": ("AdamW", lambda size, numbers: Cost(0, (24 + 4 + size) * numbers)),
    "pack_weight": ("packing of weights", lambda size, rows, columns: Cost(0, 2 * size * rows * columns)),
}


def _head(size: int, rows: int, vocab: int, depth: int) -> Cost:
    return Cost(2.0 * rows * vocab * depth, size * (rows + vocab) * depth)


@dataclass(slots=True)
class Row:
    """Sums over the calls of one label."""

    kind: str
    seconds: float = 0.0
    calls: float = 0
    cost: Cost = FREE

    def add(self, seconds: float, calls: float, cost: Cost) -> None:
        self.seconds, self.calls, self.cost = self.seconds + seconds, self.calls + calls, self.cost + cost


def label_of(name: str, sizes: Sequence[int], shapes: Mapping[tuple[int, int], str]) -> tuple[str, str, Cost] | None:
    """Row, kind and cost of a span; None where it belongs to the span around it. shapes: (N, K) -> weight.

    >>> label_of("src/tandem/engine/schedule.py(80): plan", (), {})
    ('engine/schedule', 'host', Cost(flop=0.0, bytes=0.0))
    >>> label_of("tandem::linear_bf16", (576, 4, 960, 576), {(960, 576): "qkv"})[0]
    'qkv'
    """
    if name.startswith("tandem::"):
        kernel, _, dtype = name.removeprefix("tandem::").rpartition("_")
        text, cost = KERNELS.get(kernel, (kernel, lambda *_: FREE))
        weight = shapes.get((sizes[-2], sizes[-1]), f"{sizes[-2]} x {sizes[-1]}") if "{}" in text else ""
        return text.format(weight), "kernel", cost({"bf16": 2, "fp32": 4}[dtype], *sizes)
    module = re.match(r"(?:.*/)?tandem/([\w/]+)\.py\(\d+\): ", name)
    if module is None and name != WORK:
        return None
    return (REST if module is None or module[1].startswith("bench/") else module[1]), "host", FREE


def rows_of(events: Iterable[Any], shapes: Mapping[tuple[int, int], str]) -> tuple[float, dict[str, Row]]:
    """Seconds of the span WORK, and of the rows inside it, which sum to it. events: torch's FunctionEvents."""
    rows = {REST: Row("host")}
    labels: dict[int, str | None] = {}
    wall_s = 0.0

    def label(event: Any) -> str | None:
        """Of the innermost span around it that has one; None outside WORK."""
        if event is None:
            return None
        if id(event) not in labels:
            around = REST if event.name == WORK else label(event.cpu_parent)
            own = label_of(event.name, event.concrete_inputs, shapes) if around else None
            labels[id(event)] = own[0] if own else around
            if own:
                rows.setdefault(own[0], Row(own[1])).add(0.0, own[1] == "kernel", own[2])
        return labels[id(event)]

    for event in events:
        found = label(event)
        if found is not None:
            rows[found].seconds += event.self_cpu_time_total / 1e6
        wall_s += event.cpu_time_total / 1e6 if event.name == WORK else 0.0
    return wall_s, rows


def profiled(run: Callable[[], object], decoder: Decoder) -> tuple[float, dict[str, Row]]:
    """`rows_of` a call."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    shapes: dict[tuple[int, int], str] = {}
    for slot, weight in decoder.slots():
        if weight.value.dim() == 2:
            n, k = weight.value.shape
            shapes[n, k] = f"{shapes[n, k]}, {slot.name}" if shapes.get((n, k), slot.name) != slot.name else slot.name
    for left in reversed(range(TRIES)):
        with (
            torch_profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_stack=True) as found,
            record_function(WORK),
        ):
            run()
        try:
            return rows_of(found.events(), shapes)
        except UnicodeDecodeError:  # a name of torch 2.13's own that is no text, once in some runs
            if not left:
                raise
    raise AssertionError("unreachable")


def split(
    work: str,
    tokens: int,
    measured: tuple[float, dict[str, Row]],
    bare_s: Sequence[float],
    limits: tuple[Machine, Cost],
    times: int = 1,
) -> dict[str, Any]:
    """The result of one work: per call of it, by operation; the seconds of the rows sum to `wall_s`.

    `measured`: `times` calls under the profiler; `bare_s`: of calls without it; `limits`: the machine, and the least
    that the work needs.
    """
    (machine, needed), (wall_s, found) = limits, measured
    for label in [label for label, row in found.items() if row.kind == "host" and row.seconds < SMALL * wall_s]:
        if label != REST:
            found[REST].add(found.pop(label).seconds, 0, FREE)
    rows = []
    for label, row in found.items():
        seconds, flop, moved = row.seconds / times, row.cost.flop / times, row.cost.bytes / times
        rates = {"bytes": moved, "flop_s": flop / seconds, "bytes_s": moved / seconds}
        least_s = machine.least_s(Cost(flop, moved))
        rows.append(
            {"operation": label, "kind": row.kind, "seconds": seconds, "calls": row.calls / times, "flop": flop}
            | rates
            | {"share_of_limit": least_s / seconds if least_s else None}
        )
    spent_s, least_s = statistics.median(bare_s), machine.least_s(needed)
    return {
        "work": work,
        "tokens": tokens,
        "seconds": spent_s,
        "tok_s": tokens / spent_s,
        "limit_s": least_s,
        "share_of_limit": least_s / spent_s,
        "wall_s": wall_s / times,
        "host_s": sum(row["seconds"] for row in rows if row["kind"] == "host"),
        "rows": sorted(rows, key=lambda row: -row["seconds"]),
    }


@dataclass(frozen=True, slots=True)
class Pass:
    """What the forward passes of an engine's steps ran; queries and keys as one layer meets them.

    Behind the attention of the last layer there are only the rows that are drawn from.
    """

    steps: int
    rows: int
    drawn: int
    met: float  # queries times the keys they see
    keys: float
    drawn_met: float  # of the rows drawn from

    def costs(self, decoder: Decoder) -> dict[str, tuple[int, Cost]]:
        """By kernels.forward.KINDS: calls and cost."""
        from tandem.kernels.forward import KINDS

        layers, size, width = decoder.layers, decoder.dtype.itemsize, decoder.spec.width
        full, heads, steps = len(layers) - 1, layers[0].mix.heads, self.steps
        wide = full * self.rows + self.drawn
        weights = [(slot.name, weight) for layer in layers for slot, weight in layer.weights()]

        def product(name: str, rows: int) -> Cost:
            own = [weight for slot, weight in weights if slot == name]
            shape = own[0].value.shape
            return Cost(2.0 * rows * shape.numel(), steps * sum(map(_served, own)) + size * rows * sum(shape))

        met, keys = full * self.met + self.drawn_met, full * self.keys + self.drawn_met
        costs = (
            Cost(0.0, 2 * size * width * self.rows),
            Cost(0.0, 2 * size * width * (len(layers) * self.rows + wide + self.drawn)),
            product("qkv", len(layers) * self.rows),
            Cost(0.0, 2 * size * len(layers) * self.rows * heads.width),
            _attention(decoder, met, keys, wide),
            product("out", wide),
            product("gate_up", wide),
            product("down", wide),
        )
        calls = (1, 2 * len(layers) + 1, *[len(layers)] * (len(KINDS) - 2))
        return {kind: (steps * n, cost) for kind, n, cost in zip(KINDS, calls, costs, strict=True)}


def _served(weight: Weight) -> int:
    """Bytes that a product reads of a matrix."""
    if weight.codes is not None:
        return weight.codes.packed.nbytes
    return (weight.value if weight.packed is None else weight.packed).nbytes


def _attention(decoder: Decoder, met: float, keys: float, queries: float) -> Cost:
    heads = decoder.layers[0].mix.heads
    moved = 2 * decoder.dtype.itemsize * heads.size * (heads.kv_heads * keys + heads.heads * queries)
    return Cost(4.0 * met * heads.heads * heads.size, moved)


def profiled_engine(engine: Engine, run: Callable[[], object], ran: Callable[[], Pass]) -> tuple[float, dict[str, Row]]:
    """`profiled`, the forward call split by the clock of the C++; `ran` is asked afterwards."""
    import torch

    from tandem.kernels.forward import KINDS
    from tandem.models.fused import FusedForward

    forward, seconds = engine.runner.forward, torch.zeros(len(KINDS), dtype=torch.float64)  # type: ignore[attr-defined]
    assert isinstance(forward, FusedForward), "no compiled forward pass for this decoder"
    forward.seconds = seconds
    try:
        wall_s, rows = profiled(run, forward.decoder)
    finally:
        forward.seconds = None
    for (kind, (calls, cost)), spent_s in zip(ran().costs(forward.decoder).items(), seconds.tolist(), strict=True):
        rows.setdefault(kind, Row("kernel")).add(spent_s, calls, cost)
    rows["models/fused"].seconds -= float(seconds.sum())
    return wall_s, rows


def decode_work(engine: Engine, count: int, context: int, machine: Machine) -> dict[str, Any]:
    """Steps of `count` sequences at about `context`."""
    decoder = engine.runner.decoder  # type: ignore[attr-defined]
    start_decoding(engine, count, context, 2 * STEPS + 2, random.Random(count))
    engine.step()
    bare_s = [timed(engine.step) for _ in range(STEPS // 2)]
    seen = count * sum(context + 2 + STEPS // 2 + step for step in range(STEPS))
    ran = Pass(STEPS, STEPS * count, STEPS * count, seen, seen, seen)
    measured = profiled_engine(engine, lambda: [engine.step() for _ in range(STEPS)], lambda: ran)
    bare_s += [timed(engine.step) for _ in range(STEPS - STEPS // 2)]
    stop_decoding(engine)
    cost = decode_cost(decoder.spec, count, context + 1 + STEPS)
    return split(f"decode step {count}", count, measured, bare_s, (machine, cost), STEPS)


def prefill_work(engine: Engine, count: int, length: int, machine: Machine) -> dict[str, Any]:
    """`count` prompts of `length` tokens, and a token drawn of each."""
    decoder, rng = engine.runner.decoder, random.Random(length)  # type: ignore[attr-defined]
    steps: list[object] = []

    def prefill() -> None:
        for request in random_requests(count, length, decoder.spec.vocab_size, 1, rng):
            engine.submit(request)
        steps.clear()
        while engine.has_work:
            steps.append(engine.step())

    def ran() -> Pass:
        rows = count * length
        return Pass(len(steps), rows, count, count * pairs(length), rows, rows)

    bare_s = [timed(prefill)]
    measured = profiled_engine(engine, prefill, ran)
    limits = (machine, prefill_cost(decoder.spec, count, length))
    return split(f"prefill {count}x{length}", count * length, measured, bare_s, limits)


def learner_work(learner: Learner, samples: Sequence[Sample], machine: Machine) -> dict[str, Any]:
    """A step on samples of one length, after one that warms up; nothing is predicted from a last token."""
    from tandem.algo.pack import count_prompts

    decoder, count, length = learner.decoder, len(samples), len(samples[0].columns)
    totals = count_prompts(samples)

    def step() -> object:
        return learner.step(samples, totals)

    step()
    bare_s = [timed(step)]
    wall_s, rows = profiled(step, decoder)
    layers, run, met = len(decoder.layers), count * (length - 1), count * pairs(length - 1)
    once = _attention(decoder, met, run, run)
    rows["attention"].cost = layers * once
    # Scores again, and the gradients of probabilities, values, queries and keys; all of them twice but the output.
    rows["attention backward"].cost = layers * Cost(2.5 * once.flop, 2 * once.bytes)
    limits = (machine, train_cost(decoder.spec, count, length))
    return split(f"train {count}x{length}", count * length, (wall_s, rows), bare_s, limits)


def profile() -> dict[str, Any]:
    """All works on SmolLM2-135M in bf16, in this process."""
    machine = measure()
    engine = build_engine().engine
    fill_pages(engine)
    works = [decode_work(engine, count, CONTEXT, machine) for count in DECODES]
    works.append(prefill_work(engine, *PREFILL, machine))
    del engine
    works.append(learner_work(*build_learner(*LEARNER), machine))
    limits = {"matrix FLOP/s": machine.flop_s, "memory bytes/s": machine.bytes_s}
    return {"bench": "profile", "limits": limits, "works": works}
