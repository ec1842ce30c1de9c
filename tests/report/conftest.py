"""A realistic synthetic report: LLaMA-like scales and errors, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

HIDDEN, MLP, KV = 576, 1536, 192
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
BASE_ERROR = dict(zip(SHAPES, (0.004, 0.003, 0.009, 0.012, 0.007, 0.010, 0.014), strict=True))


def build_layer(
    random: np.random.Generator, block: int, kind: str, blocks: int, amplifier: int | None
) -> dict[str, Any]:
    outputs, inputs = SHAPES[kind]
    groups = -(-inputs // 128)
    std = (
        0.02 * (1 + 0.6 * block / blocks) * float(random.lognormal(0, 0.12)) * (0.7 if kind.endswith("v_proj") else 1.0)
    )
    scales = std * random.gamma(14, 0.16 / 14 * 3.2, size=(outputs, groups))
    curve = None
    low = 31 * 127 * 128 * 8 * groups / 2.0**31  # 127 * S * sum |Q|, roughly
    if amplifier is not None:
        curve = [
            {
                "amplifier": 2**power,
                "weight_mse": float(std**2 * 0.009 + 10 / 12 / 4.0**power * random.lognormal(0, 0.2)),
                "overflow_use": float(low * std / 0.02 * 2.0**power / 1024),
            }
            for power in range(6, 17)
        ]
        integers = np.maximum(1, np.round(scales * amplifier))
        edges = np.arange(integers.min(), integers.max() + 2) - 0.5
        if edges.size > 65:
            edges = np.linspace(edges[0], edges[-1], 65)
        values = integers
    else:
        values, edges = scales, np.linspace(scales.min(), scales.max(), 65)
    counts, edges = np.histogram(values, bins=edges)
    spike = 5.0 if (block, kind) in {(1, "mlp.down_proj"), (blocks - 2, "mlp.down_proj")} else 1.0
    error = BASE_ERROR[kind] * spike * (0.5 + 1.1 * (block + 2) / blocks) * float(random.lognormal(0, 0.14))
    return {
        "name": f"model.layers.{block}.{kind}",
        "block": block,
        "shape": [outputs, inputs],
        "bits": 4,
        "group_size": 64 if kind == "mlp.down_proj" and block == 1 else 128,
        "symmetric": True,
        "solver": "quantease",
        "relative_error": error,
        "weight_mse": float(std**2 * 0.009),
        "amplifier": amplifier,
        "overflow_use": None if amplifier is None else float(low * std / 0.02 * amplifier / 1024),
        "scale_min": float(values.min()),
        "scale_max": float(values.max()),
        "scale_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "amplifier_curve": curve,
        "tokens": 262144,
        "damping": 0.01 if (block, kind) != (3, "self_attn.k_proj") else 0.1,
        "notes": []
        if (block, kind) != (3, "self_attn.k_proj")
        else ["damping raised from 0.01 to 0.1: the Hessian was not positive definite"],
    }


def build(blocks: int = 30, seed: int = 7, amplifier: int | None = 1024, name: str = "SmolLM2-135M") -> dict[str, Any]:
    random = np.random.default_rng(seed)
    layers = [build_layer(random, b, kind, blocks, amplifier) for b in range(blocks) for kind in SHAPES]
    return {
        "finescale": "0.1.0",
        "model": {
            "name": name,
            "family": "llama",
            "parameters": 134_515_008,
            "block_parameters": 106_203_456,
            "quantized_parameters": 106_168_320,
            "quantized_share": 0.7892674310,
        },
        "recipe": {
            "weights": {"bits": 4, "group_size": 128, "symmetric": True, "clip": "minmax"},
            "activations": {"bits": 8, "granularity": "token", "dynamic": True},
            "integer_scale": {"mode": "before" if amplifier else "off", "amplifier": amplifier},
            "solver": {"name": "quantease", "iterations": 25},
            "transforms": [],
        },
        "recipe_name": "w4a8-integer-scale" if amplifier else "quantease",
        "calibration": {
            "source": "wikitext-2-raw-v1",
            "sha256": "5e8d2f2f3b9a4d0c9f7c1b6a5e4d3c2b1a09f8e7d6c5b4a392817060504030201",
            "samples": 128,
            "length": 2048,
            "tokens": 262144,
            "seed": 0,
        },
        "size": {"before_bytes": 269_060_552, "after_bytes": 112_436_224, "bits_per_weight": 4.1411},
        "layers": layers,
        "fallbacks": [
            "model.layers.3.self_attn.k_proj: damping raised from 0.01 to 0.1, the Hessian was not positive definite"
        ],
        "engines": [
            {
                "engine": "finescale",
                "loads": True,
                "runs_as": "int8 x int4, integer scales, int32 sums",
                "remark": "fastest on its own kernels",
            },
            {
                "engine": "transformers",
                "loads": True,
                "runs_as": "bfloat16 after decompression",
                "remark": "activations stay in bfloat16",
            },
            {
                "engine": "vLLM",
                "loads": True,
                "runs_as": "Marlin, 4-bit weights, 8-bit activations",
                "remark": "float scales S/1024",
            },
            {"engine": "llama.cpp", "loads": False, "runs_as": "–", "remark": "needs a GGUF file"},
        ],
    }


def build_run(blocks: int = 30, seed: int = 7) -> dict[str, Any]:
    random = np.random.default_rng(seed + 1)
    rows = []
    for block in range(blocks):
        load, forward, solve, write = (
            float(v * random.lognormal(0, 0.1)) for v in (0.4 if block else 1.6, 5.2, 9.1, 0.7)
        )
        rows.append(
            {
                "block": block,
                "seconds": load + forward + solve + write + 0.2,
                "load": load,
                "forward": forward,
                "solve": solve,
                "write": write,
            }
        )
    return {
        "started": "2026-01-02T03:04:05Z",
        "seconds": sum(row["seconds"] for row in rows) + 11.5,
        "peak_rss_bytes": 1_273_991_168,
        "machine": {"cpu": "Example CPU", "cores": 2, "memory_bytes": 16_777_216_000, "gpu": None},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "resumed_from_block": None,
        "blocks": rows,
    }


def build_comparisons() -> list[dict[str, Any]]:
    rows = (
        ("original (bfloat16)", 17.2391, 269_060_552, 0.0, 1.0),
        ("rtn", 24.9127, 111_804_416, 0.3127, 0.7312),
        ("gptq", 19.6644, 111_804_416, 0.1289, 0.8231),
        ("quantease", 19.0177, 111_804_416, 0.1063, 0.8414),
        ("w4a8-float-scale", 18.4127, 112_436_224, 0.0713, 0.8689),
        ("w4a8-integer-scale", 18.4396, 112_436_224, 0.0724, 0.8683),
    )
    keys = ("name", "perplexity", "size_bytes", "kl", "top1")
    return [dict(zip(keys, row, strict=True)) for row in rows]


@pytest.fixture
def make_report() -> Callable[..., dict[str, Any]]:
    return build


@pytest.fixture
def make_run() -> Callable[..., dict[str, Any]]:
    return build_run


@pytest.fixture
def report() -> dict[str, Any]:
    return build()


@pytest.fixture
def run() -> dict[str, Any]:
    return build_run()


@pytest.fixture
def comparisons() -> list[dict[str, Any]]:
    return build_comparisons()
