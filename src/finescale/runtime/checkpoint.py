"""Reading a quantized checkpoint layer by layer, with every check that does not need the model.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finescale.errors import CheckpointError, NumericsError
from finescale.formats import registry
from finescale.formats.source import SourceCheckpoint, open_checkpoint
from finescale.grid import ActivationScheme, InputRule, QuantizedWeight, input_rule
from finescale.grid.inputs import SUFFIXES
from finescale.grid.integer_scale import prove_no_overflow

METADATA_VERSION = 1


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """An opened quantized checkpoint.

    Attributes:
        source: its tensors.
        fmt: its format.
        activations: how the inputs of most layers are rounded, None when they are not; see ``inputs_of`` for each.
        metadata: what finescale stored under its own key; empty for checkpoints of others.
    """

    source: SourceCheckpoint
    fmt: registry.Format
    activations: ActivationScheme | None
    metadata: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        value: dict[str, Any] = self.source.config["quantization_config"]
        return value

    def layer_names(self) -> list[str]:
        """Names of the quantized layers, in the order of the file's tensors."""
        marks = tuple("." + suffix for suffix in self.fmt.suffixes if suffix not in ("weight", "bias"))
        names = dict.fromkeys(key.rpartition(".")[0] for key in self.source if key.endswith(marks))
        return [name for name in names if self.fmt.layer_scheme(self.config, name) is not None]

    def inputs_of(self, name: str) -> InputRule:
        """What happens to the input of a layer. Raises CheckpointError when tensors that say so are missing."""
        scheme = registry.layer_activations(self.source.config, name)
        facts = dict(self.metadata.get("layers", {}).get(name, {}).get("inputs") or {})
        facts["scheme"] = None if scheme is None else asdict(scheme)
        keys = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
        tensors = {suffix: self.source.read(key) for suffix, key in keys.items() if key in self.source}
        return input_rule(facts, tensors, name)

    def activation_max(self, name: str) -> int:
        """Largest magnitude of the codes of a layer's input, 127 when it is not rounded."""
        scheme = registry.layer_activations(self.source.config, name)
        return scheme.code_max if scheme else 127

    def read(self, name: str, device: torch.device | str = "cpu") -> QuantizedWeight:
        """One layer, its integer scales recovered and its overflow bound proved again.

        Args:
            name: of the layer.
            device: where that is done, and the result lies; formats other than compressed-tensors know only the CPU.

        Raises:
            CheckpointError: missing or damaged tensors.
            NumericsError: scales that are not integers over the stored amplifier, or not folded as promised, or a bound
                that does not hold.
        """
        scheme = self.fmt.layer_scheme(self.config, name)
        if scheme is None:
            raise CheckpointError(f"{name} is not quantized in {self.source.name}.")
        prefix = name + "."
        # weight_g_idx: files of old versions of compressed-tensors, which finescale reads and never writes.
        suffixes = [suffix for suffix in (*self.fmt.suffixes, "weight_g_idx") if prefix + suffix in self.source]
        tensors = {suffix: self.source.read(prefix + suffix).to(device) for suffix in suffixes if suffix != "bias"}
        facts = self.metadata.get("layers", {}).get(name, {})
        amplifier = facts.get("amplifier")
        try:
            weight = self.fmt.unpack(tensors, scheme, amplifier)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if facts.get("folded"):
            if amplifier != 1:
                raise CheckpointError(f"{name}: folded scales have no amplifier; config.json was changed.")
            weight = replace(weight, grid=replace(weight.grid, folded=True))
        if amplifier is not None:
            try:
                bound = self._bound(name, weight)
            except NumericsError as error:
                raise NumericsError(f"{name}: {error}") from error
            stored = facts.get("bound")
            if stored != bound:
                raise NumericsError(
                    f"{name}: the stored overflow bound {stored} is not the {bound} of its tensors; "
                    "the file was changed, quantize again."
                )
        return weight

    def _bound(self, name: str, weight: QuantizedWeight) -> int:
        grid = weight.grid
        integer_scale_OG, maximum = grid.integer_scale_OG(), self.activation_max(name)
        return prove_no_overflow(name, weight.codes_OI, integer_scale_OG, grid.group_of_I, maximum)

    def layers(self) -> Iterator[tuple[str, QuantizedWeight]]:
        for name in self.layer_names():
            yield name, self.read(name)


def open_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Open a quantized checkpoint of finescale or of another tool.

    Raises:
        InputError: no model folder.
        CheckpointError: damaged, not quantized, or of a newer version of finescale.
    """
    source = open_checkpoint(path)
    quantization = source.config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path} is not quantized; give a folder that finescale quantize wrote.")
    metadata = _metadata(quantization, path)
    fmt = registry.get(registry.detect(source.config))
    return QuantizedCheckpoint(source, fmt, registry.activation_scheme(source.config), metadata)


def has_integer_scales(source: SourceCheckpoint) -> bool:
    """Whether a checkpoint has layers whose sums stay in int32.

    Raises:
        CheckpointError: what finescale stored there is damaged, or of a newer version.
    """
    quantization = source.config.get("quantization_config")
    layers = _metadata(quantization, source.name).get("layers", {}) if isinstance(quantization, dict) else {}
    return any(facts.get("amplifier") for facts in layers.values())


def _metadata(quantization: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """What finescale stored under its own key; raises like ``open_quantized``."""
    metadata = quantization.get("finescale") or {}
    version = metadata.get("version", 0) if isinstance(metadata, dict) else None
    if isinstance(version, int) and version > METADATA_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer finescale ({metadata.get('finescale')}); update finescale."
        )
    layers = metadata.get("layers", {}) if isinstance(version, int) else None
    if not isinstance(layers, dict):
        raise CheckpointError(f"what {path}/config.json holds under finescale is damaged; quantize again.")
    if not _is_kv_cache(metadata.get("kv_cache")):
        raise CheckpointError(f"what {path}/config.json holds of the key-value cache is damaged; quantize again.")
    for name, facts in layers.items():
        if not _are_facts(facts):
            raise CheckpointError(f"what {path}/config.json holds of {name} is damaged; quantize again.")
    return metadata


def _is_kv_cache(facts: Any) -> bool:
    """Whether this may be a recipe's part of that name, or nothing."""
    known = isinstance(facts, dict) and facts.get("bits") in (4, 6, 8) and isinstance(facts.get("symmetric"), bool)
    return facts is None or known


def _are_facts(facts: Any) -> bool:
    """Whether this may be what finescale stores of a layer: an amplifier and a bound that are integers or nothing."""
    if not isinstance(facts, dict) or not isinstance(facts.get("inputs") or {}, dict):
        return False
    amplifier, bound = facts.get("amplifier"), facts.get("bound")
    return (amplifier is None or (type(amplifier) is int and amplifier > 0)) and (bound is None or type(bound) is int)
