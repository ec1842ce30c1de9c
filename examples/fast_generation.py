"""Generate fast: a cache of fixed size and one compiled step, in CUDA graphs where there is a GPU.

python examples/fast_generation.py CHECKPOINT "Once upon a time"
"""

import sys

import torch
from transformers import AutoTokenizer, StaticCache

import finescale

checkpoint, prompt = sys.argv[1:]
cuda = torch.cuda.is_available()
device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
model = finescale.load(checkpoint, device=device, dtype=dtype, path="kernel")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
# model.generate(..., cache_implementation="static") does the same, sampling and all; this is what happens inside.
step = torch.compile(model, fullgraph=True, **({"mode": "reduce-overhead"} if cuda else {"backend": "eager"}))

tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 20)
with torch.no_grad():
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(20):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        logits = step(tokens[:, -1:].clone(), past_key_values=cache).logits
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
print(f"decoded by {type(model.model.layers[0]).__name__}")
