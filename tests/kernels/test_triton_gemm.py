"""The Triton kernels against the exact product, bit for bit: on a GPU, or in triton's interpreter on the CPU."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from numpy.lib import NumpyVersion

from finescale.errors import InputError
from finescale.grid import ActivationScheme, quantize_tokens
from finescale.kernels.reference import grouped_int32_product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        """Triton decides when it is imported whether it interprets, hence another process."""
        if NumpyVersion(numpy.__version__) >= "2.4.0":
            pytest.skip("triton 3.6 interprets loops with numpy before 2.4 only")
        root = Path(__file__).parents[2]
        path = os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("tokens", [1, 64, 4096])
    @pytest.mark.parametrize("capability", [80, 90])
    def test_compiles_to_int8_tensor_core_instructions(capability, tokens):
        """Without a GPU: triton brings its own assembler."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from finescale.kernels import triton_gemm

        tile = triton_gemm.choose_tile(tokens, 4096, 32, 108)
        kernel = triton_gemm._product_kernel
        pointers = {"x_TI": "*i8", "x_scale_T": "*fp32", "packed_COH": "*i8", "scale_GO": "*i16", "bias_O": "*fp32"}
        pointers |= {"channel_scale_O": "*fp32", "out": "*i32" if tile.parts > 1 else "*bf16"}
        constants = {
            "half": 64, "two_groups": False, "folded": False, "whole_chunks": True, "raw": tile.parts > 1,
            "has_bias": True, "has_channel": False, "tile_outputs": tile.outputs, "tile_tokens": tile.tokens,
        }  # fmt: skip
        signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | {"factor": "fp32"}
        signature |= dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(ASTSource(kernel, signature, places, {}), target=target, options=options)
        assert re.search(r"mma\S*\.s8\.s8", compiled.asm["ptx"]) and compiled.asm["cubin"]

else:
    from finescale.kernels import triton_gemm
    from finescale.kernels.triton_gemm import Tile

    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
    SMALL = [
        (1, 20, 128, 128, False),
        (3, 70, 200, 64, False),
        (5, 33, 100, 32, True),
        (2, 9, 50, -1, False),
        (17, 16, 300, 256, False),
        (4, 40, 96, 96, False),
        (1, 8, 31, 32, True),
    ]
    LARGE = [
        (1, 4096, 4096, 128, False),
        (16, 1536, 576, 64, True),
        (33, 1536, 576, 32, False),
        (64, 22016, 4096, 128, False),
        (130, 1000, 1000, 32, True),
        (256, 4096, 11008, 128, True),
        (777, 1001, 777, 64, False),
        (1000, 4096, 4096, -1, False),
    ]
    CASES = SMALL if INTERPRETED else SMALL + LARGE
    TILES = [None, Tile(32, 16, 2, 4, 2)]

    def make(tokens, outputs, inputs, group_size, folded, adversarial):
        generator = torch.Generator().manual_seed(0)
        groups = 1 if group_size == -1 else -(-inputs // group_size)
        codes = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
        scale = torch.randint(1, 16 if folded else 400, (outputs, groups), generator=generator, dtype=torch.int32)
        x = torch.randint(-127, 128, (tokens, inputs), generator=generator, dtype=torch.int8)
        if adversarial:  # every bound is reached, in both directions
            codes[: outputs // 2], codes[outputs // 2 :] = -8, 7
            x[: tokens // 2], x[tokens // 2 :] = 127, -127
            scale[:] = 15 if folded else (2**31 - 1) // (127 * 8 * inputs)
        return x.to(DEVICE), codes.to(DEVICE), scale.to(DEVICE)

    @pytest.mark.parametrize("tile", TILES, ids=["chosen", "parts"])
    @pytest.mark.parametrize("adversarial", [False, True], ids=["random", "bounds"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_the_exact_product(case, adversarial, tile):
        tokens, outputs, _, group_size, folded = case
        x, codes, scale = make(*case, adversarial)
        weight = triton_gemm.pack_weight(codes, scale, group_size)
        expected = grouped_int32_product(x, codes, scale, group_size)
        x_scale = torch.rand(tokens, device=DEVICE) + 0.5

        def product(amplifier, bias, own, dtype):
            return triton_gemm.product(x, x_scale, weight, group_size, folded, amplifier, bias, own, dtype, tile)

        assert torch.equal(product(1, None, None, torch.int32), expected)
        bias, own = torch.randn(outputs, device=DEVICE), torch.rand(outputs, device=DEVICE)
        # The interpreter cuts bfloat16 off where GPUs round.
        for dtype in (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32):
            out = product(1024, bias, None, dtype)
            assert torch.equal(out, (expected.float() * (x_scale[:, None] / 1024) + bias).to(dtype))
        assert torch.equal(product(1, None, own, torch.float32), expected.float() * x_scale[:, None] * own)

    @pytest.mark.parametrize("inputs", [5, 2048, 4100])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_quantizer_equals_the_grid(inputs, dtype):
        x = torch.randn(6, inputs, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        x[1], x[2] = 0, x[2] * 1e-5
        codes, scale = triton_gemm.quantize(x)
        expected, expected_scale = quantize_tokens(x, ActivationScheme(8))
        assert torch.equal(codes, expected) and torch.equal(scale, expected_scale[:, 0])
        x[3, 0], x[4, 0] = float("nan"), float("inf")
        _, scale = triton_gemm.quantize(x)
        assert torch.isnan(scale[3]) and torch.isinf(scale[4]) and torch.isfinite(scale[[0, 1, 2, 5]]).all()

    def test_nothing_to_multiply():
        x, codes, scale = make(0, 8, 64, 32, False, False)
        weight = triton_gemm.pack_weight(codes, scale, 32)
        out = triton_gemm.product(x, torch.empty(0), weight, 32, False, 1, None, None, torch.bfloat16)
        assert out.shape == (0, 8) and triton_gemm.quantize(torch.empty(0, 64, device=DEVICE))[0].shape == (0, 64)

    @pytest.mark.parametrize("size", [16, 48, 0, -2])
    def test_groups_without_kernel_are_refused(size):
        with pytest.raises(InputError, match="multiple of 32"):
            triton_gemm.half_chunk(size)

    def test_what_cannot_be_packed_is_refused():
        with pytest.raises(InputError, match="4-bit codes"):
            triton_gemm.pack_weight(torch.full((2, 32), 9, dtype=torch.int8), torch.ones(2, 1, dtype=torch.int32), 32)
        with pytest.raises(InputError, match=r"\[2, 1\]"):
            triton_gemm.pack_weight(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int32), 32)
