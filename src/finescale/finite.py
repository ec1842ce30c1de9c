"""Whether a tensor holds NaN or Inf, without another tensor of its size."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf: neither leaves a sum again, and in float64 sums of finite numbers stay finite."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64)))
