"""Shapes in signatures are checked under pytest: the hook must come before the first import of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook looks it up by name)

install_import_hook("selfdoubt", "tests.typecheck.check")

# Nothing here may reach a network: models and tokenizers are made on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

# The first example of a test may build a model: no deadline, and always the same examples.
settings.register_profile(
    "laws", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("laws")


SLOW_SECONDS = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests a longer limit than the one of pyproject.toml, unless they set their own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real():
    """The path of a real file beside this checkout; skips where there is none."""

    def path(name: str) -> Path:
        found = Path(__file__).parents[2] / "shared" / "data" / name
        if not found.exists():
            pytest.skip(f"the data folder with {name} is not beside this checkout")
        return found

    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random language model with its tokenizer, in float64; shared, so copy it to change it."""
    from tests.zoo import talker, tokenizer

    path = tmp_path_factory.mktemp("model")
    talker().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def _shared_models_stay_as_they_are() -> Iterator[None]:
    """Fail where a file of tests changes a model that other tests share: cast, trained, or configured in place."""
    yield
    zoo = sys.modules.get("tests.zoo")
    if zoo is not None:
        zoo.check_shared()


@pytest.fixture(scope="session")
def stories() -> Path:
    """A trained model of 260 thousand parameters that lies beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the data folder with stories260k is not beside this checkout")
    return folder
