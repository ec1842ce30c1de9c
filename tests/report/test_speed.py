"""The picture of whole models' speed."""

from xml.etree import ElementTree

from finescale.report.speed import speed_figure


def test_every_speedup_is_drawn_once():
    speedups = {"a<b": {"w4a8": {"prefill": 1.25, "1": 3.0, "16": 2.0}, "w4a8-float": {}}, "lonely": {"w4a8": {}}}
    picture = ElementTree.fromstring(speed_figure(speedups))
    tips = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert set(tips) == {
        "a<b, integer scales, 1: 3.00", "a<b, integer scales, 16: 2.00", "a<b, integer scales, prefill: 1.25",
    }  # fmt: skip
    assert len(tips) == 3


def test_nothing_to_draw():
    ElementTree.fromstring(speed_figure({}))
