"""The quantized matrix products, as torch custom ops."""

from finescale.kernels.reference import grouped_int32_product, integer_scale_linear

__all__ = ["grouped_int32_product", "integer_scale_linear"]
