"""What all tests share: tiny models made on the spot, texts, and the development data beside the checkout, if any."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# Nothing here may reach for the network; a test that needs a model makes it or skips.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with suppress(ImportError):  # GPU tests run where hypothesis may be missing
    from hypothesis import settings

    # The same commit gives the same outcome, on however slow a machine; `--hypothesis-profile explore` looks further.
    settings.register_profile("explore", deadline=None)
    settings.register_profile("reproducible", deadline=None, derandomize=True)
    settings.load_profile("reproducible")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-python", default=None, metavar="PATH", help="the Python of an environment that has vLLM")


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of the environment with vLLM; skips without ``--vllm-python``."""
    path = request.config.getoption("--vllm-python")
    if path is None:
        pytest.skip("needs --vllm-python PATH, the Python of an environment with vLLM (make test-vllm)")
    return Path(path)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development models and texts; skips where there is none."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs the development data in the folder shared beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def zoo(shared: Path) -> Callable[[str], Path]:
    """Folder of a small trained model: ``zoo("llama")``, ``zoo("stories260k")``."""

    def folder(name: str) -> Path:
        path = shared / "models" / (name if name == "stories260k" else f"zoo/{name}")
        if not path.is_dir():
            pytest.skip(f"needs the development model {name}")
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums must not depend on how many cores the machine has."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws must not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers.utils import logging

    from tests.helpers import make_tokenizer

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Folder of a tiny model: ``tiny(kind, dtype, style)``. Shared by all tests: do not write into it.

    ``style`` is ``hub`` for names without the base prefix (GPT-2, BLOOM), ``fused`` for experts in 3-D tensors, and
    ``shards`` for several files with an index.
    """
    import torch

    from tests.helpers import forget_prefix, make_model, save_model

    made: dict[Any, Path] = {}

    def folder(kind: str, dtype: torch.dtype = torch.float32, style: str = "plain") -> Path:
        key = (kind, dtype, style)
        if key not in made:
            path = tmp_path_factory.mktemp(f"{kind}-{style}")
            options = {"fused": {"save_original_format": False}, "shards": {"max_shard_size": "100KB"}}
            save_model(make_model(kind, dtype), tokenizer, path, **options.get(style, {}))
            if style == "hub":
                forget_prefix(path, "transformer.")
            made[key] = path
        return made[key]

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of about 8000 tokens of the tiny tokenizer."""
    from finescale.calibration.data import builtin_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(builtin_text()[:12_000], encoding="utf-8")
    return path
