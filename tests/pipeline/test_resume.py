"""A run that was killed goes on, and ends with the bytes of a run that was not: the real command, really killed."""

import ctypes
import ctypes.util
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

import finescale
from finescale.errors import CheckpointError, InputError
from finescale.pipeline.quantize import prepare, run
from finescale.pipeline.verify import verify
from tests.helpers import (
    StopError,
    assert_sentence,
    command,
    hashes,
    lasting_files,
    make_model,
    quantize,
    read_json,
    recipe,
    save_model,
    stop_after,
)

BLOCKS = 8


@pytest.fixture(scope="module")
def deep(tokenizer, tmp_path_factory):
    """A model of eight blocks, each long enough at work to be killed in."""
    return save_model(make_model("llama", num_hidden_layers=BLOCKS), tokenizer, tmp_path_factory.mktemp("deep"))


SETTINGS = (
    "weights.bits=3",
    "weights.group_size=32",
    "calibration.true_sequential=true",
    "calibration.samples=12",
    "calibration.length=96",
    "solver.sweeps=20",
)


def facts(out):
    return hashes(out, lasting_files(out))


def run_until_block(arguments, environment, out, block, delay):
    """Start the command, kill it ``delay`` seconds after the entry of ``block`` appears. Returns the exit code."""
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    entry = out / ".finescale" / f"block-{block:05d}.json"
    deadline = time.monotonic() + 120
    while not entry.is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait(timeout=60)


def test_killed_three_times_it_ends_with_the_same_bytes(deep, text, tmp_path):
    out, chance = tmp_path / "out", random.Random(20240518)
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    arguments, environment = command(
        "quantize", deep, "--recipe", "quantease", "--out", out, "--calibration", text, *options
    )
    moments = sorted(chance.sample(range(BLOCKS - 1), 3))
    for block in moments:
        assert run_until_block(arguments, environment, out, block, chance.uniform(0, 0.1)) == -signal.SIGKILL
        assert not (out / "config.json").exists(), "killed too late to be a test"
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Without interruption, and through Python instead of the command line.
    finescale.quantize(deep, "quantease", out=tmp_path / "whole", calibration=str(text), settings=SETTINGS)
    assert facts(out) == facts(tmp_path / "whole")
    assert read_json(out / "run.json")["resumed_from_block"] > moments[-1]
    assert not (out / ".finescale").exists() and not list(out.glob("*.partial"))
    again = finescale.quantize(deep, "quantease", out=out, calibration=str(text), settings=SETTINGS)
    assert again["already_complete"] and facts(out) == facts(tmp_path / "whole")
    assert verify(out, deep).layers == 7 * BLOCKS


# The moments between two writes, which no clock can hit: the state they leave is made by hand, in this process.


def stopped(model, text, out, chosen, after):
    """A run stopped when ``after`` blocks are done, as a kill leaves it."""

    with pytest.raises(StopError):
        run(prepare(model, chosen, out, str(text)), on_progress=stop_after(after))


CHOSEN = {
    "plain": recipe("gptq", 3, 32),
    "integer": recipe("gptq", 4, 32, weights={"symmetric": True}, activations={"bits": 8},
                      integer_scale={"mode": "before"}),
    "dense": recipe("gptq", 3, 32, format="dense"),
    "gptq act-order": recipe("gptq", 4, 32, format="gptq", weights={"symmetric": True},
                             options={"act_order": True, "static_groups": False}),
}  # fmt: skip


STATES = ("after a block", "between shard and entry", "half a shard", "before the first block")


@pytest.mark.parametrize(
    ("kind", "name", "state"),
    [("llama", name, state) for name in CHOSEN for state in STATES]
    + [(kind, "plain", state) for kind in ("gpt2", "mixtral") for state in STATES[:2]],
)
def test_every_state_a_kill_can_leave(tiny, text, tmp_path, kind, name, state):
    model, out, chosen = tiny(kind), tmp_path / "out", CHOSEN[name]
    stopped(model, text, out, chosen, 0 if state == "before the first block" else 1)
    entry = out / ".finescale" / "block-00000.json"
    shard = next(out.glob("model-00002-of-*.safetensors"), None)
    if state == "between shard and entry":
        entry.unlink()
    if state == "half a shard":
        entry.unlink()
        data = shard.read_bytes()
        shard.unlink()
        shard.with_name(shard.name + ".partial").write_bytes(data[: len(data) // 2])
        entry.with_name(entry.name + ".partial").write_text('{"layers": [')
    report = run(prepare(model, chosen, out, str(text)))
    quantize(model, tmp_path / "whole", chosen, text)
    assert facts(out) == facts(tmp_path / "whole")
    assert read_json(out / "run.json")["resumed_from_block"] == (1 if state == "after a block" else None)
    assert not list(out.glob("*.partial")) and "already_complete" not in report


@pytest.mark.parametrize(
    "missing", [["report.json"], ["report.json", "run.json"], ["report.json", "run.json", "config.json"]]
)
def test_killed_in_the_last_moments(tiny, text, tmp_path, missing):
    """All blocks done, the small files not all written."""
    out, chosen = tmp_path / "out", CHOSEN["plain"]
    stopped(tiny("llama"), text, out, chosen, 1)
    journal = shutil.copytree(out / ".finescale", tmp_path / "journal")
    run(prepare(tiny("llama"), chosen, out, str(text)))
    expected = facts(out)
    shutil.copytree(journal, out / ".finescale")
    for name in missing:
        (out / name).unlink()
    run(prepare(tiny("llama"), chosen, out, str(text)))
    assert facts(out) == expected


def test_killed_after_the_report_and_before_the_journal_is_gone(tiny, text, tmp_path):
    out, chosen = tmp_path / "out", CHOSEN["plain"]
    quantize(tiny("llama"), out, chosen, text)
    (out / ".finescale").mkdir()
    (out / ".finescale" / "lock").touch()
    before = facts(out)
    assert quantize(tiny("llama"), out, chosen, text)["already_complete"]
    assert facts(out) == before and not (out / ".finescale").exists()


def test_a_damaged_shard_of_a_finished_block_is_found(tiny, text, tmp_path):
    out = tmp_path / "out"
    stopped(tiny("llama"), text, out, CHOSEN["plain"], 1)
    shard = next(out.glob("model-00002-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CheckpointError) as caught:
        run(prepare(tiny("llama"), CHOSEN["plain"], out, str(text)))
    assert_sentence(str(caught.value))
    assert shard.name in str(caught.value)


def test_other_numbers_than_before_are_not_mixed_with_the_old_ones(tiny, text, tmp_path):
    """Resumed on a machine whose float sums differ: the result would be that of neither."""
    out = tmp_path / "out"
    stopped(tiny("llama"), text, out, CHOSEN["plain"], 1)
    entry = out / ".finescale" / "block-00000.json"
    entry.write_text(entry.read_text().replace('"outputs": "', '"outputs": "0'))
    with pytest.raises(CheckpointError, match="--fresh") as caught:
        run(prepare(tiny("llama"), CHOSEN["plain"], out, str(text)))
    assert_sentence(str(caught.value))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 20 MB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    library = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if os.geteuid() != 0 or library.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=20m") != 0:
        pytest.skip("needs the right to mount a small file system")
    yield place
    library.umount2(bytes(place), 2)


def test_a_full_disk_keeps_finished_blocks_and_the_run_goes_on(deep, text, tmp_path, small_disk):
    out, ballast = small_disk / "out", small_disk / "ballast"
    chosen = recipe("gptq", 4, 32)

    def fill(label, done, total):
        if done == 3:
            with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError):
                while True:
                    stream.write(b"\0" * 4096)

    with pytest.raises(InputError, match=r"disk.*is full") as caught:
        run(prepare(deep, chosen, out, str(text)), on_progress=fill)
    assert_sentence(str(caught.value))
    entries = sorted(path.name for path in (out / ".finescale").glob("block-*.json"))
    assert entries == [f"block-0000{n}.json" for n in range(3)]
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-0000{n}-of-00009.safetensors" for n in range(1, 5)]
    ballast.unlink()
    run(prepare(deep, chosen, out, str(text)))
    assert read_json(out / "run.json")["resumed_from_block"] == 3
    quantize(deep, tmp_path / "whole", chosen, text)
    assert facts(out) == facts(tmp_path / "whole")


def test_another_version_of_ones_own_solver_does_not_go_on(deep, text, tmp_path, monkeypatch):
    plugin = tmp_path / "resume_test_solver.py"
    body = "from finescale.solvers import SOLVERS\nMINE = SOLVERS['rtn']\n"
    plugin.write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    chosen, out = recipe("resume_test_solver:MINE", 4, 32), tmp_path / "out"

    with pytest.raises(StopError):
        run(prepare(deep, chosen, out, str(text)), on_progress=stop_after(2))
    plugin.write_text(body + "# another version\n")
    with pytest.raises(InputError, match="unfinished run with another model, recipe"):
        run(prepare(deep, chosen, out, str(text)))
    plugin.write_text(body)
    run(prepare(deep, chosen, out, str(text)))
    assert read_json(out / "run.json")["resumed_from_block"] == 2
