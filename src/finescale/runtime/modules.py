"""Quantized linear layers.

Shape legend: T tokens (any leading dimensions), O outputs, I inputs, G groups.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from finescale.grid import ActivationScheme, Grid, InputRule, Outliers, QuantizedWeight, quantize_activations
from finescale.kernels import integer_scale_linear

Path = Literal["float", "integer"]
"""``float``: dequantize and multiply in floating point; ``integer``: the exact int32 product (integer scales only)."""


class QuantizedLinear(nn.Module):
    """A linear layer kept as int8 codes and group scales.

    Args:
        weight: codes and grid.
        bias: float [O] or None.
        inputs: what happens to inputs, or only how they are rounded; None for float inputs.
        path: see ``Path``; ``integer`` needs integer scales and symmetric activations.
        full_range: round inputs as the library compressed-tensors does (``fake_quantize_full_range``); float path only.
        cache: keep the dequantized weight (fast, four times the memory) instead of making it in every call.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    group_of_I: Tensor
    bias: Tensor | None
    integer_scale_OG: Tensor | None
    channel_scale_O: Tensor | None
    dense_OI: Tensor | None
    outlier_value: Tensor | None
    outlier_column: Tensor | None
    outlier_row_start_R: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        inputs: InputRule | ActivationScheme | None,
        path: Path = "float",
        cache: bool = False,
        full_range: bool = False,
    ) -> None:
        super().__init__()
        grid = weight.grid
        self.scheme, self.scale_dtype = grid.scheme, grid.scale_dtype
        self.amplifier, self.folded = grid.amplifier, grid.folded
        self.inputs = inputs if isinstance(inputs, InputRule) else InputRule(inputs)
        self.path: Path = path
        self.full_range = full_range
        self.out_features, self.in_features = weight.codes_OI.shape
        self.register_buffer("codes_OI", weight.codes_OI, persistent=False)
        self.register_buffer("scale_OG", grid.scale_OG, persistent=False)
        self.register_buffer("zero_OG", grid.zero_OG, persistent=False)
        self.register_buffer("group_of_I", grid.group_of_I, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        for name in ("value", "column", "row_start_R"):
            self.register_buffer(f"outlier_{name}", getattr(weight.outliers, name, None), persistent=False)
        integer = path == "integer"
        self.register_buffer("integer_scale_OG", grid.integer_scale_OG() if integer else None, persistent=False)
        self.register_buffer("channel_scale_O", grid.channel_scale_O if integer else None, persistent=False)
        self.register_buffer("dense_OI", weight.dequantize() if cache else None, persistent=False)

    def quantized_weight(self) -> QuantizedWeight:
        """Codes, grid and outliers again."""
        grid = Grid(
            self.scheme, self.scale_OG, self.zero_OG, self.group_of_I, self.scale_dtype, self.amplifier,
            folded=self.folded,
        )  # fmt: skip
        return QuantizedWeight(self.codes_OI, grid, self.outliers())

    def outliers(self) -> Outliers | None:
        """What is added to the dequantized weight, None for nothing."""
        if self.outlier_value is None or self.outlier_column is None:
            return None
        return Outliers(self.in_features, self.outlier_value, self.outlier_column, self.outlier_row_start_R)

    def forward(self, x_TI: Tensor) -> Tensor:
        """float [..., I] -> [..., O], in the type of the input."""
        x_TI = self.inputs.rearrange(x_TI)
        if self.path == "integer":
            return self._integer(x_TI)
        x_TI = self.inputs.round(x_TI, self.full_range)
        dense_OI = self.dense_OI if self.dense_OI is not None else self.quantized_weight().dequantize()
        bias = None if self.bias is None else self.bias.to(x_TI.dtype)
        return nn.functional.linear(x_TI, dense_OI.to(x_TI.dtype), bias)

    def _integer(self, x_TI: Tensor) -> Tensor:
        scheme = self.inputs.scheme
        assert scheme is not None and scheme.symmetric
        assert self.amplifier is not None and self.integer_scale_OG is not None
        codes_TI, scale_T1, _ = quantize_activations(x_TI.reshape(-1, x_TI.shape[-1]), scheme, self.inputs.fixed)
        out_TO = integer_scale_linear(
            codes_TI, scale_T1, self.codes_OI, self.integer_scale_OG, self.scheme.group_size, self.amplifier,
            self.channel_scale_O,
        )  # fmt: skip
        if self.bias is not None:
            out_TO = out_TO + self.bias.float()
        return out_TO.to(x_TI.dtype).reshape(*x_TI.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        groups = "per channel" if self.scheme.group_size == -1 else f"groups of {self.scheme.group_size}"
        scales = "float scales" if self.amplifier is None else f"integer scales over {self.amplifier}"
        scales = "folded scales" if self.folded else scales
        return f"{self.in_features} -> {self.out_features}, {self.scheme.bits} bits, {groups}, {scales}, {self.path}"
