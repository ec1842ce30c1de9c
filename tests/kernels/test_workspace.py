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
    made: list[torch.Tensor] = []
    device, graph = torch.device("cuda", 0), torch.cuda.CUDAGraph()
    pieces = Workspaces(lambda device: made.append(torch.zeros(1000, device=device)) or made[-1])
    pieces.reserve(device)
    with torch.cuda.graph(graph):
        piece = pieces.of(device, torch.cuda.current_stream().cuda_stream)
        piece.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert len(made) == workspace.SPARE and bool((piece == 1).all())
