"""Orthogonal matrices that spread outliers: Hadamard's, random signs, and steps of a learned one.

Hadamard's of order n have entries 1 and -1 and orthogonal rows. Here: doubled (Sylvester) and multiplied from those of
Paley (1933), of orders q + 1 for primes q = 3 mod 4 and 2 (q + 1) for primes q = 1 mod 4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tandem.errors import ConfigError


def _prime(number: int) -> bool:
    return number > 1 and all(number % other for other in range(2, int(number**0.5) + 1))


def _paley(order: int) -> Tensor | None:
    """The matrix of Paley's first or second construction."""
    first, second = order - 1, order // 2 - 1
    if order % 4 == 0 and _prime(first):
        core, square = _residues(first), torch.eye(order)
        skew = torch.zeros(order, order)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, core
        return square + skew
    if order % 4 == 0 and second % 4 == 1 and _prime(second):
        conference = torch.zeros(second + 1, second + 1)
        conference[0, 1:] = conference[1:, 0] = 1.0
        conference[1:, 1:] = _residues(second)
        one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, one) + torch.kron(torch.eye(second + 1), other)
    return None


def _residues(prime: int) -> Tensor:
    """Jacobsthal's matrix: of i - j, 1 where it is a square modulo the prime, -1 where not, 0 of 0."""
    signs = torch.full((prime,), -1.0)
    signs[torch.arange(prime).square() % prime] = 1.0
    signs[0] = 0.0
    index = torch.arange(prime)
    return signs[(index[:, None] - index) % prime]


@functools.cache
def _signs(order: int) -> Tensor | None:
    """A Hadamard matrix of the order, entries 1 and -1; None where these constructions have none."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    whole = _paley(order)
    if whole is not None or order % 4:
        return whole
    for part in (2, *range(4, int(order**0.5) + 1, 4)):
        if order % part == 0:
            one, other = _signs(part), _signs(order // part)
            if one is not None and other is not None:
                return torch.kron(one, other)
    return None


def hadamard_matrix(order: int) -> Tensor:
    """[n, n] fp32, orthogonal: a Hadamard matrix / sqrt(n). ConfigError for an order that none is known of here.

    >>> float((hadamard_matrix(12) @ hadamard_matrix(12).T - torch.eye(12)).abs().max()) < 1e-6
    True
    """
    signs = _signs(order)
    if signs is None:
        raise ConfigError(
            f"no Hadamard matrix of order {order} is built here (products of 2, of q + 1 and of 2 (q + 1) for primes "
            "q). Take a rotation that is learned, --method rotation, which starts from another."
        )
    return signs / order**0.5


def random_hadamard(order: int, seed: int = 0) -> Tensor:
    """`hadamard_matrix` whose rows are turned by random signs: Q of x Q, as QuaRot draws it."""
    signs = torch.randint(0, 2, (order,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
    return signs[:, None] * hadamard_matrix(order)


def random_orthogonal(order: int, seed: int = 0) -> Tensor:
    """[n, n] fp32, uniformly drawn: the Q of a normal matrix whose R has a positive diagonal."""
    drawn = torch.randn(order, order, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).float()


def cayley_step(rotation_NN: Tensor, gradient_NN: Tensor, rate: float) -> Tensor:
    """A step down a gradient that stays orthogonal (Cayley; Li, Fuxin and Todorovic, 2002.01113, solved exactly).

    With A = G R^T - R G^T: R' = (1 + rate / 2 A)^-1 (1 - rate / 2 A) R, in fp64, back in R's dtype.
    """
    wide, gradient = rotation_NN.double(), gradient_NN.double()
    skew = gradient @ wide.T - wide @ gradient.T
    one = torch.eye(len(wide), dtype=torch.float64)
    return torch.linalg.solve(one + rate / 2 * skew, (one - rate / 2 * skew) @ wide).to(rotation_NN.dtype)
