"""Other tools beside finescale."""

import pytest

from tools.docs_peers import peers_tables

PROVENANCE = {"versions": "tool 1", "settings": "bits 4", "command": "python tool.py --bits 4", "processor_seconds": 1}


def peer(label, bits, perplexity, **more):
    return {"label": label, "bits": bits, "group_size": 64, "perplexity": perplexity, "provenance": PROVENANCE} | more


@pytest.fixture
def results():
    setting = {"samples": 64, "sample_length": 512, "windows": 20, "length": 2048}
    peers = [peer("tool", 4, 26.5, kl=0.25), peer("tool", 3, 60.0), peer("tool", 4, 9.0, activation_bits=8)]
    ours = {"samples": 64, "length": 512, "windows": 20, "window_length": 2048}
    rows = {"4": {"rounding from quantease": {"perplexity": 22.7, "kl": 0.1}}, "w4a8": {"quantease": {"perplexity": 1}}}
    return {
        "peers-m": {"benchmark": "peers", "model": "m", "setting": setting, "peers": peers},
        "tuning": {"benchmark": "tuning", "models": {"m": {"setting": ours, "rows": rows}}},
    }


def test_ours_stand_beside_the_tools(results):
    text = peers_tables(results)
    assert "| tool | 26.5 (0.25) | **60** |" in text
    assert "| finescale: rounding from quantease | **22.7** (**0.1**) | – |" in text
    assert "* tool: tool 1; `python tool.py --bits BITS`" in text and "w4a8" not in text


@pytest.mark.parametrize("key", ["samples", "length", "windows", "window_length"])
def test_another_setting_is_not_compared(results, key):
    results["tuning"]["models"]["m"]["setting"][key] += 1
    assert "finescale" not in peers_tables(results)


def test_seeds_are_one_row_and_differences_are_paired(results):
    """Losses of two windows that differ by 0.1 and 0.3: 0.2 in the mean, with a standard error of 0.1."""
    results["peers-m"]["peers"] = [
        peer("tool", 4, 20.0, kl=0.2, window_losses=[3.0, 2.8]),
        peer("tool, seed 1", 4, 45.0, kl=0.4, window_losses=[3.2, 3.0]),
    ]
    best = {"perplexity": 10.0, "kl": 0.1, "window_losses": [3.0, 2.6]}
    results["tuning"]["models"]["m"]["rows"] = {"4": {"rounding from quantease, signed scales, damping 0.1": best}}
    text = peers_tables(results)
    assert "| tool | 30 [20 to 45] (0.3) |" in text
    assert "| tool | -18.1% ± 10.0% |" in text and "seed" not in text.replace("several seeds", "")
