"""A model without its weights: built on the meta device, then filled module by module from the checkpoint.

Memory is that of whatever is filled at the moment, never of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finescale.errors import CheckpointError, InputError
from finescale.formats.source import SourceCheckpoint
from finescale.models.experts import UnfusedExperts, unfuse_experts
from finescale.models.families import Family, find_family

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FUSED_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.weight$")


@dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device and where its tensors are.

    Attributes:
        model: the transformers model, experts taken apart.
        source: the checkpoint.
        family: names that differ between the two.
        blocks_path: module path of the list of blocks, such as ``model.layers``.
        block_count: number of blocks.
    """

    model: PreTrainedModel
    source: SourceCheckpoint
    family: Family
    blocks_path: str
    block_count: int

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block_path(self, index: int) -> str:
        return f"{self.blocks_path}.{index}"


def open_skeleton(source: SourceCheckpoint, allow_unknown: bool = False) -> Skeleton:
    """Build the model of a checkpoint without weights.

    Raises:
        InputError: unknown family, a config that transformers cannot build, or no list of blocks in it.
    """
    family = find_family(source.config, allow_unknown, source)
    check_no_foreign_kernels(source.config, source.name)
    model = build_empty(source.path, source.name)
    if family.experts is not None:
        unfuse_experts(model, family.experts)
    path, blocks = find_blocks(model)
    return Skeleton(model, source, family, path, len(blocks))


def check_no_foreign_kernels(config: Any, name: str) -> None:
    """Raises InputError for a config that names attention or experts of a hub repository: transformers would download
    and run that repository's code, with no flag of the user's."""
    values = config.items() if isinstance(config, dict) else ()
    for key, value in values:
        if str(key).endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise InputError(f"{name}: config.json asks for code of the hub ({key}: {value}); remove that key.")
        check_no_foreign_kernels(value, name)


def build_empty(path: Path, name: str) -> PreTrainedModel:
    """The transformers model of a folder on the meta device; remote code is never run. Raises InputError for a config
    that transformers cannot build."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.use_cache = False
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:  # a config can be wrong in many ways, and each model class fails in its own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{name}: transformers {transformers.__version__} cannot build this model ({reason}); "
            "check its config.json."
        ) from error
    model.eval()
    model.requires_grad_(False)
    return model


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the module list as long as the config says, all of one class. Raises InputError when
    there is none."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and not isinstance(module, UnfusedExperts)
        if is_list and len(module) == depth and len({type(block) for block in module}) == 1:
            return name, module
    raise InputError(f"no list of {depth} equal blocks found in {type(model).__name__}; this family is not supported.")


def possible_names(skeleton: Skeleton, name: str) -> tuple[str, ...]:
    """Names that a checkpoint may have for what the module graph calls ``name``, the likeliest first.

    Checkpoints come with and without the prefix of the base model (``transformer.``, ``model.``).
    """
    for module_part, checkpoint_part in skeleton.family.renames:
        name = name.replace(module_part, checkpoint_part)
    prefix = skeleton.model.base_model_prefix + "."
    return name, name.removeprefix(prefix), prefix + name


def checkpoint_key(skeleton: Skeleton, name: str) -> str | None:
    """Name in the checkpoint of the tensor that the module graph calls ``name``; None when it is not there."""
    return next((key for key in possible_names(skeleton, name) if key in skeleton.source), None)


def layer_name(skeleton: Skeleton, module_name: str) -> str:
    """Name of a layer in a full-precision checkpoint, for a module path in the graph."""
    key = checkpoint_key(skeleton, module_name + ".weight")
    return possible_names(skeleton, module_name)[0] if key is None else key.removesuffix(".weight")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: under ``key``, and if experts are fused there, at ``expert`` from row ``first`` on."""

    key: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0


def _find(skeleton: Skeleton, name: str) -> _Place | None:
    key = checkpoint_key(skeleton, name)
    if key is not None:
        return _Place(key, skeleton.source.shape(key))
    match, experts = _FUSED_EXPERT.match(name), skeleton.family.experts
    if match is None or experts is None:
        return None
    is_down = match["projection"] == experts.down
    key = checkpoint_key(skeleton, f"{match['experts']}.{'down_proj' if is_down else 'gate_up_proj'}")
    if key is None or len(skeleton.source.shape(key)) != 3:
        return None
    count, rows, columns = skeleton.source.shape(key)
    if int(match["index"]) >= count:
        return None
    if is_down:
        return _Place(key, (rows, columns), int(match["index"]))
    first = 0 if match["projection"] == experts.gate else rows // 2
    return _Place(key, (rows // 2, columns), int(match["index"]), first)


def read_tensor(skeleton: Skeleton, name: str) -> Tensor | None:
    """A tensor by its name in the module graph, in its stored type; experts fused in the file are sliced out."""
    place = _find(skeleton, name)
    if place is None:
        return None
    tensor = skeleton.source.read(place.key)
    return tensor if place.expert is None else tensor[place.expert, place.first : place.first + place.shape[0]].clone()


def check_tensors(skeleton: Skeleton) -> set[str]:
    """Look up every parameter of the model, by the files' headers only.

    Returns:
        The names in the checkpoint of all tensors that the model uses.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the config says, or holds no plain floats.
    """
    return {_checked(skeleton, name, parameter).key for name, parameter in _parameters(skeleton)}


def used_tensors(skeleton: Skeleton) -> set[str]:
    """The same names, whatever shapes transforms have given to the model's layers since."""
    places = (_find(skeleton, name) for name, _ in _parameters(skeleton))
    return {place.key for place in places if place is not None}


def _parameters(skeleton: Skeleton) -> Iterator[tuple[str, Tensor]]:
    """All parameters by name, but a tied head that the checkpoint does not hold."""
    head = skeleton.model.get_output_embeddings()
    tied = getattr(skeleton.model.config, "tie_word_embeddings", False)
    for prefix, module in skeleton.model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}"
            is_tied = module is head and tied and leaf == "weight"
            if parameter is not None and not (is_tied and checkpoint_key(skeleton, name) is None):
                yield name, parameter


def unread_weights(skeleton: Skeleton, used: set[str]) -> list[str]:
    """Weights in the checkpoint that the model by its config has no place for, such as a further block's."""
    return [
        key
        for key in skeleton.source
        if key.endswith(".weight") and key not in used and len(skeleton.source.shape(key)) > 1
    ]


def fill_module(skeleton: Skeleton, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give the parameters and buffers below ``path`` their values, floating-point ones as ``dtype``.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    root = skeleton.model.get_submodule(path)
    for prefix, module in root.named_modules(prefix=path):
        fill_parameters(skeleton, prefix, module, device, dtype)
        fill_buffers(skeleton, prefix, module, device)
    skeleton.source.close()  # or the pages that were read would stay in memory beside the weights
    return root


def fill_except_blocks(skeleton: Skeleton, device: torch.device, dtype: torch.dtype) -> None:
    """Fill what runs before and after the blocks (embeddings, norms, rotary tables), not the language-model head."""
    for prefix, module in _outside_blocks(skeleton):
        fill_parameters(skeleton, prefix, module, device, dtype)
        fill_buffers(skeleton, prefix, module, device)
    skeleton.source.close()


def release_except_blocks(skeleton: Skeleton) -> None:
    """Drop what ``fill_except_blocks`` filled."""
    for _, module in _outside_blocks(skeleton):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = buffer.to("meta")


def _outside_blocks(skeleton: Skeleton) -> list[tuple[str, nn.Module]]:
    base, blocks = set(skeleton.model.base_model.modules()), set(skeleton.blocks.modules())
    return [(path, module) for path, module in skeleton.model.named_modules() if module in base - blocks]


def fill_parameters(
    skeleton: Skeleton, prefix: str, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> None:
    """Values for the parameters of one module itself, not of those below it; raises like ``fill_module``."""
    for leaf, parameter in list(module._parameters.items()):
        if parameter is not None:
            _checked(skeleton, f"{prefix}.{leaf}", parameter)
            value = read_tensor(skeleton, f"{prefix}.{leaf}")
            assert value is not None
            module._parameters[leaf] = nn.Parameter(value.to(device, dtype), requires_grad=False)


def release_module(root: nn.Module) -> None:
    """Drop the weights below ``root``: everything goes back to the meta device."""
    root.to("meta")


def _checked(skeleton: Skeleton, name: str, expected: Tensor) -> _Place:
    place = _find(skeleton, name)
    if place is None:
        if name in skeleton.source:  # where the family's checkpoints have another name, so has every engine
            raise CheckpointError(
                f"{skeleton.source.name} calls {name} as transformers does inside, not as "
                f"{skeleton.family.model_type} is published; save it again by save_pretrained with "
                "save_original_format=True."
            )
        raise CheckpointError(
            f"{skeleton.source.name} has no tensor for {name}; the checkpoint does not fit its config."
        )
    if place.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{name} is {place.shape} in the checkpoint and {tuple(expected.shape)} by config.json; "
            "they do not belong together, download the model again."
        )
    dtype = skeleton.source.dtype(place.key)
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"{name} is stored as {dtype}, as quantized weights are; give the model as float32, float16 or bfloat16."
        )
    return place


def fill_buffers(skeleton: Skeleton, prefix: str, module: nn.Module, device: torch.device) -> None:
    """Buffers of one module: from the checkpoint where it has them, else computed by the model's own initializer."""
    missing = False
    for leaf, buffer in list(module._buffers.items()):
        if buffer is None:
            continue
        value = None
        if leaf not in module._non_persistent_buffers_set:
            value = read_tensor(skeleton, f"{prefix}.{leaf}")
        missing |= value is None
        module._buffers[leaf] = torch.empty_like(buffer, device=device) if value is None else value.to(device)
    if missing:
        # The initializer makes weights as well as buffers: it must not see those that are already filled.
        filled = dict(module._parameters)
        for leaf, parameter in filled.items():
            module._parameters[leaf] = None if parameter is None else nn.Parameter(parameter.to("meta"), False)
        skeleton.model._init_weights(module)
        module._parameters.update(filled)


def linear_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Quantizable layers of a block by path: ``nn.Linear`` and GPT-2's ``Conv1D``, without the gates of experts."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith("gate")
    }


def weight_OI_of(module: nn.Module) -> Tensor:
    """The weight as outputs x inputs; Conv1D stores it the other way round."""
    weight: Any = module.weight
    return weight.data.T if isinstance(module, Conv1D) else weight.data


def replace_weight_OI(module: nn.Module, weight_OI: Tensor) -> None:
    """Give a module a weight that may be of another width, float [O, J], in the type it had."""
    if weight_OI.shape == weight_OI_of(module).shape:
        set_weight_OI(module, weight_OI)
        return
    value = weight_OI.T if isinstance(module, Conv1D) else weight_OI
    dtype = weight_OI_of(module).dtype
    module._parameters["weight"] = nn.Parameter(value.to(dtype).contiguous(), requires_grad=False)
    if isinstance(module, nn.Linear):
        module.in_features = weight_OI.shape[1]


def set_weight_OI(module: nn.Module, weight_OI: Tensor) -> None:
    """Replace the weight by ``weight_OI`` [O, I], cast to the module's type."""
    weight: Any = module.weight
    value = weight_OI.T if isinstance(module, Conv1D) else weight_OI
    weight.data.copy_(value.to(weight.dtype))
