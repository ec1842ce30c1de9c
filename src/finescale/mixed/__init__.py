"""Bits layer by layer: how much each layer's bits matter, measured, and the best choice for a size."""
