"""Runs a recipe over a model block by block: streaming, resume, progress."""
