"""Opening a checkpoint: everything that may be wrong with files is found before work starts, in one sentence."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from finescale.errors import CheckpointError, FinescaleError, InputError
from finescale.formats.source import INDEX_NAME, check_shard, open_checkpoint
from finescale.pipeline.quantize import resolve_model
from tests.helpers import assert_sentence, read_json, read_tensors


@pytest.fixture
def single(tiny, tmp_path):
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama", style="shards"), tmp_path / "sharded")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def refused(folder, error=CheckpointError, match=None):
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(folder)
    assert_sentence(str(caught.value))
    assert type(caught.value) is error


def test_reads_every_tensor_as_stored(single, sharded):
    for folder in (single, sharded):
        source, expected = open_checkpoint(folder), read_tensors(folder)
        assert set(source) == set(source.keys()) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(source.read(key), tensor)
            assert source.shape(key) == tuple(tensor.shape) and source.dtype(key) == tensor.dtype
        assert source.total_bytes() == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_reading_goes_on_after_close(single):
    source = open_checkpoint(single)
    key = next(iter(source))
    before = source.read(key)
    source.close()
    assert torch.equal(source.read(key), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_dtype_is_that_of_most_values(tiny, dtype):
    assert open_checkpoint(tiny("llama", dtype)).float_dtype() == dtype


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", InputError, "does not exist")
    refused("./no-such-folder", InputError, "does not exist")
    refused(tmp_path, InputError, r"config\.json")
    refused("finescale-tests/no-such-model", InputError, "neither a folder here nor reachable on the hub")


def test_a_hub_name_downloads_the_weights_once(single, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.safetensors",
        "original/consolidated.00.pth", "onnx/model.safetensors", "pytorch_model.bin", "tokenizer.json", "merges.txt",
        "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_custom.py",
    ]  # fmt: skip
    kept = []

    def download(name, **patterns):
        kept.extend(filter_repo_objects(files, **patterns))
        return str(single)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("someone/model").path == single
    left = {
        "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.safetensors", "pytorch_model.bin",
        "modeling_custom.py",
    }  # fmt: skip
    assert set(files) - set(kept) == left


def test_a_file_instead_of_a_folder(single):
    refused(single / "config.json", InputError, "is a file")


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, InputError, "holds no model.safetensors")


def test_pickled_weights_only(single):
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(single, CheckpointError, "pickled")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_shard(single, keep):
    file = single / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    refused(single, CheckpointError, r"model\.safetensors.*truncated")


def test_a_shard_with_bytes_too_many(single):
    with (single / "model.safetensors").open("ab") as stream:
        stream.write(b"\0" * 8)
    refused(single, CheckpointError, "header promises")


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {"data_offsets": []}}', b"[" * 100_000],
    ids=range(6),
)
def test_a_damaged_header(single, header):
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(single, CheckpointError, "damaged header|cannot be opened|header promises")


def test_a_header_that_promises_other_tensors_than_there_are(single):
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}'
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(single).read("a")
    assert_sentence(str(caught.value))


def test_random_damage_never_gives_a_traceback(single):
    """Any byte of the header changed: either it still opens and reads, or one of our errors comes."""
    file = single / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, 8 + length, (60,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        try:
            source = open_checkpoint(single)
            source.float_dtype()
            for key in source:
                source.read(key)
        except FinescaleError as error:
            assert_sentence(str(error))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", 3, None, ["a"]])
def test_an_index_that_points_elsewhere(sharded, name):
    index = read_json(sharded / INDEX_NAME)
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = name
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    refused(sharded, CheckpointError, "points outside its folder|lacks its shard")


def test_a_missing_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sharded, CheckpointError, victim.name)


@pytest.mark.parametrize("value", ["{", '"text"', "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index(sharded, value):
    (sharded / INDEX_NAME).write_text(value)
    refused(sharded)


@pytest.mark.parametrize("value", ["{", "[]", "3", "[" * 100_000], ids=range(4))
def test_a_damaged_config(single, value):
    (single / "config.json").write_text(value)
    refused(single)


def test_an_index_that_promises_a_tensor_its_shard_lacks(sharded):
    index = read_json(sharded / INDEX_NAME)
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.ghost.weight"] = file
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    source = open_checkpoint(sharded)
    for use in (source.read, source.shape, source.dtype):
        with pytest.raises(CheckpointError, match=r"model\.ghost\.weight") as caught:
            use("model.ghost.weight")
        assert_sentence(str(caught.value))


def test_a_type_that_is_not_read(single):
    save_file({"a": torch.zeros(4, dtype=torch.uint16)}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="U16") as caught:
        open_checkpoint(single).float_dtype()
    assert_sentence(str(caught.value))


def test_models_that_cannot_be_quantized(single):
    save_file({"a": torch.zeros(4, dtype=torch.float64)}, single / "model.safetensors")
    with pytest.raises(InputError, match="float64") as caught:
        resolve_model(single)
    assert_sentence(str(caught.value))
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="no floating-point tensors"):
        resolve_model(single)


def test_fingerprint_notices_another_model(single, tiny):
    before = open_checkpoint(single).fingerprint()
    assert open_checkpoint(tiny("llama")).fingerprint() == before
    file = single / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_checkpoint(single).fingerprint() != before


def test_fingerprint_notices_a_tensor_in_the_middle_of_a_large_file(single):
    """A merged adapter changes some attention layers, and neither the embeddings nor the last norm."""
    tensors = {name: torch.zeros(1 << 19) for name in "abcde"}
    save_file(tensors, single / "model.safetensors")
    before = open_checkpoint(single).fingerprint()
    save_file(tensors | {"c": torch.full((1 << 19,), 1e-3)}, single / "model.safetensors")
    after = open_checkpoint(single).fingerprint()
    assert after != before
    save_file(tensors, single / "model.safetensors")
    assert open_checkpoint(single).fingerprint() == before


def test_gguf_files_of_one_name_and_size_are_told_apart(tmp_path, monkeypatch):
    """Two models of one shape, quantized alike: unpacked to one folder, the second would be the first."""
    from finescale.formats import gguf

    monkeypatch.setattr(gguf, "unpack_gguf", lambda file, folder: folder)
    data = bytearray(b"GGUF" + bytes(2_000_000))
    folders = []
    for place in (0, 1_000_000):
        file = tmp_path / str(place) / "model-q4_0.gguf"
        file.parent.mkdir()
        data[place : place + 20_000] = b"x" * 20_000
        file.write_bytes(data)
        folders.append(gguf.local_folder(file))
        assert gguf.local_folder(file) == folders[-1]
    assert folders[0] != folders[1]


def test_check_shard_follows_links(single, tmp_path):
    """The hub's cache holds links to blobs."""
    link = tmp_path / "link.safetensors"
    os.symlink(single / "model.safetensors", link)
    check_shard(link)
