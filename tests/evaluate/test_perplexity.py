"""Perplexity, KL and agreement against the plainest possible computation."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import finescale
from finescale.calibration.data import encode, open_tokenizer, read_text
from finescale.errors import CheckpointError, InputError, NumericsError
from finescale.evaluate import cut_windows, evaluate_windows
from finescale.runtime.load import load
from tests.helpers import assert_sentence, change_tensor, make_model, quantize, recipe

TOKENS_T = torch.arange(2, 202)


def naive(model, windows_WT):
    """Loss and log-probabilities as transformers itself computes them, in float64."""
    losses, logs = [], []
    for tokens_T in windows_WT:
        with torch.no_grad():
            output = model(input_ids=tokens_T[None], labels=tokens_T[None])
        losses.append(float(output.loss))
        logs.append(output.logits[0, :-1].double().log_softmax(-1))
    return math.exp(sum(losses) / len(losses)), torch.cat(logs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_perplexity_equals_transformers_own_loss(tiny, text, kind):
    path = tiny(kind)
    windows_WT = cut_windows(encode(open_tokenizer(path), read_text(str(text))), 5, 60, None)
    expected, _ = naive(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), windows_WT)
    result = evaluate_windows(load(path), windows_WT)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 5 * 59 and (result.windows, result.length) == (5, 60)
    third = evaluate_windows(load(path), windows_WT[2:3])
    assert len(result.window_losses) == 5 and result.window_losses[2] == pytest.approx(math.log(third.perplexity))
    assert result.dtype == "float32" and result.kl is None and result.top1 is None


def test_windows_longer_than_a_chunk_of_logits(tiny, text):
    """The loss is summed in pieces: their seams must not lose or repeat a token."""
    import finescale.evaluate.perplexity as module

    windows_WT = cut_windows(encode(open_tokenizer(tiny("llama")), read_text(str(text))), 2, 150, None)
    whole = evaluate_windows(load(tiny("llama")), windows_WT)
    old = module._CHUNK
    try:
        module._CHUNK = 37
        pieces = evaluate_windows(load(tiny("llama")), windows_WT, load(tiny("llama")))
    finally:
        module._CHUNK = old
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6) and pieces.tokens == whole.tokens == 298


def test_a_model_against_itself(tiny, text):
    model = load(tiny("llama"))
    windows_WT = cut_windows(encode(open_tokenizer(tiny("llama")), read_text(str(text))), 3, 60, None)
    result = evaluate_windows(model, windows_WT, model)
    assert result.kl == 0.0 and result.top1 == 1.0 and result.reference_perplexity == result.perplexity


def test_kl_and_agreement_equal_the_naive_computation(tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "out", recipe("rtn", 3, 32), text)
    windows_WT = cut_windows(encode(open_tokenizer(tiny("llama")), read_text(str(text))), 3, 60, None)
    original, quantized = load(tiny("llama")), load(tmp_path / "out")
    result = evaluate_windows(quantized, windows_WT, original)
    _, log_p = naive(original, windows_WT)
    _, log_q = naive(quantized, windows_WT)
    assert result.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert result.top1 == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    assert result.reference_perplexity == pytest.approx(naive(original, windows_WT)[0], rel=1e-5)
    # KL(original || model) is not symmetric: the direction matters.
    assert result.kl != pytest.approx(evaluate_windows(original, windows_WT, quantized).kl, rel=1e-3)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tiny):
    model = make_model("llama")
    model.lm_head.weight.data.zero_()
    result = evaluate_windows(model, TOKENS_T.view(4, 50))
    assert result.perplexity == pytest.approx(300, rel=1e-5)


def test_windows_are_consecutive_and_the_rest_is_dropped():
    windows_WT = cut_windows(TOKENS_T, None, 64, None)
    assert windows_WT.shape == (3, 64) and torch.equal(windows_WT.flatten(), TOKENS_T[:192])
    assert torch.equal(cut_windows(TOKENS_T, 2, 64, None).flatten(), TOKENS_T[:128])


def test_bos_stands_before_every_window():
    windows_WT = cut_windows(TOKENS_T, None, 64, 0)
    assert windows_WT.shape == (3, 64) and bool((windows_WT[:, 0] == 0).all())
    assert torch.equal(windows_WT[:, 1:].flatten(), TOKENS_T[:189])  # no token of the text is lost between windows


@pytest.mark.parametrize(
    ("windows", "length", "bos", "message"),
    [
        (4, 64, None, "--windows 3"),
        (None, 201, None, "fewer than one window"),
        (5, 201, None, "fewer than one window"),
        (0, 64, None, "at least 1"),
        (-3, 64, None, "at least 1"),
        (1, 1, None, "at least 2"),
        (1, 0, None, "at least 2"),
        (1, 2, 0, "at least 3"),
    ],
)
def test_windows_that_cannot_be_cut(windows, length, bos, message):
    with pytest.raises(InputError, match=message) as caught:
        cut_windows(TOKENS_T, windows, length, bos)
    assert_sentence(str(caught.value))


def test_nan_names_the_window(tiny):
    model = make_model("llama")
    model.model.embed_tokens.weight.data[60] = float("nan")
    with pytest.raises(NumericsError, match="window 2") as caught:
        evaluate_windows(model, TOKENS_T[:200].view(4, 50))
    assert_sentence(str(caught.value))


def test_progress_counts_windows(tiny):
    seen = []
    evaluate_windows(make_model("llama"), TOKENS_T.view(4, 50), on_progress=lambda *args: seen.append(args))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_evaluate_from_python(tiny, text):
    path = tiny("llama")
    result = finescale.evaluate(path, str(text), windows=3, length=60, against=path)
    assert result.kl == 0.0 and result.windows == 3 and not result.bos
    with_bos = finescale.evaluate(path, str(text), windows=3, length=60, bos=True)
    assert with_bos.bos and with_bos.perplexity != result.perplexity and with_bos.tokens == result.tokens
    assert with_bos.text_sha256 != result.text_sha256
    loaded = finescale.evaluate(load(path), str(text), windows=3, length=60, tokenizer_from=path)
    assert loaded.perplexity == result.perplexity
    assert set(result.to_dict()) >= {"perplexity", "tokens", "windows", "length", "kl", "top1"}


def test_evaluate_refuses(tiny, text, tmp_path):
    path = tiny("llama")
    with pytest.raises(InputError, match="256 positions"):
        finescale.evaluate(path, str(text), length=512)
    with pytest.raises(InputError, match="tokenizer_from"):
        finescale.evaluate(load(path), str(text), length=60)
    bare = shutil.copytree(path, tmp_path / "model")
    config = (bare / "tokenizer_config.json").read_text().replace('"bos_token": "<s>",', "")
    (bare / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match="--bos") as caught:
        finescale.evaluate(bare, str(text), length=60, bos=True)
    assert_sentence(str(caught.value))


def test_a_damaged_model_has_a_huge_perplexity_not_an_exception(tiny, text, tmp_path):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    change_tensor(path, "lm_head.weight", lambda tensor: tensor * 1e4)
    result = finescale.evaluate(path, str(text), windows=1, length=60, against=tiny("llama"))
    assert 1e300 < result.perplexity < math.inf
    json.dumps(result.to_dict(), allow_nan=False)


def test_another_vocabulary_is_refused():
    model, other = make_model("llama"), make_model("llama", vocab_size=310)
    with pytest.raises(InputError, match="310 tokens") as caught:
        evaluate_windows(model, TOKENS_T[None, :20], other)
    assert_sentence(str(caught.value))
    with pytest.raises(CheckpointError, match="300 embeddings") as caught:
        evaluate_windows(model, torch.tensor([[5, 299, 300]]))
    assert_sentence(str(caught.value))


@pytest.mark.parametrize(("spoiled", "words"), [("model", "the model puts out"), ("original", "the original puts out")])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_numbers_that_are_none_are_not_averaged(tiny, value, spoiled, words):
    """An original that excludes a token makes the divergence infinite, or NaN where both do."""
    models = {name: make_model("llama") for name in ("model", "original")}
    models[spoiled].lm_head.bias = torch.nn.Parameter(torch.zeros(300))
    models[spoiled].lm_head.bias.data[int(TOKENS_T[5])] = value
    with pytest.raises(NumericsError, match=words) as caught:
        evaluate_windows(models["model"], TOKENS_T[None, :20], models["original"])
    assert_sentence(str(caught.value))
