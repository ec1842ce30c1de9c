"""Kernels as text: complete without headers, and compiled without spilling registers."""

import re
import shutil
import subprocess

import pytest

from finescale.kernels import jit
from finescale.kernels.hopper import grouped, quantize
from finescale.kernels.hopper.gemm import Variant, variants
from finescale.kernels.jit import source_text

NVCC = shutil.which("nvcc")


def quantizer(kind, add, dtype, routed=0, gather=0):
    facts = quantize.Facts(
        list(quantize.KINDS)[kind], bool(add), list(quantize.IN_TYPES)[dtype], 4096, 4200 if gather else None, routed
    )
    return source_text("quantize.cu", dict(quantize.settings_of(facts, quantize.block_shape(facts, 4096, 132))), {})


def test_all_are_compiled_and_an_error_of_one_is_told(monkeypatch):
    seen = []

    def compile_source(text, architecture):
        if text == "wrong":
            raise jit.CompileError("refused")
        seen.append((text, architecture))

    monkeypatch.setattr(jit, "compile_source", compile_source)
    jit.compile_all(text for text in "abc")
    assert sorted(seen) == [("a", "sm_90a"), ("b", "sm_90a"), ("c", "sm_90a")]
    with pytest.raises(jit.CompileError, match="refused"):
        jit.compile_all(["a", "wrong"])


def test_the_text_includes_nothing():
    for text in (Variant(8, 3, 1, False, 0).text(), quantizer(1, 1, 0)):
        assert "#include" not in text and "mbarrier.init" in text
    assert "m64n8k32.s32.s8.s8" in Variant(8, 3, 1, False, 0).text()
    assert "m64n256k32.s32.u8.s8" in Variant(256, 2, 1, True, 0).text()


def compiler_report(text, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(text)
    command = [NVCC, "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "k", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_clean(report):
    assert set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}, report
    assert "serialized" not in report, report


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "variant",
    [
        Variant(8, 3, 1, False, 0),
        Variant(128, 2, 1, False, 0),
        Variant(128, 3, 1, True, 0),
        Variant(256, 2, 1, True, 0),
        Variant(256, 2, 1, True, 0, cluster=4),
        Variant(64, 2, 1, False, 0, cluster=2),
        Variant(8, 3, 1, False, 0, experts=8),
        Variant(96, 2, 1, False, 0, experts=128),
    ],
    ids=str,
)
def test_no_spills(variant, tmp_path):
    assert_clean(compiler_report(variant.text(), tmp_path))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("setting", ["GROUPED", "FREE", "RELAXED"])
def test_the_sweep_kernel_has_no_spills(setting, tmp_path):
    settings = dict.fromkeys(("GROUPED", "ZERO", "FREE", "RELAXED", "PARTS"), 0) | {"WARPS": 8, setting: 1}
    report = compiler_report(source_text("sweep.cu", settings | {"PARTS": int(setting == "FREE")}, {}), tmp_path)
    assert_clean(report)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("folded", [False, True])
def test_no_variant_spills(groups, folded, tmp_path):
    chosen = {v for tokens in (8, 16, 32, 64, 128, 256) for v in variants(tokens, groups, folded, 0) if v.split}
    for variant in sorted(chosen, key=str):
        assert_clean(compiler_report(variant.text(), tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("folded", [False, True])
def test_no_variant_of_grouped_products_spills(groups, folded, tmp_path):
    for variant in grouped.variants(5000, groups, folded, 0, 128):
        assert_clean(compiler_report(variant.text(), tmp_path))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "kind, add, dtype, gather, routed",
    [
        (0, 0, 1, 0, 0), (1, 1, 0, 0, 0), (2, 1, 2, 0, 0), (3, 0, 0, 0, 0), (0, 0, 2, 1, 0), (1, 1, 0, 1, 0),
        (0, 0, 0, 0, 1), (3, 0, 0, 0, 2),
    ],
)  # fmt: skip
def test_quantizers_compile(kind, add, dtype, gather, routed, tmp_path):
    assert_clean(compiler_report(quantizer(kind, add, dtype, gather=gather, routed=routed), tmp_path))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "name, settings", [("route.cu", {"WARPS": 32, "WIDE": 1}), ("combine.cu", {"IN": 0, "THREADS": 256})]
)
def test_routing_compiles(name, settings, tmp_path):
    assert_clean(compiler_report(source_text(name, settings, {}), tmp_path))
