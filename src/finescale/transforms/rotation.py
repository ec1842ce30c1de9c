"""A rotation of the residual stream, and what it makes of the weights outside the blocks (QuaRot, arXiv 2404.00456).

Rows rotate as x -> x Q. Behind RMSNorms Q = D H / sqrt(n), random signs times a Hadamard matrix. A LayerNorm also
subtracts the mean, so behind LayerNorms Q must leave the vector of ones where it is: Q = H S H^T / n does, with the
sign of the first row of H (which is all ones) fixed at +1. Either way the norms need no change but in their gains, and
a rotated model is loaded by any engine.
Shape legend: N hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finescale.errors import InputError, NumericsError
from finescale.grid.hadamard import largest_rotation, rotate
from finescale.models import Skeleton
from finescale.models.edges import is_norm
from finescale.models.skeleton import checkpoint_key, read_tensor

_MOST_OF_A_BIAS = 1e4


@dataclass(frozen=True)
class Rotation:
    """Q in factors.

    Attributes:
        size, inner: of the Hadamard matrix, see `finescale.grid.hadamard.rotate`.
        sign_N: +-1, float [N].
        keeps_ones: whether the vector of ones stays, as LayerNorms need.
    """

    size: int
    inner: int
    sign_N: Tensor
    keeps_ones: bool

    def apply(self, x: Tensor) -> Tensor:
        """x Q along the last dimension, computed in float64, in the type of ``x``."""
        sign_N = self.sign_N.to(x.device)
        y = x.double()
        if self.keeps_ones:
            return rotate(rotate(y, self.size, self.inner) * sign_N, self.size, self.inner, back=True).to(x.dtype)
        return rotate(y * sign_N, self.size, self.inner).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        """x Q^T along the last dimension."""
        if self.keeps_ones:  # H S H^T / n is its own inverse
            return self.apply(x)
        return (rotate(x.double(), self.size, self.inner, back=True) * self.sign_N.to(x.device)).to(x.dtype)


def make_rotation(width: int, keeps_ones: bool, seed: int) -> Rotation:
    """A random rotation of so many channels: the largest Hadamard matrix that fits, signs by ``seed``."""
    size, inner = largest_rotation(width)
    generator = torch.Generator().manual_seed(seed)
    sign_N = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    if keeps_ones:
        sign_N[:inner] = 1.0
    return Rotation(size, inner, sign_N, keeps_ones)


def absorb_norm(gain_N: Tensor, bias_N: Tensor | None, rotation: Rotation, what: str) -> tuple[Tensor, Tensor | None]:
    """The bias that a norm has once its gain moved into its readers and its output is rotated; (ones, bias / gain Q).

    Raises:
        NumericsError: a gain so small beside its bias that the bias cannot be divided by it.
    """
    if bias_N is None:
        return torch.ones_like(gain_N), None
    moved_N = bias_N.double() / gain_N.double()
    moved_N = torch.where(bias_N == 0, torch.zeros_like(moved_N), moved_N)
    if not bool((moved_N.abs() < _MOST_OF_A_BIAS).all()):
        raise NumericsError(
            f"{what} has a bias where its gain is almost zero, which cannot be rotated; leave quarot out."
        )
    return torch.ones_like(gain_N), rotation.apply(moved_N).to(bias_N.dtype)


@dataclass(frozen=True)
class Outside:
    """Where a model keeps what is outside its blocks: module paths of embeddings, of the last norm, of the head."""

    embeddings: tuple[str, ...]
    norm: str
    head: str
    tied: bool


def find_outside(skeleton: Skeleton) -> Outside:
    """What has to be rotated outside of the blocks.

    Raises:
        InputError: the model is not built so that its residual stream can be rotated; says why.
    """
    model = skeleton.model
    inside = set(skeleton.blocks.modules())
    width = int(model.config.hidden_size)
    head = model.get_output_embeddings()
    outside = {name: module for name, module in model.named_modules() if module not in inside}
    norms = [name for name, module in outside.items() if is_norm(module)]
    kind = skeleton.family.model_type
    if len(norms) != 1:
        raise InputError(
            f"quarot cannot rotate {kind}: {len(norms)} norms stand outside its blocks where only the last may; "
            "leave it out."
        )
    others = [name for name, module in outside.items() if isinstance(module, nn.Linear) and module is not head]
    if others or head is None:
        raise InputError(f"quarot cannot rotate {kind}: {', '.join(others) or 'no output head'}; leave it out.")
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise InputError(f"quarot cannot rotate {kind} with norms behind its layers; leave it out.")
    embeddings = [name for name, module in outside.items() if isinstance(module, nn.Embedding)]
    if any(outside[name].weight.shape[1] != width for name in embeddings):
        raise InputError(f"quarot cannot rotate {kind}: its embeddings are not of the hidden size; leave it out.")
    (head_path,) = (name for name, module in outside.items() if module is head)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return Outside(tuple(embeddings), norms[0], head_path, tied)


def outside_names(skeleton: Skeleton, outside: Outside) -> list[str]:
    """Names in the checkpoint of the tensors that `rotated_outside` makes."""
    paths = [f"{path}.weight" for path in (*outside.embeddings, outside.norm)]
    found = [checkpoint_key(skeleton, path) for path in (*paths, f"{outside.norm}.bias")]
    head = checkpoint_key(skeleton, f"{outside.head}.weight") or f"{outside.head}.weight"
    return sorted({key for key in found if key is not None} | {head})


def rotated_outside(skeleton: Skeleton, outside: Outside, rotation: Rotation) -> dict[str, Tensor]:
    """Embeddings, last norm and head of the rotated model by name in the checkpoint, in their stored types.

    Tied embeddings come apart: the head also takes the last norm's gain, which embeddings must not have.
    """
    tensors = {}
    for path in outside.embeddings:
        key, value = _stored(skeleton, f"{path}.weight")
        tensors[key] = rotation.apply(value)
    gain_key, gain_N = _stored(skeleton, f"{outside.norm}.weight")
    bias_key = checkpoint_key(skeleton, f"{outside.norm}.bias")
    bias_N = None if bias_key is None else skeleton.source.read(bias_key)
    ones_N, moved_N = absorb_norm(gain_N, bias_N, rotation, outside.norm)
    tensors[gain_key] = ones_N
    if bias_key is not None and moved_N is not None:
        tensors[bias_key] = moved_N
    head_key = checkpoint_key(skeleton, f"{outside.head}.weight")
    if head_key is None or outside.tied:
        input_path = next(
            name for name, module in skeleton.model.named_modules() if module is skeleton.model.get_input_embeddings()
        )
        _, head_VN = _stored(skeleton, f"{input_path}.weight")
        head_key = head_key or f"{outside.head}.weight"
    else:
        head_VN = skeleton.source.read(head_key)
    tensors[head_key] = rotation.apply(head_VN.double() * gain_N.double()).to(head_VN.dtype)
    return tensors


def _stored(skeleton: Skeleton, name: str) -> tuple[str, Tensor]:
    key, value = checkpoint_key(skeleton, name), read_tensor(skeleton, name)
    assert key is not None and value is not None  # checked when the job was prepared
    return key, value
