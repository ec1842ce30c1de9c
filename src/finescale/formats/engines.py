"""Which engine loads a checkpoint, and what truly runs there.

Many engines read a W4A8 file and quietly multiply in 16 bits, or fail only when serving; the report says so when the
model is saved. Rows marked *measured* were loaded and compared with the dequantized model: transformers 5.23 with
compressed-tensors 0.20, and vLLM 0.32 for CPU. The rows for vLLM on CUDA and for SGLang are read in their sources.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finescale.errors import InputError
from finescale.formats.checks import SchemeKey, scheme_key
from finescale.grid import ActivationScheme, WeightScheme

PACKED, INT8, DENSE = "compressed-tensors", "int-quantized", "dense"
_GPTQ = ("gptq", "gptq_v2")
_CUDA_GROUPS = (-1, 32, 64, 128)
_EXPERT_FAMILIES = re.compile(r"mixtral|moe|deepseek_v[23]|gpt_oss|qwen3_next|dbrx|jamba")
# Layers of one input, which engines load as one matrix and which must have one scheme for that.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_CONV1D_FAMILIES = ("gpt2",)
_CONV1D = "GPT-2's Conv1D layers are read packed by finescale only; save with dense"
_OUTLIERS = "only finescale reads outliers and quantized scales, and without them weights are wrong; save with dense"
_OWN_INPUTS = "only finescale, in vLLM by its plugin, rearranges the inputs of layers (a gather or an online rotation)"
_W8A8_ONLY = "int-quantized weights must be symmetric 8-bit per channel, with 8-bit activations"
_ONE_SCHEME = "the schemes within {} differ, yet engines load these layers as one; give them one scheme"
_FLOAT_CACHE = "keys and values are not rounded"


@dataclass(frozen=True)
class Model:
    """What the engines' limits depend on.

    Attributes:
        format_name: a name of `finescale.formats.FORMATS`.
        keys: the distinct (bits, group size, symmetric).
        activation_bits: None for weight-only.
        family: `model_type` of config.json.
        experts: whether experts are quantized.
        ragged: whether some layer's inputs do not divide by its group size.
        odd: whether some dimension is no multiple of 32.
        conflict: layers that engines fuse but whose schemes differ, for a message; empty if none.
        desc_act: whether groups are scattered columns.
        outliers: whether some weights are kept beside the grid.
        own_inputs: whether inputs are rearranged before the product (a gather, an online rotation).
        other_inputs: whether inputs are rounded, and not to symmetric 8 bits per token.
        integer: whether group scales are integers over an amplifier.
        mixed_experts: whether the experts of the model have more than one scheme, or some of them none.
        rounded_cache: whether keys and values are rounded.
    """

    format_name: str
    keys: frozenset[SchemeKey]
    activation_bits: int | None
    family: str
    experts: bool = False
    ragged: bool = False
    odd: bool = False
    conflict: str = ""
    desc_act: bool = False
    outliers: bool = False
    own_inputs: bool = False
    other_inputs: bool = False
    integer: bool = False
    mixed_experts: bool = False
    rounded_cache: bool = False

    @property
    def bits(self) -> set[int]:
        return {bits for bits, _, _ in self.keys}

    @property
    def groups(self) -> set[int]:
        return {group for _, group, _ in self.keys}

    @property
    def asymmetric(self) -> bool:
        return not all(symmetric for _, _, symmetric in self.keys)

    def runs(self, activations: str) -> str:
        """`W4A8` and the like, for what an engine does with this model."""
        return f"W{'/'.join(map(str, sorted(self.bits)))}A{activations}"


Row = tuple[list[str], str, list[str]]
"""(reasons why it does not load, what runs, remarks)"""


def engine_table(
    format_name: str,
    schemes: Mapping[str, WeightScheme | None] | Sequence[WeightScheme],
    activations: ActivationScheme | None,
    family: str,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    desc_act: bool = False,
    outliers: bool = False,
    own_inputs: bool = False,
    integer: bool = False,
    rounded_cache: bool = False,
) -> list[dict[str, Any]]:
    """One row per engine: ``{"engine", "loads": bool, "runs_as": str, "remark": str}``.

    Args:
        format_name: a name of `finescale.formats.FORMATS`.
        schemes: scheme of each layer, None for one left as it is; names allow to find fused layers that differ.
        activations: how inputs are quantized, or None.
        family: `model_type` of config.json.
        shapes: (O, I) of the layers, to find ragged groups and odd sizes.
        desc_act: whether groups are scattered columns (activation order).
        outliers: whether some weights are kept beside the grid.
        own_inputs: whether inputs are rearranged before the product, by QLLM's gather or an online rotation.
        integer: whether group scales are integers over an amplifier.
        rounded_cache: whether keys and values are rounded.
    """
    layers: Mapping[str, WeightScheme | None] = schemes if isinstance(schemes, Mapping) else {}
    named = {name: scheme for name, scheme in layers.items() if scheme is not None}
    values = list(named.values() if isinstance(schemes, Mapping) else schemes)
    shapes = {name: shape for name, shape in (shapes or {}).items() if name in named}
    model = Model(
        format_name=format_name,
        keys=frozenset(map(scheme_key, values)),
        activation_bits=None if activations is None else activations.bits,
        family=family,
        experts=any(".experts." in name for name in named) or (not named and bool(_EXPERT_FAMILIES.search(family))),
        ragged=any(
            named[name].group_size != -1 and shape[1] % named[name].group_size for name, shape in shapes.items()
        ),
        odd=any(size % 32 for shape in shapes.values() for size in shape),
        conflict=fused_conflict(layers),
        desc_act=desc_act,
        outliers=outliers,
        own_inputs=own_inputs,
        other_inputs=activations not in (None, ActivationScheme(8)),
        integer=integer,
        mixed_experts=len({_key(scheme) for name, scheme in layers.items() if ".experts." in name}) > 1,
        rounded_cache=rounded_cache,
    )
    engines: dict[str, Callable[[Model], Row]] = {
        "finescale": _finescale,
        "transformers": _transformers,
        "vLLM with finescale": _vllm_finescale,
        "vLLM (CUDA)": _vllm_cuda,
        "vLLM (x86 CPU)": _vllm_cpu,
        "SGLang": _sglang,
    }
    rows = []
    for engine, describe in engines.items():
        reasons, runs_as, remarks = describe(model)
        if engine != "finescale" and model.family in _CONV1D_FAMILIES and model.format_name != DENSE:
            reasons = [_CONV1D]
        if engine != "finescale" and model.outliers and model.format_name != DENSE:
            reasons = [_OUTLIERS]
        if "finescale" not in engine and model.own_inputs:
            reasons = [_OWN_INPUTS]
        if engine != "finescale" and model.rounded_cache:
            remarks = [*remarks, _FLOAT_CACHE]
        loads = not reasons
        rows.append(
            {
                "engine": engine,
                "loads": loads,
                "runs_as": runs_as if loads else "",
                "remark": "; ".join(remarks if loads else reasons),
            }
        )
    return rows


def _key(scheme: WeightScheme | None) -> SchemeKey | None:
    return None if scheme is None else scheme_key(scheme)


def fused_conflict(schemes: Mapping[str, WeightScheme | None]) -> str:
    """The first layers that engines load as one matrix although their schemes differ, or only some are quantized; empty
    if there are none."""
    leaves = {name.rpartition(".")[2] for name in schemes}
    fused: dict[str, set[SchemeKey | None]] = {}
    for name, scheme in schemes.items():
        if ".experts." in name:
            fused.setdefault(f"{name.split('.experts.', 1)[0]}.experts", set()).add(_key(scheme))
            continue
        parent, _, leaf = name.rpartition(".")
        for members in SAME_INPUT:
            if leaf in members:
                # A member left unquantized conflicts too, unless the model has no such layer at all.
                found = {_key(schemes.get(f"{parent}.{member}")) for member in members if member in leaves}
                fused[f"{parent}.({'|'.join(members)})"] = found
    return next((label for label, keys in fused.items() if len(keys) > 1), "")


def check_tensor_parallel(
    shape_OI: tuple[int, int],
    group_size: int,
    tp: int,
    split: Literal["row", "column"],
    name: str = "a layer",
) -> None:
    """Refuse a layer that an engine cannot cut over ``tp`` devices.

    Args:
        shape_OI: (outputs, inputs) of the weight.
        group_size: inputs that share a scale, -1 for all.
        tp: number of devices.
        split: `column` cuts the outputs, `row` the inputs (attention output and down projections).
        name: for the message.

    Raises:
        InputError: the cut would not be even, or would go through a group.
    """
    size = shape_OI[0 if split == "column" else 1]
    what = "outputs" if split == "column" else "inputs"
    if tp < 1:
        raise InputError(f"tensor parallel size is {tp}; use 1 or more.")
    if size % tp:
        raise InputError(
            f"{name} has {size} {what}, which {tp} devices cannot share evenly; use another tensor parallel size."
        )
    if split == "row" and group_size != -1 and (size // tp) % group_size:
        raise InputError(
            f"{name} has {size} inputs: each of {tp} devices would get {size // tp}, which is no multiple of the group "
            f"size {group_size}; choose a smaller group size or fewer devices."
        )


def _finescale(model: Model) -> Row:
    if model.format_name == DENSE:
        return [], "the model's own type", ["weights are dequantized"]
    activations = "16" if model.activation_bits is None else str(model.activation_bits)
    return (
        [],
        model.runs(activations),
        [
            "dequantized with their outliers, then a float product"
            if model.outliers
            else "finescale inspect names the kernel of each layer"
        ],
    )


def _transformers(model: Model) -> Row:
    """Measured."""
    if model.format_name == DENSE:
        return [], "the model's own type", []
    if model.format_name in (*_GPTQ, "awq"):
        return [], model.runs("16"), ["needs the package gptqmodel; not tested"]
    reasons = []
    if model.ragged:
        reasons.append("compressed-tensors needs a group size that divides the inputs of every layer")
    if model.experts and (model.asymmetric or model.format_name == INT8):
        reasons.append("experts load only as symmetric packed integers")
    if model.experts and model.mixed_experts:
        reasons.append("all experts of a model are decompressed by one scheme; give them one, or load with finescale")
    if model.asymmetric and model.format_name == PACKED and not model.experts:
        reasons.append(
            "compressed-tensors 0.20 misreads packed zero points: load with "
            "quantization_config=CompressedTensorsConfig(dequantize=True), or with compressed-tensors 0.17"
        )
    if model.family == "falcon" and model.format_name == PACKED:
        reasons.append("Falcon loads only with quantization_config=CompressedTensorsConfig(dequantize=True)")
    remarks = ["decompresses to dense weights: right numbers, no gain in memory or speed"]
    if model.experts and model.activation_bits is not None:
        remarks.append("the inputs of experts are not rounded")
    if 3 in model.bits:
        remarks.append("3 bits need compressed-tensors 0.18 or later")
    runs_as = "dense" if model.activation_bits is None else f"dense, inputs rounded to {model.activation_bits} bits"
    return reasons, runs_as, remarks


def _vllm_common(model: Model) -> list[str]:
    reasons: list[str] = []
    if model.format_name == DENSE:
        return reasons
    if model.ragged:
        reasons.append("vLLM needs a group size that divides the inputs of every layer")
    if model.conflict:
        reasons.append(_ONE_SCHEME.format(model.conflict))
    if model.family == "bloom" and model.format_name != INT8:
        reasons.append(
            "vLLM's loader of BLOOM cannot reorder packed query_key_value tensors; use dense or int-quantized"
        )
    if model.desc_act:
        reasons.append("vLLM dropped activation order with scattered groups; solve with static groups")
    if model.format_name in _GPTQ and model.asymmetric:
        reasons.append("vLLM reads symmetric gptq only; save with compressed-tensors or awq")
    if 6 in model.bits:
        reasons.append("vLLM has no 6-bit weights")
    if model.format_name == PACKED and model.activation_bits not in (None, 4, 8):
        reasons.append(f"vLLM has no {model.activation_bits}-bit activations")
    if model.format_name == PACKED and model.activation_bits is not None and model.experts:
        reasons.append("vLLM runs quantized experts with quantized inputs on Arm CPUs only; leave activations out")
    return reasons


def _is_w8a8(model: Model) -> bool:
    return model.keys == {(8, -1, True)} and model.activation_bits == 8


def _vllm_finescale(model: Model) -> Row:
    """What vLLM runs where finescale is installed too; `finescale.runtime.serving` says the same of a file."""
    other = model.format_name == PACKED and model.other_inputs
    if not (model.integer or model.own_inputs or other) or model.outliers:
        reasons, runs_as, remarks = _vllm_cuda(model)
        return reasons, runs_as, [*remarks, "left to vLLM"]
    reasons = []
    if model.rounded_cache:
        reasons.append("the plugin does not round keys and values; leave kv_cache out, or load with finescale")
    if model.format_name not in (PACKED, INT8):
        reasons.append(f"the plugin serves {PACKED} and {INT8}")
    if model.conflict:
        reasons.append(_ONE_SCHEME.format(model.conflict))
    if model.family == "bloom" and model.format_name == PACKED:
        reasons.append("vLLM's loader of BLOOM cannot reorder packed query_key_value tensors")
    if model.experts and not (model.integer and model.activation_bits == 8):
        reasons.append("experts are served as W4A8 with integer scales only")
    activations = "16" if model.activation_bits is None else str(model.activation_bits)
    return reasons, model.runs(activations), ["on finescale's kernels: finescale serve"]


def _vllm_cuda(model: Model) -> Row:
    """Read in the sources of vLLM 0.32."""
    reasons = _vllm_common(model)
    if model.format_name == DENSE:
        return reasons, "the model's own type", []
    if model.format_name == INT8:
        if not _is_w8a8(model):
            reasons.append(_W8A8_ONLY)
        return reasons, "W8A8", ["8-bit integer tensor cores"]
    if model.bits & {2, 3}:
        reasons.append("2 and 3 bits need the package humming-kernels")
    if model.groups - set(_CUDA_GROUPS):
        reasons.append(f"its kernels know the group sizes {', '.join(map(str, _CUDA_GROUPS))}")
    remarks = []
    if any(bits == 8 and not symmetric for bits, _, symmetric in model.keys):
        remarks.append("asymmetric 8 bits need a Hopper GPU")
    if model.activation_bits is not None:
        ways = ["finescale's plugin"] * model.integer + ["humming-kernels and --linear-backend humming"]
        remarks.append(f"activations stay 16-bit, silently; integers only with {', or with '.join(ways)}")
    elif model.keys <= {(4, 32, True), (4, 64, True), (4, 128, True)}:
        remarks.append("VLLM_MARLIN_INPUT_DTYPE=int8 makes it W4A8")
    return reasons, model.runs("16"), remarks


def _vllm_cpu(model: Model) -> Row:
    """Measured on a machine with AMX."""
    reasons = _vllm_common(model)
    if model.format_name == DENSE:
        return reasons, "the model's own type", []
    if model.format_name == INT8:
        if model.bits == {4} and not model.asymmetric and model.activation_bits == 8 and not model.experts:
            return reasons, "W4A8", []
        if not _is_w8a8(model):
            reasons.append(_W8A8_ONLY)
        return reasons, "W8A8", ["with dtype bfloat16 only"]
    if model.bits != {4}:
        reasons.append("its only kernel for packed weights is 4-bit")
    if model.odd:
        reasons.append("its kernel needs inputs and outputs that are multiples of 32")
    if model.experts and ((model.asymmetric and model.format_name == PACKED) or -1 in model.groups):
        reasons.append("its kernel for experts needs symmetric groups")
    remarks = ["8-bit integer activations with dtype bfloat16 and AMX, whatever the file says; float32 is refused"]
    return reasons, f"{model.runs('16')} with dtype float16", remarks


def _sglang(model: Model) -> Row:
    """Read in its sources."""
    if model.format_name == DENSE:
        return [], "the model's own type", []
    reasons = []
    if model.ragged or model.conflict:
        reasons.append(_ONE_SCHEME.format(model.conflict) if model.conflict else "groups must divide the inputs")
    if model.bits & {2, 3, 6}:
        reasons.append("it has no 2, 3 and 6 bits")
    if model.format_name == INT8:
        if not _is_w8a8(model):
            reasons.append(_W8A8_ONLY)
        return reasons, "W8A8", ["not tested"]
    if model.activation_bits is not None:
        reasons.append("it has no integer activations with packed weights; save with gptq, awq, or without activations")
    if model.format_name == PACKED and model.asymmetric:
        reasons.append("packed weights must be symmetric; save with awq")
    if model.format_name in _GPTQ and (model.asymmetric or model.desc_act):
        reasons.append("gptq must be symmetric without activation order")
    return reasons, model.runs("16"), ["not tested"]
