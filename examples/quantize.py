"""Quantize a model, load the result, and compare it with the original.

python examples/quantize.py MODEL TEXT OUT
"""

import sys

import finescale

model_folder, text, out = sys.argv[1:]
report = finescale.quantize(
    model_folder,
    "w4a8-integer-scale",  # `finescale recipes` lists all
    out=out,
    calibration=text,
    settings=("calibration.samples=16", "solver.sweeps=10"),  # any key of the recipe
)
errors = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
worst = max(errors, key=errors.__getitem__)
print(f"{len(errors)} layers; the largest relative error is {errors[worst]:.4f}, of {worst}")

model = finescale.load(out)  # a PreTrainedModel of transformers, with packed weights
print(f"loaded a {type(model).__name__}")

result = finescale.evaluate(out, text, windows=2, length=128, against=model_folder)
print(f"perplexity {result.perplexity:.2f}, of the original {result.reference_perplexity:.2f}, KL {result.kl:.4f}")
