import json
import shutil

import pytest
import torch

from finescale.calibration.data import (
    builtin_text,
    calibration_windows,
    encode,
    open_tokenizer,
    read_text,
)
from finescale.errors import CheckpointError, InputError
from tests.helpers import assert_sentence

TOKENS_T = torch.arange(1000)


def test_windows_are_whole_disjoint_and_in_the_order_of_the_text():
    data = calibration_windows(TOKENS_T, samples=12, length=64, seed=0, source="text")
    assert data.tokens_BT.shape == (12, 64)
    starts = data.tokens_BT[:, 0]
    assert torch.equal(data.tokens_BT, starts[:, None] + torch.arange(64))  # whole
    assert bool((starts.diff() >= 64).all())  # disjoint, in order
    assert set(starts.tolist()) <= set(range(0, 1000, 64))


def test_windows_depend_on_the_seed_and_on_nothing_else():
    first, again, other = (calibration_windows(TOKENS_T, 6, 32, seed, "text") for seed in (5, 5, 6))
    assert torch.equal(first.tokens_BT, again.tokens_BT) and first.sha256 == again.sha256
    assert not torch.equal(first.tokens_BT, other.tokens_BT) and first.sha256 != other.sha256


def test_asking_for_all_windows_takes_all():
    data = calibration_windows(TOKENS_T, 15, 64, 3, "text")
    assert torch.equal(data.tokens_BT.flatten(), TOKENS_T[:960])


def test_facts_and_batches():
    data = calibration_windows(TOKENS_T, 7, 16, 3, "text")
    assert data.facts() == {
        "source": "text",
        "sha256": data.sha256,
        "samples": 7,
        "length": 16,
        "tokens": 112,
        "seed": 3,
    }
    batches = data.batches(3)
    assert [batch.shape[0] for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), data.tokens_BT)


def test_too_few_tokens_names_the_number_that_works():
    with pytest.raises(InputError, match="--samples 15") as caught:
        calibration_windows(TOKENS_T, 16, 64, 0, "my.txt")
    assert "my.txt" in str(caught.value) and "1000" in str(caught.value)
    assert_sentence(str(caught.value))
    calibration_windows(TOKENS_T, 15, 64, 0, "my.txt")


def test_less_than_one_window():
    with pytest.raises(InputError, match="fewer than one window") as caught:
        calibration_windows(TOKENS_T[:10], 1, 64, 0, "my.txt")
    assert_sentence(str(caught.value))


def test_builtin_parts_are_disjoint_and_whole():
    from pydoc_data.topics import topics

    calibration, evaluation, everything = (builtin_text(part) for part in ("calibration", "evaluation", "all"))
    assert len(calibration) + len(evaluation) + 2 == len(everything)
    for topic in topics.values():
        assert (topic in calibration) != (topic in evaluation) or calibration.count(topic) + evaluation.count(topic) > 1
    assert read_text("builtin") == everything
    assert read_text("builtin:calibration") == calibration
    # Enough of both for the defaults of the demo on any tokenizer of about 4 characters a token.
    assert len(calibration) > 300_000 and len(evaluation) > 60_000


def test_no_topic_is_in_both_parts():
    from pydoc_data.topics import topics

    evaluation = builtin_text("evaluation")
    shared = [name for name, topic in topics.items() if topic in builtin_text("calibration") and topic in evaluation]
    assert not [name for name in shared if len(topics[name]) > 500]


def test_an_unknown_part_of_the_builtin_text():
    with pytest.raises(InputError, match="builtin:calibration"):
        read_text("builtin:validation")


def test_plain_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("Äpfel\nund Birnen", encoding="utf-8")
    assert read_text(str(file)) == "Äpfel\nund Birnen"


def test_jsonl_joins_the_texts(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["one", "two\nlines", "with a \u2028 separator and a \x85 one"]
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    assert read_text(str(file)) == "\n\n".join(texts)


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', '"text"', "[1]", '{"text": 3}', '{"text": null}'])
def test_jsonl_errors_name_the_line(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match="line 3") as caught:
        read_text(str(file))
    assert_sentence(str(caught.value))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n{"text": "you"}')
    assert read_text(str(tmp_path / "a.txt")) == "hello"
    assert read_text(str(tmp_path / "a.jsonl")) == "hello\n\nyou"


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_torch_has_no_place_for(seed):
    with pytest.raises(InputError, match="--seed"):
        calibration_windows(torch.arange(100), 2, 8, seed, "a.txt")


def test_not_utf8(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        read_text(str(file))
    assert_sentence(str(caught.value))


def test_files_that_are_not_there(tmp_path):
    for name in (tmp_path, tmp_path / "no.txt", tmp_path / "no.jsonl", tmp_path / "no.raw"):
        with pytest.raises(InputError) as caught:
            read_text(str(name))
        assert_sentence(str(caught.value))
        assert str(name) in str(caught.value)


def test_a_hub_data_set_that_cannot_be_had():
    with pytest.raises(InputError, match="finescale-tests/nothing") as caught:
        read_text("finescale-tests/nothing")
    assert_sentence(str(caught.value))


def test_encode_adds_no_special_tokens(tokenizer):
    ids = encode(tokenizer, "def f(x):\n    return x")
    assert ids.dtype == torch.int64 and ids.dim() == 1
    assert not set(ids.tolist()) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert tokenizer.decode(ids) == "def f(x):\n    return x"


def test_a_folder_without_tokenizer(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        open_tokenizer(tmp_path)
    assert_sentence(str(caught.value))


def test_a_damaged_setting_of_a_tokenizer(tiny, tmp_path):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    facts = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(facts | {"model_max_length": "many"}))
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        open_tokenizer(path)
    assert_sentence(str(caught.value))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"version": "1.0", "model": {"type": "Nothing"}}'])
def test_a_damaged_tokenizer(tiny, tmp_path, content):
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        open_tokenizer(tmp_path)
    assert_sentence(str(caught.value))
