"""The output checkpoint: one shard per block, written when the block is done, and the small files around them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finescale._version import __version__
from finescale.errors import CheckpointError, NumericsError
from finescale.formats.registry import OWN_METHOD, Format
from finescale.formats.source import INDEX_NAME, check_shard
from finescale.grid import ActivationScheme, InputRule, QuantizedWeight
from finescale.models import Skeleton
from finescale.models.skeleton import checkpoint_key, layer_name, linear_modules, read_tensor, used_tensors
from finescale.pipeline.journal import file_sha256, full_disk_explained, write_json, write_shard
from finescale.pipeline.plan import LayerPlan, Plan
from finescale.runtime.checkpoint import METADATA_VERSION

NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".h5", ".msgpack", ".onnx", ".partial", ".ckpt"}
COPY_LIMIT = 64 << 20
WRITTEN_ANEW = {"config.json", INDEX_NAME, "quantize_config.json", "report.json", "run.json", "report.html"}


@dataclass(frozen=True)
class Output:
    """Where the tensors of the source go."""

    skeleton: Skeleton
    fmt: Format
    out: Path

    def shard(self, block: int | None) -> Path:
        """File of a block; None is everything outside the blocks."""
        total = self.skeleton.block_count + 1
        number = 1 if block is None else block + 2
        return self.out / f"model-{number:05d}-of-{total:05d}.safetensors"

    def shards(self) -> list[Path]:
        """All files of tensors."""
        return [self.shard(block) for block in (None, *range(self.skeleton.block_count))]

    @cached_property
    def _keys(self) -> dict[int | None, list[str]]:
        """Source tensors by the number of their block; None is everything outside the blocks."""
        prefix = self._blocks_prefix()
        keys: dict[int | None, list[str]] = {block: [] for block in (None, *range(self.skeleton.block_count))}
        for key in self.skeleton.source:
            number = key.removeprefix(prefix).split(".", 1)[0] if key.startswith(prefix) else ""
            block = int(number) if number.isdigit() and int(number) < self.skeleton.block_count else None
            keys[block].append(key)
        return keys

    def _blocks_prefix(self) -> str:
        first = self.skeleton.block_path(0)
        for name, _ in self.skeleton.blocks[0].named_parameters():
            key = checkpoint_key(self.skeleton, f"{first}.{name}")
            if key is not None:
                return key.split(".0.", 1)[0] + "."
        raise CheckpointError(
            f"{self.skeleton.source.name} holds no tensor of its first block; it does not fit its config."
        )

    def keys_of(self, block: int | None) -> list[str]:
        """Names of the source tensors of a block."""
        return self._keys[block]

    def file_names(self) -> list[str]:
        """Names of all files that make up the output, besides the report."""
        shards = [path.name for path in self.shards()]
        return [*shards, INDEX_NAME, "config.json", *(path.name for path in self._small_files())]

    def write_rest(self, changed: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
        """Everything outside the blocks, byte for byte, or as a transform ``changed`` it.

        Raises:
            NumericsError: a tensor that the model uses holds NaN or Inf.
        """
        path = self.shard(None)
        if path.is_file():
            return
        tensors = {key: self._copied(key) for key in self.keys_of(None)}
        write_shard(path, tensors | dict(changed() if changed else {}))

    @cached_property
    def _used(self) -> set[str]:
        """Source tensors that the model reads: what else a checkpoint may hold is nobody's number."""
        return used_tensors(self.skeleton)

    def _copied(self, key: str) -> Tensor:
        tensor = self.skeleton.source.read(key)
        return _finite(key, tensor) if key in self._used else tensor

    def write_block(
        self,
        block: int,
        layers: Iterable[tuple[LayerPlan, QuantizedWeight]],
        changed: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, InputRule] | None = None,
    ) -> None:
        """One block: quantized layers packed, with what the ``inputs`` of each need; every other tensor byte for byte
        under its own name, or as a transform ``changed`` it.

        Raises:
            NumericsError: a tensor that stays as it is holds NaN or Inf. In the last block no later one would show it.
        """
        tensors: dict[str, Tensor] = {}
        solved = {plan.name: (plan, weight) for plan, weight in layers}
        fused = self._fused_keys(block, solved)
        for key in self.keys_of(block):
            if key.removesuffix(".weight") not in solved and key not in fused:
                tensors[key] = self._copied(key)
        for name, (plan, weight) in solved.items():
            packed = pack_layer(self.fmt, plan, weight)
            if self.fmt.name.startswith("gptq"):
                # GPTQ readers expect a bias only beside layers that have one, and that one is copied above.
                packed.pop("bias", None)
            tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
            if inputs and self.fmt.name != "dense":
                tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in inputs[plan.path].tensors().items()})
        if fused:
            tensors.update(self._unfused(block, solved))
        tensors.update(changed or {})
        write_shard(self.shard(block), tensors)

    def _unfused(self, block: int, solved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Experts' weights that are not quantized, out of 3-D tensors: they are named one by one like the others."""
        tensors = {}
        for path in linear_modules(self.skeleton.blocks[block]):
            full = f"{self.skeleton.block_path(block)}.{path}"
            name = layer_name(self.skeleton, full)
            if name not in solved and name + ".weight" not in self.skeleton.source:
                value = read_tensor(self.skeleton, full + ".weight")
                assert value is not None
                tensors[name + ".weight"] = _finite(name + ".weight", value)
        return tensors

    def _fused_keys(self, block: int, solved: Mapping[str, Any]) -> set[str]:
        """3-D expert tensors of the source that the output replaces by one tensor per expert."""
        if self.skeleton.family.experts is None:
            return set()
        return {key for key in self.keys_of(block) if key.endswith((".experts.gate_up_proj", ".experts.down_proj"))}

    def finish(
        self,
        plan: Plan,
        layer_records: list[dict[str, Any]],
        recipe: dict[str, Any],
        config_changes: Mapping[str, Any] | None = None,
    ) -> tuple[int, dict[str, str]]:
        """Index, tokenizer and, last, config.json: only now the folder is a model.

        Returns:
            The bytes of all shards, and the SHA-256 of every file by name.
        """
        weight_map, total = self._index()
        write_json(self.out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in self._small_files():
            with full_disk_explained(self.out):
                shutil.copyfile(path, self.out / path.name)
        config = dict(self.skeleton.source.config) | dict(config_changes or {})
        quantization = self._quantization_config(plan, layer_records, recipe)
        if quantization is not None:
            config["quantization_config"] = quantization
        write_json(self.out / "config.json", config)
        return total, {name: file_sha256(self.out / name) for name in self.file_names()}

    def _small_files(self) -> list[Path]:
        """Files of the source beside its weights and config: tokenizer, chat template, generation config, licence."""
        return small_files(self.skeleton.source.path)

    def _index(self) -> tuple[dict[str, str], int]:
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        total = 0
        for path in self.shards():
            check_shard(path)
            total += path.stat().st_size
            with safe_open(path, framework="pt") as handle:
                weight_map.update(dict.fromkeys(handle.keys(), path.name))
        return dict(sorted(weight_map.items())), total

    def _quantization_config(
        self, plan: Plan, layer_records: list[dict[str, Any]], recipe: dict[str, Any]
    ) -> dict[str, Any] | None:
        by_layer = {record["name"]: input_scheme(record) for record in layer_records}
        activations = by_layer if any(by_layer.values()) else None
        schemes = {layer.name: layer.scheme for layer in plan.layers}
        ignore = [*plan.skipped, *self._other_linears()]
        layers = {record["name"]: stored_facts(record) for record in layer_records}
        own = {record["name"]: record["inputs"] for record in layer_records if not is_plain(record)}
        for name, inputs in own.items():
            layers[name]["inputs"] = {key: inputs[key] for key in ("gather", "rotation")}
        for record in layer_records:
            if record.get("outliers"):
                layers[record["name"]]["outliers"] = record["outliers"]
        metadata = {
            "version": METADATA_VERSION,
            "finescale": __version__,
            "recipe": recipe["name"],
            "activations": recipe["activations"],
            "kv_cache": recipe["kv_cache"],
            "layers": layers,
        }
        if self.fmt.name.startswith("gptq"):
            solver = recipe["solver"]  # see plan.scattered_groups
            scattered = bool(solver.get("act_order")) and not solver.get("static_groups", True)
            return self.fmt.quantization_config(schemes, activations, ignore, metadata, desc_act=scattered)
        config = self.fmt.quantization_config(schemes, activations, ignore, metadata)
        if config is not None and own:
            config["quant_method"] = OWN_METHOD
        return config

    def _other_linears(self) -> list[str]:
        """Linear layers outside the blocks (the head) and routers inside, which stay as they are."""
        quantizable = {
            f"{self.skeleton.block_path(index)}.{path}"
            for index, block in enumerate(self.skeleton.blocks)
            for path in linear_modules(block)
        }
        others = []
        for name, module in self.skeleton.model.named_modules():
            is_router = "router" in type(module).__name__.lower()
            if (isinstance(module, nn.Linear) or is_router) and name not in quantizable:
                key = checkpoint_key(self.skeleton, name + ".weight")
                others.append(key.removesuffix(".weight") if key else name)
        return others


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(f"{name} holds NaN or Inf; repair or re-download the checkpoint.")
    return tensor


def stored_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a layer under the ``finescale`` key: what its scales are, and their proof."""
    facts = {key: record[key] for key in ("bits", "group_size", "symmetric", "amplifier", "bound")}
    return facts | {"folded": True} if record.get("folded") else facts


def input_scheme(record: Mapping[str, Any]) -> ActivationScheme | None:
    """How the input of a layer is rounded, by its record."""
    facts = record["inputs"]["scheme"]
    return None if facts is None else ActivationScheme(**facts)


def is_plain(record: Mapping[str, Any]) -> bool:
    """Whether the input of a layer is at most rounded, by its record."""
    return not record["inputs"]["gather"] and record["inputs"]["rotation"] is None


def small_files(source: Path) -> list[Path]:
    """The files of a model folder that a result takes over as they are."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in NOT_COPIED
        and path.name not in WRITTEN_ANEW
        and not path.name.startswith(".")
        and path.stat().st_size <= COPY_LIMIT
    ]


def pack_layer(fmt: Format, plan: LayerPlan, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of one layer by suffix; a dense layer keeps the orientation of its source."""
    packed = fmt.pack(weight)
    if fmt.name == "dense" and plan.transposed:
        packed["weight"] = packed["weight"].T.contiguous()
    return packed


def unpack_layer(fmt: Format, plan: LayerPlan, tensors: dict[str, Tensor]) -> Tensor:
    """The dequantized weight, float32 [O, I], of a layer as it stands in a shard."""
    if fmt.name == "dense":
        weight = tensors["weight"].to(torch.float32)
        return weight.T if plan.transposed else weight
    return fmt.unpack(tensors, plan.scheme).dequantize()


def stored_weight(fmt: Format, plan: LayerPlan, weight: QuantizedWeight) -> Tensor:
    """The weight a reader of the shard will compute with, float32 [O, I]: later blocks are calibrated on it."""
    return unpack_layer(fmt, plan, pack_layer(fmt, plan, weight)) if fmt.name == "dense" else weight.dequantize()
