"""A shared page that changed under its name and was served."""

from __future__ import annotations

import pytest
import torch

from tandem.kernels.page_sum import page_sums, page_sums_reference


def make_pools(layers: int = 3, pages: int = 5, elements: int = 64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(pages, elements, generator=generator).to(dtype) for _ in range(2 * layers)]


@pytest.mark.parametrize(("elements", "dtype"), [(64, torch.bfloat16), (3, torch.bfloat16), (15, torch.float32)])
def test_sums_are_the_reference(elements, dtype):
    """The compiled sum reading past a page, leaving out its last bytes, or taking a page of another pool."""
    pools = make_pools(elements=elements, dtype=dtype)
    pages = [4, 0, 2, 2]
    sums = page_sums(pools, pages)
    assert sums == page_sums_reference(pools, pages)
    assert sums[2] == sums[3] and len(set(sums)) == 3


def test_pools_of_several_sizes():
    """Words counted as if all pools had pages of one size: scales beside keys take each other's factors."""
    pools = [*make_pools(elements=15), *make_pools(elements=4, dtype=torch.float32)]
    assert page_sums(pools, [3, 1]) == page_sums_reference(pools, [3, 1])


def test_sums_see_every_element_and_its_place():
    """A change of one element, or two elements or pages exchanged, that leaves the sum as it was."""
    pools = make_pools(layers=1)
    before = page_sums(pools, [1])[0]
    for pool in pools:
        for place in range(64):
            kept = pool[1, place].clone()
            pool[1, place] = kept * 1.01 + 0.1
            assert page_sums(pools, [1])[0] != before
            pool[1, place] = kept
    assert page_sums(pools, [1])[0] == before
    swapped = [pools[1], pools[0]]
    assert page_sums(swapped, [1])[0] != before
    pools[0][1] = pools[0][1].flip(0)
    assert page_sums(pools, [1])[0] != before
