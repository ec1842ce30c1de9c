"""Quantized weights are, byte for byte, what they were when hashes.json was written (see make.py)."""

import json

import pytest
import torch

from finescale.solvers import SOLVERS as REGISTERED
from tests.golden.make import FILE, SOLVERS, cases, fingerprint, problem

HASHES = json.loads(FILE.read_text())


@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_hash(case):
    assert fingerprint(*case) == HASHES[" ".join(case)]


def test_every_case_has_a_hash_and_every_solver_a_case():
    assert set(HASHES) == {" ".join(case) for case in cases()}
    assert {name for name, _ in SOLVERS.values()} == set(REGISTERED)
    assert len(set(HASHES.values())) > 0.6 * len(HASHES), "solvers, schemes and amplifiers must make a difference"


def test_the_problem_is_made_of_exact_numbers_and_well_posed():
    weight_OI, hessian_II = problem()
    assert torch.equal(weight_OI, weight_OI.float().double())
    assert torch.equal(hessian_II * 2**10, (hessian_II * 2**10).round()) and torch.equal(hessian_II, hessian_II.T)
    assert float(torch.linalg.eigvalsh(hessian_II)[0]) > 0.01
