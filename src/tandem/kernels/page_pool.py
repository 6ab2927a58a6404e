"""Keys and values of a layer in pages, and the step's write into them.

A slot is a position of a page: page * page_tokens + position % page_tokens. Row-major pools are [slots, K, D]. Where
the C++ kernels compute, pages are packed as the matrix product of attention reads them, so that no step packs what
another has packed before: keys [pages, K, D / pair, page_tokens, pair], values [pages, K, page_tokens / pair, D, pair],
with pairs of elements for bf16 and single ones for fp32 compute, and fours in int8, or as many as divide. A page is
contiguous in both.

Kept as int8, the key and the value of a token and head are codes with an fp32 scale each (`numerics.quantise.to_int8`),
which lie apart, [pages, keys and values, K, page_tokens]: what a token left behind depends on no neighbour.

Kept as int4, they are bytes (`numerics.quantise.to_int4`), in uint8: keys [pages, K, bytes, page_tokens], values
[pages, K, page_tokens, bytes], scales [pages, keys and values, K, groups, page_tokens]. Attention widens them to the
compute dtype as it reads, to the numbers that they were rounded to.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from tandem.kernels.address import address, check_range, rows_address
from tandem.kernels.build.load import SUFFIX, kernel
from tandem.kernels.choice import backend
from tandem.kernels.large import large
from tandem.kernels.rotary import rotate_, store_
from tandem.kernels.rounding import Kept
from tandem.numerics.quantise import from_int4, from_int8, int4_bytes, to_e4m3, to_int4, to_int8

INT4 = torch.uint8  # a byte of codes in int4 or of a zero point
STORED = {torch.float8_e4m3fn: "_e4m3", torch.int8: "_int8", INT4: "_int4"}  # kept narrower than computed with


class KvPool:
    """Keys and values of `num_pages` pages of one layer, uninitialised: what was not written may be anything.

    >>> KvPool(2, 16, 1, 8, torch.float16).rows(torch.tensor([17]))[0].shape
    torch.Size([1, 1, 8])
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        stored: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Computed with in `dtype`, kept as that or as `stored` (one of STORED)."""
        assert stored in (None, dtype, *STORED), stored
        self.page_tokens, self.kv_heads, self.head_size, self.dtype = page_tokens, kv_heads, head_size, dtype
        self.packed = backend(torch.empty(0, dtype=dtype, device=device)) == "cpp"
        self.vector, groups = int4_bytes(head_size) if stored == INT4 else (head_size, 1)  # elements of one
        assert stored != INT4 or head_size % 2 == 0, head_size
        keys: tuple[int, ...] = (num_pages * page_tokens, kv_heads, self.vector)
        values = keys
        if self.packed and stored == INT4:
            assert str(dtype) in SUFFIX, dtype
            keys = (num_pages, kv_heads, self.vector, page_tokens, 1)
            values = (num_pages, kv_heads, page_tokens, self.vector, 1)
        elif self.packed:
            channels = positions = 2 if dtype == torch.bfloat16 else 1
            assert page_tokens > 1 and page_tokens & (page_tokens - 1) == 0, page_tokens
            assert head_size % channels == 0 and str(dtype) in SUFFIX, (head_size, dtype)
            if stored == torch.int8:  # sums of products of codes fit into 32 bits
                assert head_size <= 1024, head_size
                channels, positions = math.gcd(head_size, 4), min(page_tokens, 4)
            keys = (num_pages, kv_heads, head_size // channels, page_tokens, channels)
            values = (num_pages, kv_heads, page_tokens // positions, head_size, positions)
        self.keys, self.values = (large(*shape, dtype=stored or dtype, device=device) for shape in (keys, values))
        self.scales: Tensor | None = None
        if stored in (torch.int8, INT4):
            grouped = (groups,) if stored == INT4 else ()
            self.scales = large(num_pages, 2, kv_heads, *grouped, page_tokens, dtype=torch.float32, device=device)

    @property
    def suffix(self) -> str:
        """Of the kernels that read and write what it keeps."""
        return STORED.get(self.keys.dtype, "")

    def holds(self, kept: Kept | None) -> bool:
        """Whether what is stored is read back as `kept` rounds it, so that nothing has to be rounded before."""
        return kept is None or {"float8_e4m3": torch.float8_e4m3fn, "int4": INT4}.get(kept.name) == self.keys.dtype

    @property
    def num_slots(self) -> int:
        return self.keys.numel() // (self.kv_heads * self.vector)

    @property
    def nbytes(self) -> int:
        return sum(pages.nbytes for pages in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """The memory of keys, of values and, where there are any, of scales, a page a row."""
        elements = self.page_tokens * self.kv_heads * self.vector
        pages = self.keys.view(-1, elements), self.values.view(-1, elements)
        return pages if self.scales is None else (*pages, self.scales.view(len(self.scales), -1))

    def copy_(self, sources: list[int], targets: list[int]) -> None:
        """Pages `targets`, all different and none of the sources, become what `sources` are."""
        for pages in self.tensors():
            raw = pages.view(torch.uint8)
            raw[targets] = raw[sources]

    def rows(self, slots_N: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of slots, as attention reads them: [N, K, D] each, in `dtype`."""
        page, offset, group = slots_N // self.page_tokens, slots_N % self.page_tokens, self.values.shape[-1]
        shape = (len(slots_N), self.kv_heads, self.vector)
        if self.packed:
            found = self.keys[page, :, :, offset], self.values[page, :, offset // group, :, offset % group]
        else:
            found = self.keys[slots_N], self.values[slots_N]
        key, value = (x.reshape(shape) for x in found)
        if self.scales is None:
            return key.to(self.dtype), value.to(self.dtype)
        key_NK, value_NK = (self.scales[page, which, ..., offset] for which in (0, 1))
        back = from_int4 if self.keys.dtype == INT4 else from_int8
        return back(key, key_NK, self.dtype), back(value, value_NK, self.dtype)

    def store_(self, key_TKD: Tensor, value_TKD: Tensor, slots_T: Tensor) -> None:
        """Write rows to their slots; rounded as `numerics.quantise` says where the pool is narrower."""
        if self.scales is not None and self.keys.dtype == INT4:
            page, offset = slots_T // self.page_tokens, slots_T % self.page_tokens
            key_TKD, self.scales[page, 0, :, :, offset] = to_int4(key_TKD)
            value_TKD, self.scales[page, 1, :, :, offset] = to_int4(value_TKD)
            if self.packed:
                self.keys[page, :, :, offset, 0], self.values[page, :, offset, :, 0] = key_TKD, value_TKD
            else:
                self.keys[slots_T], self.values[slots_T] = key_TKD, value_TKD
            return
        if not self.packed:
            scales = (None, None) if self.scales is None else self.scales.unbind(1)
            store_(key_TKD, slots_T, self.keys, scales[0])
            store_(value_TKD, slots_T, self.values, scales[1])
            return
        page, offset, group = slots_T // self.page_tokens, slots_T % self.page_tokens, self.values.shape[-1]
        if self.keys.dtype == torch.float8_e4m3fn:
            key_TKD, value_TKD = to_e4m3(key_TKD), to_e4m3(value_TKD)
        elif self.scales is not None:
            key_TKD, self.scales[page, 0, :, offset] = to_int8(key_TKD)
            value_TKD, self.scales[page, 1, :, offset] = to_int8(value_TKD)
        self.keys[page, :, :, offset] = key_TKD.reshape(len(slots_T), self.kv_heads, -1, self.keys.shape[-1])
        self.values[page, :, offset // group, :, offset % group] = value_TKD


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "keys", "values", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "heads", "kv_heads", "head_size", "page_tokens")),
        ("scales", ctypes.c_void_p),
    ]


def rotate_store_(
    qkv: tuple[Tensor, Tensor, Tensor],
    positions_T: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    slots_T: Tensor,
    pool: KvPool,
) -> None:
    """Rotate query [T, H, D] and key [T, K, D] in place, then write key and value into their slots.

    The three are cut from one fused row a token; positions and slots are int64. Without tables nothing is rotated.
    64 rows of SmolLM2-135M take 18 us on a Zen 5 core, of which rotation takes 10.
    """
    query, key, value = qkv
    if not pool.packed:
        if tables is not None:
            rotate_(query, positions_T, *tables)
            rotate_(key, positions_T, *tables)
        return pool.store_(key, value, slots_T)
    run = kernel("page_store", f"rotate_store{pool.suffix}", query.dtype, "p")
    rows, heads, size = query.shape
    assert run is not None and pool.dtype == query.dtype, (pool.dtype, query.dtype)
    assert size == pool.head_size and key.stride(0) == value.stride(0) == query.stride(0), (size, pool.head_size)
    check_range(slots_T, pool.num_slots, "slots")
    turns = 0 if tables is None else len(tables[0])
    if tables is not None:
        check_range(positions_T, turns, "positions")
    args = _Args(
        rows_address(query, pool.dtype, rows, heads, size),
        *(rows_address(x, pool.dtype, rows, pool.kv_heads, size) for x in (key, value)),
        *(pool.keys.data_ptr(), pool.values.data_ptr()),
        *(address(x, torch.int64, rows) for x in (positions_T, slots_T)),
        *(address(table, torch.float32, turns, size // 2) for table in tables or ()),  # none: they stay null
    )
    args.rows, args.stride, args.heads, args.kv_heads = rows, query.stride(0), heads, pool.kv_heads
    args.head_size, args.page_tokens = size, pool.page_tokens
    args.scales = None if pool.scales is None else pool.scales.data_ptr()
    run(ctypes.addressof(args))
