"""Noise from a counter: a number depends on where it is used, not on what was drawn before it.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
64-bit request seed (low word, high word); the counter is (token_id // 4, position, stream, 0) and token_id % 4 picks
the word. So the noise of a token at a position is the same whatever else is in the batch, before and after a
preemption, and with and without speculation. NumPy only; `kernels/sample.h` has the same in C++.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

# Of a 32-bit word w: u = (w + 1/2) 2^-32 lies in [2^-33, 1 - 2^-33], so -log(-log u) lies between
# -log(33 log 2) and -log(-log1p(-2^-33)) = 33 log 2 - 2^-34 + ...; both rounded to fp32.
GUMBEL_MIN = float(np.float32(-math.log(33 * math.log(2))))  # -3.1300
GUMBEL_MAX = float(np.float32(-math.log(-math.log1p(-(2.0**-33)))))  # 22.8739


class Stream(IntEnum):
    """What a number is used for; uses never share numbers."""

    TARGET = 0  # the token drawn from the model
    PROPOSAL = 1  # a draft, where it is accepted by its probability (engine/reject.py); the next two beside it
    ACCEPT = 2  # whether it is; the token id is 0
    RESIDUAL = 3  # the token in its place where it is not
    ROUNDING = 4  # stochastic rounding
    NOISE = 5  # engine.noise; a channel of the final hidden state stands in the place of the token id
    INITIAL = 6  # weights of a new model; the tensor's number stands in the place of the position
    SELECTION = 7  # of prompts and groups; a candidate's place stands in the place of the token id
    SHUFFLE = 8  # of a corpus's rows; a row's place stands in the place of the token id, twice over
    RESAMPLE = 9  # of a bootstrap: its number stands in the place of the position, a draw's place in that of the token
    ADAPTER = 10  # A of a new adapter; the layer's number stands in the place of the position
    SYNTHETIC = 11  # which drafts stand under engine.draft.by=synthetic; a position's place in that of the token id


def philox4x32(counter: ArrayLike, key: ArrayLike) -> Words:
    """Ten rounds of Philox4x32.

    `counter` [..., 4] and `key` [..., 2] are unsigned 32-bit words that broadcast; returns words [..., 4].
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, dtype=np.uint64), -1, 0)
    for turn in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        weyl0, weyl1 = np.uint64(turn * _WEYL[0] & 0xFFFFFFFF), np.uint64(turn * _WEYL[1] & 0xFFFFFFFF)
        c0 = (product1 >> _HALF) ^ c1 ^ ((k0 + weyl0) & _LOW)
        c1 = product1 & _LOW
        c2 = (product0 >> _HALF) ^ c3 ^ ((k1 + weyl1) & _LOW)
        c3 = product0 & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, position: int, token_ids: ArrayLike, stream: int = Stream.TARGET) -> Words:
    """The 32-bit words of `token_ids` (any shape) at one position: same shape."""
    assert 0 <= seed < 2**64 and 0 <= position < 2**32, (seed, position)
    ids = np.asarray(token_ids, dtype=np.int64)
    counter = np.zeros((*ids.shape, 4), dtype=np.uint64)
    counter[..., 0] = ids // 4
    counter[..., 1] = position
    counter[..., 2] = int(stream)
    blocks = philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32])
    return np.take_along_axis(blocks, (ids % 4)[..., None], axis=-1)[..., 0]


def word_rows(seeds_S: ArrayLike, positions_S: ArrayLike, count: int, stream: int) -> Words:
    """[S, count]: the words of ids 0 to count - 1 for each pair of a seed (uint64) and a position, as in `words`."""
    seeds = np.asarray(seeds_S, dtype=np.uint64)
    counter = np.zeros((len(seeds), -(-count // 4), 4), dtype=np.uint64)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.asarray(positions_S, dtype=np.uint64)[:, None]
    counter[..., 2] = int(stream)
    key = np.stack((seeds & _LOW, seeds >> _HALF), -1)[:, None]
    return philox4x32(counter, key).reshape(len(seeds), -1)[:, :count]


def uniform(word: ArrayLike) -> NDArray[np.float64]:
    """(w + 1/2) 2^-32, exact in fp64: in [2^-33, 1 - 2^-33], never 0 or 1."""
    return (np.asarray(word, dtype=np.uint32).astype(np.float64) + 0.5) * 2.0**-32


def gumbel(word: ArrayLike) -> NDArray[np.float32]:
    """Standard Gumbel noise -log(-log u), evaluated in fp64 and rounded to fp32: in [GUMBEL_MIN, GUMBEL_MAX]."""
    return (-np.log(-np.log(uniform(word)))).astype(np.float32)


def normal(word: ArrayLike) -> NDArray[np.float64]:
    """Standard normal numbers of words [..., 2 n], two of a pair of neighbours: in [-6.77, 6.77], same shape.

    sqrt(-2 log u) times the cosine and the sine of 2 pi v, in fp64 (Box and Muller, "A note on the generation of random
    normal deviates", 1958).
    """
    u, v = uniform(word).reshape(-1, 2).T.copy()  # contiguous: one code path of NumPy's for any number of rows
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(np.shape(word))


def derive_seed(run_seed: int, step: int, prompt_id: str, sibling: int) -> int:
    """The 64-bit seed of one rollout: siblings of a group, steps and prompts get unrelated noise.

    >>> derive_seed(0, 1, "sum-0", 0) == derive_seed(0, 1, "sum-0", 1)
    False
    """
    # The integers hold no "/", so the text determines the four values whatever the prompt id holds.
    text = f"{int(run_seed)}/{int(step)}/{prompt_id}/{int(sibling)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"tandem seed").digest(), "little")
