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
    values = random.uniform(extremes)
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


def test_rows_of_words_are_the_words():
    """The noise of a row depends on the rows beside it, or a seed's high word is lost in the array of all seeds."""
    seeds, positions = [0, 2**64 - 1, 2**32 + 7, 7], [0, 2**32 - 1, 12, 12]
    for count in (1, 4, 575, 576):
        rows = random.word_rows(np.array(seeds, np.uint64), np.array(positions, np.uint32), count, Stream.NOISE)
        for row, seed, position in zip(rows, seeds, positions, strict=True):
            assert (row == random.words(seed, position, np.arange(count), Stream.NOISE)).all()


def test_normal_is_normal():
    """Noise with another location, scale or shape; a cosine and a sine that are not of one radius and angle."""
    stats = pytest.importorskip("scipy.stats")
    noise = random.normal(random.words(1, 2, np.arange(400_000), Stream.NOISE))
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3
    n = len(noise)
    # Standard errors of the first four moments: 1, sqrt 2, sqrt 15 and sqrt 96 over sqrt n.
    for power, (moment, deviation) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], start=1):
        assert abs((noise**power).mean() - moment) < 4 * deviation / n**0.5
    # Neighbours, a pair of one radius among them, and their squares: of a pair with one angle these would correlate.
    for function in (np.asarray, np.square):
        first, second = function(noise[::2]), function(noise[1::2])
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / n**0.5
        assert abs(np.corrcoef(first[1:], second[:-1])[0, 1]) < 5 / n**0.5
    # Far out: 400,000 draws have 400,000 x 6.3e-5 = 25 beyond 4.
    assert 8 < (np.abs(noise) > 4).sum() < 50


def test_normal_by_hand():
    """A pair made of other words than its own, degrees for turns, or a result that depends on the shape."""
    words = np.array([0, 2**32 - 1, 1 << 30, 3 << 30, 5, 1 << 29, 77, 12345], np.uint32)
    wanted = []
    for first, second in words.reshape(-1, 2).tolist():
        radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
        turn = 2 * math.pi * (second + 0.5) / 2**32
        wanted += [radius * math.cos(turn), radius * math.sin(turn)]
    assert random.normal(words) == pytest.approx(wanted, rel=1e-12, abs=1e-14)
    assert (random.normal(words.reshape(2, 4)) == random.normal(words).reshape(2, 4)).all()
    assert np.abs(random.normal(np.zeros(2, np.uint32))).max() < 6.77


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
