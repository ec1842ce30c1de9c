"""What the tests with a real vLLM share: asking it, and what finescale itself generates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORKER = Path(__file__).parent / "greedy_worker.py"
PROMPTS = [[5, 9, 30, 77, 12, 8], [100, 101, 7, 3, 2, 50, 61]]
TOKENS = 12


def ask(python: Path | str, root: Path, folders: Iterable[Path], **request: Any) -> dict[str, dict[str, Any]]:
    """Answers of a real vLLM by name of the folder (`greedy_worker`)."""
    question, answer = root / "request.json", root / "answer.json"
    request = {"prompts": PROMPTS, "tokens": TOKENS, "dtype": "float32", "plugins": "finescale"} | request
    question.write_text(json.dumps(request | {"checkpoints": [str(folder) for folder in folders]}))
    subprocess.run([str(python), str(WORKER), str(question), str(answer)], check=True)
    return {Path(found["checkpoint"]).name: found for found in json.loads(answer.read_text())}


def greedy(model: nn.Module, prompts: Iterable[list[int]] = PROMPTS, count: int = TOKENS) -> list[list[int]]:
    """The likeliest continuation of each prompt."""
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def shortfall(model: nn.Module, continuations: list[list[int]], prompts: Iterable[list[int]] = PROMPTS) -> float:
    """By how much the tokens of another engine are less likely than this model's own, in logarithms, at worst; 0 for
    greedy tokens of the same model."""
    worst = 0.0
    for prompt, tokens in zip(prompts, continuations, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        best, chosen = logits.amax(-1), logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((best - chosen).max()))
    return worst
