"""What will be quantized and how, settled before any work: layers, schemes, share, and all that can be refused."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.pytorch_utils import Conv1D

from finescale.errors import InputError
from finescale.formats.registry import Format
from finescale.grid import ActivationScheme, WeightScheme, number_of_groups
from finescale.models import Skeleton, linear_modules
from finescale.models.experts import Expert
from finescale.models.skeleton import layer_name
from finescale.recipe import STANDARD_GROUPS, Recipe, WeightsPart, is_ragged, resolve_group_size
from finescale.transforms.view import Limits

LEAST_SHARE = 0.8
"""Below this share of the block weights a run is refused: most likely layers were overlooked."""
ROW_PARALLEL = {"o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj", "w2"}
"""Layers whose inputs are cut over the ranks in tensor parallelism; all others cut their outputs."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer to quantize.

    Attributes:
        name: name in the checkpoint, without ``.weight``.
        path: module path inside its block.
        shape_OI: outputs and inputs.
        scheme: what becomes of the weight.
        transposed: the checkpoint keeps [I, O] (GPT-2's Conv1D).
        activations: how the input is rounded, None for not at all.
        limits: the range that the grid of each group covers; None for all of it.
    """

    name: str
    path: str
    shape_OI: tuple[int, int]
    scheme: WeightScheme
    transposed: bool = False
    activations: ActivationScheme | None = None
    limits: Limits | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Plan:
    """All layers of all blocks, by block and module path, and the notes that the plan gave rise to."""

    blocks: tuple[dict[str, LayerPlan], ...]
    skipped: tuple[str, ...]
    block_parameters: int
    quantized_parameters: int
    parameters: int
    notes: tuple[str, ...]

    @property
    def layers(self) -> list[LayerPlan]:
        return [layer for block in self.blocks for layer in block.values()]

    @property
    def share(self) -> float:
        return self.quantized_parameters / max(self.block_parameters, 1)


def make_plan(skeleton: Skeleton, recipe: Recipe, fmt: Format, allow_partial: bool = False) -> Plan:
    """Settle each layer's scheme.

    Raises:
        InputError: nothing to quantize, too small a share, an override without a layer, or a scheme that the format
            cannot hold.
    """
    if scattered_groups(recipe) and recipe.weights.group_size != -1 and not fmt.name.startswith("gptq"):
        raise InputError(
            f"{fmt.name} holds groups of consecutive columns only; set solver.static_groups true or --format gptq."
        )
    if recipe.solver.options().keeps_outliers and fmt.name.startswith(("gptq", "awq")):
        raise InputError(f"{fmt.name} has no place for outliers; use --format compressed-tensors or dense.")
    drafts, skipped = _drafts(skeleton, recipe)
    _check_overrides(skeleton, recipe, [*(name for _, _, name, *_ in drafts), *skipped])
    sizes, notes = _group_sizes(drafts)
    blocks: list[dict[str, LayerPlan]] = [{} for _ in range(skeleton.block_count)]
    for (index, path, name, shape_OI, transposed, part), size in zip(drafts, sizes, strict=True):
        scheme = part.scheme(size)
        activations = recipe.activations_of(name)
        # Conv1D is written transposed, as the other layers; only finescale reads it back (see formats/engines.py).
        fmt.check(scheme, activations, shape_OI)
        blocks[index][path] = LayerPlan(name, path, shape_OI, scheme, transposed, activations)
        if is_ragged(shape_OI[1], size):
            notes.append(f"the last group of {path} is ragged ({shape_OI[1]} inputs in groups of {size})")
    plan = _count(skeleton, blocks, skipped, notes, active_blocks(skeleton, recipe))
    if plan.share < LEAST_SHARE and not allow_partial:
        raise InputError(
            f"only {plan.share:.0%} of the block weights would be quantized (left out: {_few(skipped)}); "
            "pass --allow-partial if that is what you want."
        )
    return plan


def scattered_groups(recipe: Recipe) -> bool:
    """Whether groups follow the solver's order of columns, not the weight's (act-order without static groups)."""
    options = recipe.solver.options()
    return bool(getattr(options, "act_order", False)) and not getattr(options, "static_groups", True)


def active_blocks(skeleton: Skeleton, recipe: Recipe) -> int:
    """How many of the first blocks are quantized at all."""
    return min(recipe.blocks or skeleton.block_count, skeleton.block_count)


def _drafts(skeleton: Skeleton, recipe: Recipe) -> tuple[list[Any], list[str]]:
    drafts, skipped = [], []
    for index, block in enumerate(skeleton.blocks):
        for path, module in linear_modules(block).items():
            name = layer_name(skeleton, f"{skeleton.block_path(index)}.{path}")
            part = recipe.weights_of(name) if index < active_blocks(skeleton, recipe) else None
            transposed = isinstance(module, Conv1D)
            weight: Any = module.weight
            rows, columns = reversed(weight.shape) if transposed else weight.shape
            if part is None:
                skipped.append(name)
            else:
                drafts.append((index, path, name, (rows, columns), transposed, part))
    if not drafts:
        raise InputError("no layer is left to quantize; check the recipe's overrides.")
    return drafts, skipped


def _check_overrides(skeleton: Skeleton, recipe: Recipe, names: list[str]) -> None:
    """Raises InputError for a pattern that matches no layer: a typing mistake would change the result unseen. What is
    never quantized, such as the head, may be skipped once more."""
    for override in recipe.overrides:
        others = (name for name, _ in skeleton.model.named_modules()) if override.skip else ()
        if not any(map(override.matches, names)) and not any(map(override.matches, others)):
            raise InputError(
                f"the pattern {override.pattern} of overrides matches no layer; correct it (layers are called "
                f"{names[0]} and so on) or leave it out."
            )


def _group_sizes(drafts: list[Any]) -> tuple[list[int], list[str]]:
    """Group size of each draft; ``auto`` is one standard size for all layers if there is one, else each layer's own."""
    automatic = [shape_OI[1] for *_, shape_OI, _, part in drafts if part.group_size == "auto"]
    common = resolve_group_size(automatic) if automatic else None
    sizes, notes = [], []
    for *_, shape_OI, _, part in drafts:
        sizes.append(_group_size(part, shape_OI[1], common))
    if automatic and common is None:
        notes.append(
            f"no standard group size ({', '.join(map(str, STANDARD_GROUPS))}) divides the inputs of every layer: each "
            "layer has its own, and layers that none divides are quantized per channel"
        )
    return sizes, notes


def _group_size(part: WeightsPart, columns: int, common: int | None) -> int:
    if part.group_size == "auto":
        return common or resolve_group_size([columns]) or -1
    return -1 if part.group_size >= columns else part.group_size


def _count(
    skeleton: Skeleton, blocks: list[dict[str, LayerPlan]], skipped: list[str], notes: list[str], active: int
) -> Plan:
    block_parameters = sum(parameter.numel() for block in skeleton.blocks[:active] for parameter in block.parameters())
    quantized = sum(layer.shape_OI[0] * layer.shape_OI[1] for block in blocks for layer in block.values())
    parameters = sum(torch.Size(skeleton.source.shape(key)).numel() for key in skeleton.source)
    counted = tuple(f"{note} (in {count} layers)" if count > 1 else note for note, count in Counter(notes).items())
    return Plan(tuple(blocks), tuple(skipped), block_parameters, quantized, parameters, counted)


def _few(names: list[str]) -> str:
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "what is in no linear layer"
    )


def check_tensor_parallel(plan: Plan, ranks: int) -> None:
    """Raises InputError when a layer cannot be cut over ``ranks`` without cutting a group."""
    from finescale.formats.engines import check_tensor_parallel as check

    for layer in plan.layers:
        leaf = layer.name.rpartition(".")[2]
        check(layer.shape_OI, layer.scheme.group_size, ranks, "row" if leaf in ROW_PARALLEL else "column", layer.name)


def output_bytes(plan: Plan, scale_dtype: torch.dtype, source_bytes: int, float_dtype: torch.dtype) -> int:
    """Estimated size of the output checkpoint."""
    quantized = 0
    for layer in plan.layers:
        rows, columns = layer.shape_OI
        groups = number_of_groups(columns, layer.scheme.group_size)
        per_word = 32 // layer.scheme.bits
        quantized += 4 * rows * -(-columns // per_word) + rows * groups * (scale_dtype.itemsize + 1)
    return source_bytes - plan.quantized_parameters * float_dtype.itemsize + quantized


def stored_bits(layer: LayerPlan, scale_dtype: torch.dtype) -> int:
    """Bits of a layer's codes, scales and zero points, as `QuantizedWeight.stored_bits` counts them; no outliers."""
    rows, columns = layer.shape_OI
    groups = number_of_groups(columns, layer.scheme.group_size)
    zeros = 0 if layer.scheme.symmetric else layer.scheme.bits
    return rows * (columns * layer.scheme.bits + groups * (8 * scale_dtype.itemsize + zeros))


def check_disk(out: Path, needed: int, files: Iterable[Path] = ()) -> None:
    """Raises InputError when the disk of ``out`` is too full for ``needed`` bytes, those of ``files`` that an earlier
    run has written already not counted."""
    needed -= sum(path.stat().st_size for path in files if path.is_file())
    folder = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05 + (16 << 20):
        raise InputError(
            f"{folder} has {free / 1e9:.2f} GB free, the result needs {needed / 1e9:.2f} GB; "
            "free some or choose another --out."
        )


def hidden_bytes(skeleton: Skeleton, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the hidden states of so many tokens."""
    return int(skeleton.model.config.hidden_size) * tokens * dtype.itemsize


def memory_bytes(skeleton: Skeleton, plan: Plan, tokens: int, dtype: torch.dtype, power: float = 1.0) -> int:
    """Estimated peak memory: one block in the working type, its Hessians, the activations of all samples, the
    embeddings while the first activations are made, and the solver's work matrices; ``power`` of the Hessians."""
    block = skeleton.blocks[0]
    weights = sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize
    inputs = [layer.shape_OI[1] for layer in plan.blocks[0].values()]
    experts = sum(isinstance(module, Expert) for module in block.modules())
    widest, narrowest = max(inputs, default=0), min(inputs, default=0)
    # Four distinct inputs in a block, one of them wide; of experts two each. The factorization takes one in float64
    # and its copy in float32 (on a GPU two in float64, in memory of its own), a power's decomposition six in float64.
    working = 12 if power == 1 else 48
    hessians = 4 * ((2 * experts + 4) * widest**2 if experts else widest**2 + 3 * narrowest**2) + working * widest**2
    hidden = hidden_bytes(skeleton, tokens, dtype)
    largest = max((rows * columns for rows, columns in (layer.shape_OI for layer in plan.layers)), default=0)
    rest = sum(p.numel() for p in skeleton.model.parameters()) - skeleton.block_count * sum(
        p.numel() for p in block.parameters()
    )
    solving = hessians + 5 * 4 * largest
    return int(weights + max(solving, rest * dtype.itemsize) + hidden * 1.2 + 7e8)


def available_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: what the machine has free, and at most what its container is allowed.

    Without a look at the container's limit (version 2 of control groups, or 1) a run would be killed in its middle.
    Pages of files that were read count as free: they are dropped when memory is short.
    """
    available = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, taken = (int((cgroups / name).read_text()) for name in (limit, used))
            lines = (cgroups / used).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such version, or the word max: no limit
            continue
        facts = dict(line.split(maxsplit=1) for line in lines)
        # Version 1 has the numbers of the groups below in lines of their own.
        files = sum(int(facts.get(f"total_{name}", facts.get(name, 0))) for name in ("active_file", "inactive_file"))
        available = min(available, allowed - taken + files)
    return available


def check_memory(needed: int) -> None:
    """Raises InputError when the machine, or its container, has less memory than the run needs."""
    available = available_memory()
    if needed > available:
        raise InputError(
            f"about {needed / 1e9:.1f} GB of memory are needed and {available / 1e9:.1f} GB are free; "
            "use fewer --samples or a shorter --length."
        )
