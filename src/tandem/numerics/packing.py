"""Codes of few bits in words and bytes, as files have them: a stream of bits a row, the first code in the lowest.

32 codes of b bits fill b words of 32 bits, so a code of 3, 5, 6 or 7 bits may lie in two words. Pure functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns, the one that lies in each nibble of a word, the lowest first


def num_words(count: int, bits: int) -> int:
    """Of 32 bits, that so many codes fill."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words of codes [.., K] (integers of `bits` bits, 1 to 8): int32 [.., ceil(K bits / 32)], zeros behind the last.

    >>> pack(torch.tensor([1, 2, 3, 15]), 4).tolist(), unpack(pack(torch.arange(8), 3), 3, 8).tolist()
    ([62241], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    assert 1 <= bits <= 8, bits
    count = codes.shape[-1]
    wide = functional.pad(codes.long(), (0, -count % WORD)).unflatten(-1, (-1, WORD))
    words = wide.new_zeros((*wide.shape[:-1], bits + 1))  # one more, which takes nothing: no code goes beyond
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        shifted = wide[..., index] << offset
        words[..., word] |= shifted & 0xFFFFFFFF
        if offset + bits > WORD:
            words[..., word + 1] |= shifted >> WORD
    return words[..., :bits].flatten(-2)[..., : num_words(count, bits)].to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of words (int32, [.., W]): uint8 [.., count]."""
    assert words.dtype == torch.int32 and 1 <= bits <= 8 and words.shape[-1] >= num_words(count, bits), words.shape
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
        return codes.to(torch.uint8).flatten(-2)[..., :count]
    wide = functional.pad(words, (0, -words.shape[-1] % bits)).long().unflatten(-1, (-1, bits)) & 0xFFFFFFFF
    found = []
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        code = wide[..., word] >> offset
        if offset + bits > WORD:
            code = code | wide[..., word + 1] << (WORD - offset)
        found.append((code & ((1 << bits) - 1)).to(torch.uint8))
    return torch.stack(found, -1).flatten(-2)[..., :count]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Bytes of codes of 4 bits [.., K], K even: uint8 [.., K / 2], the first of two in the low half.

    >>> pack_nibbles(torch.tensor([1, 2])).tolist(), unpack_nibbles(torch.tensor([33], dtype=torch.uint8)).tolist()
    ([33], [1, 2])
    """
    assert codes.shape[-1] % 2 == 0, codes.shape
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [.., 2 K] of bytes [.., K]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def to_awq_order(codes: Tensor) -> Tensor:
    """Columns [.., N], N a multiple of eight, as AutoAWQ packs them."""
    return codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)


def from_awq_order(codes: Tensor) -> Tensor:
    """`to_awq_order` back."""
    places = [AWQ_ORDER.index(column) for column in range(8)]
    return codes.unflatten(-1, (-1, 8))[..., places].flatten(-2)
