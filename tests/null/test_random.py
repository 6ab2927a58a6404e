"""Noise that depends on anything but (seed, position, token id, stream), or whose distribution is off."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.numerics import random
from tandem.numerics.random import Stream

# Random123 1.14, tests/kat_vectors: "philox4x32 10".
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    """A wrong multiplier, Weyl constant, number of rounds or word order."""
    assert tuple(int(word) for word in random.philox4x32(counter, key)) == expected


def philox_in_plain_integers(counter, key):
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k0, second % 2**32, (first >> 32) ^ c[3] ^ k1, first % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
    token=st.integers(0, 2**20),
    stream=st.sampled_from(list(Stream)),
)
@settings(max_examples=100, deadline=None)
def test_layout_of_counter_and_key(seed, position, token, stream):
    """Key halves swapped, the token's word mixed up, the position or the stream ignored or in the wrong word."""
    expected = philox_in_plain_integers((token // 4, position, stream, 0), (seed % 2**32, seed >> 32))[token % 4]
    assert int(random.words(seed, position, token, stream)) == expected


def test_words_do_not_depend_on_which_tokens_are_asked_for():
    """Noise keyed by the place in a sorted or filtered list instead of by the token id."""
    every = random.words(9, 4, np.arange(300))
    picked = [299, 3, 17, 17, 0]
    assert (random.words(9, 4, picked) == every[picked]).all()


def test_uniform_is_open_at_both_ends():
    """A uniform of 0 or 1, which makes infinite noise."""
    extremes = np.array([0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1], dtype=np.uint32)
    for values in (random.uniform(extremes), random.uniform_fp32(extremes)):
        assert (values > 0).all() and (values < 1).all()
    assert random.uniform(np.uint32(0)) == 2.0**-33 and random.uniform(np.uint32(2**32 - 1)) == 1 - 2.0**-33


def test_gumbel_bounds_are_exact():
    """A bound below the largest noise makes the sampler leave out a token that wins."""
    lowest, highest = random.gumbel([0, 2**32 - 1])
    assert lowest == random.GUMBEL_MIN and highest == random.GUMBEL_MAX
    assert highest == np.float32(-math.log(2.0**-33)) and highest < 22.8739
    assert lowest == np.float32(-math.log(33 * math.log(2)))


def test_gumbel_is_gumbel():
    """Noise with another location, scale or shape (24-bit uniforms, a sign)."""
    stats = pytest.importorskip("scipy.stats")
    noise = random.gumbel(random.words(1, 2, np.arange(200_000)))
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-3
    # 200,000 draws have about 200,000 e^-10 = 9 beyond 10, where coarse uniforms would show steps.
    assert len(np.unique(noise[noise > 6])) == (noise > 6).sum()


def test_seeds_positions_and_streams_are_unrelated():
    """Neighbouring seeds (siblings), positions or streams sharing or correlating their noise."""
    tokens = np.arange(50_000)
    draws = {
        "base": (7, 3, 0),
        "seed": (8, 3, 0),
        "high seed": (7 + 2**32, 3, 0),
        "position": (7, 4, 0),
        "stream": (7, 3, 1),
        "swapped": (3, 7, 0),
    }
    columns = np.stack([random.uniform(random.words(*key[:2], tokens, key[2])) for key in draws.values()])
    correlation = np.corrcoef(columns) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / math.sqrt(len(tokens))
    # Shifted by up to four tokens too: a counter that overlaps its neighbour's would show as a copy.
    for shift in range(1, 5):
        assert np.abs(np.corrcoef(columns[:, shift:], columns[:, :-shift])[: len(draws), len(draws) :]).max() < 0.03


def test_derived_seeds_are_stable_and_distinct():
    """Siblings with one seed give identical samples and no advantage; a changed derivation breaks every replay."""
    seeds = {
        random.derive_seed(run, step, prompt, sibling)
        for run in (0, 1)
        for step in (0, 1, 11)
        for prompt in ("1", "11", "1/1", "a", "")
        for sibling in (0, 1, 11)
    }
    assert len(seeds) == 2 * 3 * 5 * 3
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert random.derive_seed(0, 1, "sum-0", 0) == EXPECTED_SEED


EXPECTED_SEED = 4967856461433797049
