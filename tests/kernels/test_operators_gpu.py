"""A whole layer as torch operators, in every surrounding that torch offers: run on a GPU with `pytest -m gpu`."""

from importlib.util import find_spec

import pytest
import torch

from finescale.errors import InputError
from finescale.grid import ActivationScheme, quantize_tokens
from finescale.kernels import integer_scale_linear
from finescale.kernels.dispatch import has_hopper_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
INPUTS, OUTPUTS, GROUP = 576, 200, 64


def weight(device):
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-8, 8, (OUTPUTS, INPUTS), generator=generator, dtype=torch.int8)
    scale_OG = torch.randint(1, 400, (OUTPUTS, INPUTS // GROUP), generator=generator, dtype=torch.int32)
    return codes_OI.to(device), scale_OG.to(device), torch.linspace(-1, 1, OUTPUTS, device=device)


def hopper(device):
    from finescale.kernels.layout import pack_weight
    from finescale.kernels.linear import w4a8_linear

    if not has_hopper_kernels(torch.device(device)):
        pytest.skip("needs a Hopper GPU")
    codes_OI, scale_OG, bias_O = weight(device)
    packed = pack_weight(codes_OI, scale_OG, GROUP)
    return lambda x: w4a8_linear(x, packed, bias_O, None, OUTPUTS, 1024, False)


def triton(device):
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    from finescale.kernels.triton_gemm import pack_weight, triton_linear

    codes_OI, scale_OG, bias_O = weight(device)
    packed = pack_weight(codes_OI, scale_OG, GROUP)
    return lambda x: triton_linear(x, packed, GROUP, False, bias_O, None, 1024)


def expected(x_TI):
    codes_OI, scale_OG, bias_O = weight(x_TI.device)
    codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    return (integer_scale_linear(codes_TI, scale_T1, codes_OI, scale_OG, GROUP, 1024) + bias_O).to(x_TI.dtype)


def inputs(tokens, dtype=torch.bfloat16, device="cuda:0", seed=0):
    return torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture(params=[hopper, triton], ids=["hopper", "triton"])
def make(request):
    return request.param


@pytest.fixture
def layer(make):
    return make("cuda:0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_eager(layer, tokens, dtype):
    x_TI = inputs(tokens, dtype)
    assert torch.equal(layer(x_TI), expected(x_TI))
    wide = torch.cat([x_TI, x_TI], 1)[:, :INPUTS]  # rows that are not neighbours
    assert torch.equal(layer(wide), expected(x_TI))


def test_compiled(layer):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, dynamic=True)
    for tokens in (3, 40):
        x_TI = inputs(tokens)
        assert torch.equal(compiled(x_TI), layer(x_TI) * 2)


def test_cuda_graph(layer):
    still_TI = inputs(16)
    layer(still_TI)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_TO = layer(still_TI)
    for seed in range(3):
        still_TI.copy_(inputs(16, seed=seed))
        graph.replay()
        assert torch.equal(captured_TO, expected(still_TI))


def test_autocast(layer):
    x_TI = inputs(5, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(layer(x_TI), expected(x_TI)) and layer(x_TI.bfloat16()).dtype == torch.bfloat16


def test_two_streams_at_once(layer):
    streams = [torch.cuda.Stream() for _ in range(2)]
    xs = [inputs(40, seed=seed) for seed in range(2)]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for stream, x_TI, out in zip(streams, xs, found, strict=True):
            with torch.cuda.stream(stream):
                out.append(layer(x_TI))
    torch.cuda.synchronize()
    for x_TI, outs in zip(xs, found, strict=True):
        assert all(torch.equal(out, expected(x_TI)) for out in outs)


def test_a_device_that_is_not_the_current_one(make):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x_TI = inputs(9, device="cuda:1")
    assert torch.cuda.current_device() == 0
    out_TO = make("cuda:1")(x_TI)
    assert out_TO.device == x_TI.device and torch.equal(out_TO, expected(x_TI))


@pytest.mark.parametrize(
    "x_TI", [torch.zeros(2, 700), torch.zeros(2, INPUTS, dtype=torch.int8), torch.zeros(2, INPUTS, dtype=torch.float64)]
)
def test_what_does_not_fit_is_refused(layer, x_TI):
    with pytest.raises(InputError):
        layer(x_TI.cuda())


def test_weights_of_another_device_are_refused(layer):
    with pytest.raises((InputError, NotImplementedError)):
        layer(inputs(2, device="cpu"))
