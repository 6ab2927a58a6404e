"""Where the time of a decode step, a prefill and a learner step goes: seconds, operations and bytes by operation.

The functions of the table `probes` are timed from outside (`meter.py`). A row counts the operands of its calls, each
read or written once: where a share is above 100 %, they lay in a cache. Rows of kind "kernel" are operations, "host" is
Python and torch between them. On the CPU only: a GPU's calls return before they have run.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tandem.bench.meter import OWN, Kind, Meter, Part, Probe, Reading
from tandem.bench.roofline import Cost, Machine, decode_cost, measure, prefill_cost, timed, train_cost
from tandem.bench.sweep import fill_pages, made_up, start_decoding, start_prompts, stop_decoding

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.engine.engine import Engine
    from tandem.kernels.paths import Paths
    from tandem.kernels.weight import Weight
    from tandem.models.decoder import Decoder
    from tandem.models.fused import FusedForward
    from tandem.models.view import PagedView
    from tandem.train.step import Learner
    from tandem.types import Sample

DECODES = (1, 64, 256)
CONTEXT = 100
STEPS = 12  # measured, and as many with no stopwatch, in turn
PREFILL = (16, 1024)
LEARNER = (16, 256)


def _traffic(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _served(weight: Weight) -> int:
    """Bytes that a product reads of a matrix."""
    if weight.codes is not None:
        return _traffic(weight.codes.packed)
    return _traffic(weight.value if weight.packed is None else weight.packed)


def _product(rows: int, weight: Weight) -> float:
    return 2.0 * rows * weight.value.numel()


def _pairs(paths: Paths) -> tuple[float, float]:
    """Of all segments: queries times the keys they see, and keys. For layers whose queries see everything."""
    rows_S, first_S = paths.row_start_S.diff().double(), paths.first_position_S.double()
    return float((rows_S * first_S + rows_S * (rows_S + 1) / 2).sum()), float((first_S + rows_S).sum())


def _clock(own: FusedForward, *_: Any) -> None:
    """Let the next call say what its time went to."""
    import torch

    from tandem.kernels.forward import KINDS

    own.seconds = torch.zeros(len(KINDS), dtype=torch.float64)


def _fused(_out: Tensor, own: FusedForward, tokens_T: Tensor, view: PagedView, rows_N: Tensor) -> Reading:
    """An engine step's forward in one call; behind the attention of its last layer there are only `rows_N`."""
    from tandem.kernels.forward import KINDS

    assert own.seconds is not None
    seconds, own.seconds = own.seconds.tolist(), None
    layers, heads, size = own.decoder.layers, own.decoder.layers[0].mix.heads, own.decoder.dtype.itemsize
    rows, last, full = len(tokens_T), len(rows_N), len(layers) - 1
    (met, keys), last_keys = _pairs(view.paths), float((view.positions_T[rows_N] + 1).sum())
    wide = full * rows + last

    def product(name: str, count: int) -> Cost:
        weights = [weight for layer in layers for slot, weight in layer.weights() if slot.name == name]
        moved = sum(map(_served, weights)) + size * count * sum(weights[0].value.shape)
        return Cost(_product(count, weights[0]), moved)

    width, query = 2 * size * own.decoder.spec.width, heads.heads * heads.size
    seen = 2 * size * heads.kv_heads * heads.size * (full * keys + last_keys) + 2 * size * wide * query
    costs = (
        Cost(0.0, width * rows),
        Cost(0.0, width * (len(layers) * rows + wide + last)),
        product("qkv", len(layers) * rows),
        Cost(0.0, 2 * size * len(layers) * rows * heads.width),
        Cost(4.0 * query * (full * met + last_keys), seen),
        product("out", wide),
        product("gate_up", wide),
        product("down", wide),
    )
    calls = (1, 2 * len(layers) + 1, *[len(layers)] * (len(KINDS) - 2))
    parts = [Part(*part) for part in zip(KINDS, seconds, calls, costs, strict=True)]
    return Reading("around the forward call", parts=parts)


class _Readings:
    """What a call of each probed function was: its label, by the weight it multiplies by, and its cost."""

    def __init__(self, decoder: Decoder) -> None:
        self.names: dict[int, str] = {}  # by the id of a weight, and by where its gradient lies
        for name, weight in decoder.weights():
            label = "head" if name == "embed" else name.rpartition(".")[2]
            self.names[id(weight)] = label
            if weight.grad is not None:
                self.names[weight.grad.untyped_storage().data_ptr()] = label

    def linear(self, out: Tensor, x: Tensor, weight: Weight, _bias: Any = None, residual: Any = None) -> Reading:
        cost = Cost(_product(len(x), weight), _served(weight) + _traffic(x, out, residual))
        return Reading(self.names[id(weight)], cost)

    def input_gradient(self, out: Tensor, dy: Tensor, weight: Weight) -> Reading:
        cost = Cost(_product(len(dy), weight), _traffic(weight.value, dy, out))
        return Reading(f"input gradient: {self.names[id(weight)]}", cost)

    def accumulate(self, _out: None, grad: Tensor, dy: Tensor, x: Tensor, *_: Any) -> Reading:
        name = self.names[grad.untyped_storage().data_ptr()]
        cost = Cost(2.0 * len(x) * grad.numel(), 2 * _traffic(grad) + _traffic(dy, x))
        return Reading(f"weight gradient: {name}", cost)

    def attention(
        self, out: Tensor, query: Tensor, key: Tensor, _value: Tensor, paths: Paths, *_: Any, **__: Any
    ) -> Reading:
        heads, size = query.shape[1:]
        met, keys = _pairs(paths)
        read = 2 * keys * key.shape[1] * size * key.element_size()
        return Reading("attention", Cost(4 * met * heads * size, read + _traffic(query, out)))

    def attention_backward(self, _out: None, dout: Tensor, *rest: Any) -> Reading:
        """Products: scores again, and the gradients of probabilities, values, queries and keys."""
        out, _lse, qkv, grads, paths, *_ = rest
        cost = Cost(10 * _pairs(paths)[0] * dout.shape[1] * dout.shape[2], _traffic(dout, out, *qkv, *grads))
        return Reading("attention backward", cost)

    def logprobs(self, _out: Any, hidden: Tensor, weight: Weight, *_: Any, **__: Any) -> Reading:
        return Reading("head: log-probs, entropy", self._head(hidden, weight))

    def logprobs_backward(self, _out: Any, ctx: Any, *_: Any) -> Reading:
        """Gradients of the hidden states and of the head; logits that are computed again are not counted."""
        hidden, weight = ctx.saved_tensors[0], ctx.weight
        moved = _traffic(*ctx.saved_tensors, hidden, weight.value, weight.grad, weight.grad)
        return Reading("head: log-probs backward", Cost(2 * _product(len(hidden), weight), moved))

    def draw(self, _out: Any, hidden: Tensor, weight: Weight, *_: Any) -> Reading:
        return Reading("head, sampling", self._head(hidden, weight))

    @staticmethod
    def _head(hidden: Tensor, weight: Weight) -> Cost:
        return Cost(_product(len(hidden), weight), _served(weight) + _traffic(hidden))


def _elementwise(label: str) -> Callable[..., Reading]:
    """A reading of what only moves bytes: the tensors that it is given and gives."""
    from torch import Tensor

    def read(out: Any, *arguments: Any, **_: Any) -> Reading:
        results = out if isinstance(out, tuple) else (out,)
        return Reading(label, Cost(0.0, _traffic(*(a for a in (*results, *arguments) if isinstance(a, Tensor)))))

    return read


def _rotation(label: str) -> Callable[..., Reading]:
    """Of what reads rows and writes as many, whatever tables it is handed."""
    return lambda _out, rows, *_, **__: Reading(label, Cost(0.0, 2 * _traffic(rows)))


def probes(decoder: Decoder) -> list[Probe]:
    """What is timed of the engine and the learner."""
    read = _Readings(decoder)
    kernels: str = "tandem.kernels"
    host: Kind = "host"
    return [
        Probe(f"{kernels}.linear:linear", read.linear),
        Probe(f"{kernels}.swiglu:input_gradient", read.input_gradient),
        Probe(f"{kernels}.swiglu:accumulate", read.accumulate),
        Probe(f"{kernels}.attention:attention", read.attention),
        Probe(f"{kernels}.attention:attention_backward", read.attention_backward),
        Probe(f"{kernels}.rotary:rotate_", _rotation("rotation")),
        Probe(f"{kernels}.rotary:store_", _rotation("store")),
        Probe(f"{kernels}.norm:rms_norm", _rotation("norm")),
        Probe(f"{kernels}.norm:_Norm.backward", lambda dx, *_: Reading("norm backward", Cost(0, 3 * _traffic(dx[0])))),
        Probe(f"{kernels}.swiglu:swiglu", _elementwise("swiglu")),
        Probe(f"{kernels}.swiglu:_backward", _elementwise("swiglu backward")),
        Probe(f"{kernels}.head:draw", read.draw),
        Probe(f"{kernels}.logprob:token_logprobs", read.logprobs),
        Probe(f"{kernels}.logprob:_LogProb.backward", read.logprobs_backward),
        Probe(
            f"{kernels}.adamw:adamw",
            lambda _out, master, *rest: Reading("AdamW", Cost(0, 6 * _traffic(master) + _traffic(*rest[2:4]))),
        ),
        Probe(f"{kernels}.adamw:grad_norm", lambda _out, grads: Reading("gradient norm", Cost(0, _traffic(*grads)))),
        Probe(
            f"{kernels}.weight:Weight.repack", lambda _out, w: Reading("packing of weights", Cost(0, 2 * _served(w)))
        ),
        Probe(
            "tandem.train.optimiser:Optimiser.zero_grad",
            lambda _out, own: Reading("zeroing", Cost(0, _traffic(*(w.grad for _, w in own.decoder.weights())))),
        ),
        Probe("tandem.models.decoder:_Embed.backward", _elementwise("embedding gradient")),
        Probe("tandem.models.fused:FusedForward.__call__", _fused, host, before=_clock),
        Probe("tandem.engine.schedule:Scheduler.plan", "plan", host),
        Probe("tandem.engine.schedule:Scheduler.commit", "commit", host),
        Probe("tandem.engine.runner:DecoderRunner._check_pages", "sums of pages", host),
        Probe("tandem.engine.runner:DecoderRunner._view", "slots and page tables", host),
        Probe("tandem.engine.runner:DecoderRunner.run", "runner: Python", host),
        Probe("tandem.models.decoder:Decoder.forward", "forward: Python", host),
        Probe("tandem.algo.pack:pack", "packing of samples", host),
        Probe("tandem.algo.loss:policy_loss", "loss", host),
        Probe("torch:Tensor.backward", "autograd: Python", host),
    ]


def split(
    work: str, tokens: int, meters: Sequence[Meter], bare_s: Sequence[float], limits: tuple[Machine, Cost]
) -> dict[str, Any]:
    """The result of one work: per call of it, by operation; the seconds of the rows sum to `wall_s`.

    `meters` measured one call each; `bare_s` are the times of calls without stopwatches; `limits`: the machine, and the
    least that the work needs.
    """
    (machine, needed), number = limits, len(meters)
    labels = dict.fromkeys(label for meter in meters for label in meter.rows)
    rows = []
    for label in labels:
        found = [meter.rows[label] for meter in meters if label in meter.rows]
        seconds, calls, flop, moved = (
            sum(getattr(row, name) for row in found) / number for name in ("seconds", "calls", "flop", "bytes")
        )
        least_s = machine.least_s(Cost(flop, moved))
        row = {"operation": label, "kind": found[0].kind, "seconds": seconds, "calls": calls, "flop": flop}
        rates = {"bytes": moved, "flop_s": flop / seconds, "bytes_s": moved / seconds}
        rows.append(row | rates | {"share_of_limit": least_s / seconds if least_s else None})
    spent_s, least_s = statistics.median(bare_s), machine.least_s(needed)
    return {
        "work": work,
        "tokens": tokens,
        "seconds": spent_s,
        "tok_s": tokens / spent_s,
        "limit_s": least_s,
        "share_of_limit": least_s / spent_s,
        "wall_s": sum(meter.wall_s for meter in meters) / number,
        "host_s": sum(row["seconds"] for row in rows if row["kind"] == "host" and row["operation"] != OWN),
        "rows": sorted(rows, key=lambda row: -row["seconds"]),
    }


def _in_turn(run: Callable[[], object], decoder: Decoder, times: int) -> tuple[list[Meter], list[float]]:
    """`times` calls without and as many with stopwatches."""
    meters, bare_s, timing = [], [], probes(decoder)
    for _ in range(times):
        bare_s.append(timed(run))
        meters.append(Meter())
        meters[-1].over(timing, run)
    return meters, bare_s


def decode_work(engine: Engine, count: int, context: int, machine: Machine) -> dict[str, Any]:
    """Steps of `count` sequences at about `context`."""
    decoder = engine.runner.decoder  # type: ignore[attr-defined]
    start_decoding(engine, count, context, 2 * STEPS + 2, random.Random(count))
    engine.step()
    measured = _in_turn(engine.step, decoder, STEPS)
    stop_decoding(engine)
    cost = decode_cost(decoder.spec, count, context + 1 + STEPS)
    return split(f"decode step {count}", count, *measured, (machine, cost))


def prefill_work(engine: Engine, count: int, length: int, machine: Machine) -> dict[str, Any]:
    """`count` prompts of `length` tokens, and a token drawn of each."""
    decoder, rng = engine.runner.decoder, random.Random(length)  # type: ignore[attr-defined]

    def prefill() -> None:
        start_prompts(engine, made_up(count, length, decoder.spec.vocab_size, rng), 1, rng)
        while engine.has_work:
            engine.step()

    measured = _in_turn(prefill, decoder, 1)
    limits = (machine, prefill_cost(decoder.spec, count, length))
    return split(f"prefill {count}x{length}", count * length, *measured, limits)


def learner_work(learner: Learner, samples: Sequence[Sample], machine: Machine) -> dict[str, Any]:
    """A step on samples of one length, after one that warms up."""
    from tandem.algo.pack import count_prompts

    count, length, totals = len(samples), len(samples[0].columns), count_prompts(samples)
    learner.step(samples, totals)
    measured = _in_turn(lambda: learner.step(samples, totals), learner.decoder, 1)
    limits = (machine, train_cost(learner.decoder.spec, count, length))
    return split(f"train {count}x{length}", count * length, *measured, limits)


def profile() -> dict[str, Any]:
    """All works on SmolLM2-135M in bf16, in this process."""
    from tandem.bench.beside import build_engine, build_learner

    machine = measure()
    engine = build_engine().engine
    fill_pages(engine)
    works = [decode_work(engine, count, CONTEXT, machine) for count in DECODES]
    works.append(prefill_work(engine, *PREFILL, machine))
    del engine
    works.append(learner_work(*build_learner(*LEARNER), machine))
    limits = {"matrix FLOP/s": machine.flop_s, "memory bytes/s": machine.bytes_s}
    return {"bench": "profile", "limits": limits, "works": works}
