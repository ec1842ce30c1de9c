"""Importing this makes the plugin take the path of Hopper GPUs on a CPU, whose operators are plain torch there."""

from finescale.kernels.dispatch import Choice
from finescale.runtime import vllm_linear

vllm_linear.choose_kernel = lambda layer, device: Choice("hopper", "emulated")
