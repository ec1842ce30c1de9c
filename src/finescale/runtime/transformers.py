"""``AutoModelForCausalLM.from_pretrained`` of a finescale checkpoint, on finescale's own layers.

transformers knows our files as compressed-tensors and would simulate them with that library. Once finescale is
imported, files that carry the ``finescale`` key are loaded as `finescale.load` does: packed weights, the fastest kernel
of the device. `finescale.claim` sends them here; all other compressed-tensors files are left to transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finescale.errors import InputError
from finescale.formats.source import open_checkpoint
from finescale.models import Skeleton, find_family
from finescale.models.experts import unfuse_experts
from finescale.models.skeleton import find_blocks, possible_names, weight_OI_of
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.fused import fuse_on_kernels
from finescale.runtime.load import install_quantized, quantized_places, usable_device
from finescale.runtime.portable import join_same_inputs

METHOD = "finescale"


class FinescaleConfig(QuantizationConfigMixin):
    """The quantization config of a finescale checkpoint, kept as it is in config.json."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = METHOD
        self.settings = settings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


class FinescaleQuantizer(HfQuantizer):
    """Takes the quantized layers out of transformers' hands, and puts finescale's in."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Empty places instead of the quantized layers, so that nothing is allocated for them."""
        self._device = _single_device(kwargs.get("device_map"))
        skeleton = _skeleton_of(model)
        names = set(open_quantized(skeleton.source.path).layer_names())
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        paths = {block: skeleton.block_path(index) for index, block in enumerate(skeleton.blocks)}
        for block, path, _ in quantized_places(skeleton, names):
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Place(block.get_submodule(path)))
            module_path = f"{paths[block]}.{path}"
            # transformers reports names as the file has them, or as its own renaming makes them.
            known = (module_path, *possible_names(skeleton, module_path))
            ignored |= {re.escape(each) + r"\." for each in known}
        model._keys_to_ignore_on_load_unexpected = ignored

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        skeleton = _skeleton_of(model)
        for block in skeleton.blocks:
            for path, place in [(path, m) for path, m in block.named_modules() if isinstance(m, Place)]:
                parent, _, leaf = path.rpartition(".")
                setattr(block.get_submodule(parent), leaf, nn.Linear(*place.shape, bias=False, device="meta"))
        quantized = open_quantized(skeleton.source.path)
        device = self._device or next(model.parameters()).device
        install_quantized(skeleton, quantized, device, model.dtype, "kernel", False, "finescale")
        fuse_on_kernels(model)
        join_same_inputs(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class Place(nn.Module):
    """Where a quantized layer will stand. Some models initialize ``weight`` and ``bias`` of their layers by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        outputs, inputs = weight_OI_of(layer).shape
        self.shape = (inputs, outputs)
        self.weight = self.bias = torch.empty(0)


def _skeleton_of(model: PreTrainedModel) -> Skeleton:
    folder = Path(model.config._name_or_path)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no local folder; download the checkpoint first (huggingface_hub.snapshot_download)."
        )
    source = open_checkpoint(folder)
    family = find_family(source.config, allow_unknown=True, keys=source)
    if family.experts is not None:
        unfuse_experts(model, family.experts)
    path, blocks = find_blocks(model)
    return Skeleton(model, source, family, path, len(blocks))


def _single_device(device_map: Any) -> torch.device | None:
    """The one device of a device map, None when there is no map.

    Raises:
        InputError: several devices.
    """
    if device_map is None:
        return None
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
    if len(devices) > 1 or devices & {"disk", "meta"}:
        raise InputError("a finescale checkpoint loads onto one device; use device_map='cuda', or serve it by vLLM.")
    (device,) = devices
    return usable_device(f"cuda:{device}" if device.isdigit() else device)


AUTO_QUANTIZER_MAPPING[METHOD] = FinescaleQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FinescaleConfig
