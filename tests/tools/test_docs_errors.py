"""Errors collected from source."""

from pathlib import Path

from tools.docs_errors import TOPICS, errors_by_topic, raised

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "finescale"

SOURCE = """
def f(x, missing):
    if x:
        raise InputError(f"{x} is wrong; " "use another.")
    text = "no file; download it." if missing else f"{missing} is gone."
    raise errors.CheckpointError(text) from None
    raise KeyError("not ours")
    raise InputError(explain(x))
"""


def test_sentences_of_a_file():
    assert list(raised(SOURCE)) == [
        ("InputError", "… is wrong; use another."),
        ("CheckpointError", "no file; download it."),
        ("CheckpointError", "… is gone."),
    ]


def test_every_topic_has_sentences_and_known_ones_are_there():
    found = errors_by_topic(PACKAGE)
    for topic, starts, remedy in TOPICS:
        assert remedy.endswith(".")
        if starts != ("",):
            assert found[topic], topic
    said = {sentence for sentences in found.values() for _, sentence in sentences}
    assert "--set …: write it as key=value, for instance weights.bits=3." in said
    assert "another run is writing to …; wait for it or choose another --out." in said
    assert len(said) > 150 and not any(sentence.strip("… .:") == "" for sentence in said)
    nan = [sentence for sentences in found.values() for _, sentence in sentences if "NaN or Inf" in sentence]
    assert nan and {sentence for _, sentence in found["A number that must not be"]} >= set(nan)
