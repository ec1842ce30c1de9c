"""Runs on the original's activations: alone, and on statistics that were collected once."""

import pytest
import torch

from finescale.calibration.shared import collected
from finescale.calibration.statistics import collect_moments
from finescale.errors import CheckpointError, InputError
from finescale.pipeline import block as block_module
from finescale.pipeline.quantize import prepare, run
from finescale.pipeline.statistics import collect_statistics
from finescale.recipe import Recipe
from tests.helpers import hashes, lasting_files, quantize, recipe

FLOAT = {"sequential": False}


def shared(job, folder):
    return collect_statistics(
        job.skeleton, job.calibration.tokens_BT, job.recipe.calibration.batch_size, job.device, job.compute_dtype,
        folder, "signature",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "parts"), [("llama", {}), ("gpt2", {}), ("mixtral", {}), ("llama", {"activations": {"bits": 4}})]
)
def test_the_same_bytes_with_and_without_sharing(tiny, text, tmp_path, kind, parts, monkeypatch):
    """Inputs that are rounded at run time too: the original's are not."""
    chosen = recipe("gptq", 3, 32, calibration=FLOAT, **parts)
    alone = quantize(tiny(kind), tmp_path / "alone", chosen, text)
    job = prepare(tiny(kind), chosen, tmp_path / "shared", str(text))
    statistics = shared(job, tmp_path / "statistics")
    assert collected(tmp_path / "statistics", "signature") == statistics
    assert collected(tmp_path / "statistics", "other") is None and collected(tmp_path / "none", "signature") is None
    monkeypatch.setattr(block_module, "collect_moments", None)  # no text may run through the model
    together = run(prepare(tiny(kind), chosen, tmp_path / "shared", str(text), statistics=statistics))
    assert together["layers"] == alone["layers"]
    names = lasting_files(tmp_path / "alone")
    assert hashes(tmp_path / "alone", names) == hashes(tmp_path / "shared", names)


def test_every_block_sees_the_originals_activations(tiny, text, tmp_path, monkeypatch):
    """The Hessians do not depend on the bits, while those of a sequential run do after the first block."""
    seen = []

    def noted(*args):
        found = collect_moments(*args)
        seen.append({name: moment.sum_II.clone() for name, moment in found.items()})
        return found

    monkeypatch.setattr(block_module, "collect_moments", noted)
    for sequential in (False, True):
        seen.clear()
        for bits in (2, 8):
            chosen = recipe("gptq", bits, 32, calibration={"sequential": sequential})
            quantize(tiny("llama"), tmp_path / f"{sequential}-{bits}", chosen, text)
        low, high = seen[:2], seen[2:]
        assert all(torch.equal(low[0][name], high[0][name]) for name in low[0])
        assert all(torch.equal(low[1][name], high[1][name]) == (not sequential) for name in low[1])


def test_an_interrupted_run_goes_on(tiny, text, tmp_path, monkeypatch):
    chosen = recipe("gptq", 3, 32, calibration=FLOAT)
    quantize(tiny("llama-tied"), tmp_path / "whole", chosen, text)
    real, calls = block_module.collect_moments, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(block_module, "collect_moments", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny("llama-tied"), tmp_path / "parts", chosen, text)
    quantize(tiny("llama-tied"), tmp_path / "parts", chosen, text)
    names = lasting_files(tmp_path / "whole")
    assert hashes(tmp_path / "whole", names) == hashes(tmp_path / "parts", names)


def test_skipped_layers_do_not_need_statistics_of_their_own(tiny, text, tmp_path):
    """The first of the layers with one input may be skipped; the others find its moments."""
    chosen = recipe("gptq", 3, 32, calibration=FLOAT, overrides=[{"pattern": "*q_proj", "skip": True}])
    alone = quantize(tiny("llama"), tmp_path / "alone", chosen, text)
    job = prepare(tiny("llama"), chosen, tmp_path / "shared", str(text))
    statistics = shared(job, tmp_path / "s")
    together = run(prepare(tiny("llama"), chosen, tmp_path / "shared", str(text), statistics=statistics))
    assert [layer["sha256"] for layer in together["layers"]] == [layer["sha256"] for layer in alone["layers"]]


def test_what_does_not_fit_is_refused(tiny, text, tmp_path):
    for parts in ({"transforms": ["awq"]}, {"tuning": "rounding"}, {"calibration": {"true_sequential": True}}):
        calibration = FLOAT | parts.get("calibration", {})
        with pytest.raises(InputError, match="sequential"):
            Recipe.from_dict({"solver": {"name": "rtn"}} | parts | {"calibration": calibration})
    job = prepare(tiny("llama"), recipe("gptq", calibration=FLOAT), tmp_path / "o", str(text))
    statistics = shared(job, tmp_path / "s")
    with pytest.raises(InputError, match="sequential false"):
        prepare(tiny("llama"), recipe("gptq"), tmp_path / "o", str(text), statistics=statistics)
    statistics.file(1).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        run(prepare(tiny("llama"), recipe("gptq", calibration=FLOAT), tmp_path / "o", str(text), statistics=statistics))
