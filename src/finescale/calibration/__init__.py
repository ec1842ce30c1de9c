"""Texts to token batches, running a block, accumulating statistics."""
