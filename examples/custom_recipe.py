"""A recipe of one's own: 3 bits, but 4 in every down projection, and the first block left as it is.

python examples/custom_recipe.py MODEL TEXT OUT
"""

import sys
from collections import Counter

import finescale

model_folder, text, out = sys.argv[1:]
recipe = finescale.Recipe.from_dict(
    {
        "name": "mixed",
        "weights": {"bits": 3, "group_size": 32, "symmetric": True, "clip": "mse"},
        "solver": {"name": "quantease", "sweeps": 10, "start": "gptq", "damping": 0.01},
        "overrides": [  # the last match wins
            {"pattern": "*down_proj", "weights": {"bits": 4}},
            {"pattern": "*layers.0.*", "skip": True},
        ],
        "calibration": {"samples": 16, "length": 128},
    }
)
report = finescale.quantize(model_folder, recipe, out=out, calibration=text, allow_partial=True)
print("layers by bits:", dict(Counter(layer["bits"] for layer in report["layers"])))
print(f"{report['model']['quantized_share']:.0%} of the block weights are quantized")
