"""What the compiled kernels are handed: nothing at all is fine, and anything but what they take is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.algo.pack import count_prompts, pack
from tandem.engine.runner import DecoderRunner
from tandem.kernels import (
    adamw,
    adapter,
    attention,
    gradient,
    linear,
    logprob,
    norm,
    page_sum,
    quantise,
    rotary,
    swiglu,
)
from tandem.kernels import sample as sampler
from tandem.kernels.divergence import Divergence, Head, head_divergence
from tandem.kernels.head import draw
from tandem.kernels.page_pool import INT4, KvPool, rotate_store_
from tandem.kernels.paths import Paths
from tandem.kernels.sample import SamplingBatch
from tandem.kernels.weight import Adapter, Piece, Strips, Weight
from tandem.models.fused import FusedForward
from tandem.models.rope import rope_tables
from tandem.models.spec import ModelSpec
from tandem.models.view import PackView, PagedView
from tandem.numerics.quantise import dequantise as dequantise_reference
from tandem.numerics.quantise import quantise as quantise_reference
from tandem.train.score import score
from tandem.types import Request, Sampling

COLUMNS, DEPTH, HEADS, KV_HEADS, SIZE, PAGE = 70, 32, 4, 2, 8, 4
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
TABLES = rope_tables(ModelSpec("llama", 8, 64, 8, 1, HEADS, KV_HEADS, SIZE), 64)
HYPER = adamw.Hyper(1e-3, 0.9, 0.99, 1e-8, 0.1, step=1)


def weight(*shape: int, dtype: torch.dtype = BF16) -> Weight:
    made = Weight(normal(*shape, dtype=dtype), matrix=len(shape) == 2)
    made.grad = torch.zeros(shape)
    return made


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def batch_of(rows: int, **filters: Any) -> SamplingBatch:
    return SamplingBatch.stack([Sampling(**filters)] * rows, range(rows), range(rows))


def paths_of(rows: int, page_tokens: int) -> Paths:
    """One sequence of so many rows; none where there are none."""
    if not rows:
        return Paths.build([0], [], [], page_tokens)
    return Paths.build([0, rows], [0], [list(range(-(-rows // page_tokens)))], page_tokens)


@dataclass
class Entry:
    """A call of a kernel's wrapper on tensors of so many rows."""

    call: Callable[..., Any]
    tensors: Callable[[int], dict[str, Tensor]]
    needs: tuple[str, ...] = field(default=("compiled", "portable", "reference"))  # where it can be called


def pool_of(dtype: torch.dtype = BF16, stored: torch.dtype | None = None) -> KvPool:
    pool = KvPool(8, PAGE, KV_HEADS, SIZE, dtype, stored)
    for tensor in pool.tensors():
        tensor.view(torch.uint8).zero_()
    return pool


def held() -> Weight:
    """Codes, or without a compiler the matrix of their values."""
    made = weight(COLUMNS, DEPTH)
    own = quantise_reference(made.value, 4, 16)
    made.value.copy_(dequantise_reference(own, BF16))
    made.repack()
    assert made.hold(own, rows=True) or made.packed is None
    return made


def added() -> Adapter:
    """Of all columns, in two pieces of 3 ranks and one."""
    down = Strips(normal(6, DEPTH))
    down.value[3], down.value[5] = 0, 0
    down.repack()
    ups = Weight(normal(5, 3), matrix=True), Weight(normal(COLUMNS - 5, 1), matrix=True)
    return Adapter(down, (Piece(0, 0, 0.5, ups[0]), Piece(5, 4, 2.0, ups[1])))


def adapted() -> Weight:
    """A matrix with them, which alone learn."""
    made = weight(COLUMNS, DEPTH)
    made.grad, made.adapter = None, added()
    return made


def _store(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, stored=None) -> list[Tensor]:
    pool = pool_of(stored=stored)
    rotate_store_((query, key, value), positions, TABLES, slots, pool)
    return [query, *pool.rows(slots)]


def _qkv(rows: int) -> dict[str, Tensor]:
    """Views of one row a token, as of a fused projection."""
    fused = normal(rows, HEADS + 2 * KV_HEADS, SIZE)
    parts = fused[:, :HEADS], fused[:, HEADS : HEADS + KV_HEADS], fused[:, HEADS + KV_HEADS :]
    return dict(zip(("query", "key", "value"), parts, strict=True))


def _attend_backward(query: Tensor, key: Tensor, value: Tensor, dout: Tensor) -> list[Tensor]:
    rows = len(query)
    paths, lse = paths_of(rows, 1), torch.empty(rows, HEADS)
    out = attention.attention(query, key, value, paths, lse_TH=lse)
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    attention.attention_backward(dout, out, lse, (query, key, value), grads, paths)
    return list(grads)


def _divergence_backward(hidden: Tensor, other: Tensor, targets: Tensor) -> list[Tensor]:
    head = weight(COLUMNS, DEPTH)
    leaf = hidden.clone().requires_grad_()
    teacher = Head(other, weight(COLUMNS, DEPTH))
    found = head_divergence(Head(leaf, head), teacher, targets, Divergence("jensen_shannon"))
    found.loss_N.sum().backward()
    assert leaf.grad is not None and head.grad is not None
    return [*(one.detach() for one in found), leaf.grad, head.grad]


def _scores_backward(hidden: Tensor, targets: Tensor) -> list[Tensor]:
    matrix = weight(COLUMNS, DEPTH)
    hidden = hidden.detach().requires_grad_()
    found = logprob.token_logprobs(hidden, matrix, targets, 0.7)
    found[0].sum().backward()
    return [*(x.detach() for x in found), hidden.grad, matrix.grad]


def _backward(call: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out = call(*leaves)
    (out.float() * 1.5).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


CPP = ("compiled", "portable")
ENTRIES: dict[str, Entry] = {
    "linear": Entry(
        lambda x, residual: linear.linear(x, weight(COLUMNS, DEPTH), weight(COLUMNS), residual),
        lambda n: {"x": normal(n, DEPTH), "residual": normal(n, COLUMNS)},
    ),
    "linear backward": Entry(
        lambda x, residual: _backward(lambda *g: linear.linear(g[0], weight(COLUMNS, DEPTH), None, g[1]), x, residual),
        lambda n: {"x": normal(n, DEPTH), "residual": normal(n, COLUMNS)},
    ),
    "adapt": Entry(
        lambda y, x: [adapter.adapt_(y, x, added()), y],
        lambda n: {"y": normal(n, COLUMNS), "x": normal(n, DEPTH)}
    ),
    "adapt backward": Entry(
        lambda x, residual: _backward(lambda *g: linear.linear(g[0], adapted(), None, g[1]), x, residual),
        lambda n: {"x": normal(n, DEPTH), "residual": normal(n, COLUMNS)},
    ),
    "logits": Entry(lambda x: linear.logits(x, weight(COLUMNS, DEPTH)), lambda n: {"x": normal(n, DEPTH)}),
    "codes": Entry(
        lambda x, bias, residual: held().codes.product(x, bias, residual),  # type: ignore[union-attr]
        lambda n: {"x": normal(n, DEPTH), "bias": normal(COLUMNS, dtype=FP32), "residual": normal(n, COLUMNS)},
        needs=CPP,
    ),
    "draw": Entry(
        lambda x, each: draw(x, weight(COLUMNS, DEPTH), batch_of(len(each))),
        lambda n: {"x": normal(n, DEPTH), "each": torch.zeros(n)},
    ),
    "draw from codes": Entry(
        lambda x, each: draw(x, held(), batch_of(len(each))),
        lambda n: {"x": normal(n, DEPTH), "each": torch.zeros(n)},
    ),
    "sample": Entry(
        lambda logits, each: sampler.sample(logits, batch_of(len(each), top_k=3)),
        lambda n: {"logits": normal(n, COLUMNS, dtype=FP32), "each": torch.zeros(n)},
    ),
    "kept sets": Entry(
        lambda logits, tokens: [
            torch.tensor([0.0 if p is None else p for p in sampler.kept_sets(logits, tokens, batch_of(len(logits)))[1]])
        ],
        lambda n: {"logits": normal(n, COLUMNS, dtype=FP32), "tokens": torch.zeros(n, dtype=INT64)},
    ),
    "processed logits": Entry(
        lambda logits: sampler.processed_logits(logits, batch_of(len(logits), top_p=0.5)),
        lambda n: {"logits": normal(n, COLUMNS, dtype=FP32)},
    ),
    "entropy": Entry(sampler.entropy, lambda n: {"logits_SV": normal(n, COLUMNS, dtype=FP32)}),
    "log-sum-exp": Entry(
        sampler.log_sum_exp, lambda n: {"logits_SV": normal(n, COLUMNS, dtype=FP32), "temperature_S": torch.ones(n)}
    ),
    "log-probs": Entry(
        _scores_backward, lambda n: {"hidden": normal(n, DEPTH), "targets": torch.arange(n) % COLUMNS}
    ),
    "divergence": Entry(
        _divergence_backward,
        lambda n: {"hidden": normal(n, DEPTH), "other": normal(n, DEPTH), "targets": torch.arange(n) % COLUMNS},
    ),
    "norm": Entry(
        lambda x: _backward(lambda leaf: norm.rms_norm(leaf, weight(DEPTH), 1e-5), x), lambda n: {"x": normal(n, DEPTH)}
    ),
    "norm forward": Entry(lambda x: norm.rms_norm(x, weight(DEPTH), 1e-5), lambda n: {"x": normal(n, DEPTH)}),
    "rotate": Entry(
        lambda x, positions: [rotary.rotate_(x, positions, *TABLES), x][1:],
        lambda n: {"x": normal(n, HEADS, SIZE), "positions": torch.arange(n)}
    ),
    "SwiGLU": Entry(swiglu.swiglu, lambda n: {"gate_up_TF": normal(n, 2 * DEPTH)}),
    "SwiGLU backward": Entry(
        lambda gate_up, residual: _backward(
            lambda *g: swiglu.swiglu_down(g[0], weight(COLUMNS, DEPTH), g[1]), gate_up, residual
        ),
        lambda n: {"gate_up": normal(n, 2 * DEPTH), "residual": normal(n, COLUMNS)},
    ),
    "attention": Entry(
        lambda query, key, value: attention.attention(query, key, value, paths_of(len(query), 1)), lambda n: _qkv(n)
    ),
    "attention backward": Entry(
        _attend_backward, lambda n: {**_qkv(n), "dout": normal(n, HEADS, SIZE)}, needs=CPP
    ),
    "paged attention": Entry(
        lambda query: attention.paged_attention(query, pool_of(), paths_of(len(query), PAGE)),
        lambda n: {"query": normal(n, HEADS, SIZE)},
    ),
    "store": Entry(
        _store, lambda n: {**_qkv(n), "positions": torch.arange(n), "slots": torch.arange(n)}
    ),
    "store int8": Entry(
        lambda **given: _store(**given, stored=torch.int8),
        lambda n: {**_qkv(n), "positions": torch.arange(n), "slots": torch.arange(n)}
    ),
    "store int4": Entry(
        lambda **given: _store(**given, stored=INT4),
        lambda n: {**_qkv(n), "positions": torch.arange(n), "slots": torch.arange(n)}
    ),
    "paged attention int4": Entry(
        lambda query: attention.paged_attention(query, pool_of(stored=INT4), paths_of(len(query), PAGE)),
        lambda n: {"query": normal(n, HEADS, SIZE)},
    ),
    "page sums": Entry(
        lambda pool, pages: torch.tensor(page_sum.page_sums([pool], pages.tolist())),
        lambda n: {"pool": normal(max(n, 1), 9), "pages": torch.arange(n)},
    ),
    "accumulate": Entry(
        lambda grad, dy, x: [gradient.accumulate(grad, dy, x), grad][1:],
        lambda n: {"grad": torch.zeros(COLUMNS, DEPTH), "dy": normal(n, COLUMNS), "x": normal(n, DEPTH)}
    ),
    "input gradient": Entry(
        lambda dy: gradient.input_gradient(dy, weight(COLUMNS, DEPTH)), lambda n: {"dy": normal(n, COLUMNS)}
    ),
    "adamw": Entry(
        lambda **given: [adamw.adamw(**given, hyper=HYPER), *given.values()][1:],
        lambda n: {
            **{name: torch.full((n, 3), 0.5) for name in ("master", "first", "second", "grad")},
            "value": torch.zeros(n, 3, dtype=BF16),
        }
    ),
    "norm of gradients": Entry(
        lambda grad: torch.tensor(adamw.grad_norm([grad])), lambda n: {"grad": normal(n, DEPTH, dtype=FP32)}
    ),
    "quantise": Entry(
        lambda x: [(q := quantise.quantise(x, 4, 16)).codes_NK, q.scales_NG, quantise.dequantise(q, BF16)],
        lambda n: {"x": normal(n, DEPTH)},
    ),
}  # fmt: skip


def flat(found: Any) -> Iterator[Tensor]:
    yield from found if isinstance(found, tuple | list) else [found]


@pytest.mark.parametrize("name", ENTRIES)
def test_no_rows_are_fine(any_path, name):
    """A chunk that draws nothing, a batch without a sample, a tensor without elements: a crash or an index error."""
    entry = ENTRIES[name]
    if any_path not in entry.needs:
        pytest.skip("needs a compiler")
    full, empty = (list(flat(entry.call(**entry.tensors(rows)))) for rows in (5, 0))
    assert [x.ndim for x in full] == [x.ndim for x in empty]
    assert all(0 in x.shape or x.shape == y.shape for x, y in zip(empty, full, strict=True))


# What a kernel would read as other numbers, or beyond its end.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda tensor: tensor.to({BF16: FP32, FP32: BF16, INT64: torch.int32}[tensor.dtype]),
    "fewer rows": lambda tensor: tensor[:-1].clone(),
    "narrower": lambda tensor: tensor[..., :-1].clone(),
    "strided": lambda tensor: torch.stack([tensor, tensor + 1], -1)[..., 0],
    "no memory": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_kernel_does_not_take_is_refused(kernel_path, by_reference, name):
    """A tensor of another dtype, fewer rows or other strides, read as if it were right: other numbers, or a crash.

    Whatever is not refused is what the reference makes of the same tensors.
    """
    entry, taken = ENTRIES[name], []
    for argument, right in entry.tensors(5).items():
        for what in WRONG:
            given = entry.tensors(5)
            given[argument] = WRONG[what](right)
            try:
                found = list(flat(entry.call(**given)))
            except (AssertionError, RuntimeError, IndexError):
                continue
            assert "reference" in entry.needs or what == "strided", (argument, what)
            taken.append((argument, what, found))
    if "reference" not in entry.needs:
        return
    with by_reference():
        for argument, what, found in taken:
            given = entry.tensors(5)
            given[argument] = WRONG[what](given[argument])
            for got, wanted in zip(found, flat(entry.call(**given)), strict=True):
                assert got.shape == wanted.shape and torch.allclose(got, wanted, 0.05, 0.05), (argument, what)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def kept(*values: int) -> bytes:
    return np.array(values, dtype=np.uint32).tobytes()


def _scored(target: int, kept_ids: bytes = b"") -> None:
    logprob.token_logprobs(normal(1, DEPTH), weight(COLUMNS, DEPTH), ids(target), 1.0, (kept_ids,))


def _stored(positions: Tensor, slots: Tensor) -> None:
    _store(**_qkv(2), positions=positions, slots=slots)


BEYOND: dict[str, tuple[Callable[[], Any], str]] = {
    "target": (lambda: _scored(COLUMNS), "targets 70 to 70, outside 0 to 69"),
    "negative target": (lambda: _scored(-1), "targets -1 to -1"),
    "kept id": (lambda: _scored(3, kept(3, COLUMNS)), "ids of kept sets 3 to 70, outside 0 to 69"),
    "negative kept id": (lambda: _scored(3, kept(3, 2**32 - 1)), "kept set of row 0 is not in ascending order"),
    "kept ids out of order": (lambda: _scored(3, kept(5, 3)), "kept set of row 0 is not in ascending order"),
    "position": (
        lambda: rotary.rotate_(normal(2, HEADS, SIZE), ids(0, 64), *TABLES),
        "positions 0 to 64, outside 0 to 63",
    ),
    "stored position": (lambda: _stored(ids(0, 64), ids(0, 1)), "positions 0 to 64"),
    "slot": (lambda: _stored(ids(0, 1), ids(0, 32)), "slots 0 to 32, outside 0 to 31"),
    "negative slot": (lambda: _stored(ids(0, 1), ids(-1, 0)), "slots -1 to 0"),
    "page": (lambda: page_sum.page_sums([normal(3, 9)], [0, 3]), "pages 0 to 3, outside 0 to 2"),
    "rows beyond the table": (lambda: Paths.build([0, 9], [0], [[0, 1]], PAGE), "in tables of 8 positions"),
    "path beyond its parent": (lambda: PackView([0, 1, 2], [0, 2], [-1, 0]), "sees 2 positions of segment 0"),
    "path without a parent": (lambda: PackView([0, 2], [1], [-1]), "sees 1 positions of segment -1"),
}


@pytest.mark.parametrize("what", BEYOND)
def test_ids_beyond_what_they_name_are_refused(kernel_path, what):
    """A target, position, slot, page or kept id whose memory is somebody else's: a crash, or a log-prob of nothing."""
    call, said = BEYOND[what]
    with pytest.raises(AssertionError, match=said):
        call()


@pytest.mark.parametrize("width", [32, 33])
def test_a_pass_names_ids_that_it_has_no_rows_for(any_path, make_decoder, width):
    """A token beyond the embedding (a negative one counts from its end), or a position beyond the rotation's table."""
    decoder = make_decoder("bfloat16", width=width)
    runner = DecoderRunner(decoder, 4, 64)
    place = (torch.arange(3), [torch.arange(3)], [paths_of(3, 64)], runner.group_L, runner.pools_L)
    for forward in (decoder.forward, runner.forward):
        for wrong in (-1, 97, 2**40):
            with pytest.raises(AssertionError, match="tokens .*outside 0 to 96"):
                forward(ids(0, wrong, 3), PagedView(*place), ids(2))
        with pytest.raises(AssertionError, match="positions 0 to 256, outside 0 to 255"):
            forward(ids(0, 1, 2), PagedView(ids(0, 1, 256), *place[1:]), ids(2))
    if isinstance(runner.forward, FusedForward):
        for wrong, said in (({1: [ids(0, 1, 256)]}, "slots 0 to 256"), ({1: [ids(0, 1, -1)]}, "slots -1 to 1")):
            given = [wrong.get(i, part) for i, part in enumerate(place)]
            with pytest.raises(AssertionError, match=said):
                runner.forward(ids(0, 1, 2), PagedView(*given), ids(2))
        table = Paths.build([0, 3], [0], [[4]], 64)
        with pytest.raises(AssertionError, match="pages 4 to 4, outside 0 to 3"):
            runner.forward(ids(0, 1, 2), PagedView(*place[:2], [table], *place[3:]), ids(2))


@pytest.mark.parametrize("wrong", [-1, 97])
def test_the_learner_names_the_sample_of_a_token_outside_the_vocabulary(make_decoder, parity, wrong):
    """A target that no logit stands for counts as probability 1 over the sum: a loss of nothing, and exit 0."""
    asked = Request("r", "r", (1, 2, 3), Sampling(max_new_tokens=4), 0)
    decoder = make_decoder()
    (sample,) = parity.samples([asked], parity.engine(decoder).generate([asked]))
    tokens = [*sample.columns["tokens"][:-1], wrong]
    samples = [dataclasses.replace(sample, columns=sample.columns.having(tokens=tokens))]
    (microbatch,) = pack(samples, count_prompts(samples), 100)
    with pytest.raises(AssertionError, match="of r: .*outside 0 to 96"):
        score(decoder, microbatch, 1.0)
