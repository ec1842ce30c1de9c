"""Hadamard matrices of the sizes that language models have, by construction: Sylvester, Paley, and Kronecker products.

A Hadamard matrix has entries of +-1 and orthogonal rows, so that H / sqrt(n) is a rotation that spreads a single large
channel over all of them. Paley's constructions (over any finite field, such as the 343 elements behind the 11008
channels of Llama) give what powers of two cannot.
Shape legend: N size of the matrix.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from finescale.errors import InputError

_LARGEST_PALEY = 2048


@lru_cache(maxsize=32)
def hadamard_matrix(size: int) -> Tensor:
    """A Hadamard matrix, int8 [N, N], its first row and column all ones.

    Raises:
        InputError: no construction known here gives this size (it must be 1, 2 or a multiple of 4).
    """
    factors = hadamard_factors(size)
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for factor in factors:
        matrix = torch.kron(matrix, _factor(factor))
    return matrix


def has_hadamard(size: int) -> bool:
    """Whether a matrix of this size can be constructed."""
    return _factors(size) is not None


def largest_rotation(channels: int) -> tuple[int, int]:
    """(size, inner) of the largest rotation over so many channels, for `rotate`: inner is 1 where a matrix of the whole
    size is known, else channels an inner step apart are rotated together."""
    size = next(size for size in range(channels, 0, -1) if channels % size == 0 and has_hadamard(size))
    return size, channels // size


def hadamard_factors(size: int) -> tuple[int, ...]:
    """Sizes of the matrices whose Kronecker product is used, the odd one first; raises like `hadamard_matrix`."""
    factors = _factors(size)
    if factors is None:
        raise InputError(
            f"no Hadamard matrix of size {size} is known to the constructions here; leave this rotation out."
        )
    return factors


@lru_cache(maxsize=256)
def _factors(size: int) -> tuple[int, ...] | None:
    if size < 1:
        return None
    twos = (size & -size).bit_length() - 1
    if size == 2**twos:
        return (2,) * twos
    # The smallest Paley matrix that holds the odd part leaves the most to the fast powers of two.
    for exponent in range(2, twos + 1):
        base = (size >> twos) << exponent
        if base <= _LARGEST_PALEY and _paley_order(base):
            return (base, *(2,) * (twos - exponent))
    for left in range(12, math.isqrt(size) + 1, 4):
        if size % left == 0 and left & (left - 1):
            parts = _factors(left), _factors(size // left)
            if parts[0] is not None and parts[1] is not None:
                return (*parts[0], *parts[1])
    return None


@lru_cache(maxsize=64)
def _factor_on(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Brought to a GPU once, not in every call."""
    return _factor(size).to(device, dtype)


def _factor(size: int) -> Tensor:
    if size == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    order = _paley_order(size)
    assert order is not None
    matrix = _paley_one(order) if order == size - 1 else _paley_two(order)
    matrix = matrix * matrix[:, :1]
    return matrix * matrix[:1]


def _paley_order(size: int) -> int | None:
    """The order q of the field behind a matrix of this size: size = q + 1 with q % 4 == 3, or size = 2 (q + 1) with
    q % 4 == 1."""
    if size % 4 == 0 and _prime_power(size - 1) and (size - 1) % 4 == 3:
        return size - 1
    if size % 4 == 0 and _prime_power(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return size // 2 - 1
    return None


def _paley_one(order: int) -> Tensor:
    """H = I + S with S = [[0, 1], [-1, Q]], Q the Jacobsthal matrix; order % 4 == 3 (Paley 1933)."""
    core = _jacobsthal(order)
    skew = torch.zeros(order + 1, order + 1, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
    return skew + torch.eye(order + 1, dtype=torch.int8)


def _paley_two(order: int) -> Tensor:
    """Entries of the conference matrix [[0, 1], [1, Q]] replaced by 2 x 2 blocks; order % 4 == 1 (Paley 1933)."""
    conference = torch.zeros(order + 1, order + 1, dtype=torch.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(order)
    nonzero = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, nonzero) + torch.kron(torch.eye(order + 1, dtype=torch.int8), diagonal)


def _jacobsthal(order: int) -> Tensor:
    """Q_ab = chi(a - b), int8 [q, q]: 1 for a square of the field, -1 for any other non-zero element, 0 for zero."""
    found = _prime_power(order)
    assert found is not None
    prime, degree = found
    elements = list(product(range(prime), repeat=degree))
    modulus = _irreducible(prime, degree)
    squares = {_multiply(element, element, modulus, prime) for element in elements[1:]}
    chi = torch.tensor([0] + [1 if element in squares else -1 for element in elements[1:]], dtype=torch.int8)
    digits = torch.tensor(elements)
    difference = (digits[:, None] - digits[None]) % prime
    powers = torch.tensor([prime ** (degree - 1 - place) for place in range(degree)])
    return chi[(difference * powers).sum(-1)]


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with p prime and p^k = number; None when there is no such pair."""
    if number < 2:
        return None
    prime = next((p for p in range(2, math.isqrt(number) + 1) if number % p == 0), number)
    degree, rest = 0, number
    while rest % prime == 0:
        rest, degree = rest // prime, degree + 1
    return (prime, degree) if rest == 1 else None


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """Coefficients below the leading 1 of a monic polynomial over the prime field that no other one divides, highest
    power first. For degrees 2 and 3 it suffices that it has no root; higher ones are tried against all factors."""
    for low in product(range(prime), repeat=degree):
        polynomial = (1, *low)
        factors = ((1, *tail) for width in range(1, degree // 2 + 1) for tail in product(range(prime), repeat=width))
        if all(any(_remainder(polynomial, factor, prime)) for factor in factors):
            return low
    raise AssertionError("every finite field has an irreducible polynomial")


def _remainder(polynomial: tuple[int, ...], divisor: tuple[int, ...], prime: int) -> list[int]:
    """Remainder of the division by a monic polynomial, highest power first."""
    rest = list(polynomial)
    while len(rest) >= len(divisor):
        head = rest[0]
        for place, coefficient in enumerate(divisor):
            rest[place] = (rest[place] - head * coefficient) % prime
        rest.pop(0)
    return rest


def _multiply(left: tuple[int, ...], right: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Product of two field elements, coefficients highest power first."""
    total = [0] * (2 * len(left) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            total[i + j] = (total[i + j] + a * b) % prime
    rest = _remainder(tuple(total), (1, *modulus), prime)
    return (0,) * (len(left) - len(rest)) + tuple(rest)


def rotate(x: Tensor, size: int, inner: int = 1, back: bool = False) -> Tensor:
    """x H / sqrt(size) along the last dimension, which is read as [outer, size, inner]: the inner channels stay apart.

    Powers of two run as butterflies, in the type of ``x``; the rest is one small product.

    Args:
        x: float [..., outer * size * inner].
        size: of the Hadamard matrix; see `hadamard_matrix` for what it raises.
        inner: channels that move together; 1 rotates runs of ``size`` channels.
        back: undo it, with the transpose of H.
    """
    factors = hadamard_factors(size)
    shape = x.shape
    x = x.reshape(-1, size, inner)
    if factors and factors[0] != 2:
        base = _factor_on(factors[0], x.device, x.dtype)
        base = base.T if back else base
        x = torch.einsum("bkri,kl->blri", x.reshape(x.shape[0], factors[0], -1, inner), base)
        x = x.reshape(-1, size // factors[0], inner)
    step = x.shape[1]
    while step > 1:
        step //= 2
        x = x.reshape(-1, 2, step * inner)
        x = torch.stack((x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]), 1)
    return (x / math.sqrt(size)).reshape(shape)
