"""Quantized modules, loading models made of them, and the engines that run them."""
