"""Attention against PyTorch's own in fp64 with autograd, and the same bits for a position however it is computed.

Tolerances are worked out beside the fp64 result, element by element, from rounding errors (E = 2^-24; U = 2^-24 or, for
bf16, 2^-8, of one rounding to the compute dtype):
- a score errs by (D + 3) E scale sum |q||k| and its exponential by a few E more, so a probability has a relative
  error `soft`; it is rounded to the compute dtype (U) before it meets the values;
- a sum of n terms in fp32 errs by n E times the sum of their magnitudes; each result is rounded (U).
The gradient of a score is p (dout . v - dout . out) scale: the error of `out` as stored enters through its second term.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.kernels.attention import attention, attention_backward, attention_reference, paged_attention
from tandem.kernels.attention_int8 import int8_attention_reference
from tandem.kernels.page_pool import INT4, KvPool, rotate_store_
from tandem.kernels.paths import Paths
from tandem.kernels.rotary import rotate_
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import from_e4m3, from_int4, from_int8, to_e4m3, to_int4, to_int8
from tandem.types import Reach
from tests.samples import forests

E = 2.0**-24
INT8_ERROR = (
    2.0**-6
)  # of the largest value: weights of a block are rounded to 1 / 510 of the largest of 64, queries hardly
STORE = {torch.float32: E, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]
KEPT = {  # what a pool stores -> what then is read
    None: lambda x: x,
    torch.float8_e4m3fn: lambda x: from_e4m3(to_e4m3(x), x.dtype),
    torch.int8: lambda x: from_int8(*to_int8(x), x.dtype),
    INT4: lambda x: from_int4(*to_int4(x), x.dtype),
}


@dataclass(frozen=True)
class Shape:
    """Heads of a layer."""

    heads: int
    kv_heads: int
    size: int
    reach: Reach = Reach()
    sinks: int = 0

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the positions `query` see the positions `key`, by the definition."""
        seen = key <= query
        if self.reach.window:
            return seen & ((key > query - self.reach.window) | (key < self.sinks))
        return seen & (key // self.reach.chunk == query // self.reach.chunk) if self.reach.chunk else seen


@dataclass
class Expected:
    """fp64 results and the bounds of their errors."""

    out: Tensor
    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    bounds: dict[str, Tensor]


REACHES = [Reach(), Reach(), *(Reach(window=w) for w in (1, 5, 64, 70)), *(Reach(chunk=c) for c in (1, 16, 50, 64))]
PAGES = [2, 4, 8, 16, 32, 64, 128]
shapes = st.builds(
    lambda kv, group, size, reach: Shape(kv * group, kv, size, reach),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([16, 24, 32, 48, 64, 80, 96, 128]),
    st.sampled_from(REACHES),
)


def rows_of(count: int, shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as strided views of one fused row, as the decoder has them."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(count, shape.heads + 2 * shape.kv_heads, shape.size, generator=generator).to(dtype)
    ends = (shape.heads, shape.heads + shape.kv_heads)
    return fused[:, : ends[0]], fused[:, ends[0] : ends[1]], fused[:, ends[1] :]


def slots_of(paths: Paths, segment: int, length: int) -> list[int]:
    size, table = paths.page_tokens, paths.table_SP[segment].tolist()
    return [table[p // size] * size + p % size for p in range(length)]


def expected(qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor | None, paths: Paths, shape: Shape) -> Expected:
    """By scaled_dot_product_attention in fp64, one segment at a time, gradients by autograd. No `dout`: the output
    alone, a fourth of the work."""
    unit, group = STORE[qkv[0].dtype], shape.heads // shape.kv_heads
    query, key, value = (x.detach().double().requires_grad_() for x in qkv)
    outs, bounds = [], {name: torch.zeros_like(x) for name, x in zip(("query", "key", "value"), qkv, strict=True)}
    bounds = {name: bound.double() for name, bound in bounds.items()}
    bounds["out"] = torch.zeros_like(bounds["query"])
    for s, first in enumerate(paths.first_position_S.tolist()):
        start, stop = paths.row_start_S[s : s + 2].tolist()
        slots = torch.tensor(slots_of(paths, s, first + stop - start))
        seen = shape.seen(torch.arange(first, first + stop - start)[:, None], torch.arange(len(slots)))
        q, k, v = query[start:stop].transpose(0, 1), *(x[slots].transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        outs.append(out.transpose(0, 1))

        with torch.no_grad():
            scale, n = shape.size**-0.5, len(slots)
            scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
            p, lse = scores.softmax(-1), scores.logsumexp(-1)
            largest = float((q.abs() @ k.abs().mT).max()) * scale
            soft = 2 * (shape.size + 3) * E * largest + (n + 16 + 4 * (largest + float(lse.abs().max()))) * E
            out_error = (unit + soft + n * E) * (p @ v.abs()) + unit * out.abs()
            bounds["out"][start:stop] = out_error.transpose(0, 1)
            if dout is None:
                continue
            do = dout[start:stop].double().transpose(0, 1)
            delta = (out * do).sum(-1, keepdim=True)
            ds = p * (do @ v.mT - delta) * scale
            delta_error = (out_error * do.abs()).sum(-1, keepdim=True)
            delta_error += shape.size * E * (out * do).abs().sum(-1, keepdim=True)
            ds_error = p * scale * (shape.size * E * (do.abs() @ v.abs().mT) + delta_error)
            ds_error += (soft + unit + 4 * E) * ds.abs()
            terms = (n + query.shape[0] * group) * E
            bounds["query"][start:stop] = (ds_error @ k.abs() + terms * (ds.abs() @ k.abs())).transpose(0, 1)
            heads = (shape.kv_heads, group, n, shape.size)
            dkey = ds_error.mT @ q.abs() + terms * (ds.abs().mT @ q.abs())
            dvalue = (soft + unit + terms) * (p.mT @ do.abs())
            for name, part in (("key", dkey), ("value", dvalue)):
                bounds[name].index_add_(0, slots, part.view(heads).sum(1).transpose(0, 1))
    result = torch.cat(outs)
    if dout is None:
        return Expected(result.detach(), *(torch.empty(0) for _ in range(3)), bounds)
    dquery, dkey, dvalue = torch.autograd.grad(result, (query, key, value), dout.double())
    for name, grad in (("query", dquery), ("key", dkey), ("value", dvalue)):
        bounds[name] += unit * grad.abs()
    return Expected(result.detach(), dquery, dkey, dvalue, bounds)


def within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted).abs() - 1.05 * bound - 1e-30
    assert bool((excess <= 0).all()), (excess.max().item(), bound.max().item(), wanted.abs().max().item())


class Paged:
    """Sequences in pages of one pool. What nobody wrote is NaN, and so is a page that no sequence has."""

    def __init__(self, lengths: list[int], shape: Shape, page: int, dtype: torch.dtype, seed: int, stored=None) -> None:
        self.rng, self.page, self.shape = random.Random(seed), page, shape
        counts = [-(-length // page) for length in lengths]
        self.pages = sum(counts) + 3
        order = self.rng.sample(range(self.pages), self.pages)
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.pool = KvPool(self.pages, page, shape.kv_heads, shape.size, dtype, stored)
        for memory in self.pool.tensors():
            memory.view(torch.uint8).fill_(0xFF)  # NaN in fp32, so in scales too, bf16 and e4m3

    def slots(self, sequence: int, positions: range) -> Tensor:
        table = self.tables[sequence]
        return torch.tensor([table[p // self.page] * self.page + p % self.page for p in positions])

    def write(self, sequence: int, first: int, key: Tensor, value: Tensor) -> None:
        self.pool.store_(key, value, self.slots(sequence, range(first, first + len(key))))

    def paths(self, segments: list[tuple[int, int, int]]) -> Paths:
        """Of (sequence, first position, rows). What no query of a segment sees is no page, or one of NaN."""
        tables, sinks = [], self.shape.sinks if self.shape.reach.window else 0
        for sequence, first, _ in segments:
            begin, table = self.shape.reach.first_seen(first) // self.page, self.tables[sequence].copy()
            for place in range(-(-sinks // self.page), begin):
                table[place] = self.rng.choice([-1, 1 << 30])
            tables.append(table)
        row_start = itertools.accumulate((rows for *_, rows in segments), initial=0)
        return Paths.build(list(row_start), [first for _, first, _ in segments], tables, self.page)


@settings(max_examples=40)
@given(
    shape=shapes,
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 75)), min_size=1, max_size=4),
    page=st.sampled_from(PAGES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(any_path, dtype, shape, lengths, page, seed):
    """A key of another page, of the future or out of reach is seen; a tail of a block or head is lost."""
    paged = Paged([past + own for past, own in lengths], shape, page, dtype, seed)
    row_start = list(itertools.accumulate((own for _, own in lengths), initial=0))
    rows = [rows_of(past + own, shape, dtype, seed + 1 + s)[1:] for s, (past, own) in enumerate(lengths)]
    for s, (key, value) in enumerate(rows):
        paged.write(s, 0, key, value)
    paths = paged.paths([(s, past, own) for s, (past, own) in enumerate(lengths)])
    assert paths.num_rows == row_start[-1]
    query, _, _ = rows_of(row_start[-1], shape, dtype, seed)
    out = paged_attention(query, paged.pool, paths, shape.reach)
    ends = list(itertools.accumulate((past + own for past, own in lengths), initial=0))
    alike = Paths.build(
        row_start, [past for past, _ in lengths], [list(range(*ab)) for ab in itertools.pairwise(ends)], 1
    )
    key, value = (torch.cat(parts) for parts in zip(*rows, strict=True))
    wanted = expected((query, key, value), None, alike, shape)
    within(out, wanted.out, wanted.bounds["out"])


@settings(max_examples=40)
@given(shape=shapes, forest=forests(), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_and_gradients(any_path, dtype, shape, forest, seed):
    """A gradient lost: of a sample through shared rows, of a tile's tail, of a head of a group."""
    row_start, first, _, tables = forest
    paths, rows = Paths.build(row_start, first, tables, 1), row_start[-1]
    query, key, value = rows_of(rows, shape, dtype, seed)
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    wanted = expected((query, key, value), dout, paths, shape)
    if any_path == "reference":
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attention_reference(*inputs, paths, shape.reach)
        within(out.detach(), wanted.out, wanted.bounds["out"])
        assert all(x is not None for x in torch.autograd.grad(out, inputs, dout))
        return
    lse = torch.empty(query.shape[:2])
    out = attention(query, key, value, paths, shape.reach, lse)
    within(out, wanted.out, wanted.bounds["out"])
    fused = torch.full((rows, shape.heads + 2 * shape.kv_heads, shape.size), math.nan, dtype=dtype)
    ends = (shape.heads, shape.heads + shape.kv_heads)
    grads = (fused[:, : ends[0]], fused[:, ends[0] : ends[1]], fused[:, ends[1] :])
    attention_backward(dout, out, lse, (query, key, value), grads, paths, shape.reach)
    pairs = zip(("query", "key", "value"), grads, (wanted.dquery, wanted.dkey, wanted.dvalue), strict=True)
    for name, grad, gradient in pairs:
        within(grad, gradient, wanted.bounds[name])


def test_reference_in_fp64_equals_pytorch():
    """The reference that the kernels stand in for computes something else."""
    shape = Shape(6, 2, 16, Reach(window=9))
    paths = Paths.build([0, 20, 31], [0, 20], [list(range(20)), list(range(31))], 1)
    qkv = tuple(x.double() for x in rows_of(31, shape, torch.float32, 0))
    dout = torch.randn(31, 6, 16, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in qkv]
    out = attention_reference(*inputs, paths, shape.reach)
    wanted = expected(tuple(x.float() for x in qkv), dout, paths, shape)  # exact: drawn in fp32
    torch.testing.assert_close(out, wanted.out, atol=1e-13, rtol=1e-12)
    grads = torch.autograd.grad(out, inputs, dout)
    for grad, gradient in zip(grads, (wanted.dquery, wanted.dkey, wanted.dvalue), strict=True):
        torch.testing.assert_close(grad, gradient, atol=1e-13, rtol=1e-12)


@settings(max_examples=30)
@given(
    shape=shapes,
    length=st.integers(1, 210),
    cuts=st.sets(st.integers(1, 209), max_size=6),
    pages=st.tuples(st.sampled_from(PAGES), st.sampled_from([None, None, *KEPT])),
    others=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), max_size=3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_however_it_is_run(kernel_path, dtype, shape, length, cuts, pages, others, seed):
    """A position's bits depend on the chunk it came in, the page size or order, or on the sequences beside it; narrow
    keys and values are others than those that were rounded a row at a time."""
    page, stored = pages
    query, key, value = rows_of(length, shape, dtype, seed)
    whole_paths = Paths.build([0, length], [0], [list(range(length))], 1)
    if stored == torch.int8:
        whole = int8_attention_reference(query, to_int8(key), to_int8(value), whole_paths, shape.reach)
    else:
        rows = (KEPT[stored](x).contiguous() for x in (key, value))
        whole = attention(query, *rows, whole_paths, shape.reach)

    ends = [0, *sorted(cut for cut in cuts if cut < length), length]
    paged = Paged([length, *(past + own for past, own in others)], shape, page, dtype, seed, stored)
    beside = [rows_of(past + own, shape, dtype, seed + 1 + i) for i, (past, own) in enumerate(others)]
    for i, (_, *rows) in enumerate(beside):
        paged.write(i + 1, 0, *rows)
    for first, last in itertools.pairwise(ends):
        paged.write(0, first, key[first:last], value[first:last])
        segments = [(0, first, query[first:last])]
        segments += [(i + 1, past, beside[i][0][past:]) for i, (past, _) in enumerate(others)]
        paged.rng.shuffle(segments)
        paths = paged.paths([(which, start, len(part)) for which, start, part in segments])
        out = paged_attention(torch.cat([part for _, _, part in segments]), paged.pool, paths, shape.reach)
        at = next(i for i, (which, _, _) in enumerate(segments) if which == 0)
        assert same_bits(out[sum(len(part) for _, _, part in segments[:at]) :][: last - first], whole[first:last])


@settings(max_examples=15)
@given(shape=shapes, prefix=st.integers(1, 100), tails=st.lists(st.integers(1, 40), min_size=1, max_size=3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_prefix_equals_plain_pack(kernel_path, dtype, shape, prefix, tails):
    """Sharing the rows of a prompt changes the log-probs of what follows."""
    shared = rows_of(prefix, shape, dtype, 0)
    own = [rows_of(count, shape, dtype, 1 + i) for i, count in enumerate(tails)]
    plain = []
    for tail in own:
        rows = [torch.cat(pair) for pair in zip(shared, tail, strict=True)]
        count = len(rows[0])
        plain.append(attention(*rows, Paths.build([0, count], [0], [list(range(count))], 1), shape.reach))
    row_start = list(itertools.accumulate([prefix, *tails], initial=0))
    tables = [list(range(prefix))]
    tables += [[*range(prefix), *range(a, b)] for a, b in itertools.pairwise(row_start[1:])]
    packed = [torch.cat(parts) for parts in zip(shared, *own, strict=True)]
    out = attention(*packed, Paths.build(row_start, [0, *[prefix] * len(tails)], tables, 1), shape.reach)
    for (start, stop), alone in zip(itertools.pairwise(row_start[1:]), plain, strict=True):
        assert same_bits(out[:prefix], alone[:prefix])
        assert same_bits(out[start:stop], alone[prefix:])


WINDOWS, SINKS = (1, 15, 16, 17, 63, 64, 65, 128), (0, 1, 4, 64, 65)


def agree(shape: Shape, dtype: torch.dtype, length: int, pages: list[int], seed: int, path: str) -> None:
    """From rows: what fp64 gives. From pages, whole, in chunks and one by one: bit for bit the same."""
    query, key, value = rows_of(length, shape, dtype, seed)
    whole = Paths.build([0, length], [0], [list(range(length))], 1)
    out = attention(query, key, value, whole, shape.reach, sinks=shape.sinks)
    wanted = expected((query, key, value), None, whole, shape)
    within(out, wanted.out, wanted.bounds["out"])
    cuts = sorted(random.Random(seed).sample(range(1, length), min(5, length - 1)))
    for page, starts in itertools.product(pages, ([0], range(length), [0, *cuts])):
        if path == "reference":
            continue
        paged = Paged([length], shape, page, dtype, seed)
        paged.write(0, 0, key, value)
        paths = paged.paths([(0, a, b - a) for a, b in itertools.pairwise([*starts, length])])
        got = paged_attention(query, paged.pool, paths, shape.reach, shape.sinks)
        assert same_bits(got, out), (page, len(starts), length)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_with_sinks(any_path, dtype, sinks):
    """A sink behind the window is lost, one too many is seen, or a key that is sink and in the window counts twice."""
    for window in WINDOWS:
        agree(Shape(2, 1, 32, Reach(window=window), sinks), dtype, 203, [4, 16], window * 100 + sinks, any_path)


@pytest.mark.parametrize("chunk", [4, 16, 40, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(any_path, dtype, chunk):
    """A query sees the last key of the chunk before its own, or not the first of its own; a page of an earlier chunk is
    read, which by then is another sequence's."""
    for length in (chunk - 1, chunk, chunk + 1, 2 * chunk + 3):
        agree(Shape(3, 1, 32, Reach(chunk=chunk)), dtype, length, [4, 64], chunk + length, any_path)


LONG = [(Reach(), 0), (Reach(window=700), 0), (Reach(chunk=600), 0), (Reach(window=300), 4), (Reach(window=600), 520)]


@pytest.mark.parametrize("reach, sinks", LONG, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_of_a_long_path(kernel_path, dtype, reach, sinks):
    """The threads that take the splits of a path, or the queries beside one, show in its bits; a split is lost or gets
    another's weight."""
    shape, threads = Shape(6, 2, 32, reach, sinks), torch.get_num_threads()
    for length in (513, 1100):
        query, key, value = rows_of(length, shape, dtype, length)
        key[length // 3] *= 4  # so that splits differ in their largest score
        rows = Paths.build([0, length], [0], [list(range(length))], 1)
        whole = attention(query, key, value, rows, reach, sinks=sinks)
        wanted = expected((query, key, value), None, rows, shape)
        within(whole, wanted.out, wanted.bounds["out"])
        paged = Paged([length], shape, 16, dtype, 0)
        paged.write(0, 0, key, value)
        try:
            for count, own in itertools.product((1, 2, 5), (1, 3, 40)):
                torch.set_num_threads(count)
                paths = paged.paths([(0, length - own, own)])
                out = paged_attention(query[-own:], paged.pool, paths, reach, sinks)
                assert same_bits(out, whole[-own:]), (length, count, own)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_have_one_sign(kernel_path, dtype):
    """A sum that cancelled to -0 becomes 0 as it is multiplied by a later query's keys: chunks differ in a sign bit."""
    query, key, value = torch.ones(80, 1, 16), torch.zeros(80, 1, 16), torch.ones(80, 1, 16)
    key[64] = 200.0  # so that what came before is multiplied by 0
    value[:64], value[64] = -1.0, -0.0
    qkv = [x.to(dtype) for x in (query, key, value)]
    out = attention(*qkv, Paths.build([0, 80], [0], [list(range(80))], 1))
    assert bool((out[64] == 0).all()) and not bool(out[64].signbit().any())
    alone = attention(qkv[0][64:65], *qkv[1:], Paths.build([0, 1], [64], [list(range(80))], 1))
    assert same_bits(out[64:65], alone)


def test_sinks_that_change_nothing(kernel_path):
    """Sinks count without a window, or where all positions are seen the path with sinks reduces in another order."""
    query, key, value = rows_of(150, Shape(6, 2, 64), torch.bfloat16, 3)
    paths = Paths.build([0, 150], [0], [list(range(150))], 1)
    plain = attention(query, key, value, paths)
    for window, sinks in ((None, 5), (70, 200), (70, 80), (150, 5)):
        assert same_bits(attention(query, key, value, paths, Reach(window=window), sinks=sinks), plain), (window, sinks)


@pytest.mark.parametrize(
    ("sinks", "read"), [(0, (3,)), (4, (0, 3)), (64, (0, 3)), (65, (0, 1, 3)), (250, (0, 1, 2, 3))]
)
def test_blocks_that_no_query_sees_are_not_read(kernel_path, sinks, read):
    """Decoding under a window costs what it costs without one."""
    query, key, value = rows_of(256, Shape(2, 1, 64), torch.float32, 0)
    paths = Paths.build([0, 1], [255], [list(range(256))], 1)
    for block in range(4):
        broken = value.clone()
        broken[64 * block : 64 * block + 64] = math.nan
        out = attention(query[255:], key.contiguous(), broken, paths, Reach(window=16), sinks=sinks)
        assert bool(out.isnan().any()) == (block in read), block


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("page", [4, 16, 64])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, INT4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_in_8_bits(any_path, dtype, stored, page, size):
    """A code is read as another number or by a neighbour's scale, keys in e4m3 are reduced in another order than the
    same keys in 16 bits, those in int8 otherwise than exactly, or a broken key or value is forgotten."""
    generator = torch.Generator().manual_seed(size)
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    shape = Shape(6, 2, size)
    query = rows_of(150, shape, dtype, 0)[0]
    x = finite[torch.randint(len(finite), (2, 150, 2, size), generator=generator)].view(torch.float8_e4m3fn).to(dtype)
    narrow, wide = (Paged([150], shape, page, dtype, size, kind) for kind in (stored, None))
    narrow.write(0, 0, *x)
    wide.write(0, 0, *KEPT[stored](x))
    for paged in (narrow, wide):
        assert same_bits(torch.stack(paged.pool.rows(paged.slots(0, range(150)))), KEPT[stored](x))
    for reach, sinks in ((Reach(), 0), (Reach(window=40), 0), (Reach(window=40), 3), (Reach(chunk=48), 0)):
        segments = [(0, 0, 100), (0, 149, 1), (0, 50, 49)]
        got, wanted = (paged_attention(query, p.pool, p.paths(segments), reach, sinks) for p in (narrow, wide))
        if stored == torch.int8:
            own = [to_int8(part) for part in x]
            rows = Paths.build([0, 100, 101, 150], [0, 149, 50], [list(range(150))] * 3, 1)
            exact = attention_reference(
                query.double(), *((codes * scales[..., None]).double() for codes, scales in own), rows, reach, sinks
            )
            within(got, exact, INT8_ERROR * x[1].float().abs().max() + STORE[dtype] * exact.abs())
            wanted = int8_attention_reference(query, *own, rows, reach, sinks)
            got, wanted = (y.where(y.abs() >= 2.0**-126, 0.0) for y in (got, wanted))  # AVX-512 writes no denormal bf16
        assert same_bits(got, wanted)
    key, value = narrow.pool.rows(narrow.slots(0, range(8, 9)))
    narrow.write(0, 8, key, torch.full_like(value, math.nan))
    out = paged_attention(query, narrow.pool, narrow.paths([(0, 0, 150)]))
    assert bool(out[8:].isnan().all()) and (any_path == "reference" or not bool(out[:8].isnan().any()))


@pytest.mark.parametrize("stored", KEPT, ids=str)
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize(("size", "page"), [(8, 2), (24, 4), (64, 16), (48, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_and_store(any_path, dtype, size, page, rotary, stored):
    """What is stored is not what would be rotated and stored apart, or lies elsewhere than the layout says."""
    generator = torch.Generator().manual_seed(size)
    shape, slots = Shape(6, 2, size), torch.randperm(12 * page, generator=generator)[: 9 * page]
    rows = len(slots)
    angles = 6 * torch.rand(50, size // 2, generator=generator)
    positions, tables = torch.randint(50, (rows,), generator=generator), (angles.cos(), angles.sin())
    query, key, value = rows_of(rows, shape, dtype, size)
    apart = [x.clone() for x in (query, key)]
    if rotary:
        for x in apart:
            rotate_(x, positions, *tables)
    paged, wanted = (Paged([12 * page], shape, page, dtype, 0, stored) for _ in range(2))
    wanted.pool.store_(apart[1], value, slots)
    rotate_store_((query, key, value), positions, tables if rotary else None, slots, paged.pool)
    assert same_bits(query.contiguous(), apart[0]) and same_bits(key.contiguous(), apart[1])
    for got, memory in zip(paged.pool.tensors(), wanted.pool.tensors(), strict=True):
        assert torch.equal(got.view(torch.uint8), memory.view(torch.uint8))
    kept = [KEPT[stored](x).contiguous() for x in (apart[1], value)]
    for got, x in zip(paged.pool.rows(slots), kept, strict=True):
        assert same_bits(got, x)
    pair, group = (4, min(page, 4)) if stored == torch.int8 else (2, 2) if dtype == torch.bfloat16 else (1, 1)
    by_number = paged.pool.packed and stored != INT4
    for t, h, d in ((0, 0, 0), (5, 1, size - 1), (rows - 1, 1, size // 2)) if by_number else ():
        place, offset = divmod(int(slots[t]), page)
        keys, values, *rest = (memory[place].float().view(2, -1) for memory in paged.pool.tensors())
        scales = rest[0].view(2, 2, page)[:, h, offset] if rest else torch.ones(2)
        places = (d // pair * page + offset) * pair + d % pair, (offset // group * size + d) * group + offset % group
        for memory, at, scale, x in zip((keys, values), places, scales, kept, strict=True):
            assert (memory[h, at] * scale).to(dtype) == x[t, h, d]
