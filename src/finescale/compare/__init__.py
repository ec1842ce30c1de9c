"""Many recipes on one model, side by side."""
