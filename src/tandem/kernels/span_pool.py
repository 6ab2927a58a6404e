"""Keys and values of a layer in pages of codes, and in pages as they were made until they are full.

A page of `page_tokens` positions is rounded at once (numerics/kv.py: `SpanRule`) as its last position is written. Until
then it lies in `open`, a pool of few pages in the compute dtype, which who runs the steps divides among sequences. In a
page table a number from `num_pages` on is a page of `open`.

Full pages, codes of 2, 4 or 8 bits in bytes, the first in the lowest bits: keys [pages, K, D, page_tokens codes], with
scales and then minima [pages, K, 2, page_tokens / 32, D]; values [pages, K, page_tokens, D codes], with [pages, K, 2,
page_tokens, D / 32]. A scale and a minimum lie in the compute dtype. Groups are of fewer where 32 do not fit.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from tandem.kernels.attention import _args, attention_reference
from tandem.kernels.build.load import kernel
from tandem.kernels.large import large
from tandem.kernels.page_pool import KvPool
from tandem.kernels.paths import EVERYTHING, Paths
from tandem.numerics.kv import SpanRule, affine_codes
from tandem.types import Reach


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """[.., N] codes, NaN for any, in [.., N * bits / 8] bytes.

    >>> packed_codes(torch.tensor([1.0, 2.0, 3.0, 0.0]), 2).tolist()
    [57]
    """
    each = 8 // bits
    whole = codes.nan_to_num(0.0).to(torch.uint8).unflatten(-1, (-1, each))
    return sum((whole[..., i] << (bits * i) for i in range(1, each)), whole[..., 0])


def unpacked_codes(held: Tensor, bits: int) -> Tensor:
    """What `packed_codes` gave, in fp32."""
    each = 8 // bits
    return torch.stack([(held >> (bits * i)) & ((1 << bits) - 1) for i in range(each)], -1).flatten(-2).float()


class _Coded(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int64) for name in ("pages", "bits", "token_group", "channel_group")),
    ]


class SpanPool:
    """`num_pages` pages of codes and `num_open` as they are made. On the CPU; `rule` has no sinks, keys by channel and
    values by token.

    >>> from tandem.numerics.kv import span_rule
    >>> SpanPool(2, 1, 1, 16, torch.float16, span_rule("kivi2", 32, 0)).nbytes  # two of 448, and one of 2,048
    2944
    """

    def __init__(
        self, num_pages: int, num_open: int, kv_heads: int, head_size: int, dtype: torch.dtype, rule: SpanRule
    ) -> None:
        assert rule.keys is not None and rule.values is not None and not rule.sinks, rule
        self.rule, self.bits, self.page_tokens, self.kv_heads = rule, rule.keys.bits, rule.tokens, kv_heads
        self.head_size, self.dtype, self.num_pages = head_size, dtype, num_pages
        self.open = KvPool(num_open, rule.tokens, kv_heads, head_size, dtype)
        self.token_group, self.channel_group = rule.keys.group, gcd(rule.values.group, head_size)
        assert head_size * self.bits % 8 == 0, (head_size, self.bits)
        bytes_R, bytes_D = (count * self.bits // 8 for count in (rule.tokens, head_size))
        self.keys = large(num_pages, kv_heads, head_size, bytes_R, dtype=torch.uint8)
        self.values = large(num_pages, kv_heads, rule.tokens, bytes_D, dtype=torch.uint8)
        shapes = (rule.tokens // self.token_group, head_size), (rule.tokens, head_size // self.channel_group)
        self.key_scales, self.value_scales = (large(num_pages, kv_heads, 2, *shape, dtype=dtype) for shape in shapes)

    @property
    def packed(self) -> bool:
        return self.open.packed

    @property
    def nbytes(self) -> int:
        return self.open.nbytes + sum(pages.nbytes for pages in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """The memory of full pages, a page a row."""
        return tuple(x.flatten(1) for x in (self.keys, self.values, self.key_scales, self.value_scales))

    def fill_(self, pages_N: Tensor, key_NRKD: Tensor, value_NRKD: Tensor) -> None:
        """Round pages, all different, from all of their positions."""
        key = affine_codes(key_NRKD.permute(0, 2, 3, 1).unflatten(-1, (-1, self.token_group)), self.bits)
        self.keys[pages_N] = packed_codes(key[0].flatten(-2), self.bits)
        self.key_scales[pages_N] = torch.stack([x.squeeze(-1).transpose(2, 3) for x in key[1:]], 2)
        value = affine_codes(value_NRKD.transpose(1, 2).unflatten(-1, (-1, self.channel_group)), self.bits)
        self.values[pages_N] = packed_codes(value[0].flatten(-2), self.bits)
        self.value_scales[pages_N] = torch.stack([x.squeeze(-1) for x in value[1:]], 2)

    def full(self, pages_N: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of full pages as they are read back, [N, R, K, D] in the compute dtype."""
        scales, lows = (x.float().transpose(2, 3)[..., None] for x in self.key_scales[pages_N].unbind(2))
        codes = unpacked_codes(self.keys[pages_N], self.bits).unflatten(-1, (-1, self.token_group))
        key = (codes * scales + lows).flatten(-2).permute(0, 3, 1, 2)
        scales, lows = (x.float()[..., None] for x in self.value_scales[pages_N].unbind(2))
        codes = unpacked_codes(self.values[pages_N], self.bits).unflatten(-1, (-1, self.channel_group))
        return key.to(self.dtype), (codes * scales + lows).flatten(-2).transpose(1, 2).to(self.dtype)


def coded_attention(
    query_THD: Tensor, pool: SpanPool, paths: Paths, reach: Reach = EVERYTHING, sinks: int = 0
) -> Tensor:
    """`attention` over pages of both kinds, with the bits that the same keys and values give as rows."""
    assert paths.page_tokens == pool.page_tokens, (paths.page_tokens, pool.page_tokens)
    if not pool.packed:
        pages, table_SP = paths.table_SP.unique(return_inverse=True)
        full = pages[pages < pool.num_pages]
        slots = ((pages[len(full) :, None] - pool.num_pages) * pool.page_tokens + torch.arange(pool.page_tokens)).long()
        made = zip(pool.full(full.long()), pool.open.rows(slots.flatten()), strict=True)
        key, value = (torch.cat([some.flatten(0, 1), others]) for some, others in made)
        return attention_reference(query_THD, key, value, replace(paths, table_SP=table_SP.int()), reach, sinks)
    run = kernel("attention_coded", "attention_coded", query_THD.dtype, "p")
    assert run is not None and query_THD.dtype == pool.dtype, (query_THD.dtype, pool.dtype)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
    key_CKD, value_CKD = (x.view(-1, pool.kv_heads, pool.head_size) for x in (pool.open.keys, pool.open.values))
    args = _args(query_THD, key_CKD, value_CKD, paths, reach, out_THD, None, sinks)
    tensors = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    numbers = (pool.num_pages, pool.bits, pool.token_group, pool.channel_group)
    coded = _Coded(*(x.data_ptr() for x in tensors), *numbers)
    args.coded = ctypes.addressof(coded)
    run(ctypes.addressof(args))
    return out_THD
