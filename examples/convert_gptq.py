"""Give an existing symmetric GPTQ checkpoint integer scales (W4A8), without calibration, and prove the result.

python examples/convert_gptq.py CHECKPOINT OUT
"""

import sys
from pathlib import Path

from finescale.pipeline.convert import convert
from finescale.pipeline.verify import verify

checkpoint, out = sys.argv[1:]
report = convert(checkpoint, Path(out), amplifier="auto")  # 1024 is the paper's
amplifiers = sorted({layer["amplifier"] for layer in report["layers"]})
change = max(layer["relative_error"] for layer in report["layers"])
print(f"{len(report['layers'])} layers, amplifiers {amplifiers}, weights changed by {change:.1e} at most (squared)")

proof = verify(Path(out))
print(f"int32 cannot overflow in {proof.integer_layers} of {proof.layers} layers")
