"""Fixtures: a Stable Diffusion folder of shrunken random networks, and recipes that use it."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests are about the CPU, where a run is the same bit for bit, also on a machine with a GPU, which they do not see.
# DAG_TEST_DEVICE=cuda shows it to them: meant for the kernels' tests and those with the marker `gpu`.
if os.environ.get("DAG_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several tests run at a time, so each of them, and each program that they start, uses one thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this variable when a kernel's module is imported; with it kernels run in Python, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dag.recipe import Recipe
from dag.recipe.load import parse


def pytest_collection_finish() -> None:
    """Exempt what the imports made from garbage collection, which would go through all of it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def draws_curves() -> None:
    """A test that asks for this gets the real `curves.png` of its runs."""


@pytest.fixture(autouse=True)
def _undrawn_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in the tests' own process leave an empty `curves.png`: drawing takes a fifth of a short run."""
    # Not imported for this: a test of a recipe alone would wait seconds for it.
    if "draws_curves" not in request.fixturenames and (outputs := sys.modules.get("dag.training.outputs")):
        monkeypatch.setattr(outputs, "draw_curves", lambda rows, path: path.touch())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `helpers.tiny_model`."""
    from helpers import tiny_model

    return tiny_model.build(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `helpers.shallow_model`."""
    from helpers import shallow_model

    return shallow_model.build(tmp_path_factory.mktemp("shallow") / "model")


@pytest.fixture
def make_recipe(tiny_model: Path) -> Callable[..., Recipe]:
    """A small recipe on the tiny model; keyword arguments replace sections, merged one level deep."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(tiny_model)},
        "sampler": {"steps": 4, "guidance_scale": 3.0, "tile": 4},
        "prompts": {"texts": ["a cat", "a dog"]},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "dag_db", "beta": {"value": 20.0}},
        "flow": {"channels": [8, 8], "warmup_epochs": 0},
        "train": {"epochs": 2, "trajectories": 8, "updates": 2, "micro_batch": 4, "learning_rate": 1e-3},
        "evaluation": {"every": 1, "prompts": 2, "images_per_prompt": 2},
        "checkpoint": {"every": 1},
    }

    def make(**sections: Any) -> Recipe:
        merged: dict[str, Any] = {
            name: section if isinstance(section, list) else {**base.get(name, {}), **section}
            for name, section in {**base, **sections}.items()
        }
        if merged["objective"]["name"] in ("ddpo", "backprop", "refl", "dpo", "regression"):
            merged["objective"].pop("beta", None)
        return parse(merged, "test recipe")

    return make
