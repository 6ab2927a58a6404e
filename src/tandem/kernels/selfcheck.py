"""What each compiled library computes, against its reference, on a few small shapes: run once per compiled file.

A compiler, a processor or a virtual machine that gets one instruction wrong is found here and not in a reward curve.
Bounds of error are those of the tests, widened for references in fp32: E = 2^-24 of every fp32 operation of a sum, U of
one rounding to the compute dtype. A row's bits must not hang on the rows beside it. `build/load.py` runs these,
which are registered when this module is imported, and keeps the mark.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from tandem import env
from tandem.kernels import (
    adamw,
    adapter,
    attention,
    attention_int8,
    blocks,
    changes,
    codes,
    divergence,
    eights,
    eights_gradient,
    fours,
    gradient,
    head,
    linear,
    logprob,
    norm,
    page_pool,
    page_sum,
    quantise,
    rotary,
    sample,
    span_pool,
    swiglu,
)
from tandem.kernels.build import load
from tandem.kernels.build.check import CHECKS, Comparison, E, normal
from tandem.kernels.sample import SamplingBatch
from tandem.kernels.sizes import COMPARED_ROWS, GROUP
from tandem.kernels.weight import Adapter, Piece, Strips, Weight
from tandem.numerics import blocks as whole_blocks
from tandem.numerics import quantise as rounding
from tandem.numerics.blocks import format_of
from tandem.numerics.kv import span_rule
from tandem.types import Reach, Sampling

U = {torch.float32: E, torch.bfloat16: 2.0**-8}
DTYPES = (torch.bfloat16, torch.float32)


def _each(check: Callable[[torch.dtype], Iterator[Comparison]]) -> Callable[[], Iterator[Comparison]]:
    return lambda: itertools.chain.from_iterable(map(check, DTYPES))


def _near(what: str, got: Tensor, wanted: Tensor, roundings: float, operations: float) -> Comparison:
    """Each element within so many roundings to its dtype and fp32 operations."""
    return Comparison(what, got, wanted, (roundings * U[got.dtype] + operations * E) * wanted.double().abs())


def _gradients(dtype: torch.dtype, **of: tuple[Tensor | None, Tensor | None]) -> Iterator[Comparison]:
    """Each within some roundings of its largest element."""
    for name, (got, wanted) in of.items():
        assert got is not None and wanted is not None, name
        yield Comparison(f"the gradient of {name}", got, wanted, (8 * U[dtype] + 2.0**-12) * float(wanted.abs().max()))


def _linear(dtype: torch.dtype) -> Iterator[Comparison]:
    x, residual = (normal(37, n, dtype=dtype, seed=n) for n in (96, 130))
    weight = Weight(normal(130, 96, dtype=dtype, seed=1), matrix=True)
    sums = x.double().abs() @ weight.value.double().abs().T
    y, wanted = (
        linear.linear(x, weight, None, residual),
        linear.linear_reference(x, weight.value, None, residual).double(),
    )
    size = (wanted - residual.double()).abs() + wanted.abs()
    yield Comparison("a product", y, wanted, 3 * U[dtype] * size + 200 * E * (sums + residual.double().abs()))
    yield Comparison("a row alone", linear.linear(x[9:10], weight, None, residual[9:10]), y[9:10])
    wanted = x.double() @ weight.value.double().T
    yield Comparison("logits", linear.logits(x, weight), wanted, 200 * E * sums)


def _adapter(dtype: torch.dtype) -> Iterator[Comparison]:
    """Two pieces, of an odd rank and of one beyond a panel, with factors."""
    x, y = normal(37, 96, dtype=dtype), normal(37, 140, dtype=dtype, seed=2)
    down = normal(70, 96, dtype=dtype, seed=1)
    down[3] = 0
    sides = [Weight(normal(*shape, dtype=dtype, seed=3), matrix=True) for shape in ((60, 3), (70, 66))]
    pieces = Piece(0, 0, 0.5, sides[0]), Piece(70, 4, 0.25, sides[1])
    made = Adapter(Strips(down), pieces, Weight(normal(140, seed=4), matrix=False))
    wanted, alone = y.clone(), y[9:10].clone()
    lowered = adapter.adapt_reference_(wanted, x, made)
    got = y.clone()
    bound = (4 * U[dtype] + 2.0**-14) * float(lowered.abs().max())
    yield Comparison("what is lowered", adapter.adapt_(got, x, made), lowered, bound)
    bound = (8 * U[dtype] + 2.0**-12) * float((wanted.double() - y.double()).abs().max() + y.abs().max())
    yield Comparison("a sum", got, wanted, bound)
    adapter.adapt_(alone, x[9:10], made)
    yield Comparison("a row alone", alone, got[9:10])
    weight, dy = Weight(normal(140, 96, dtype=dtype, seed=5), matrix=True), normal(37, 140, dtype=dtype, seed=6)
    dx, dlow = adapter.adapted_input_gradient(dy, weight, made)
    right_dx, right_dlow = adapter.adapted_input_gradient_reference(dy, weight, made)
    yield from _gradients(dtype, input=(dx, right_dx), lowered=(dlow, right_dlow))
    parts = {"A": made.down, "a B": sides[0], "another B": sides[1]}
    found = []
    for add in (adapter.add_gradients, adapter.add_gradients_reference):
        for part in parts.values():
            part.grad = torch.zeros(part.value.shape)
        add(made, dy, right_dlow, x, lowered)
        found.append([part.grad for part in parts.values()])
    yield from _gradients(dtype, **dict(zip(parts, zip(*found, strict=True), strict=True)))


def _eights(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: rows beyond a tile, columns beyond a panel, inputs of no whole words, a row that is not finite."""
    x, weight, residual = (normal(*shape, dtype=dtype, seed=8) for shape in ((9, 98), (130, 98), (9, 130)))
    x[2, 5], x[4] = torch.inf, 0
    quantised = rounding.quantise(weight, 8, 98)
    made, bias = eights.Eights(quantised), normal(130, seed=9)
    wanted = eights.product_reference(x, quantised, bias, residual)
    got = made.product(x, bias, residual)
    yield Comparison("a product in 8 bits", got.nan_to_num(), wanted.nan_to_num())
    yield Comparison("what is not finite", got.isnan().float(), wanted.isnan().float())
    yield Comparison("the codes again", made.values(dtype), rounding.dequantise(quantised, dtype))
    other = eights.Eights(weight)
    yield Comparison("a matrix that is rounded", torch.cat([other.packed, made.packed]), torch.cat([made.packed] * 2))
    yield Comparison(
        "whose codes they are",
        torch.tensor([other.is_of(weight), other.is_of(-weight)]).float(),
        torch.tensor([1.0, 0.0]),
    )


def _fours(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: as of 8 bits, and a last group and words that are not full, minima, few rows and many."""
    x, weight, residual = (normal(*shape, dtype=dtype, seed=8) for shape in ((9, 98), (130, 98), (9, 130)))
    x[2, 5], x[4] = torch.inf, 0
    quantised, bias = rounding.quantise(weight, 4, GROUP), normal(130, seed=9)
    halves = [part.half() for part in (quantised.scales_NG, -7 * quantised.scales_NG)]
    lifted = rounding.Quantised(quantised.codes_NK + 7, halves[0], 4, GROUP, halves[1])
    for what, codes_of in (("a product of 4 and 8 bits", quantised), ("a product with minima", lifted)):
        made = fours.Fours(codes_of)
        wanted = fours.product_reference(x, codes_of, bias, residual)
        for first in (0, 5, 7, 8):
            got = made.product(x[first:], bias, residual[first:])
            yield Comparison(what, got.nan_to_num(), wanted[first:].nan_to_num())
            yield Comparison("what is not finite", got.isnan().float(), wanted[first:].isnan().float())
        yield Comparison("the codes again", made.values(dtype), rounding.dequantise(codes_of, dtype))
    other, made = fours.Fours(-weight), fours.Fours(quantised)
    other.round(weight)
    yield Comparison("a matrix that is rounded", other.packed, made.packed)
    yield Comparison(
        "whose codes they are",
        torch.tensor([other.is_of(weight), other.is_of(-weight)]).float(),
        torch.tensor([1.0, 0.0]),
    )


def _eights_gradient(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: rows of no whole word, columns beyond a panel, a noise of more than one run."""
    dy, x, value = (normal(*shape, dtype=dtype, seed=7) for shape in ((38, 290), (38, 70), (290, 70)))
    dy[:, 3], x[5] = 0, 0
    wanted = eights_gradient.input_gradient_reference(dy, value)
    yield Comparison("an input's gradient", eights_gradient.input_gradient(dy, eights_gradient.turned(value)), wanted)
    grad, right = torch.ones(290, 70), torch.ones(290, 70)
    eights_gradient.accumulate(grad, dy, x)
    eights_gradient.accumulate_reference(right, dy, x)
    yield Comparison("a weight's gradient", grad, right)


def _blocks(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: each kind of scale, a block that is not full, a row of zeros and one that is not finite."""
    x = normal(9, 70, dtype=dtype, seed=8)
    x[2, 5], x[4] = torch.inf, 0
    for name in ("mxfp4_even", "mxint8_rceil", "nvfp4", "nvfp4_inference", "fp8_1x128", "int4_g32_asym"):
        form = format_of(name).by_row()
        got, wanted = blocks.rounded_rows(x, form), blocks.rounded_rows_reference(x, form)
        yield Comparison(f"numbers of {name}", got.nan_to_num(), wanted.nan_to_num())
        yield Comparison("what is not finite", got.isnan().float(), wanted.isnan().float())
    tiles = format_of("fp8_128x128")
    yield Comparison("tiles", blocks.rounded(x[5:], tiles), whole_blocks.rounded(x[5:], tiles))


def _gradient(dtype: torch.dtype) -> Iterator[Comparison]:
    """Rows beyond a strip, outputs beyond a panel."""
    x, dy, value = (normal(*shape, dtype=dtype, seed=7) for shape in ((37, 96), (37, 130), (130, 96)))
    grad, weight = torch.zeros(130, 96), Weight(value, matrix=True)
    gradient.accumulate(grad, dy, x)
    sums = dy.double().abs().T @ x.double().abs()
    yield Comparison("a weight's gradient", grad, dy.double().T @ x.double(), 80 * E * sums)
    wanted, sums = dy.double() @ value.double(), dy.double().abs() @ value.double().abs()
    bound = U[dtype] * wanted.abs() + 200 * E * sums
    yield Comparison("an input's gradient", gradient.input_gradient(dy, weight), wanted, bound)


def _attention(dtype: torch.dtype) -> Iterator[Comparison]:
    """Two paths that share their beginning, as rows of a pack; the engine's pages are checked with `page_store`."""
    paths = attention.Paths.build([0, 70, 82], [0, 40], [[*range(70)], [*range(40), *range(70, 82)]], 1)
    query, key, value, dout = (normal(82, h, 64, dtype=dtype, seed=i) for i, h in enumerate((6, 2, 2, 6)))
    lse = torch.empty(82, 6)
    out = attention.attention(query, key, value, paths, lse_TH=lse)
    q, k, v = (x.float().clone().requires_grad_() for x in (query, key, value))
    wanted = attention.attention_reference(q, k, v, paths)
    bound = (3 * U[dtype] + 2.0**-14) * float(value.abs().max())
    yield Comparison("attention", out, wanted.detach(), bound)
    alone = attention.Paths.build([0, 1], [69], [[*range(70)]], 1)
    yield Comparison("a query alone", attention.attention(query[69:70], key, value, alone), out[69:70])
    wanted.backward(dout.float())
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    attention.attention_backward(dout, out, lse, (query, key, value), grads, paths)
    yield from _gradients(dtype, query=(grads[0], q.grad), key=(grads[1], k.grad), value=(grads[2], v.grad))


def _page_store(dtype: torch.dtype) -> Iterator[Comparison]:
    """Rows rotated into pages of every kind, and attention that reads them there."""
    kept: dict[torch.dtype | None, Callable[[Tensor], Tensor]] = {
        None: lambda x: x,
        torch.float8_e4m3fn: lambda x: rounding.from_e4m3(rounding.to_e4m3(x), dtype),
        torch.int8: lambda x: rounding.from_int8(*rounding.to_int8(x), dtype),
        page_pool.INT4: lambda x: rounding.from_int4(*rounding.to_int4(x), dtype),
    }
    for stored, rounded in kept.items():
        fused = normal(40, 4, 64, dtype=dtype)
        cos, sin = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1)).unbind()
        positions, pool = torch.arange(40), page_pool.KvPool(4, 16, 1, 64, dtype, stored)
        slots = torch.tensor([2, 0, 3])[positions // 16] * 16 + positions % 16
        wanted = rotary.rotate_reference(fused[:, :3], positions, cos, sin)
        page_pool.rotate_store_((fused[:, :2], fused[:, 2:3], fused[:, 3:]), positions, (cos, sin), slots, pool)
        yield Comparison("rotated rows", fused[:, :3], wanted, 2 * U[dtype] * wanted.double().abs() + 16 * E)
        key, value = (rounded(x).contiguous() for x in (fused[:, 2:3], fused[:, 3:]))
        for what, got, row in zip(("keys", "values"), pool.rows(slots), (key, value), strict=True):
            yield Comparison(f"{what} in pages, {stored or dtype}", got, row)
        paths = attention.Paths.build([0, 1], [39], [[2, 0, 3]], 16)
        rows = attention.Paths.build([0, 1], [39], [[*range(40)]], 1)
        if stored not in (torch.int8, page_pool.INT4):
            query = fused[39:, :2].contiguous()
            got = attention.paged_attention(query, pool, paths)
            yield Comparison(
                f"attention to pages, {stored or dtype}", got, attention.attention(query, key, value, rows)
            )


def _attention_int4(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: heads of every width that rows are widened by, pages of fewer positions than a run, some not full."""
    for size, page in ((64, 16), (72, 16), (34, 4), (8, 2)):
        query, key, value = (normal(90, h, size, dtype=dtype, seed=i) for i, h in enumerate((4, 2, 2)))
        value[3, 0, 5] = torch.inf
        count = -(-90 // page)
        pool, pages = page_pool.KvPool(count + 1, page, 2, size, dtype, page_pool.INT4), [*range(count, 0, -1)]
        pool.store_(key, value, torch.tensor(pages)[torch.arange(90) // page] * page + torch.arange(90) % page)
        got = attention.paged_attention(query[80:], pool, attention.Paths.build([0, 10], [80], [pages], page))
        own, seen = (rounding.from_int4(*rounding.to_int4(x), dtype) for x in (key, value))
        rows = attention.Paths.build([0, 10], [80], [[*range(90)]], 1)
        wanted = attention.attention(query[80:], own, seen, rows)
        yield Comparison(f"attention to int4, {size}", got.nan_to_num(), wanted.nan_to_num())
        yield Comparison(f"what is not finite, {size}", got.isnan().float(), wanted.isnan().float())


def _attention_coded(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: codes of every size, heads of every width that rows are widened by, then a page that is not full."""
    for rule, page, size in (("kivi2", 64, 64), ("kivi4", 16, 72), ("kivi8", 8, 8), ("kivi4", 32, 80)):
        query, key, value = (normal(2 * page + 5, h, size, dtype=dtype, seed=i) for i, h in enumerate((4, 2, 2)))
        value[3, 0, 5] = torch.inf
        pool = span_pool.SpanPool(3, 2, 2, size, dtype, span_rule(rule, page, 0))
        key_NRKD, value_NRKD = (x[: 2 * page].unflatten(0, (2, page)) for x in (key, value))
        pool.fill_(torch.tensor([2, 0]), key_NRKD, value_NRKD)
        pool.open.store_(key[2 * page :], value[2 * page :], page + torch.arange(5))
        paths = attention.Paths.build([0, 5], [2 * page], [[2, 0, 4]], page)
        got = span_pool.coded_attention(query[2 * page :], pool, paths)
        made = pool.rule.rounded(key_NRKD, value_NRKD, torch.tensor([0, page]))
        own, seen = (torch.cat([x.flatten(0, 1), y[2 * page :]]) for x, y in zip(made, (key, value), strict=True))
        rows = attention.Paths.build([0, 5], [2 * page], [[*range(2 * page + 5)]], 1)
        wanted = attention.attention(query[2 * page :], own, seen, rows)
        yield Comparison(f"attention to {rule}, {size}", got.nan_to_num(), wanted.nan_to_num())
        yield Comparison(f"what is not finite, {size}", got.isnan().float(), wanted.isnan().float())


def _attention_int8(dtype: torch.dtype) -> Iterator[Comparison]:
    """Exact: several blocks and splits, more rows than a tile has, a row alone, and a value that is not finite."""
    query, key, value = (normal(530, h, 64, dtype=dtype, seed=i) for i, h in enumerate((3, 1, 1)))
    value[3, 0, 5] = torch.inf
    pool, pages = page_pool.KvPool(34, 16, 1, 64, dtype, torch.int8), [*range(33, -1, -1)]
    slots = torch.tensor(pages)[torch.arange(530) // 16] * 16 + torch.arange(530) % 16
    pool.store_(key, value, slots)
    for first, reach in ((523, attention.EVERYTHING), (529, attention.EVERYTHING), (523, Reach(window=70))):
        rows, count = query[first:], 530 - first
        got = attention.paged_attention(rows, pool, attention.Paths.build([0, count], [first], [pages], 16), reach)
        paths = attention.Paths.build([0, count], [first], [[*range(530)]], 1)
        parts = rounding.to_int8(key), rounding.to_int8(value)
        wanted = attention_int8.int8_attention_reference(rows, *parts, paths, reach)
        yield Comparison("attention in int8", got.nan_to_num(), wanted.nan_to_num())
        yield Comparison("what is not finite", got.isnan().float(), wanted.isnan().float())


def _layer(dtype: torch.dtype) -> Iterator[Comparison]:
    x, dy = normal(7, 200, dtype=dtype, seed=0).requires_grad_(), normal(7, 200, dtype=dtype, seed=1)
    weight = Weight(normal(200, dtype=dtype, seed=2), matrix=False)
    weight.grad = torch.zeros(200)
    y = norm.rms_norm(x, weight, 1e-5)
    y.backward(dy)
    yield _near("a norm", y.detach(), norm.rms_norm_reference(x.detach(), weight.value, 1e-5), 2, 32)
    wanted = norm.rms_norm_backward_reference(dy, x.detach(), weight.value, 1e-5)
    yield from _gradients(dtype, rows=(x.grad, wanted[0]))
    yield from _gradients(torch.float32, scales=(weight.grad, wanted[1]))
    heads, positions = normal(5, 3, 64, dtype=dtype, seed=3), torch.tensor([0, 3, 1, 4, 2])
    cos, sin = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).unbind()
    turned = rotary.rotate_reference(heads, positions, cos, sin)
    rotary.rotate_(heads, positions, cos, sin)
    yield Comparison("a rotation", heads, turned, 2 * U[dtype] * turned.double().abs() + 16 * E)
    both = normal(5, 96, dtype=dtype, seed=5)
    yield _near("SwiGLU", swiglu.swiglu(both), swiglu.swiglu_reference(both), 2, 32)


def _logprob(dtype: torch.dtype) -> Iterator[Comparison]:
    hidden, targets = normal(9, 64, dtype=dtype, seed=0), torch.arange(9) * 30
    weight = Weight(normal(300, 64, dtype=dtype, seed=1) / 8, matrix=True)
    weight.grad = torch.zeros(300, 64)
    ours, leaf, value = (x.clone().requires_grad_() for x in (hidden, hidden.float(), weight.value.float()))
    logprobs, entropies = logprob.token_logprobs(ours, weight, targets, 0.7)
    wanted, wanted_entropies = logprob.logprob_reference(leaf, value, targets, 0.7)
    logprobs.sum().backward()
    wanted.sum().backward()
    yield Comparison("log-probs", logprobs.detach(), wanted.detach(), 2.0**-13)
    yield Comparison("entropies", entropies, wanted_entropies.detach(), 2.0**-13)
    yield from _gradients(dtype, rows=(ours.grad, leaf.grad), head=(weight.grad, value.grad))


def _divergence(dtype: torch.dtype) -> Iterator[Comparison]:
    """Every kind, of models of two widths and more rows than are computed at once."""
    rows = COMPARED_ROWS + 3
    hidden, others, targets = normal(rows, 64, dtype=dtype), normal(rows, 32, dtype=dtype, seed=1), torch.arange(rows)
    weight, teacher = (Weight(normal(300, n, dtype=dtype, seed=n) / 8, matrix=True) for n in (64, 32))
    for kind in divergence.KINDS:
        how = divergence.Divergence(kind, 0.3, 0.7)
        weight.grad = torch.zeros(300, 64)
        ours, leaf, value = (x.clone().requires_grad_() for x in (hidden, hidden.double(), weight.value.double()))
        found = divergence.head_divergence(
            divergence.Head(ours, weight), divergence.Head(others, teacher), targets, how
        )
        wanted = divergence.divergence_reference(leaf @ value.T, others.double() @ teacher.value.double().T, how)
        found.loss_N.sum().backward()
        wanted.sum().backward()
        yield Comparison(f"the {kind} divergence", found.divergence_N.detach(), wanted.detach(), 2.0**-13)
        yield from _gradients(dtype, rows=(ours.grad, leaf.grad), head=(weight.grad, value.grad))


def _batch(temperatures: list[float], top_p: float) -> SamplingBatch:
    samplings = [Sampling(temperature=t, top_p=top_p) for t in temperatures]
    return SamplingBatch.stack(samplings, list(range(len(samplings))), list(range(7, 7 + len(samplings))))


def _sample() -> Iterator[Comparison]:
    logits = 3 * normal(6, 700)
    for top_p in (1.0, 0.8):
        batch = _batch([0.0, 0.5, 0.7, 1.0, 1.0, 1.5], top_p)
        tokens, logprobs = sample.sample(logits, batch)
        wanted, wanted_logprobs = sample.sample_reference(logits, batch)
        yield Comparison("tokens", tokens, wanted)
        yield Comparison("their log-probs", logprobs, wanted_logprobs, 2.0**-18)
    lse = sample.log_sum_exp(logits)
    yield Comparison("log-sum-exp", lse, logits.double().logsumexp(-1), 2.0**-18)


def _head(dtype: torch.dtype) -> Iterator[Comparison]:
    weight, hidden = Weight(normal(700, 64, dtype=dtype), matrix=True), normal(7, 64, dtype=dtype, seed=1)
    batch = _batch([0.0, 0.5, 0.7, 1.0, 1.0, 1.5, 1.0], 1.0)
    tokens, logprobs = head.draw(hidden, weight, batch)
    wanted, wanted_logprobs = sample.sample(linear.logits(hidden, weight), batch)
    yield Comparison("tokens", tokens, wanted)
    yield Comparison("their log-probs", logprobs, wanted_logprobs)


def _adamw(dtype: torch.dtype) -> Iterator[Comparison]:
    hyper = adamw.Hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.5)
    ours = [normal(100, seed=seed).abs() if seed == 2 else normal(100, seed=seed) for seed in range(4)]
    wanted, value = [x.clone() for x in ours], torch.empty(100, dtype=dtype)
    adamw.adamw(ours[0], ours[1], ours[2], ours[3], value, hyper)
    adamw.adamw_reference(wanted[0], wanted[1], wanted[2], wanted[3], hyper)
    for what, got, other in zip(("weights", "first moments", "second moments"), ours[:3], wanted[:3], strict=True):
        yield Comparison(what, got, other, 16 * E * (1 + other.double().abs()))
    yield Comparison("rounded weights", value, ours[0].to(dtype))
    if dtype == torch.bfloat16:
        yield from _few(hyper)
    yield _near("a norm", torch.tensor(adamw.grad_norm([ours[3]])), ours[3].double().norm(), 0, 64)


def _few(hyper: adamw.Hyper) -> Iterator[Comparison]:
    """A block that is not full, moments in 8 bits and in fp32, with masters and without."""
    for coded, masters in itertools.product((False, True), repeat=2):
        values = [normal(1500, dtype=torch.bfloat16, seed=6) for _ in range(2)]
        ours, wanted = (adamw.few_of(value, eights=coded, masters=masters) for value in values)
        for step in (1, 2):
            grad, now = normal(1500, seed=6 + step), replace(hyper, step=step)
            adamw.adamw_few(ours, grad, values[0], now, 5)
            adamw.adamw_few_reference(wanted, grad, values[1], now, 5)
        for what, got, other in zip(adamw.Few._fields, ours, wanted, strict=True):
            if got is not None and other is not None:
                # of a word that lies on an edge: a code more or less, and what it moves
                near = (2e-3 if coded else 0.0) + 16 * E * (1 + other.double().abs())
                if got.dtype == torch.bfloat16:
                    near = near + 2.0**-7 * other.double().abs()
                near = near + float(got.dtype == torch.uint8)
                yield Comparison(what, got.double(), other.double(), near)


def _quantise(dtype: torch.dtype) -> Iterator[Comparison]:
    matrix = normal(9, 70, dtype=dtype)
    for bits in (4, 8):
        got, wanted = quantise.quantise(matrix, bits, 32), rounding.quantise(matrix, bits, 32)
        yield Comparison("codes", got.codes_NK, wanted.codes_NK)
        yield Comparison("scales", got.scales_NG, wanted.scales_NG)
        yield Comparison("values", quantise.dequantise(got, dtype), rounding.dequantise(wanted, dtype))


def _codes() -> Iterator[Comparison]:
    """A matrix kept as codes stands for its values, and its products have the bits of theirs: few rows and many."""
    for bits in (4, 8):
        quantised = rounding.quantise(normal(70, 64, seed=bits), bits, 32)
        matrix, x = codes.Codes(quantised), normal(40, 64, dtype=torch.bfloat16)
        weight = Weight(rounding.dequantise(quantised, torch.bfloat16), matrix=True)
        yield Comparison("values", matrix.values(), weight.value)
        for rows in (1, 5, 40):
            got = matrix.product(x[:rows], out_dtype=torch.float32)
            yield Comparison("a product", got, linear.logits(x[:rows], weight))


def _page_sum() -> Iterator[Comparison]:
    pools = [normal(5, 96, seed=seed) for seed in (0, 1)]
    got, wanted = page_sum.page_sums(pools, [4, 0, 2]), page_sum.page_sums_reference(pools, [4, 0, 2])
    low = [[total >> 32 for total in got] + [total & 0xFFFFFFFF for total in got]]
    high = [[total >> 32 for total in wanted] + [total & 0xFFFFFFFF for total in wanted]]  # exact in fp64
    yield Comparison("sums", torch.tensor(low), torch.tensor(high))


def _changes() -> Iterator[Comparison]:
    """Blocks of all three streams, and one that is not full."""
    now = normal(3 * changes.BLOCK + 70, dtype=torch.bfloat16).view(torch.int16)
    base = now.clone()
    for first, step in ((0, 1000), (changes.BLOCK, 7), (2 * changes.BLOCK, 1), (3 * changes.BLOCK + 3, 66)):
        base[first : first + changes.BLOCK : step] ^= 1
    got = changes.code_changes(now, base, torch.empty_like(now))
    wanted = changes.code_changes_reference(now, base)
    yield Comparison("counts", got.counts, wanted.counts)
    yield Comparison("streams", got.streams, wanted.streams)
    changes.apply_changes(base, got)
    yield Comparison("words", base, now)


# forward.cpp composes what is checked here; it is called with whole decoders, which lie above this folder.
CHECKS |= {
    "adamw": _each(_adamw),
    "adapter": _each(_adapter),
    "attention": _each(_attention),
    "attention_int8": _each(_attention_int8),
    "attention_int4": _each(_attention_int4),
    "attention_coded": _each(_attention_coded),
    "blocks": _each(_blocks),
    "changes": _changes,
    "codes": _codes,
    "divergence": _each(_divergence),
    "eights": _each(_eights),
    "eights_gradient": _each(_eights_gradient),
    "forward": tuple,
    "fours": _each(_fours),
    "gradient": _each(_gradient),
    "head": _each(_head),
    "layer": _each(_layer),
    "linear": _each(_linear),
    "logprob": _each(_logprob),
    "page_store": _each(_page_store),
    "page_sum": _page_sum,
    "quantise": _each(_quantise),
    "sample": _sample,
}


def build_all() -> None:
    """For `make`: compile every kernel now, side by side, so that the first run does not wait for them; check them."""
    if not load.available():
        return
    flags = load._unit(load.FLAGS)[1]
    with ThreadPoolExecutor(env.num_cores()) as pool:
        list(pool.map(lambda name: load._compiled(name, flags), load.names()))
    for name in load.names():
        load.library(name)
