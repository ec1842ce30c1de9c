"""Several processes at one model, started by torchrun on the CPU; activations on disk; part of the blocks."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finescale.calibration.spill import Batches, SpilledTensors
from finescale.errors import InputError
from finescale.pipeline.quantize import prepare
from finescale.pipeline.verify import verify
from finescale.ranks import ALONE, Load, Ranks, shares
from finescale.recipe import Recipe
from tests.helpers import (
    assert_same_logits,
    command,
    hashes,
    lasting_files,
    make_model,
    quantize,
    read_json,
    recipe,
    save_model,
)

OPTIONS = ("--recipe", "quantease", "--samples", 6, "--length", 48, "--set", "calibration.batch_size=2", "--set",
           "solver.sweeps=3")  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer):
    """A model whose gate and up projections make several pieces of rows."""
    model = make_model("llama", intermediate_size=600, num_hidden_layers=2)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("wide"))


def start(processes, *arguments):
    words, environment = command(*arguments)
    if processes > 1:
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *words[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_write_the_bytes_of_one(wide, text, tmp_path):
    common = ("--calibration", text, *OPTIONS, "--deterministic")
    settings = ("calibration.samples=6", "calibration.length=48", "calibration.batch_size=2", "solver.sweeps=3")
    quantize(wide, tmp_path / "one", Recipe.load("quantease", settings), text, deterministic=True)
    printed = start(2, "quantize", wide, "--out", tmp_path / "two", *common, "--spill")
    assert printed.count("checkpoint:") == 1 and "2 processes" in printed
    names = lasting_files(tmp_path / "one")
    assert lasting_files(tmp_path / "two") == names
    assert hashes(tmp_path / "one", names) == hashes(tmp_path / "two", names)
    assert not (tmp_path / "two" / ".finescale").exists()
    assert verify(tmp_path / "two", wide).packed_again == 14


@pytest.mark.slow
def test_two_processes_without_the_promise_are_as_good(wide, text, tmp_path):
    common = ("--calibration", text, *OPTIONS)
    start(1, "quantize", wide, "--out", tmp_path / "one", *common)
    start(2, "quantize", wide, "--out", tmp_path / "two", *common, "--set", "solver.outliers=0")
    errors = [
        [layer["relative_error"] for layer in read_json(tmp_path / name / "report.json")["layers"]]
        for name in ("one", "two")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert_same_logits(wide, tmp_path / "two")


LOADS = st.builds(
    lambda rows, piece, once, row: Load(rows, rows if piece is None else piece, once, row),
    st.integers(1, 3000), st.one_of(st.none(), st.sampled_from([1, 64, 512])), st.floats(0, 1e6), st.floats(0.1, 1e3),
)  # fmt: skip


@given(st.lists(LOADS, max_size=9), st.integers(1, 6))
def test_shares_are_even_with_few_cuts(loads, count):
    found = shares(loads, count)
    laden = [0.0] * count
    for load, parts in zip(loads, found, strict=True):
        kept = sorted((part for part in parts if part.stop > part.start), key=lambda part: part.start)
        assert [row for part in kept for row in range(part.start, part.stop)] == list(range(load.rows))
        assert all(part.start % load.piece == 0 for part in kept)
        for process, part in enumerate(parts):
            laden[process] += load.cost(part.stop - part.start)
    assert sum(sum(part.stop > part.start for part in parts) - 1 for parts in found) <= count - 1
    whole = [0.0] * count
    for cost in sorted((load.cost(load.rows) for load in loads), reverse=True):
        whole[whole.index(min(whole))] += cost
    assert max(laden) <= max(whole) * (1 + 1e-9)
    bound = sum(load.cost(load.rows) for load in loads) / count
    bound += 2 * max((load.once + min(load.piece, load.rows) * load.row for load in loads), default=0.0)
    assert max(laden) <= bound * (1 + 1e-9)
    assert count > 1 or found == [[slice(0, load.rows)] for load in loads]


def test_a_narrow_layer_is_cut_and_no_hessian_is_factorized_twice_that_is_large():
    shapes = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
    loads = [Load(rows, 64, 1.0 * columns**3, 30.0 * columns**2) for rows, columns in shapes]
    found = shares(loads, 2)
    cut = [all(part.stop > part.start for part in parts) for parts in found]
    assert sum(cut) == 1 and not cut[3]
    laden = [
        sum(load.cost(parts[process].stop - parts[process].start) for load, parts in zip(loads, found, strict=True))
        for process in (0, 1)
    ]
    assert max(laden) / min(laden) < 1.02


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 7), slice(512, 1300)])
def test_pieces_have_one_size_when_bytes_are_promised(rows):
    assert Ranks(1, 3).pieces(rows) == ([rows] if rows.stop else [])
    pieces = Ranks(1, 3, deterministic=True).pieces(rows)
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(rows.start, rows.stop))
    assert all(piece.stop - piece.start == 512 for piece in pieces[:-1])


def test_one_process_exchanges_with_nobody():
    value = torch.arange(3.0)
    assert ALONE.leads and ALONE.largest(3) == 3 and ALONE.tell({"a": [1]}) == {"a": [1]}
    assert ALONE.sum_(value) is value
    ALONE.add_in_order_(value, torch.ones(3))
    assert value.tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spilled_tensors_are_a_list_on_disk(tmp_path, dtype):
    spilled = SpilledTensors(tmp_path / "a")
    tensors = [torch.randn(2, 3, 4 + n).to(dtype) for n in range(3)]
    for tensor in tensors:
        spilled.append(tensor)
    assert len(spilled) == 3 and torch.equal(spilled[-1], tensors[-1])
    spilled[1] = tensors[0]
    assert all(
        torch.equal(one, other) for one, other in zip(spilled, [tensors[0], tensors[0], tensors[2]], strict=True)
    )
    assert [tensor.shape for tensor in spilled[1:]] == [tensors[0].shape, tensors[2].shape]
    batches = Batches(spilled, [{"n": n} for n in range(3)])
    assert [batch[1]["n"] for batch in batches] == [0, 1, 2] and len(batches) == 3
    assert torch.equal(batches[2][0], tensors[2]) and torch.equal(batches[1:][1][0], tensors[2])
    with pytest.raises(IndexError):
        del spilled[0]
    with pytest.raises(IndexError):
        spilled[3]
    with pytest.raises(IndexError):
        spilled.insert(0, tensors[0])


def test_spilled_activations_change_no_byte(tiny, text, tmp_path):
    chosen = recipe("gptq")
    quantize(tiny("llama"), tmp_path / "memory", chosen, text)
    quantize(tiny("llama"), tmp_path / "disk", chosen, text, spill=True)
    names = lasting_files(tmp_path / "memory")
    assert hashes(tmp_path / "memory", names) == hashes(tmp_path / "disk", names)


def test_only_the_first_blocks(tiny, text, tmp_path):
    model = tiny("llama-tied")
    report = quantize(model, tmp_path / "out", recipe("gptq", blocks=2), text)
    assert {layer["block"] for layer in report["layers"]} == {0, 1}
    assert report["model"]["quantized_share"] == pytest.approx(1, abs=0.02)
    assert verify(tmp_path / "out", model).layers == 14
    assert_same_logits(model, tmp_path / "out")
    whole = quantize(model, tmp_path / "whole", recipe("gptq"), text)
    assert [layer["sha256"] for layer in report["layers"]] == [layer["sha256"] for layer in whole["layers"][:14]]
    with pytest.raises(InputError, match="transforms rewrite all blocks"):
        recipe("gptq", blocks=1, transforms=[{"name": "smoothquant"}])


def test_too_little_text_for_the_processes_is_refused_before_the_work(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr("finescale.pipeline.quantize.join", lambda device, _: (Ranks(0, 9), device))
    with pytest.raises(InputError, match="cannot be shared by 9 processes"):
        prepare(tiny("llama"), recipe("gptq"), tmp_path / "out", str(text))
    assert not (tmp_path / "out").exists()
