"""Workspaces: one for each stream, made ahead where models are put together."""

import pytest
import torch

from finescale.kernels import workspace
from finescale.kernels.workspace import Workspaces


def test_one_for_each_stream_that_stays():
    made = []
    pieces = Workspaces(lambda device: made.append(device) or object())
    device = torch.device("cpu")
    first, second = pieces.of(device, 1), pieces.of(device, 2)
    assert first is not second and first is pieces.of(device, 1) and second is pieces.of(device, 2)
    assert len(made) == 2
    pieces.reserve(device)  # graphs are a matter of GPUs
    assert len(made) == 2


def test_spare_pieces_are_used_first(monkeypatch):
    made = []
    stream = type("Stream", (), {"synchronize": lambda self: made.append("synchronized")})
    monkeypatch.setattr(workspace.torch.cuda, "current_stream", lambda device: stream())
    pieces, device = Workspaces(lambda device: made.append(device) or object()), torch.device("cuda", 0)
    for _ in range(2):
        pieces.reserve(device)
    assert made == [device] * workspace.SPARE + ["synchronized"]
    assert len({id(pieces.of(device, stream)) for stream in range(workspace.SPARE)}) == workspace.SPARE
    assert len(made) == workspace.SPARE + 1
    pieces.of(device, 99)
    assert len(made) == workspace.SPARE + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_is_made_while_a_graph_is_recorded():
    device = torch.device("cuda", 0)
    pieces = Workspaces(lambda device: torch.zeros(1000, device=device))
    pieces.reserve(device)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        pieces.of(device, torch.cuda.current_stream().cuda_stream).add_(1)
    assert torch.cuda.memory_allocated() == before
