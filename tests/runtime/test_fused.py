"""A fused decoder computes what the model did before: on a CPU exactly, on a GPU by the kernels, however it runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from finescale.bench.random_model import weight_bytes
from finescale.errors import InputError
from finescale.grid import (
    ActivationScheme,
    Gather,
    InputRule,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    quantize_tokens,
    with_integer_scales,
)
from finescale.kernels import plain
from finescale.kernels.attention import reserve_workspaces
from finescale.kernels.hopper import gemm
from finescale.kernels.layout import pack_weight
from finescale.kernels.reference import integer_scale_linear
from finescale.runtime.fused import FusedDecoder, fuse
from finescale.runtime.load import load, quantized_layers
from finescale.runtime.modules import QuantizedLinear
from finescale.runtime.products import PackedProduct, check_fusable, fused
from tests.helpers import make_model, quantize, recipe, save_model, some_tokens

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
KINDS = ("llama", "llama-tied", "qwen2", "qwen3", "mixtral", "qwen3_moe", "mistral-whole")
PLAIN = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def checkpoint(tiny, text, tokenizer, tmp_path_factory):
    made = {}

    def folder(kind, **scales):
        key = (kind, *scales.items())
        if key not in made:
            out = tmp_path_factory.mktemp(kind) / "out"
            original = tiny(kind) if kind != "mistral-whole" else tmp_path_factory.mktemp(kind)
            if kind == "mistral-whole":
                save_model(make_model("mistral", sliding_window=None), tokenizer, original)
            scale = {"mode": "before", "amplifier": "auto"} | scales
            chosen = recipe(
                "rtn", 4, 32, weights={"symmetric": True}, activations={"bits": 8}, integer_scale=scale,
            )  # fmt: skip
            quantize(original, out, chosen, text)
            made[key] = out
        return made[key]

    return folder


def load_exact(path, dtype=torch.float32):
    """The model with every layer as the exact int32 product in parts, whatever else this machine could do."""
    model = load(path, dtype=dtype, cache=False)
    for name, layer in quantized_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        exact = QuantizedLinear(layer.quantized_weight(), layer.bias, layer.inputs, "integer")
        setattr(model.get_submodule(parent), leaf, exact)
    return model


def ways(prompt_BT):
    """Ways to generate: caches that grow and that do not, sequences with and without padding at the left."""
    whole, padded = torch.ones_like(prompt_BT), torch.ones_like(prompt_BT)
    padded[0, :4] = 0
    yield {"attention_mask": padded, **PLAIN}
    yield {"attention_mask": padded, "cache_implementation": "static", **PLAIN}
    yield {"attention_mask": whole, "cache_implementation": "static", **PLAIN}
    yield {"attention_mask": whole, "use_cache": False, **PLAIN}


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_before(checkpoint, kind):
    plain_model, fused_model = (load_exact(checkpoint(kind)) for _ in range(2))
    assert fuse(fused_model) is None
    assert isinstance(fused_model.model.layers[0], FusedDecoder)
    tokens_BT = some_tokens(2, 9)
    assert torch.equal(fused_model(tokens_BT).logits, plain_model(tokens_BT).logits)
    for way in ways(tokens_BT):
        assert torch.equal(fused_model.generate(tokens_BT, **way), plain_model.generate(tokens_BT, **way))


@pytest.mark.parametrize("mode", ["after", "folded"])
def test_layers_of_different_scales_become_one(checkpoint, mode):
    path = checkpoint("qwen2", **({"mode": "folded"} if mode == "folded" else {"mode": "after", "amplifier": "auto"}))
    plain_model, fused_model = (load_exact(path) for _ in range(2))
    assert fuse(fused_model) is None
    qkv = fused_model.model.layers[0].blocks[0].qkv
    assert qkv.outputs == 128 and qkv.bias_O is not None
    assert mode != "folded" or (qkv.folded and qkv.channel_scale_O is not None)
    tokens_BT = some_tokens(2, 9)
    torch.testing.assert_close(fused_model(tokens_BT).logits, plain_model(tokens_BT).logits, rtol=1e-5, atol=1e-5)


def test_float_layers_are_fused_too(tiny):
    plain_model, fused_model = (load(tiny("qwen3")) for _ in range(2))
    assert fuse(fused_model) is None
    tokens_BT = some_tokens(2, 9)
    torch.testing.assert_close(fused_model(tokens_BT).logits, plain_model(tokens_BT).logits, rtol=1e-5, atol=1e-5)


def test_tokens_after_others_in_one_pass(checkpoint):
    """A second prompt after the first, in a cache that holds it."""
    plain_model, fused_model = (load_exact(checkpoint("llama")) for _ in range(2))
    fuse(fused_model)
    tokens_BT = some_tokens(2, 12)
    logits = []
    for model in (plain_model, fused_model):
        cache = StaticCache(config=model.config, max_cache_len=20)
        model(tokens_BT[:, :5], past_key_values=cache)
        logits.append(model(tokens_BT[:, 5:], past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_embeddings_of_the_caller_stay_as_they_were(checkpoint):
    model = load_exact(checkpoint("llama"))
    fuse(model)
    embedded = model.get_input_embeddings()(some_tokens(1, 6))
    before = embedded.clone()
    model(inputs_embeds=embedded)
    assert torch.equal(embedded, before)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_step_is_one_graph(checkpoint, backend):
    """torch.compile traces the step without a break, and gives the same."""
    model = load_exact(checkpoint("llama"))
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    tokens_BT = some_tokens(2, 6)
    logits = []
    for step in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=10)
        model(tokens_BT, past_key_values=cache)
        logits.append(torch.cat([step(tokens_BT[:, i : i + 1], past_key_values=cache).logits for i in range(3)]))
    assert torch.equal(*logits)


def test_what_is_left_as_it_was(tiny, checkpoint):
    for kind, reason in (("mistral", "sliding window"), ("opt", "OPTDecoderLayer"), ("gpt2", "GPT2Block")):
        model = load(tiny(kind))
        assert reason in fuse(model)
        assert not any(isinstance(module, FusedDecoder) for module in model.modules())
    model = load(checkpoint("llama"))  # computes in floating point
    assert "integer scales" in fuse(model)
    model = load_exact(checkpoint("llama"))
    assert fuse(model) is None and "already" in fuse(model)
    with pytest.raises(InputError, match="no inner outputs"):
        model(some_tokens(1, 4), output_hidden_states=True)
    with pytest.raises(InputError, match="ReLU"):
        check_fusable([torch.nn.ReLU()])


@pytest.mark.parametrize("group_size, inputs, outputs", [(32, 96, 40), (64, 200, 64), (128, 300, 130), (-1, 128, 7)])
def test_plain_kernels_on_packed_tensors(group_size, inputs, outputs):
    generator = torch.Generator().manual_seed(inputs)
    codes_OI = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    scale_OG = torch.randint(-400, 400, (outputs, groups), dtype=torch.int32, generator=generator)
    x_TI = torch.randn(9, inputs, generator=generator)
    bias_O, own_O = torch.randn(outputs, generator=generator), torch.rand(outputs, generator=generator)
    packed = pack_weight(codes_OI, scale_OG, group_size)
    product = PackedProduct(packed, bias_O, own_O, outputs, 64, False)
    x_codes_TI, x_scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    want = integer_scale_linear(x_codes_TI, x_scale_T1, codes_OI, scale_OG, group_size, 64, own_O) + bias_O
    assert torch.equal(product(x_TI), want)
    gate_up = torch.randn(9, 2 * inputs, generator=generator)
    silu = torch.nn.functional.silu(gate_up[:, :inputs]) * gate_up[:, inputs:]
    assert torch.equal(product(gate_up, "silu"), product(silu))
    gain, residual = torch.randn(inputs, generator=generator), torch.randn(9, inputs, generator=generator)
    added = residual + x_TI
    want = product(plain.rms_norm(added, gain, 1e-5))
    assert torch.equal(product(x_TI, "rms", residual, gain, 1e-5), want) and torch.equal(residual, added)


def test_layers_that_gather_their_input_alike():
    generator = torch.Generator().manual_seed(5)
    index_KJ = torch.randint(0, 64, (2, 96), generator=generator)
    gain_KJ = torch.stack([torch.ones(96), (torch.rand(96, generator=generator) < 0.2).float()])
    gather = Gather(index_KJ, gain_KJ)

    def layer(outputs, own_gather):
        weight_OI = torch.randn(outputs, 96, generator=generator)
        grid = with_integer_scales(fit_grid(weight_OI, WeightScheme(4, 32, True), torch.float16), weight_OI, "auto")
        weight = QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)
        return QuantizedLinear(weight, None, InputRule(ActivationScheme(8), gather=own_gather), "integer")

    layers, x_TI = [layer(40, gather), layer(72, gather)], torch.randn(5, 64, generator=generator)
    want = torch.cat([each(x_TI) for each in layers], -1)
    assert torch.equal(fused(layers)(x_TI), want)
    gain, residual = torch.randn(64, generator=generator), torch.randn(5, 64, generator=generator)
    normed = plain.rms_norm(residual + x_TI, gain, 1e-5)
    want = torch.cat([each(normed) for each in layers], -1)
    assert torch.equal(fused(layers)(x_TI, "rms", residual, gain, 1e-5), want)
    for other in (None, Gather(index_KJ.flip(1), gain_KJ)):
        with pytest.raises(InputError, match="gather it differently"):
            fused([layers[0], layer(40, other)])


def graph_tokens(model, tokens_BT, count):
    """Greedy tokens of steps replayed from one CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=tokens_BT.shape[1] + count + 4)
    input_B1 = model(tokens_BT, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    found, lengths = [input_B1.clone()], [layer.cumulative_length.clone() for layer in cache.layers]

    def step():
        input_B1.copy_(model(input_B1, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(), step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    input_B1.copy_(found[0])
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length.copy_(length)
    for _ in range(count - 1):
        graph.replay()
        found.append(input_B1.clone())
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=GPU) for kind in ("llama", "qwen2", "qwen3")])
@torch.no_grad()
def test_eager_compiled_and_graph_give_the_same_tokens(checkpoint, kind):
    path = checkpoint(kind)
    model = load(path, path="kernel", device="cuda", dtype=torch.bfloat16)
    assert isinstance(model.model.layers[0], FusedDecoder)
    tokens_BT = some_tokens(2, 9).cuda()
    options = PLAIN | {"max_new_tokens": 24, "attention_mask": torch.ones_like(tokens_BT)}
    model.generation_config.disable_compile = True
    eager = model.generate(tokens_BT, cache_implementation="static", **options)
    assert torch.equal(graph_tokens(model, tokens_BT, 24), eager[:, 9:])
    model.generation_config.disable_compile = False
    compiled = model.generate(tokens_BT, cache_implementation="static", **options)  # mode reduce-overhead: graphs
    assert torch.equal(compiled, eager)
    again = AutoModelForCausalLM.from_pretrained(path, device_map="cuda", dtype=torch.bfloat16)
    assert isinstance(again.model.layers[0], FusedDecoder)
    again.generation_config.disable_compile = True
    assert torch.equal(again.generate(tokens_BT, cache_implementation="static", **options), eager)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=GPU) for kind in KINDS if "moe" not in kind])
@torch.no_grad()
def test_the_kernels_compute_what_the_layers_did(checkpoint, kind):
    plain_model, fused_model = (
        load(checkpoint(kind), path="kernel", device="cuda", dtype=torch.float32, fuse=fuse) for fuse in (False, True)
    )
    assert isinstance(fused_model.model.layers[0], FusedDecoder)
    tokens_BT = some_tokens(2, 9).cuda()
    want = plain_model(tokens_BT).logits
    error = (fused_model(tokens_BT).logits - want).abs().mean() / want.abs().mean()
    assert error < 0.01, error  # a code now and then rounds to its neighbour
    plain_model.generation_config.disable_compile = fused_model.generation_config.disable_compile = True
    for way in ways(tokens_BT):
        same = fused_model.generate(tokens_BT, **way) == plain_model.generate(tokens_BT, **way)
        assert same.float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loading_needs_little_more_memory_than_the_model(text, tokenizer, tmp_path):
    changes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "head_dim": 64,
               "num_attention_heads": 16, "num_key_value_heads": 16}  # fmt: skip
    save_model(make_model("llama", torch.bfloat16, **changes), tokenizer, tmp_path / "model")
    chosen = recipe(
        "rtn", 4, 128, weights={"symmetric": True}, activations={"bits": 8}, integer_scale={"mode": "before"}
    )
    quantize(tmp_path / "model", tmp_path / "out", chosen, text, device="cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    gemm.WORKSPACES.reserve(device)  # once for all models of a process
    reserve_workspaces(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(tmp_path / "out", path="kernel", device="cuda", dtype=torch.bfloat16)
    weights = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before < 1.2 * weights
    # Four bits a weight, two bytes a scale of 128, embeddings and head in 16 bits.
    elements = sum(
        m.packed.shape[0] * 64 * m.packed.shape[1] * 128 for m in model.modules() if isinstance(m, PackedProduct)
    )
    # Of the tensors: torch hands out blocks that were free, up to a megabyte larger than a tensor.
    assert weight_bytes(model) < 1.05 * (elements * (0.5 + 2 / 128) + 2 * 2 * 300 * 1024)
