"""Quantized weights are, byte for byte, what they were when hashes.json was written (see make.py)."""

import json

import pytest

from finescale.solvers import SOLVERS as REGISTERED
from tests.golden.make import FILE, SOLVERS, cases, problem, quantize

HASHES = json.loads(FILE.read_text())


@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_hash(case):
    assert quantize(*case).sha256() == HASHES[" ".join(case)]


def test_every_case_has_a_hash_and_every_solver_a_case():
    assert set(HASHES) == {" ".join(case) for case in cases()}
    assert {name for name, _ in SOLVERS.values()} == set(REGISTERED)
    # Solvers and integer scales make a difference: few cases share their bytes.
    assert len(set(HASHES.values())) > 0.8 * len(HASHES)


def test_the_problem_is_made_of_exact_numbers():
    weight_OI, hessian_II = problem()
    assert bool((weight_OI == weight_OI.float()).all()) and bool((hessian_II * 2**10 % 1 == 0).all())
    assert weight_OI.double().sum().item() == pytest.approx(WEIGHT_SUM, abs=0)


WEIGHT_SUM = 0.0
