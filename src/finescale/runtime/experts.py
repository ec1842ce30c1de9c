"""Experts of a loaded checkpoint on the grouped kernels of a GPU: all experts of a block in two packed tensors.

Shape legend: T tokens, K choices of a token, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from finescale.grid import InputRule, QuantizedWeight
from finescale.kernels.dispatch import choose_experts_kernel, layer_facts
from finescale.kernels.experts import PackedExperts, pack_experts, w4a8_experts
from finescale.kernels.hopper import gemm
from finescale.kernels.layout import LARGEST_FOLDED_SCALE
from finescale.models.experts import Expert, UnfusedExperts

Layer = tuple[QuantizedWeight, InputRule]
Place = tuple[nn.Module, str, str]
"""A block, the path of a layer in it, and the layer's name in the file."""


class PackedMixture(nn.Module):
    """Drop-in for the experts of a block, in W4A8 (``kernels/experts.py``).

    Args:
        gate_up, down: as ``pack_experts`` makes them.
        why: for ``repr``.
    """

    gate_up: Tensor
    gate_up_factor_EO: Tensor
    down: Tensor
    down_factor_EO: Tensor

    def __init__(self, gate_up: PackedExperts, down: PackedExperts, why: str) -> None:
        super().__init__()
        self.why = why
        self.gate_up_folded, self.down_folded = gate_up.folded, down.folded
        self.register_buffer("gate_up", gate_up.packed, persistent=False)
        gemm.WORKSPACES.reserve(gate_up.packed.device)
        self.register_buffer("gate_up_factor_EO", gate_up.factor_EO, persistent=False)
        self.register_buffer("down", down.packed, persistent=False)
        self.register_buffer("down_factor_EO", down.factor_EO, persistent=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, each times its routing weight.

        Args:
            hidden_states: float [T, I].
            top_k_index: int64 [T, K].
            top_k_weights: float [T, K].
        """
        gate_up = PackedExperts(self.gate_up, self.gate_up_factor_EO, self.gate_up_folded)
        down = PackedExperts(self.down, self.down_factor_EO, self.down_folded)
        return w4a8_experts(hidden_states, top_k_index, top_k_weights, gate_up, down)

    def extra_repr(self) -> str:
        experts, outputs = self.down_factor_EO.shape
        width = self.gate_up_factor_EO.shape[1] // 2
        return f"{experts} experts, {outputs} -> {width} -> {outputs}, {self.why}"


def install_mixtures(
    places: Iterable[Place], read: Callable[[str], Layer], has_bias: Callable[[str], bool], device: torch.device
) -> list[Place]:
    """Replace the experts of every block that the grouped kernels can run.

    Args:
        places: where the quantized layers of a checkpoint belong.
        read: a layer by its name in the file.
        has_bias: whether a layer of that name has a bias.
        device: where to.

    Returns:
        The places of all other layers.
    """
    left = list(places)
    for block in dict.fromkeys(block for block, _, _ in left):
        for path, experts in [(p, m) for p, m in block.named_modules() if isinstance(m, UnfusedExperts)]:
            names = {p.removeprefix(path + "."): n for b, p, n in left if b is block and p.startswith(path + ".")}
            if len(names) < 3 * len(experts) or any(has_bias(name) for name in names.values()):
                continue
            mixture = pack_mixture(experts, {p: read(name) for p, name in names.items()}, device)
            if mixture is None:
                continue
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, mixture)
            left = [place for place in left if not (place[0] is block and place[2] in set(names.values()))]
    return left


def pack_mixture(experts: UnfusedExperts, layers: Mapping[str, Layer], device: torch.device) -> PackedMixture | None:
    """The experts of a block on the grouped kernels, None where these cannot run them (``choose_experts_kernel``).

    Args:
        experts: the block's experts, which say what their layers are called and what stands between them.
        layers: each layer by its path in ``experts``.
        device: where to.
    """
    members = [expert for expert in experts if isinstance(expert, Expert)]
    plain = all(inputs.is_plain for _, inputs in layers.values()) and all(_is_silu(expert) for expert in members)
    downs_of = {f"{index}.{expert.names.down}" for index, expert in enumerate(members)}
    facts = {path: layer_facts(weight, inputs) for path, (weight, inputs) in layers.items()}
    gate_up_facts = [fact for path, fact in facts.items() if path not in downs_of]
    choice = choose_experts_kernel(gate_up_facts, [facts[path] for path in downs_of], device) if plain else None
    if choice is None or choice.kernel != "hopper-grouped":
        return None
    gates, ups, downs = (
        [layers[f"{index}.{name}"][0] for index, name in enumerate(names)]
        for names in zip(*((e.names.gate, e.names.up, e.names.down) for e in members), strict=True)
    )
    gate_up = _packed(list(zip(gates, ups, strict=True)), device)
    return PackedMixture(gate_up, _packed([(down,) for down in downs], device), choice.why)


def _packed(experts: list[tuple[QuantizedWeight, ...]], device: torch.device) -> PackedExperts:
    """One layer of each expert, or several one above the other."""
    codes = [torch.cat([part.codes_OI for part in parts]) for parts in experts]
    scales = [torch.cat([part.grid.integer_scale_OG() for part in parts]) for parts in experts]
    factors = [torch.cat([_factor(part) for part in parts]) for parts in experts]
    folded = max(int(scale_OG.abs().max()) for scale_OG in scales) <= LARGEST_FOLDED_SCALE
    group_size = experts[0][0].grid.scheme.group_size
    return pack_experts(codes, scales, torch.stack(factors).to(device), group_size, folded)


def _factor(weight: QuantizedWeight) -> Tensor:
    """What the integer scales of each output are to be multiplied by, float32 [O]."""
    grid = weight.grid
    assert grid.amplifier is not None
    if grid.channel_scale_O is None:
        return torch.full(weight.codes_OI.shape[:1], 1 / grid.amplifier)
    return grid.channel_scale_O.float() / grid.amplifier


def _is_silu(expert: Expert) -> bool:
    """By what it does: there are several modules of that name."""
    x = torch.linspace(-4, 4, 9)
    return torch.allclose(expert.act(x), nn.functional.silu(x))
