"""The W4A8 products of mixtures of experts beside bfloat16 grouped products on the same GPU, in one run.

Tokens are routed at random, weights are rotated so that none is still in the cache, launches sit in CUDA graphs,
medians count, and every timed product is compared with the exact one first, bit for bit. bfloat16 is the faster of
torch's grouped product and one cuBLAS product an expert, whose sizes the host is told beforehand.

Run it alone, without the rest of finescale's dependencies: ``python -m finescale.bench.moe --json FILE``.

Shape legend: T tokens, K choices of a token, E experts, R rows sorted by expert, I inputs, F width between the two
products, O outputs, G groups.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finescale.bench.gemm import AMPLIFIER, CACHE_BYTES, GROUP, SEED, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.errors import InputError
from finescale.kernels import experts as moe
from finescale.kernels import layout
from finescale.kernels.experts import PackedExperts, pack_experts
from finescale.kernels.hopper import grouped
from finescale.kernels.hopper.gemm import Variant
from finescale.kernels.jit import compile_all
from finescale.kernels.launch import multiprocessors_of
from finescale.kernels.reference import grouped_int32_product

TOKENS = (1, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Mixture:
    """Sizes of the experts of a model."""

    hidden: int
    width: int
    experts: int
    choices: int

    def layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the two products."""
        return {"gate_up": (self.hidden, 2 * self.width), "down": (self.width, self.hidden)}


MODELS = {
    "mixtral-8x7b": Mixture(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Mixture(2048, 768, 128, 8),
}


class Layer:
    """Random weights of one linear layer of all experts: integer scales, small ones to be folded, and bfloat16."""

    def __init__(self, inputs: int, outputs: int, experts: int, device: torch.device) -> None:
        self.inputs, self.outputs, self.experts, self.device = inputs, outputs, experts, device
        generator = torch.Generator(device).manual_seed(SEED)
        codes = (experts, outputs, inputs)
        self.codes_EOI = torch.randint(-8, 8, codes, dtype=torch.int8, device=device, generator=generator)
        scales = (experts, outputs, inputs // GROUP)
        self.scale_EOG = torch.randint(100, 1024, scales, dtype=torch.int32, device=device, generator=generator)
        self.small_scale_EOG = torch.randint(1, 16, scales, dtype=torch.int32, device=device, generator=generator)

    def scales(self, folded: bool) -> Tensor:
        return self.small_scale_EOG if folded else self.scale_EOG

    def packed(self, folded: bool) -> PackedExperts:
        factor_EO = torch.full((self.experts, self.outputs), 1 / AMPLIFIER, device=self.device)
        return pack_experts(list(self.codes_EOI), list(self.scales(folded)), factor_EO, GROUP, folded)

    def dense(self) -> Tensor:
        shape = (self.experts, self.outputs, self.inputs)
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def exact(self, rows: Rows, folded: bool) -> list[tuple[int, int, Tensor]]:
        """First and last row of each expert that has any, and its exact outputs [rows, O] in bfloat16."""
        x_RI = layout.unpack_tokens(rows.codes, rows.scale_R.shape[0], self.inputs)
        found = []
        first = 0
        for expert, end in enumerate(rows.row_end_E.tolist()):
            if end > first:
                own = x_RI[first:end], self.codes_EOI[expert], self.scales(folded)[expert]
                sums = grouped_int32_product(*own, GROUP).float()
                found.append((first, end, (sums * rows.scale_R[first:end, None] * (1 / AMPLIFIER)).bfloat16()))
            first = -(-end // 8) * 8
        return found


@dataclass(frozen=True)
class Rows:
    """Random tokens routed at random, as a product reads them."""

    codes: Tensor
    scale_R: Tensor
    sum_R: Tensor
    row_end_E: Tensor
    bounds: list[tuple[int, int, int]]
    """expert, first and last row where rows of bfloat16 stand together without gaps."""


def routing(mixture: Mixture, tokens: int, device: torch.device) -> Tensor:
    """Different experts for each token, int64 [T, K]."""
    return torch.rand(tokens, mixture.experts, device=device).topk(mixture.choices).indices


def _rows(mixture: Mixture, inputs: int, expert_TK: Tensor) -> Rows:
    position_TK, row_end_E = moe.route_tokens(expert_TK, mixture.experts)
    x_TI = torch.randn(expert_TK.shape[0], inputs, device=expert_TK.device, dtype=torch.bfloat16)
    codes, scale_R, sum_R = moe.quantize_routed(x_TI, position_TK, "plain", mixture.experts)
    ends = torch.bincount(expert_TK.flatten(), minlength=mixture.experts).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    bounds = [(expert, a, b) for expert, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]
    return Rows(codes, scale_R, sum_R, row_end_E, bounds)


def _copies(weight: Tensor, touched: float) -> list[Tensor]:
    """So many that nothing of what ``touched`` of all bytes is read by a call is still in the cache in the next."""
    size = weight.numel() * weight.element_size()
    count = max(2, math.ceil(CACHE_BYTES / (size * touched)))
    return [weight, *(weight.clone() for _ in range(count - 1))]


def _product(layer: Layer, rows: Sequence[Rows], tokens: int, folded: bool, touched: float, choices: int) -> Product:
    packed = layer.packed(folded)
    return Product(layer, packed, _copies(packed.packed, touched), rows, tokens, choices, layer.exact(rows[0], folded))


@dataclass(frozen=True)
class Product:
    """One of our products, ready to be timed in any variant."""

    layer: Layer
    packed: PackedExperts
    copies: list[Tensor]
    rows: Sequence[Rows]
    tokens: int
    choices: int
    exact: list[tuple[int, int, Tensor]]

    def ranked(self) -> list[Variant]:
        return _ranked(self.layer, self.tokens, self.choices, self.packed.folded)

    def run(self, weight: Tensor, rows: Rows, variant: Variant) -> Tensor:
        return grouped.run(
            rows.codes, rows.scale_R, rows.sum_R, rows.row_end_E, weight, self.packed.factor_EO, self.layer.outputs,
            self.tokens, self.choices, torch.bfloat16, self.packed.folded, variant,
        )  # fmt: skip

    def equal(self, variant: Variant) -> bool:
        """Whether the result is the exact product, bit for bit."""
        y_RO = self.run(self.copies[0], self.rows[0], variant)
        return all(torch.equal(y_RO[first:end], exact) for first, end, exact in self.exact)

    def microseconds(self, variant: Variant) -> float:
        count = max(len(self.copies), len(self.rows))
        calls = [(self.copies[i % len(self.copies)], self.rows[i % len(self.rows)]) for i in range(count)]
        return median_microseconds([partial(self.run, weight, rows, variant) for weight, rows in calls])


def _ranked(layer: Layer, tokens: int, choices: int, folded: bool) -> list[Variant]:
    multiprocessors = multiprocessors_of(torch.cuda.current_device())
    blocks = layer.inputs // 128
    return grouped.ranked(tokens, choices, layer.experts, layer.outputs, blocks, 1, folded, 0, multiprocessors)


def _bf16_products(layer: Layer, rows: Sequence[Rows], total: int, copies: list[Tensor]) -> dict[str, float]:
    """Microseconds of torch's grouped product and of one cuBLAS product an expert."""
    x_RI = torch.randn(total, layer.inputs, device=layer.device, dtype=torch.bfloat16)
    ends = [
        torch.tensor([sum(b - a for e, a, b in r.bounds if e <= expert) for expert in range(layer.experts)])
        .to(layer.device, torch.int32)
        for r in rows
    ]  # fmt: skip
    pairs = [(copies[i % len(copies)], i % len(rows)) for i in range(max(len(copies), len(rows)))]

    def loop(weight: Tensor, own: Rows) -> list[Tensor]:
        return [x_RI[a:b] @ weight[expert].T for expert, a, b in own.bounds]

    return {
        "grouped_mm": median_microseconds([partial(grouped_mm, x_RI, weight, ends[i]) for weight, i in pairs]),
        "cublas_loop": median_microseconds([partial(loop, weight, rows[i]) for weight, i in pairs]),
    }


def grouped_mm(x_RI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
    """torch's bfloat16 grouped product."""
    return torch._grouped_mm(x_RI, weight_EOI.transpose(1, 2), end_E)


def bf16_experts(x_TI: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward with torch's grouped products, without synchronization, as transformers writes it."""
    experts, choices = gate_up.shape[0], expert_TK.shape[1]
    sorted_R, order_R = expert_TK.flatten().sort(stable=True)
    end_E = torch.searchsorted(sorted_R, torch.arange(experts, device=x_TI.device), right=True, out_int32=True)
    both = grouped_mm(x_TI[order_R // choices], gate_up, end_E)
    width = both.shape[1] // 2
    y_RO = grouped_mm(torch.nn.functional.silu(both[:, :width]) * both[:, width:], down, end_E)
    y_RO = y_RO * weight_TK.flatten()[order_R, None]
    return torch.zeros_like(x_TI).index_add_(0, order_R // choices, y_RO)


def _experts(
    mixture: Mixture,
    choices: Sequence[Tensor],
    ours: dict[str, tuple[list[Tensor], list[Tensor]]],
    packed: dict[str, tuple[PackedExperts, PackedExperts]],
    dense: tuple[list[Tensor], list[Tensor]],
) -> dict[str, float]:
    """Microseconds of whole feed-forwards, and how far ours is from the exact one relative to its largest output."""
    tokens, device = choices[0].shape[0], choices[0].device
    x_TI = torch.randn(tokens, mixture.hidden, device=device, dtype=torch.bfloat16)
    weights = [torch.rand(c.shape, device=device).softmax(-1) for c in choices]
    halves = [w.bfloat16() for w in weights]

    def ours_once(i: int, name: str) -> Tensor:
        own = i % len(choices)
        gate_up, down = (
            layer._replace(packed=copies[i % len(copies)])
            for layer, copies in zip(packed[name], ours[name], strict=True)
        )
        return moe.w4a8_experts(x_TI, choices[own], weights[own], gate_up, down)

    def bf16_once(i: int) -> Tensor:
        own = i % len(choices)
        gate_up, down = (copies[i % len(copies)] for copies in dense)
        return bf16_experts(x_TI, choices[own], halves[own], gate_up, down)

    found: dict[str, float] = {}
    for name, copies in ours.items():
        exact = moe.exact_experts(x_TI, choices[0], weights[0], *packed[name]).float()
        found[f"{name}_difference"] = float((ours_once(0, name).float() - exact).abs().max() / exact.abs().max())
        count = max(len(choices), *map(len, copies))
        found[name] = median_microseconds([partial(ours_once, i, name) for i in range(count)])
    calls = [partial(bf16_once, i) for i in range(max(len(choices), *map(len, dense)))]
    found["grouped_mm"] = median_microseconds(calls)
    return found


def bench_moe(
    models: Sequence[str] = tuple(MODELS),
    tokens: Sequence[int] = TOKENS,
    variants: int = 1,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Microseconds of both products and of the whole feed-forward of every model at every size.

    Args:
        models: names in ``MODELS``.
        tokens: numbers of tokens.
        variants: how many of our kernel's variants are timed, those predicted to be fastest; the first is what runs.
        on_row: called with each row.

    Raises:
        InputError: an unknown model, no tokens, or no Hopper GPU.
    """
    if not models or any(model not in MODELS for model in models):
        raise InputError(f"models are {', '.join(MODELS)}.")
    if min(tokens, default=0) < 1 or variants < 1:
        raise InputError("tokens and variants must be at least 1.")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise InputError("bench moe needs a Hopper GPU (compute capability 9.0).")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    for model in models:
        mixture = MODELS[model]
        layers = {part: Layer(*shape, mixture.experts, device) for part, shape in mixture.layers().items()}
        _compile_all(layers.values(), tokens, mixture.choices, variants)
        for count in tokens:
            for row in _bench_size(mixture, layers, count, variants):
                rows.append({"model": model, "tokens": count, **row})
                on_row(rows[-1])
        del layers
        torch.cuda.empty_cache()
    return _result(rows)


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"benchmark": "moe", "machine": machine_facts(), "group_size": GROUP, "seed": SEED, "rows": rows}


def _bench_size(mixture: Mixture, layers: dict[str, Layer], tokens: int, variants: int) -> list[dict[str, Any]]:
    device = torch.device("cuda", torch.cuda.current_device())
    choices = [routing(mixture, tokens, device) for _ in range(6)]
    touched = grouped.expected_tiles(tokens, mixture.choices, mixture.experts, 8)[0] / mixture.experts
    found = []
    products: dict[tuple[str, bool], Product] = {}
    dense: dict[str, list[Tensor]] = {}
    for part, layer in layers.items():
        row: dict[str, Any] = {"part": part}
        rows = [_rows(mixture, layer.inputs, expert_TK) for expert_TK in choices]
        dense[part] = _copies(layer.dense(), touched)
        row |= _bf16_products(layer, rows, tokens * mixture.choices, dense[part])
        row["bf16"] = min(row["grouped_mm"], row["cublas_loop"])
        for name, folded in (("integer", False), ("folded", True)):
            product = products[part, folded] = _product(layer, rows, tokens, folded, touched, mixture.choices)
            timed = [
                [product.microseconds(v), v.tokens, v.warpgroups, product.equal(v)] for v in product.ranked()[:variants]
            ]
            row[name], *row[f"{name}_variant"], row[f"{name}_equal"] = timed[0]
            row[f"{name}_variants"] = sorted(timed)
        found.append(row)
    names = (("integer", False), ("folded", True))
    whole = _experts(
        mixture,
        choices,
        {name: (products["gate_up", f].copies, products["down", f].copies) for name, f in names},
        {name: (products["gate_up", f].packed, products["down", f].packed) for name, f in names},
        (dense["gate_up"], dense["down"]),
    )
    return [*found, {"part": "experts", **whole, "bf16": whole["grouped_mm"]}]


def _compile_all(layers: Sequence[Layer] | Any, tokens: Sequence[int], choices: int, variants: int) -> None:
    """Compile every variant that will run, side by side."""
    needed = {
        variant
        for layer in layers
        for count in tokens
        for folded in (False, True)
        for variant in _ranked(layer, count, choices, folded)[:variants]
    }
    compile_all(variant.text() for variant in needed)


def text_row(row: dict[str, Any]) -> str:
    """One line: microseconds, and speed-ups over the faster bfloat16."""
    parts = [f"{row['model']:>13} {row['part']:>7} {row['tokens']:>5}  bf16 {row['bf16']:>7.1f}"]
    for name in ("integer", "folded"):
        equal = row.get(f"{name}_equal")
        mark = "" if equal else " WRONG" if equal is False else f" off by {row[f'{name}_difference']:.4f}"
        parts.append(f"{name} {row[name]:.1f} ({row['bf16'] / row[name]:.2f}){mark} {row.get(f'{name}_variant', '')}")
    parts += [f"{name} {row[name]:.1f}" for name in ("grouped_mm", "cublas_loop") if name in row]
    for name in ("integer", "folded"):
        best = row.get(f"{name}_variants")
        if best:
            parts.append(
                f"best {name} {best[0][0]:.1f} {best[0][1:3]}" + (" WRONG" if not all(v[3] for v in best) else "")
            )
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="may be repeated")
    parser.add_argument("--tokens", help="numbers with commas")
    parser.add_argument("--variants", type=int, default=1, help="those predicted to be fastest")
    options = parser.parse_args()
    tokens = tuple(map(int, options.tokens.split(","))) if options.tokens else TOKENS
    models = options.model or tuple(MODELS)
    command = " ".join(["python -m finescale.bench.moe", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []

    def on_row(row: dict[str, Any]) -> None:
        rows.append(row)
        print(text_row(row), flush=True)
        if options.json:  # what is done is kept if the rest is stopped
            options.json.write_text(json.dumps(_result(rows) | {"command": command}, indent=1) + "\n")

    bench_moe(models, tokens, options.variants, on_row)


if __name__ == "__main__":
    main()
