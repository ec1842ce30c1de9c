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
