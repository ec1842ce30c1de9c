"""Steps replayed from a recording: on a GPU the same bytes as step by step, on a CPU the step itself."""

import pytest
import torch

from finescale.grid import ActivationScheme, InputRule, QuantizedWeight, WeightScheme
from finescale.tuning import LowRankOptions, RoundingOptions, TuningLayer, correct_weights, replay, tune_rounding
from finescale.tuning.replay import adamw, replayed, set_rates
from tests.tuning import test_low_rank, test_rounding

GPU = torch.device("cuda")


def test_on_a_cpu_a_step_is_itself():
    def step(*_):
        return None

    assert replayed(step, torch.nn.Linear(2, 2), torch.device("cpu")) is step


def test_rates_fall_with_what_is_left():
    first, second = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = adamw([([first], 0.1), ([second], 0.2), ([], 0.3)], torch.device("cpu"))
    set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def counted(monkeypatch):
    """How often a recording is replayed."""
    calls, replay_ = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(replay, "RECORDS", True)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (calls.append(1), replay_(graph))[1])
    return calls


@pytest.mark.gpu
def test_learned_rounding_is_replayed_to_the_same_bytes(monkeypatch):
    found, calls = [], counted(monkeypatch)
    for warm in (3, 10**9):
        monkeypatch.setattr(replay, "WARM", warm)
        block, layers, windows = test_rounding.setup(3)
        block.cuda()
        moved = [
            TuningLayer(
                x.path,
                QuantizedWeight(x.weight.codes_OI.cuda(), test_rounding._on_gpu(x.weight.grid)),
                x.target_OI.cuda(),
            )
            for x in layers
        ]
        rules = {layer.path: InputRule(ActivationScheme(4, symmetric=False)) for layer in layers}
        chosen = RoundingOptions(iterations=20)
        weights, facts = tune_rounding(block, moved, windows, lambda _: {}, rules, chosen, 0, GPU)
        found.append([weight.sha256() for weight in weights] + [facts["error_after"]])
    assert found[0] == found[1] and len(calls) == 17


@pytest.mark.gpu
def test_low_rank_correction_is_replayed_to_the_same_bytes(monkeypatch):
    found, calls = [], counted(monkeypatch)
    for warm in (3, 10**9):
        monkeypatch.setattr(replay, "WARM", warm)
        block, windows = test_low_rank.setup()
        block.cuda()
        schemes = {path: WeightScheme(3, 8, True) for path in ("up", "down")}
        chosen = LowRankOptions(iterations=20, rate=0.01, batch_size=2)
        weights, facts = correct_weights(block, schemes, windows, lambda _: {}, {}, chosen, 0, GPU)
        found.append((weights["up"].cpu(), facts["error_after"]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] and len(calls) == 17
