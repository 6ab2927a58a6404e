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

from tandem.kernels.attention import Paths, attention, attention_backward, attention_reference
from tandem.numerics.compare import same_bits

E = 2.0**-24
STORE = {torch.float32: E, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Shape:
    """Heads of a layer."""

    heads: int
    kv_heads: int
    size: int
    window: int | None
    sinks: int = 0


@dataclass
class Expected:
    """fp64 results and the bounds of their errors."""

    out: Tensor
    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    bounds: dict[str, Tensor]


shapes = st.builds(
    lambda kv, group, size, window: Shape(kv * group, kv, size, window),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([16, 32, 48, 64, 80, 96, 128]),
    st.sampled_from([None, None, 1, 5, 64, 70]),
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


def expected(qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, paths: Paths, shape: Shape) -> Expected:
    """By scaled_dot_product_attention in fp64, one segment at a time, gradients by autograd."""
    unit, group = STORE[qkv[0].dtype], shape.heads // shape.kv_heads
    query, key, value = (x.detach().double().requires_grad_() for x in qkv)
    outs, bounds = [], {name: torch.zeros_like(x) for name, x in zip(("query", "key", "value"), qkv, strict=True)}
    bounds = {name: bound.double() for name, bound in bounds.items()}
    bounds["out"] = torch.zeros_like(bounds["query"])
    for s, first in enumerate(paths.first_position_S.tolist()):
        start, stop = paths.row_start_S[s : s + 2].tolist()
        slots = torch.tensor(slots_of(paths, s, first + stop - start))
        back = torch.arange(first, first + stop - start)[:, None] - torch.arange(len(slots))
        seen = (back >= 0) & ((back < (shape.window or len(slots))) | (torch.arange(len(slots)) < shape.sinks))
        q, k, v = query[start:stop].transpose(0, 1), *(x[slots].transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        outs.append(out.transpose(0, 1))

        with torch.no_grad():
            do, scale, n = dout[start:stop].double().transpose(0, 1), shape.size**-0.5, len(slots)
            scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
            p, lse = scores.softmax(-1), scores.logsumexp(-1)
            largest = float((q.abs() @ k.abs().mT).max()) * scale
            soft = 2 * (shape.size + 3) * E * largest + (n + 16 + 4 * (largest + float(lse.abs().max()))) * E
            out_error = (unit + soft + n * E) * (p @ v.abs()) + unit * out.abs()
            delta = (out * do).sum(-1, keepdim=True)
            ds = p * (do @ v.mT - delta) * scale
            delta_error = (out_error * do.abs()).sum(-1, keepdim=True)
            delta_error += shape.size * E * (out * do).abs().sum(-1, keepdim=True)
            ds_error = p * scale * (shape.size * E * (do.abs() @ v.abs().mT) + delta_error)
            ds_error += (soft + unit + 4 * E) * ds.abs()
            terms = (n + query.shape[0] * group) * E
            bounds["out"][start:stop] = out_error.transpose(0, 1)
            bounds["query"][start:stop] = (ds_error @ k.abs() + terms * (ds.abs() @ k.abs())).transpose(0, 1)
            heads = (shape.kv_heads, group, n, shape.size)
            dkey = ds_error.mT @ q.abs() + terms * (ds.abs().mT @ q.abs())
            dvalue = (soft + unit + terms) * (p.mT @ do.abs())
            for name, part in (("key", dkey), ("value", dvalue)):
                bounds[name].index_add_(0, slots, part.view(heads).sum(1).transpose(0, 1))
    result = torch.cat(outs)
    dquery, dkey, dvalue = torch.autograd.grad(result, (query, key, value), dout.double())
    for name, grad in (("query", dquery), ("key", dkey), ("value", dvalue)):
        bounds[name] += unit * grad.abs()
    return Expected(result.detach(), dquery, dkey, dvalue, bounds)


def within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted).abs() - 1.05 * bound - 1e-30
    assert bool((excess <= 0).all()), (excess.max().item(), bound.max().item(), wanted.abs().max().item())


def shuffled_pool(paths_slots: list[list[int]], rows: list[tuple[Tensor, Tensor]], pages: int, page: int, nan: bool):
    """Key and value slots filled from each segment's rows; what no segment owns is NaN."""
    key, value = rows[0]
    pools = [torch.full((pages * page, *x.shape[1:]), math.nan if nan else 0.0, dtype=x.dtype) for x in (key, value)]
    for slots, pair in zip(paths_slots, rows, strict=True):
        for pool, x in zip(pools, pair, strict=True):
            pool[slots] = x
    return pools


@settings(max_examples=40)
@given(
    shape=shapes,
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 75)), min_size=1, max_size=4),
    page=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(any_path, dtype, shape, lengths, page, seed):
    """A key of another page, of the future or from before the window is seen; a tail of a block or head is lost."""
    rng = random.Random(seed)
    counts = [-(-(past + own) // page) for past, own in lengths]
    order = list(range(sum(counts) + 3))
    rng.shuffle(order)
    ends = list(itertools.accumulate(counts, initial=0))
    tables = [order[a:b] for a, b in itertools.pairwise(ends)]
    row_start = list(itertools.accumulate((own for _, own in lengths), initial=0))
    paths = Paths.build(row_start, [past for past, _ in lengths], tables, page)
    assert paths.num_rows == row_start[-1]
    query, _, _ = rows_of(row_start[-1], shape, dtype, seed)
    rows = [rows_of(past + own, shape, dtype, seed + 1 + s)[1:] for s, (past, own) in enumerate(lengths)]
    slots = [slots_of(paths, s, past + own) for s, (past, own) in enumerate(lengths)]
    key, value = shuffled_pool(slots, rows, len(order), page, nan=any_path != "reference")
    out = attention(query, key, value, paths, shape.window)
    clean = tuple(torch.nan_to_num(x) for x in (key, value))
    wanted = expected((query, *clean), torch.zeros(query.shape, dtype=dtype), paths, shape)
    within(out, wanted.out, wanted.bounds["out"])


@st.composite
def packs(draw) -> tuple[Paths, int]:
    """Components: a plain sample, or a prefix and samples that go on from it; pages of one token."""
    row_start, first, tables = [0], [], []
    for _ in range(draw(st.integers(1, 3))):
        prefix = draw(st.integers(1, 90))
        shared = list(range(row_start[-1], row_start[-1] + prefix))
        row_start.append(row_start[-1] + prefix)
        first.append(0)
        tables.append(shared)
        for own in draw(st.lists(st.integers(1, 40), max_size=3)):
            tables.append([*shared, *range(row_start[-1], row_start[-1] + own)])
            first.append(prefix)
            row_start.append(row_start[-1] + own)
    return Paths.build(row_start, first, tables, 1), row_start[-1]


@settings(max_examples=40)
@given(shape=shapes, pack=packs(), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_and_gradients(any_path, dtype, shape, pack, seed):
    """A gradient lost: of a sample through shared rows, of a tile's tail, of a head of a group."""
    paths, rows = pack
    query, key, value = rows_of(rows, shape, dtype, seed)
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    wanted = expected((query, key, value), dout, paths, shape)
    if any_path == "reference":
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attention_reference(*inputs, paths, shape.window)
        within(out.detach(), wanted.out, wanted.bounds["out"])
        assert all(x is not None for x in torch.autograd.grad(out, inputs, dout))
        return
    lse = torch.empty(query.shape[:2])
    out = attention(query, key, value, paths, shape.window, lse)
    within(out, wanted.out, wanted.bounds["out"])
    fused = torch.full((rows, shape.heads + 2 * shape.kv_heads, shape.size), math.nan, dtype=dtype)
    ends = (shape.heads, shape.heads + shape.kv_heads)
    grads = (fused[:, : ends[0]], fused[:, ends[0] : ends[1]], fused[:, ends[1] :])
    attention_backward(dout, out, lse, (query, key, value), grads, paths, shape.window)
    pairs = zip(("query", "key", "value"), grads, (wanted.dquery, wanted.dkey, wanted.dvalue), strict=True)
    for name, grad, gradient in pairs:
        within(grad, gradient, wanted.bounds[name])


def test_reference_in_fp64_equals_pytorch():
    """The reference that the kernels stand in for computes something else."""
    shape = Shape(6, 2, 16, 9)
    paths = Paths.build([0, 20, 31], [0, 20], [list(range(20)), list(range(31))], 1)
    qkv = tuple(x.double() for x in rows_of(31, shape, torch.float32, 0))
    dout = torch.randn(31, 6, 16, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in qkv]
    out = attention_reference(*inputs, paths, shape.window)
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
    page=st.sampled_from([1, 4, 16]),
    others=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), max_size=3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_however_it_is_run(kernel_path, dtype, shape, length, cuts, page, others, seed):
    """A position's bits depend on the chunk it came in, the page size or order, or on the sequences beside it."""
    query, key, value = rows_of(length, shape, dtype, seed)
    whole = attention(query, key, value, Paths.build([0, length], [0], [list(range(length))], 1), shape.window)

    rng = random.Random(seed)
    ends = [0, *sorted(cut for cut in cuts if cut < length), length]
    all_lengths = [length, *(past + own for past, own in others)]
    order = list(range(sum(-(-count // page) for count in all_lengths) + 2))
    rng.shuffle(order)
    tables = []
    for count in all_lengths:
        tables.append(order[: -(-count // page)])
        del order[: -(-count // page)]
    lone = [Paths.build([0, count], [0], [table], page) for count, table in zip(all_lengths, tables, strict=True)]
    slots = [slots_of(path, 0, count) for path, count in zip(lone, all_lengths, strict=True)]
    beside = [rows_of(past + own, shape, dtype, seed + 1 + i) for i, (past, own) in enumerate(others)]
    rows = [(key, value), *((k, v) for _, k, v in beside)]
    pools = shuffled_pool(slots, rows, sum(map(len, tables)) + len(order), page, nan=True)
    for first, last in itertools.pairwise(ends):
        segments = [(0, first, query[first:last])]
        segments += [(i + 1, past, beside[i][0][past:]) for i, (past, _) in enumerate(others)]
        rng.shuffle(segments)
        counts = [len(part) for _, _, part in segments]
        paths = Paths.build(
            list(itertools.accumulate(counts, initial=0)),
            [start for _, start, _ in segments],
            [tables[which] for which, _, _ in segments],
            page,
        )
        out = attention(torch.cat([part for _, _, part in segments]), *pools, paths, shape.window)
        at = next(i for i, (which, _, _) in enumerate(segments) if which == 0)
        assert same_bits(out[sum(counts[:at]) :][: last - first], whole[first:last])


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
        plain.append(attention(*rows, Paths.build([0, count], [0], [list(range(count))], 1), shape.window))
    row_start = list(itertools.accumulate([prefix, *tails], initial=0))
    tables = [list(range(prefix))]
    tables += [[*range(prefix), *range(a, b)] for a, b in itertools.pairwise(row_start[1:])]
    packed = [torch.cat(parts) for parts in zip(shared, *own, strict=True)]
    out = attention(*packed, Paths.build(row_start, [0, *[prefix] * len(tails)], tables, 1), shape.window)
    for (start, stop), alone in zip(itertools.pairwise(row_start[1:]), plain, strict=True):
        assert same_bits(out[:prefix], alone[:prefix])
        assert same_bits(out[start:stop], alone[prefix:])


WINDOWS, SINKS = (1, 15, 16, 17, 63, 64, 65, 128), (0, 1, 4, 64, 65)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_with_sinks(any_path, dtype, sinks):
    """A sink behind the window is lost, one too many is seen, or a key that is sink and in the window counts twice."""
    length, tables = 203, {page: random.Random(page).sample(range(60), -(-203 // page)) for page in (4, 16)}
    for window in WINDOWS:
        shape = Shape(2, 1, 32, window, sinks)
        query, key, value = rows_of(length, shape, dtype, window)
        whole = Paths.build([0, length], [0], [list(range(length))], 1)
        out = attention(query, key, value, whole, window, sinks=sinks)
        wanted = expected((query, key, value), torch.zeros(query.shape, dtype=dtype), whole, shape)
        within(out, wanted.out, wanted.bounds["out"])
        if any_path == "reference":
            continue
        # Whole, one by one and in chunks, from pages: bit for bit the same rows.
        cuts = sorted(random.Random(window * 100 + sinks).sample(range(1, length), 5))
        for (page, table), starts in itertools.product(tables.items(), ([0], range(length), [0, *cuts])):
            slots = [table[p // page] * page + p % page for p in range(length)]
            pools = shuffled_pool([slots], [(key, value)], 60, page, nan=True)
            chunks = Paths.build([*starts, length], list(starts), [table] * len(starts), page)
            assert same_bits(attention(query, *pools, chunks, window, sinks=sinks), out), (window, page, len(starts))


def test_sinks_that_change_nothing(kernel_path):
    """Sinks count without a window, or where all positions are seen the path with sinks reduces in another order."""
    query, key, value = rows_of(150, Shape(6, 2, 64, None), torch.bfloat16, 3)
    paths = Paths.build([0, 150], [0], [list(range(150))], 1)
    plain = attention(query, key, value, paths)
    for window, sinks in ((None, 5), (70, 200), (70, 80), (150, 5)):
        assert same_bits(attention(query, key, value, paths, window, sinks=sinks), plain), (window, sinks)


@pytest.mark.parametrize(
    ("sinks", "read"), [(0, (3,)), (4, (0, 3)), (64, (0, 3)), (65, (0, 1, 3)), (250, (0, 1, 2, 3))]
)
def test_blocks_that_no_query_sees_are_not_read(kernel_path, sinks, read):
    """Decoding under a window costs what it costs without one."""
    query, key, value = rows_of(256, Shape(2, 1, 64, 16), torch.float32, 0)
    paths = Paths.build([0, 1], [255], [list(range(256))], 1)
    for block in range(4):
        broken = value.clone()
        broken[64 * block : 64 * block + 64] = math.nan
        out = attention(query[255:], key.contiguous(), broken, paths, 16, sinks=sinks)
        assert bool(out.isnan().any()) == (block in read), block


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_in_e4m3(any_path, dtype, size):
    """A code is read as another number, or keys in 8 bits are reduced in another order than the same keys in 16."""
    generator = torch.Generator().manual_seed(size)
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    shape = Shape(6, 2, size, None)
    query = rows_of(150, shape, dtype, 0)[0]
    codes = finite[torch.randint(len(finite), (2, 160, 2, size), generator=generator)].view(torch.float8_e4m3fn)
    order = random.Random(size).sample(range(40), 38)
    paths = Paths.build([0, 100, 101, 150], [0, 149, 50], [order] * 3, 4)
    for window, sinks in ((None, 0), (40, 0), (40, 3)):
        got = attention(query, *codes, paths, window, sinks=sinks)
        assert same_bits(got, attention(query, *codes.to(dtype), paths, window, sinks=sinks))
    nan = codes.view(torch.uint8).clone()
    nan[1, 4 * order[2]] = 0xFF  # the value of position 8
    out = attention(query, *nan.view(torch.float8_e4m3fn), paths)
    assert bool(out[8:].isnan().all())
