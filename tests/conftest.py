"""What every test may count on: two threads, no network, a real tiny model, reproducible hypothesis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # others want the cores: waiting threads sleep
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
STORIES = DATA / "stories260k"

torch.set_num_threads(min(2, os.cpu_count() or 1))

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("ci"), max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with long tests first, so that several workers end at about the same time.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch finds none here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers alone and in the whole suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    """Folder of a real trained Llama of 0.26 M parameters (see its README.md)."""
    return STORIES


@pytest.fixture(scope="session")
def stories_tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="session")
def stories_model() -> PreTrainedModel:
    """The tiny model in float32, shared by the session: whoever changes it must change it back."""
    return _load_stories()


@pytest.fixture
def new_stories_model() -> Any:
    """Makes fresh copies of the tiny model, to be trained, patched or broken: `new_stories_model(dtype=...)`."""
    return _load_stories


def _load_stories(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=dtype).eval()
