"""Weights that differ but hash the same, or the same weights that do not; differences misreported."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.numerics.compare import difference, same_bits, ulp_distance
from tandem.numerics.digest import root_hash, tensor_digest, tensor_hashes


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "norm": torch.randn(7, generator=generator),
        "a.weight": torch.randn(33, 5, generator=generator).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "ids": torch.arange(10),
    }


def test_digest_ignores_order_strides_and_storage():
    """The engine's hash differing from the learner's although they hold the same weights."""
    named = weights()
    expected = tensor_digest(named)
    transposed = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in named.items()}
    transposed["norm"] = torch.stack((named["norm"], named["norm"]), dim=1)[:, 1]
    assert tensor_digest(dict(reversed(named.items()))) == expected
    assert tensor_digest(iter(named.items())) == expected
    assert tensor_digest(transposed) == expected
    trained = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in named.items()}
    assert tensor_digest(trained) == expected
    assert len(expected) == 32 and int(expected, 16) >= 0


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {"norm": w["norm"].index_add(0, torch.tensor([6]), torch.tensor([1e-7]))},
        lambda w: w | {"a.weight": w["a.weight"].to(torch.float16)},
        lambda w: w | {"a.weight": w["a.weight"].view(torch.int16)},
        lambda w: w | {"a.weight": w["a.weight"].reshape(5, 33)},
        lambda w: w | {"scalar": torch.tensor([2.0])},
        lambda w: w | {"empty": torch.empty(3, 0)},
        lambda w: {("norm2" if name == "norm" else name): t for name, t in w.items()},
        lambda w: {name: t for name, t in w.items() if name != "empty"},
        lambda w: w | {"norm": w["ids"], "ids": w["norm"]},
        lambda w: w | {"ids": w["ids"].roll(1)},
        lambda w: w | {"scalar": torch.tensor(2.0, dtype=torch.float64)},
    ],
)
def test_digest_sees_every_change(change):
    """One flipped bit, a cast, a reshape, a rename, a missing tensor or two swapped ones served unnoticed."""
    named = weights()
    assert tensor_digest(change(named)) != tensor_digest(named)


def test_digest_sees_each_element():
    """Only the first block of a tensor hashed, or blocks in any order."""
    tensor = torch.arange(1000, dtype=torch.float32)
    seen = {tensor_digest({"w": tensor})}
    for place in range(1000):
        changed = tensor.clone()
        changed[place] += 0.5
        seen.add(tensor_digest({"w": changed}))
    seen.add(tensor_digest({"w": tensor.roll(16)}))
    assert len(seen) == 1002


def test_hashes_may_be_taken_one_at_a_time():
    """A tensor read after its memory was used again for the next: every hash would be that of the last."""

    def reused():
        scratch = torch.empty(4)
        for number in range(3):
            yield str(number), scratch.fill_(number)

    assert tensor_hashes(reused()) == tensor_hashes({str(n): torch.full((4,), float(n)) for n in range(3)})
    assert root_hash(tensor_hashes(weights())) == tensor_digest(weights())


def test_digest_is_stable_over_releases():
    """A changed layout of what is hashed: digests in old run folders would no longer match the same weights."""
    assert tensor_digest({"b": torch.arange(3, dtype=torch.float32), "a": torch.ones(2, dtype=torch.bfloat16)}) == KNOWN


KNOWN = "7676de30035dd8d5f84ec30e223124cf"


def test_digest_refuses_two_tensors_of_one_name():
    """A name given twice, of which one would be served and the other hashed."""
    with pytest.raises(AssertionError, match="given twice"):
        tensor_digest([("w", torch.ones(1)), ("w", torch.ones(1))])


@given(
    st.floats(width=32, allow_nan=False),
    st.floats(width=32, allow_nan=False),
)
@settings(max_examples=200, deadline=None)
def test_ulp_distance_counts_representable_numbers(a, b):
    """Wrong across zero, across a power of two, or for infinities."""
    distance = int(ulp_distance(torch.tensor(a), torch.tensor(b)))
    assert distance == int(ulp_distance(torch.tensor(b), torch.tensor(a)))
    assert (distance == 0) == (np.float32(a) == np.float32(b))
    if 0 < distance < 50:
        for _ in range(distance):
            a = float(np.nextafter(np.float32(a), np.float32(b)))
        assert a == b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ulp_distance_of_each_format(dtype):
    """A format whose sign or width is mistaken."""
    eps = torch.finfo(dtype).eps
    a = torch.tensor([1.0, -1.0, 0.0, 2.0, torch.finfo(dtype).max], dtype=dtype)
    b = torch.tensor([1.0 + eps, -1.0 - 2 * eps, -0.0, 2.0 - eps, math.inf], dtype=dtype)
    assert ulp_distance(a, b).tolist() == [1, 2, 0, 1, 1]


def test_difference_by_hand():
    """A maximum taken of signed differences, a relative error by the wrong side, NaN that hides a difference."""
    a = torch.tensor([[1.0, -4.0], [0.0, math.nan]])
    b = torch.tensor([[1.5, -5.0], [-0.0, math.nan]])
    found = difference(a, b)
    assert (found.count, found.differing_bits, found.worst) == (4, 3, (0, 1))
    assert found.max_abs == 1.0 and found.max_rel == pytest.approx(1 / 3) and found.max_ulp == 2**22
    assert not found.same_bits and "3 of 4" in str(found)
    assert difference(a, a).same_bits and same_bits(a, a.clone())
    assert not same_bits(a, b) and not same_bits(a, a.double()) and not same_bits(a, a.reshape(4))
    assert not same_bits(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16))
    broken = difference(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert broken.max_abs == math.inf and broken.max_ulp == -1 and broken.worst == (1,)
    assert difference(torch.tensor([math.inf]), torch.tensor([-math.inf])).max_abs == math.inf
    assert difference(torch.tensor([1, 5]), torch.tensor([1, 2])).max_abs == 3
    assert difference(torch.empty(0), torch.empty(0)).same_bits
