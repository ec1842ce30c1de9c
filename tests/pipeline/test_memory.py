"""Memory is that of one block, whatever the model's size."""

import gc

import pytest
import torch

from finescale.pipeline import walk as pipeline
from finescale.pipeline.quantize import prepare, run
from tests.helpers import make_model, recipe, save_model

BLOCKS = 6


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


def test_replayed_blocks_are_released_too(tokenizer, text, tmp_path):
    path = save_model(make_model("llama", num_hidden_layers=4), tokenizer, tmp_path / "model")

    class StopError(Exception):
        pass

    def stop(label, done, total):
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        run(prepare(path, recipe("rtn"), tmp_path / "out", str(text)), on_progress=stop)
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
