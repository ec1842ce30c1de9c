"""Load a checkpoint of finescale through transformers, on finescale's packed layers, and generate.

python examples/generate.py CHECKPOINT "Once upon a time"
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finescale  # transformers now loads finescale's checkpoints onto finescale's layers

checkpoint, prompt = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)

tokens = tokenizer(prompt, return_tensors="pt").to(device)
output = model.generate(**tokens, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
kinds = {type(module).__name__ for module in model.modules()} & {"QuantizedLinear", "PortableLinear", "PackedProduct"}
print(f"by finescale {finescale.__version__}, layers of type {kinds}")
