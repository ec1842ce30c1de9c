"""W4A8 kernels for Hopper GPUs (compute capability 9.0)."""
