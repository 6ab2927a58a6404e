"""Triton's kernels against fp64 or the slow references, and each row's independence of its company, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tandem.kernels.attention import attention, attention_backward, attention_reference, paged_attention
from tandem.kernels.choice import backend
from tandem.kernels.linear import linear, logits
from tandem.kernels.norm import rms_norm
from tandem.kernels.page_pool import KvPool
from tandem.kernels.paths import Paths
from tandem.kernels.rotary import rotate_, rotate_reference, store_
from tandem.kernels.swiglu import swiglu_down
from tandem.kernels.weight import Weight
from tandem.numerics.quantise import from_int8, to_int8
from tandem.types import Reach

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}  # relative error of one rounding
FP32 = ROUNDING[torch.float32]


def draw(seed: int, *shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def near(got: torch.Tensor, exact: torch.Tensor, before: torch.Tensor | float) -> None:
    """Within one rounding of a value that was off by `before`; below the least normal number roundings are absolute."""
    least = torch.finfo(got.dtype).smallest_normal
    bound = before + ROUNDING[got.dtype] * (exact.abs() + before + least)
    worst = ((got.double() - exact).abs() / bound).max()
    assert worst <= 1, worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 8, 5), (7, 100, 66), (70, 64, 64), (65, 130, 33)])
def test_linear_values(device, dtype, rows, depth, columns):
    """A tile's edge, the tail of the depth, the bias or the residual is computed from the wrong elements."""
    x = draw(0, rows, depth, dtype=dtype, device=device)
    weight = Weight(draw(1, columns, depth, dtype=dtype, device=device), matrix=True)
    bias = Weight(draw(2, columns, dtype=dtype, device=device), matrix=False)
    residual = draw(3, rows, columns, dtype=dtype, device=device)
    plain = x.double() @ weight.value.double().T
    # A sum of n fp32 products in any order is off by n roundings of the sum of their magnitudes.
    error = (depth + 2) * FP32 * (x.double().abs() @ weight.value.double().abs().T + bias.value.double().abs())
    near(linear(x, weight), plain, error)
    near(logits(x, weight), plain, error)
    near(linear(x, weight, bias), plain + bias.value.double(), error)
    rounded_once = error + ROUNDING[dtype] * (plain.abs() + error)
    near(linear(x, weight, None, residual), plain + residual.double(), rounded_once + FP32 * residual.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_is_computed_alone(device, dtype):
    """A row's product has other bits among 1, 63, 64 or 150 rows, or at another place among them."""
    x = draw(0, 150, 100, dtype=dtype, device=device)
    weight = Weight(draw(1, 70, 100, dtype=dtype, device=device), matrix=True)
    whole = linear(x, weight)
    for start, stop in ((0, 1), (40, 41), (5, 68), (86, 150), (149, 150)):
        assert torch.equal(linear(x[start:stop], weight), whole[start:stop])
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x[order], weight), whole[order])
    assert torch.equal(logits(x[7:9], weight), logits(x, weight)[7:9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 100, 576])
def test_norm_values_and_rows(device, dtype, width):
    """The mean runs over the padding, the norm rounds twice, or a row's norm depends on another row."""
    x, value = draw(0, 9, width, dtype=dtype, device=device), draw(1, width, dtype=dtype, device=device)
    weight = Weight(value, matrix=False)
    got = rms_norm(x, weight, 1e-5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * value.double()
    # `width` roundings in the sum, halved by the root; six operations around it.
    near(got, exact, (width / 2 + 6) * FP32 * exact.abs())
    assert torch.equal(rms_norm(x[4:5], weight, 1e-5), got[4:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(3, 8), (4, 24), (2, 64)])
def test_rotation_and_store(device, dtype, heads, size):
    """A rotation takes another position's angle, leaves its heads, is not undone by -1; or a slot gets another row."""
    rows = draw(0, 5, heads + 2, size, dtype=dtype, device=device)
    angles = torch.outer(torch.arange(40.0), torch.rand(size // 2, generator=torch.Generator().manual_seed(1)))
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    positions = torch.tensor([3, 39, 0, 7, 7], device=device)
    turned = rows.clone()
    rotate_(turned[:, 1:-1], positions, cos, sin)
    exact = rotate_reference(rows[:, 1:-1].double(), positions, cos, sin)
    magnitude = rotate_reference(rows[:, 1:-1].double().abs(), positions, cos.abs(), -sin.abs()).abs().amax()
    near(turned[:, 1:-1], exact, 2 * FP32 * magnitude)  # two products and a sum
    assert torch.equal(turned[:, 0], rows[:, 0]) and torch.equal(turned[:, -1], rows[:, -1])
    alone = rows[1:2].clone()
    rotate_(alone[:, 1:-1], positions[1:2], cos, sin)
    assert torch.equal(alone, turned[1:2])
    back = turned.clone()
    rotate_(back[:, 1:-1], positions, cos, sin, sign=-1.0)
    # Each of the two turns rounds once.
    assert (back - rows).double().abs().max() <= 4 * ROUNDING[dtype] * rows.double().abs().max()
    pool = torch.full((12, heads, size), 9.0, dtype=dtype, device=device)
    slots = torch.tensor([11, 2, 0, 7, 5], device=device)
    store_(rows[:, 1:-1], slots, pool)
    assert torch.equal(pool[slots], rows[:, 1:-1]) and bool((pool[[1, 3, 4, 6, 8, 9, 10]] == 9).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100])
def test_swiglu_values_and_rows(device, dtype, width):
    """Gate and up are exchanged, the tail of a row is lost, or the residual is missing."""
    gate_up = 3 * draw(0, 6, 2 * width, dtype=dtype, device=device)
    weight = Weight(torch.eye(width, dtype=dtype, device=device), matrix=True)
    residual = draw(1, 6, width, dtype=dtype, device=device)
    got = swiglu_down(gate_up, weight, torch.zeros_like(residual))
    gate, up = gate_up.double().chunk(2, -1)
    exact = gate * gate.sigmoid() * up
    near(got, exact, 10 * FP32 * exact.abs())  # four operations, and an exponential good to a few units
    assert torch.equal(swiglu_down(gate_up[2:3], weight, residual[2:3]), swiglu_down(gate_up, weight, residual)[2:3])
    near(swiglu_down(gate_up, weight, residual), got.double() + residual.double(), 0.0)


def heads_of(rows: int, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Strided query, key and value of a fused projection."""
    heads, kv_heads, size = shape
    qkv = draw(0, rows, heads + 2 * kv_heads, size, dtype=dtype, device=device)
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def on(paths: Paths, device: str) -> Paths:
    return paths.to(torch.device(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [Reach(), Reach(window=5), Reach(window=70), Reach(chunk=16)], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 8), (3, 1, 24), (2, 2, 64)])
def test_attention_values(device, dtype, reach, shape):
    """A query sees a later key, misses one of its own, leaves its window, or reads another head or sample."""
    query, key, value = heads_of(100, shape, dtype, device)
    shared, own = list(range(10)), list(range(70, 100))  # the second segment runs on from rows of the first
    paths = on(Paths.build([0, 70, 100], [0, 10], [list(range(70)), shared + own], page_tokens=1), device)
    got = attention(query, key, value, paths, reach)
    wide = [x.double().cpu() for x in (query, key, value)]
    exact = attention_reference(*wide, paths.to(torch.device("cpu")), reach)
    # A score of size s is off by 2 D roundings of it; a weight by that, its own rounding and the sum's over the keys.
    largest = float(wide[0].abs().amax() * wide[1].abs().amax()) * shape[2] ** 0.5
    relative = ROUNDING[dtype] + (2 * shape[2] * largest + 70 + 16) * FP32
    near(got.cpu(), exact, 2 * relative * wide[2].abs().amax())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("reach", [Reach(), Reach(window=9), Reach(chunk=24)], ids=str)
def test_attention_of_a_query_is_its_own(device, dtype, reach):
    """A query's attention depends on its chunk, on the page size or placement, on its batch, or on pack or pages."""
    query, key, value = heads_of(140, (4, 2, 8), dtype, device)
    count = 140
    rows_alone = on(Paths.build([0, count], [0], [list(range(count))], 1), device)
    whole = attention(query, key, value, rows_alone, reach)
    order = np.random.default_rng(0)
    for page_tokens, cuts in ((1, [0, 1, 2, 63, 140]), (4, [0, 100, 140]), (16, [0, 17, 64, 65, 139, 140])):
        num_pages = -(-count // page_tokens)
        table = order.permutation(num_pages + 5)[:num_pages].tolist()
        slots = torch.tensor([table[p // page_tokens] * page_tokens + p % page_tokens for p in range(count)])
        pools = [torch.full(((num_pages + 5) * page_tokens, 2, 8), torch.nan, dtype=dtype, device=device) for _ in "kv"]
        store_(key, slots.to(device), pools[0])
        store_(value, slots.to(device), pools[1])
        for start, stop in zip(cuts, cuts[1:], strict=False):
            paths = on(Paths.build([0, stop - start], [start], [table[: -(-stop // page_tokens)]], page_tokens), device)
            assert torch.equal(attention(query[start:stop], *pools, paths, reach), whole[start:stop])
        # A decode of position 139, a prefill of 20..29 and a decode of 64 in one batch.
        rows = [139, *range(20, 30), 64]
        paths = on(Paths.build([0, 1, 11, 12], [139, 20, 64], [table] * 3, page_tokens), device)
        assert torch.equal(attention(query[rows], *pools, paths, reach), whole[rows])


@pytest.mark.parametrize(
    ("reach", "sinks"), [(Reach(), 0), (Reach(window=600), 0), (Reach(window=530), 70), (Reach(chunk=700), 0)]
)
def test_spans_apart_are_spans_together(device, monkeypatch, reach, sinks):
    """A decode in a program a span has other bits than a prefill, drops a span, or adds one it cannot see."""
    from tandem.kernels.gpu import attention as gpu

    count = 1034
    query, key, value = heads_of(count, (2, 1, 8), torch.bfloat16, device)
    table = list(range(count))
    chunks, chosen = [*range(505, 515), *range(1024, 1034)], [6, 7, 10, 19]
    whole = on(Paths.build([0, 10, 20], [505, 1024], [table] * 2, 1), device)
    rows = [chunks[place] for place in chosen]
    each = on(Paths.build(list(range(len(rows) + 1)), rows, [table] * len(rows), 1), device)
    spans = []
    monkeypatch.setattr(gpu, "multiprocessors", lambda place: 0)
    together = gpu.attention(query[chunks], key, value, whole, reach, sinks=sinks)[chosen]
    assert torch.equal(gpu.attention(query[rows], key, value, each, reach, sinks=sinks), together)
    monkeypatch.setattr(gpu, "multiprocessors", lambda place: 132)
    monkeypatch.setattr(gpu, "fold_kernel", counted(gpu.fold_kernel, spans))
    assert torch.equal(gpu.attention(query[rows], key, value, each, reach, sinks=sinks), together)
    assert spans == [(len(rows), 2)]


def counted(kernel, grids):
    """The kernel, its grids noted."""

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    return Counted()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("reach", [Reach(), Reach(window=70), Reach(chunk=48)])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_gradients(device, dtype, reach, shared):
    """A gradient misses a block, a tile, a head or one of the samples that share a row, or leaves a query's sight."""
    tables = [list(range(90)), [*range(40), *range(90, 160)] if shared else list(range(90, 160))]
    paths = on(Paths.build([0, 90, 160], [0, 40 if shared else 0], tables, page_tokens=1), device)
    query, key, value = heads_of(160, (6, 2, 8), dtype, device)
    lse = torch.empty(160, 6, device=device)
    out = attention(query, key, value, paths, reach, lse)
    dout = draw(1, 160, 6, 8, dtype=dtype, device=device)
    grads = heads_of(160, (6, 2, 8), dtype, device)
    attention_backward(dout, out, lse, (query, key, value), grads, paths, reach)
    wide = [x.double().cpu().requires_grad_() for x in (query, key, value)]
    attention_reference(*wide, paths.to(torch.device("cpu")), reach).backward(dout.double().cpu())
    for got, exact in zip(grads, wide, strict=True):
        # Weights, their gradients, the output and the result are each rounded; a key's sum is over 70 rows and more.
        assert exact.grad is not None
        assert (got.double().cpu() - exact.grad).abs().max() <= 8 * ROUNDING[dtype] * exact.grad.abs().max() + 1e-5


@pytest.mark.parametrize("rows", [1, 64, 200, 600])
def test_tiles_agree(device, rows):
    """A tile leaves a block of rows or columns out, takes one twice, or has other bits than another tile."""
    from tandem.kernels.gpu.linear import disagreeing, tiled_product
    from tandem.kernels.gpu.tiles import HOPPER, PLAIN

    x, weight = (draw(seed, size, 72, dtype=torch.bfloat16, device=device) for seed, size in ((0, rows), (1, 130)))
    last = None
    for tile in (*PLAIN, *HOPPER[2:]) if device == "cpu" else HOPPER:
        out = torch.full((rows, 130), torch.nan, device=device)
        got = tiled_product(x, weight, None, None, out, tile)
        assert last is None or torch.equal(got, last)
        last = got
    near(last, x.double() @ weight.double().T, 74 * FP32 * (x.double().abs() @ weight.double().abs().T))
    assert device == "cpu" or not disagreeing(HOPPER, torch.device(device), torch.bfloat16)


def test_a_tile_of_other_bits_is_not_taken(device, monkeypatch):
    """Rows of a decode and of a prefill take tiles that do not agree on this device."""
    from tandem.kernels.gpu import linear as gpu
    from tandem.kernels.gpu.tiles import Tile

    tiles = (Tile(64, 128, 64, 4, 2), Tile(64, 64, 64, 4, 2))
    monkeypatch.setattr(gpu, "tiles_of", lambda place, dtype: tiles)
    asked, tiled = torch.device(device), gpu.tiled_product
    assert gpu.agreed.__wrapped__(asked, torch.bfloat16) == tiles
    monkeypatch.setattr(
        gpu, "tiled_product", lambda x, w, b, r, out, tile: tiled(x, w, b, r, out, tile).add_(tile.columns == 128)
    )
    with pytest.warns(UserWarning, match="other bits"):
        assert gpu.agreed.__wrapped__(asked, torch.bfloat16) == tiles[1:]


def test_sinks_stay_in_sight(device):
    """With a window and sinks the leading positions are lost, or counted twice where window and sinks meet."""
    from tandem.kernels.gpu import attention as gpu

    query, key, value = heads_of(150, (2, 1, 8), torch.float32, device)
    paths = on(Paths.build([0, 150], [0], [list(range(150))], 1), device)
    got = gpu.attention(query, key, value, paths, Reach(window=20), sinks=3)
    scores = torch.einsum("qhd,nd->hqn", query.double(), key[:, 0].double()) / 8**0.5
    q, n = torch.arange(150, device=device)[:, None], torch.arange(150, device=device)
    seen = (n <= q) & ((n > q - 20) | (n < 3))
    exact = torch.einsum("hqn,nd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[:, 0].double())
    assert (got.double() - exact).abs().max() < 400 * FP32 * float(value.abs().amax())  # as test_attention_values
    start = 100
    chunk = on(Paths.build([0, 50], [start], [list(range(150))], 1), device)
    assert torch.equal(gpu.attention(query[start:], key, value, chunk, Reach(window=20), sinks=3), got[start:])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_pages_of_eight_bits(device, dtype):
    """Keys and values in 8 bits are rounded otherwise than torch rounds, or are not widened exactly."""
    query, key, value = heads_of(70, (4, 2, 8), dtype, device)
    slots = torch.arange(70, device=device)
    paths = on(Paths.build([0, 70], [0], [list(range(70))], 1), device)
    pools = [torch.zeros(70, 2, 8, dtype=torch.float8_e4m3fn, device=device) for _ in "kv"]
    for pool, rows in zip(pools, (key, value), strict=True):
        store_(40 * rows, slots, pool)
        assert torch.equal(pool.float(), (40 * rows).to(torch.float8_e4m3fn).float())
    widened = [pool.to(dtype) for pool in pools]
    assert torch.equal(attention(query, *pools, paths), attention(query, *widened, paths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 24])
def test_codes_with_scales(device, dtype, size):
    """Codes or scales in int8 are those of another vector or rounded otherwise, padding is written, a sequence reads
    another page's scales, or a broken key is forgotten."""
    query, key, value = heads_of(70, (4, 2, size), dtype, device)
    value[5] = 0
    value[6] *= 2.0**-14 if dtype == torch.float16 else 2.0**-140  # subnormal where the dtype has them
    value[7, 0] = torch.arange(size) - size / 2 + 0.5  # ties of a scale of 1
    value[7, 0, 0] = 127
    pages = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    at = torch.arange(70)
    slots = (pages[at // 8] * 8 + at % 8).to(device)
    pool = KvPool(10, 8, 2, size, dtype, torch.int8, device)
    for memory in pool.tensors():
        memory.view(torch.uint8).fill_(0x7F)
    before = [memory.clone() for memory in pool.tensors()]
    pool.store_(key, value, torch.full_like(slots, -1))
    assert all(torch.equal(*pair) for pair in zip(before, pool.tensors(), strict=True))
    pool.store_(key, value, slots)
    kept = [to_int8(x.cpu()) for x in (key, value)]
    for which, (codes, scales) in enumerate(kept):
        assert torch.equal((pool.keys, pool.values)[which][slots].cpu(), codes)
        assert torch.equal(pool.scales[slots // 8, which, :, slots % 8].cpu(), scales)
    rows = [from_int8(*parts, dtype).to(device) for parts in kept]
    plain = on(Paths.build([0, 70], [0], [list(range(70))], 1), device)
    paged = on(Paths.build([0, 70], [0], [pages[:9].tolist()], 8), device)
    for reach in (Reach(), Reach(window=20)):
        assert torch.equal(paged_attention(query, pool, paged, reach), attention(query, *rows, plain, reach))
    for broken in (torch.nan, -torch.inf):
        value[30, 1, 3] = broken
        pool.store_(key[30:31], value[30:31], slots[30:31])
        assert bool(pool.rows(slots)[1][30, 1].isnan().all()) and not bool(pool.rows(slots)[1][30, 0].isnan().any())


def test_the_choice(device, monkeypatch):
    """A CPU tensor goes to Triton unasked, or a misspelt TANDEM_KERNELS is ignored."""
    from tandem.errors import ConfigError
    from tandem.kernels import choice

    x = torch.zeros(1)
    assert backend(x) == "triton"
    monkeypatch.delenv("TANDEM_KERNELS")
    choice._asked.cache_clear()
    assert backend(x) in ("cpp", "reference")
    assert backend(torch.zeros(1, dtype=torch.float16)) == "reference"
    monkeypatch.setenv("TANDEM_KERNELS", "tritn")
    choice._asked.cache_clear()
    with pytest.raises(ConfigError, match="tritn"):
        backend(x)
