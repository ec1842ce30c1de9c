"""QuaRot (arXiv 2404.00456): Hadamard rotations spread outliers over all channels.

Fused into the weights: the rotation of the residual stream (norms' gains go into what reads them) and one of each value
head, taken back in the attention's output projection. By option online, which only finescale runs: one before the down
projection, and one across heads before the attention's output projection.
Shape legend: O outputs, I inputs, N hidden size.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from finescale.errors import InputError
from finescale.grid import InputRule
from finescale.grid.hadamard import largest_rotation, rotate
from finescale.models import Skeleton
from finescale.models.edges import is_norm
from finescale.models.skeleton import set_weight_OI, weight_OI_of
from finescale.transforms.rotation import Outside, Rotation, absorb_norm, find_outside, make_rotation
from finescale.transforms.view import BlockView, Changes, TransformOptions


class QuarotOptions(TransformOptions):
    """``online_down`` and ``online_o`` rotate inputs at run time; ``heads`` rotates each value head; ``seed`` gives the
    signs of the residual stream's rotation."""

    online_down: bool = False
    online_o: bool = False
    heads: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)


def prepare_quarot(skeleton: Skeleton, options: QuarotOptions) -> tuple[Rotation, Outside]:
    """The rotation of a model's residual stream. Raises InputError where the model cannot be rotated."""
    outside = find_outside(skeleton)
    norms = [module for module in skeleton.blocks[0].modules() if is_norm(module)]
    subtracts_mean = any(getattr(norm, "bias", None) is not None or isinstance(norm, nn.LayerNorm) for norm in norms)
    width = int(skeleton.model.config.hidden_size)
    if largest_rotation(width)[0] == 1:
        raise InputError(f"quarot knows no Hadamard matrix for {width} channels; leave it out.")
    return make_rotation(width, subtracts_mean, options.seed), outside


def apply_quarot(view: BlockView, options: QuarotOptions) -> Changes:
    """Rotate what the block reads from the residual stream and what it writes to it, and inside as the options say."""
    rotation = view.rotation
    assert rotation is not None
    width = rotation.sign_N.shape[0]
    links = view.links(rotation.undo) if options.heads or options.online_o else ()
    facts: dict[str, dict[str, Any]] = {}
    readers: set[str] = set()
    for edge in view.edges:
        readers.update(edge.consumers)
        norm = view.block.get_submodule(edge.norm)
        gain_N = norm._parameters["weight"]
        assert gain_N is not None
        if gain_N.shape[0] != width:  # a norm inside, as multi-head latent attention has them
            raise InputError(f"quarot rotates {width} channels and {edge.norm} has {gain_N.shape[0]}; leave it out.")
        bias_N = norm._parameters.get("bias")
        ones_N, moved_N = absorb_norm(gain_N.data, None if bias_N is None else bias_N.data, rotation, edge.norm)
        for path in edge.consumers:
            module = view.block.get_submodule(path)
            set_weight_OI(module, rotation.apply(weight_OI_of(module).double() * gain_N.data.double()))
        gain_N.data.copy_(ones_N)
        if bias_N is not None and moved_N is not None:
            bias_N.data.copy_(moved_N)
    writers = [path for step in view.steps for path in step.linears if path not in readers]
    for path in writers:
        module = view.block.get_submodule(path)
        if weight_OI_of(module).shape[0] == width:
            set_weight_OI(module, rotation.apply(weight_OI_of(module).T).T)
            bias = module._parameters.get("bias")
            if bias is not None:
                bias.data.copy_(rotation.apply(bias.data))
    inputs: dict[str, InputRule] = {}
    for link in links:
        head_dim = _head_dim(view, link.producer)
        if head_dim is None or not view.in_attention(link.consumers[0]):
            continue
        if options.heads:
            size, inner = largest_rotation(head_dim)
            producer = view.block.get_submodule(link.producer)
            set_weight_OI(producer, rotate(weight_OI_of(producer).double().T, size, inner).T)
            bias = producer._parameters.get("bias")
            if bias is not None:
                bias.data.copy_(rotate(bias.data.double(), size, inner))
            for path in link.consumers:
                _rotate_columns(view, path, size, inner)
            facts[link.consumers[0]] = {"head": [size, inner]}
        if options.online_o:
            heads = link.channel_I.shape[0] // head_dim
            size, inner = largest_rotation(heads)
            for path in link.consumers:
                _rotate_columns(view, path, size, inner * head_dim)
                inputs[path] = InputRule(rotation=(size, inner * head_dim))
            facts.setdefault(link.consumers[0], {})["online"] = [size, inner * head_dim]
    for path in writers if options.online_down else ():
        if path in view.targets and not view.in_attention(path):
            size, inner = largest_rotation(weight_OI_of(view.block.get_submodule(path)).shape[1])
            _rotate_columns(view, path, size, inner)
            inputs[path] = InputRule(rotation=(size, inner))
            facts[path] = {"online": [size, inner]}
    return Changes(facts, inputs)


def _rotate_columns(view: BlockView, path: str, size: int, inner: int) -> None:
    module = view.block.get_submodule(path)
    set_weight_OI(module, rotate(weight_OI_of(module).double(), size, inner))


def _head_dim(view: BlockView, path: str) -> int | None:
    """Channels of one head, from the attention module around a linear."""
    value = getattr(view.block.get_submodule(path.rpartition(".")[0]), "head_dim", None)
    rows = weight_OI_of(view.block.get_submodule(path)).shape[0]
    return int(value) if isinstance(value, int) and value > 0 and rows % value == 0 else None
