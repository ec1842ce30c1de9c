import pytest
import torch

from finescale.bench.moe import bench_moe, bf16_experts
from finescale.errors import InputError


@pytest.mark.parametrize(
    "models, tokens, message", [(("gpt",), (1,), "models are"), (("mixtral-8x7b",), (0,), "least 1")]
)
def test_what_cannot_be_timed_is_refused_first(models, tokens, message):
    with pytest.raises(InputError, match=message):
        bench_moe(models, tokens)


def test_the_baseline_computes_the_same_function(monkeypatch):
    """torch's grouped product by a loop: on a CPU it may be missing."""

    def loop(x_RI, weight_EOI, end_E):
        starts = [0, *end_E.tolist()[:-1]]
        parts = [x_RI[a:b] @ w.T for w, a, b in zip(weight_EOI, starts, end_E.tolist(), strict=True)]
        return torch.cat(parts)

    monkeypatch.setattr("finescale.bench.moe.grouped_mm", loop)
    torch.manual_seed(0)
    x, chosen, weight = torch.randn(9, 16), torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    gate_up, down = torch.randn(4, 24, 16), torch.randn(4, 16, 12)
    expected = torch.zeros(9, 16)
    for token in range(9):
        for k in range(2):
            gate, up = (gate_up[chosen[token, k]] @ x[token]).chunk(2)
            expected[token] += weight[token, k] * (down[chosen[token, k]] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(bf16_experts(x, chosen, weight, gate_up, down), expected, rtol=1e-4, atol=1e-4)
