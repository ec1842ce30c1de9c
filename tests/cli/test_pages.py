"""Every command and every piece of Python that the pages show is executed, page by page, in the order of the page.

A page runs in a folder of its own that has what it names: a tiny model as MODEL and under every hub name, short texts,
question files. Devices become the CPU, and a command that names no text, or no number of windows, gets few and short
ones. What cannot run this way is in ``ELSEWHERE`` with the reason and the file that runs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import make_model, save_model
from tools.docs_commands import parts_of, words_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FAST = ("README.md",)
"""Pages that run with every test; the others are slow."""
ELSEWHERE = {
    r"make (setup|lint|demo|test|docs)$": ("a target of every change", ".ci/run"),
    r"make (test-all|test-vllm|bench)$": ("a target of an hour and more", "Makefile"),
    r"pip install (torch|-e \.)$|python3 -m venv ": ("what `make setup` does", "Makefile"),
    r"pip install .*finescale\[serve\]": ("gigabytes; `make test-vllm` installs the same for the CPU", "Makefile"),
    r"finescale serve ": ("needs vLLM", "tests/vllm/test_serve.py"),
    r"finescale evaluate MODEL --tasks [^-]*$": ("downloads questions", "tests/evaluate/test_tasks.py"),
    r"from finescale.runtime.cache import rounded_cache": ("needs a Hopper GPU", "tests/runtime/test_cache.py"),
    r"python benchmarks/peers/rows\.py ": ("needs the tools' environments", "benchmarks/peers/rows.py"),
    r"python (?:-m )?benchmarks[/.](\w+)(?:\.py)? ": ("minutes to hours", r"benchmarks/\1.py"),
}
EXAMPLES = re.compile(r'^--8<-- "examples/(\w+\.py)"$')
CALIBRATION = {"--calibration": "short.txt", "--samples": "3"}
EVALUATION = {"--text": "short.txt", "--windows": "2", "--length": "256"}
SHORT = {
    "quantize": CALIBRATION | {"--length": "128"},
    "mix": CALIBRATION | {"--length": "128", "--windows": "2"},
    "compare": CALIBRATION | {"--sample-length": "128"} | EVALUATION,
    "evaluate": EVALUATION,
}
"""What commands get that do not say it."""
READS = {"evaluate", "verify", "inspect", "convert"}
"""Commands whose first argument may be a checkpoint that the page did not make."""


def runnable(page):
    return [part for part in parts_of(page.read_text(encoding="utf-8")) if part.kind != "yaml"]


def elsewhere(command):
    """(reason, file) of a command, or of Python that begins so, that does not run here."""
    for pattern, (reason, file) in ELSEWHERE.items():
        match = re.match(pattern, command)
        if match:
            return reason, match.expand(file)
    return None


class Reader:
    """Somebody who types what a page says, in a folder that has what it names."""

    def __init__(self, folder, page, model, text, cli, monkeypatch):
        self.folder, self.cli, self.monkeypatch = folder, cli, monkeypatch
        self.names = {"__name__": "page"}
        monkeypatch.chdir(folder)
        for name in ("MODEL", "model-folder", "meta-llama/Llama-3.2-1B"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(model)
        for name in re.findall(r"[\w-]+\.txt", page):
            (folder / name).write_text(text, encoding="utf-8")
        for name in re.findall(r"[\w-]+\.jsonl", page):
            (folder / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in text.split("\n\n")))
        (folder / "short.txt").write_text(text, encoding="utf-8")
        write_questions(folder / "FOLDER", page)
        shutil.copytree(ROOT / "examples", folder / "examples")
        for other in PAGES:  # files that a page writes are there on the others too
            for part in parts_of(other.read_text(encoding="utf-8")):
                if part.kind == "yaml" and part.text.startswith(("grids:", "weights:")):
                    name = "grid.yaml" if part.text.startswith("grids:") else "mine.yaml"
                    (folder / name).write_text(part.text, encoding="utf-8")

    def type(self, command):
        variables, words = words_of(command)
        assert words[0] == "finescale", command
        name, given = words[1], [re.sub(r"^cuda(:\d)?(,cuda:\d)*$", "cpu", word) for word in words[2:]]
        if name in READS:
            self.make_unless_there(given[0])
        if "--out" in given and name != "mix":  # places with the same name are different ones
            shutil.rmtree(self.folder / given[given.index("--out") + 1], ignore_errors=True)
        for option, value in ({} if name == "evaluate" and "--tasks" in given else SHORT.get(name, {})).items():
            given += [] if option in given else [option, value]
        if "--jobs" in given:
            given[given.index("--jobs") + 1] = "2"
        for key, value in variables.items():
            assert key == "PYTHONPATH", command
            self.monkeypatch.syspath_prepend(self.folder / value)
        if command.startswith("torchrun"):
            self.start(given)
            return
        code, out, err = self.cli(name, *given)
        assert code == 0, f"{command}\n{out}{err}"

    def start(self, given):
        """Under torchrun, two processes."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "finescale.cli.main"]
        given[given.index("--samples") + 1] = "16"  # a batch for each at least
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "quantize", *given], env=environment, check=True, timeout=300)

    def make_unless_there(self, name):
        """The checkpoint that another page told the reader to make."""
        if (self.folder / name / "config.json").exists():
            return
        shutil.rmtree(self.folder / name, ignore_errors=True)
        recipe = ("w4a8-integer-scale",) if "w4a8" in name else ("gptq", "--set", "weights.symmetric=true")
        recipe += ("--set", "weights.group_size=32", "--format", "gptq") if "GPTQ" in name else ()
        short = [word for pair in SHORT["quantize"].items() for word in pair]
        made = self.cli("quantize", "MODEL", "--recipe", *recipe, *short, "--out", name)
        assert made[0] == 0, made

    def run(self, code):
        code = re.sub(r'(device|device_map)="cuda"', r'\1="cpu"', code)
        for name in re.findall(r'(?:load|from_pretrained|evaluate_tasks)\("([\w-]+)"', code):
            if f'out="{name}"' not in code:
                self.make_unless_there(name)
        code = code.replace("settings=(", 'settings=("calibration.samples=3", "calibration.length=128", ')
        if "inputs" in code:
            self.names["inputs"] = {"input_ids": torch.tensor([[5, 6, 7]])}
        exec(compile(code, "page", "exec"), self.names)


def write_questions(folder, page):
    """The page's own questions, or some, as the file of every task."""
    found = re.findall(r"^```json\n((?:\{.*\}\n)+)```", page, re.M)
    kinds = {key: line for line in (found[0].splitlines() if found else []) for key in json.loads(line)}
    folder.mkdir()
    for task in ("hellaswag", "piqa", "boolq"):
        line = kinds.get("query", json.dumps({"query": "a", "choices": ["b", "c"], "gold": 0}))
        (folder / f"{task}.jsonl").write_text((line + "\n") * 4)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, tokenizer):
    """Room for windows of 512 tokens."""
    folder = tmp_path_factory.mktemp("reader")
    return save_model(make_model("llama", torch.float16, max_position_embeddings=1024), tokenizer, folder)


@pytest.fixture(scope="module")
def short(text):
    """A few windows."""
    return text.read_text()[:5000]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=() if page.name in FAST else pytest.mark.slow)
        for page in PAGES
        if runnable(page)
    ],
)
def test_what_a_page_says_can_be_typed(page, small_model, short, tmp_path, cli, monkeypatch):
    whole = page.read_text(encoding="utf-8")
    reader = Reader(tmp_path, whole, small_model, short, cli, monkeypatch)
    for part in runnable(page):
        example = EXAMPLES.match(part.text.strip())
        if part.kind == "python" and example:
            assert (ROOT / "examples" / example[1]).is_file(), f"{page.name}:{part.line}"  # tests/test_examples.py
        elif elsewhere(part.text) or (part.kind == "python" and page.name == "adding.md"):  # run by test_docs.py
            continue
        elif part.kind == "python":
            reader.run(part.text)
        else:
            reader.type(part.text)


def test_what_runs_elsewhere_is_there():
    used = set()
    for page in PAGES:
        for part in runnable(page):
            if elsewhere(part.text):
                reason, file = elsewhere(part.text)
                assert reason and (ROOT / file).is_file(), f"{page.name}:{part.line}: {file}"
                used.add(next(pattern for pattern in ELSEWHERE if re.match(pattern, part.text)))
    assert used == set(ELSEWHERE), f"nothing is excepted by {set(ELSEWHERE) - used}"


def test_a_page_that_is_wrong_is_found(small_model, short, tmp_path, cli, monkeypatch):
    reader = Reader(tmp_path, "    finescale inspect MODEL\n", small_model, short, cli, monkeypatch)
    with pytest.raises(AssertionError, match="inspect MODEL"):
        reader.type("finescale inspect MODEL --no-such-option")
