"""Shares of time and idle time of kernels, on timelines made by hand."""

from finescale.bench.timeline import between, idle, shares, summary, without_idle

# "b" starts while "a" runs and waits for it; then nothing runs for 4; "copy" runs inside "c".
EVENTS = [("a", 0.0, 10.0), ("b", 2.0, 13.0), ("c", 17.0, 30.0), ("copy", 20.0, 21.0), ("ArgMax", 30.0, 32.0)]


def test_shares_add_up():
    found = shares(EVENTS)
    assert found["b"] == (3.0, 1)
    assert sum(time for time, _ in found.values()) == 32.0
    assert shares([]) == {}


def test_idle_time_is_found():
    assert idle(EVENTS) == [("b", "c", 4.0)]
    assert idle([]) == []
    assert idle([("long", 0.0, 9.0), ("short", 1.0, 2.0), ("next", 10.0, 11.0)]) == [("long", "next", 1.0)]


def test_without_idle_time_the_rest_is_as_long():
    moved = without_idle(EVENTS)
    assert idle(moved) == []
    assert moved[:2] == EVENTS[:2]
    assert [end - start for _, start, end in moved] == [end - start for _, start, end in EVENTS]
    assert max(end for *_, end in moved) == 28.0


def test_steps():
    later = [(name, start + 40, end + 40) for name, start, end in EVENTS]
    steps = between([*EVENTS, *later, ("rest", 90.0, 91.0)], "ArgMax")
    assert [len(step) for step in steps] == [5, 5]
    found = summary(steps)
    assert found["step_us"] == 36.0  # 72 from the first kernel to the last of both steps
    assert found["idle_us"] == 8.0  # 4 and 4 within, 8 between them
    assert found["kernels"]["b"] == [3.0, 1.0]
    assert sum(time for time, _ in found["kernels"].values()) == 28.0
    assert summary([]) == {}
