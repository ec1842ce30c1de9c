"""Memory is that of one block, whatever the model's size."""

import gc

import pytest
import torch

from finescale.pipeline import walk as pipeline
from finescale.pipeline.quantize import prepare, run
from tests.helpers import StopError, make_model, recipe, save_model, stop_after

BLOCKS = 6


@pytest.fixture(autouse=True)
def only_what_the_test_makes():
    """What other tests left is neither searched nor counted: that takes longer than the tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes():
    """Bytes of all real tensors that anything still refers to, each storage once (no meta, no fake tensors)."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_one_block_at_a_time(tokenizer, text, tmp_path, monkeypatch):
    path = save_model(make_model("llama", num_hidden_layers=BLOCKS), tokenizer, tmp_path / "model")
    job = prepare(path, recipe("gptq", 4, 32), tmp_path / "out", str(text))
    model, blocks = job.skeleton.model, job.skeleton.blocks
    one_block = sum(parameter.numel() for parameter in blocks[0].parameters())
    filled, live = [], []
    propagate = pipeline.propagate

    def watched(block, name, hidden, *rest):
        filled.append([i for i, b in enumerate(blocks) if any(p.device.type != "meta" for p in b.parameters())])
        assert sum(p.numel() for p in model.parameters() if p.device.type != "meta") == one_block
        propagate(block, name, hidden, *rest)

    def progress(label, done, total):
        if "block" in label:
            assert all(parameter.device.type == "meta" for parameter in model.parameters())
            gc.collect()
            live.append(live_bytes())

    monkeypatch.setattr(pipeline, "propagate", watched)
    run(job, on_progress=progress)
    assert filled == [[index] for index in range(BLOCKS - 1)]
    assert len(live) == BLOCKS
    # Nothing piles up from block to block, and the first hidden states are not kept beside the current ones.
    hidden = 6 * 48 * 64 * 4
    assert max(live) - min(live) < hidden / 2


@pytest.mark.parametrize("together", [1, 2])
def test_only_the_blocks_in_work_hold_weights_and_gradients(tokenizer, text, tmp_path, monkeypatch, together):
    path = save_model(make_model("llama", num_hidden_layers=BLOCKS), tokenizer, tmp_path / "model")
    options = {"iterations": 2, "batch_size": 2}
    tuning = [
        {"name": "low_rank", "options": options | {"blocks": together}},
        {"name": "rounding", "options": options},
    ]
    transforms = [{"name": "omniquant", "options": options}]
    chosen = recipe("gptq", 4, 32, activations={"bits": 4}, tuning=tuning, transforms=transforms)
    job = prepare(path, chosen, tmp_path / "out", str(text))
    blocks, filled, live = job.skeleton.blocks, [], []
    propagate = pipeline.propagate

    def watched(*args):
        filled.append([i for i, b in enumerate(blocks) if any(p.device.type != "meta" for p in b.parameters())])
        assert all(parameter.grad is None for block in blocks for parameter in block.parameters())
        propagate(*args)

    def progress(label, done, total):
        if "quantizing" in label and done % together == 0:
            assert all(parameter.device.type == "meta" for parameter in job.skeleton.model.parameters())
            gc.collect()
            live.append(live_bytes())

    monkeypatch.setattr(pipeline, "propagate", watched)
    run(job, on_progress=progress)
    assert max(map(len, filled)) == together and len(live) == BLOCKS // together
    hidden = 6 * 48 * 64 * 4  # the float model's inputs and outputs and the quantized one's: no more with each block
    assert max(live[1:]) - min(live[1:]) < hidden / 2


def test_replayed_blocks_are_released_too(tokenizer, text, tmp_path):
    path = save_model(make_model("llama", num_hidden_layers=4), tokenizer, tmp_path / "model")

    with pytest.raises(StopError):
        run(prepare(path, recipe("rtn"), tmp_path / "out", str(text)), on_progress=stop_after(3))
    job = prepare(path, recipe("rtn"), tmp_path / "out", str(text))
    labels = []

    def progress(label, done, total):
        labels.append(label)
        assert "block" not in label or all(p.device.type == "meta" for p in job.skeleton.model.parameters())

    run(job, on_progress=progress)
    assert sum("replaying" in label for label in labels) == 3


def test_the_estimate_counts_one_block_and_grows_with_the_text(tiny, text, tmp_path):
    few, many = (
        prepare(tiny("llama"), recipe(calibration={"samples": samples}), tmp_path / "out", str(text)).memory_bytes
        for samples in (2, 40)
    )
    hidden = 38 * 48 * 64 * 4
    assert hidden <= many - few <= 2 * hidden
