"""Several processes train like one: equal gradients and metrics; what happens to one of them reaches all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import together
from helpers.building import parts_of, rows
from helpers.forked import exit_code, forked
from helpers.together import first_gradients
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dag.errors import RunError, UsageError
from dag.recipe import Recipe
from dag.run import checkpoint
from dag.run.folder import RunFolder
from dag.run.processes import Processes
from dag.training import launch
from dag.training.safe_points import agreed
from dag.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
KINDS: dict[str, dict[str, Any]] = {
    "dag_db": {
        "objective": {"residual_scale": "running", "beta": {"value": 20.0, "unit": "reward_sd"}},
        "flow": {"passes": 1, "warmup_epochs": 1},
        "train": {"step_fraction": 0.75, "inner_epochs": 2},
    },
    "ddpo": {"objective": {"name": "ddpo", "per_prompt": 2}},
    "groups": {
        "objective": {"name": "tb", "prior": "pretrained"},
        "prompts": {"texts": ["a cat", "a dog"], "per_group": 2},
    },
    "log_z": {
        "objective": {"name": "tb", "prior": "pretrained", "log_z": "flow"},
        "flow": {"passes": 1, "warmup_epochs": 1},
    },
    "copies": {"objective": {"name": "backprop", "copies": 3}, "regulariser": {"pretrained_kl": 0.1}},
    "critic": {
        "objective": {
            "name": "dag_kl",
            "policy_gradient": "pathwise",
            "prior": "pretrained",
            "learnt_flow": False,
            "forward_looking": {"weight": "fitted"},
        },
        "reward": [{"name": "colourfulness"}, {"name": "incompressibility"}],
        # A small rate: Adam's first steps have its size for any gradient, also for one that is rounding.
        "reward_critic": {"width": 8, "passes": 1, "learning_rate": 1e-5},
        "train": {"updates": 1, "step_fraction": 0.5, "step_choice": "informative", "keep_terminal": False},
    },
    "one_pass": {"train": {"rollout": "one_pass"}, "flow": {"slopes": True, "passes": 1, "warmup_epochs": 1}},
}


def torchrun(count: int, program: Callable[..., None], *arguments: Path) -> Callable[[Sequence[str]], int]:
    """What `torchrun --nproc_per_node COUNT` does with a program, as a function; the processes are forked from its own."""

    def main(words: Sequence[str]) -> int:
        # What this process has been to accelerate says nothing about those that it starts.
        AcceleratorState._reset_state(reset_partial_state=True)
        given = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=0, monitor_interval=0.1, start_method="fork",
        )  # fmt: skip
        elastic_launch(given, program)(*arguments)
        return 0

    return main


@pytest.fixture
def small(make_recipe: MakeRecipe) -> dict[str, Recipe]:
    """Recipes with tiles of one sample, so that several processes call the network with the same rows as one process."""
    return {
        name: make_recipe(
            **{**sections, "train": {"epochs": 2, "trajectories": 4, "micro_batch": 1, **sections.get("train", {})}},
            sampler={"tile": 1},
            evaluation={"every": 2, "images_per_prompt": 3, "prompts": 1},
        )
        for name, sections in KINDS.items()
    }


def close(ours: Any, theirs: Any) -> bool:
    """Equal up to the order of float32 sums, whose effect grows over a few updates (seen: 2e-4 of a mean residual)."""
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if isinstance(ours, float):
        return theirs == pytest.approx(ours, rel=5e-4, abs=1e-5)
    return ours == theirs


def test_two_processes_are_one(small: dict[str, Recipe], tmp_path: Path) -> None:
    file, two, one = tmp_path / "recipes.json", tmp_path / "two", tmp_path / "one"
    file.write_text(json.dumps({name: recipe.model_dump(mode="json") for name, recipe in small.items()}))
    for name in (*small, "stopped", "failed", "small"):
        RunFolder.create(two / name)
    log = tmp_path / "log"
    assert exit_code(forked(torchrun(2, together.main, file, two), [], log)) == 0, log.read_text()[:3000]
    for name, recipe in small.items():
        run, parts = RunFolder.create(one / name), parts_of(recipe)
        gradients = first_gradients(parts)
        Trainer(recipe, run, parts).fit()
        same_gradients(gradients, load_file(two / name / "gradients.safetensors"), name)
        ours, theirs = rows(run.path), rows(two / name)
        assert len(ours) == len(theirs) == 3
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            # The correlation of a critic that has hardly learnt is mostly rounding, and so is a mean loss whose advantages cancel.
            inexact = ("critic_correlation", "loss") if name == "groups" else ("critic_correlation",)
            compared = [key for key in mine if not key.startswith(inexact)]
            assert [key for key in compared if not close(mine[key], other[key])] == []
        mine, other = (load_file(path / "lora/pytorch_lora_weights.safetensors") for path in (run.path, two / name))
        # The bound is a tenth of one of Adam's steps, which have the size of the learning rate for any gradient.
        assert max(float((mine[key] - other[key]).abs().max()) for key in mine) < 1e-4
    check_disturbances(two, next(iter(small)))


def same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], name: str) -> None:
    """Assert that the gradients of the first update are equal up to the order of float32 sums."""
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in ours.values())
    difference = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    print(f"{name}: gradients differ by {difference:.1e}, the largest entry is {largest:.1e}")
    assert difference < 1e-4 * largest


def check_disturbances(two: Path, name: str) -> None:
    """Assert that a stop, a failure and a lack of memory in the second process reached both, and that the runs went on."""
    first, second = json.loads((two / "outcome.json").read_text())
    assert first["stopped"] == second["stopped"]
    assert first["stopped"][0] == signal.SIGINT
    assert first["stopped"][1].startswith("epoch_0001_")
    assert second["failed"] == "no answer"
    assert first["failed"] == "another process failed; its message tells why"
    assert first["tile"] == second["tile"] == 1
    for run in ("stopped", "failed"):
        assert rows(two / run) == rows(two / name), "two processes that were stopped are the undisturbed two"


def test_shares_must_be_equal() -> None:
    processes = Processes()
    processes.size = 3
    processes.check_shares(trajectories=12, updates=2)
    with pytest.raises(UsageError, match=r"4 trajectories an update cannot be dealt out to 3 processes equally"):
        processes.check_shares(trajectories=8, updates=2)


def test_another_number_of_processes_needs_a_checkpoint_between_epochs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(train={"epochs": 1}), RunFolder.create(tmp_path / "run")
    trainer = Trainer(recipe, run, parts_of(recipe))
    trainer.fit()
    state = checkpoint.load_state(checkpoint.chosen(run.checkpoints))
    objection = trainer.checkpoints._objection
    assert objection({**state, "processes": 2}) is None
    inside = {**state, "processes": 2, "flight": [{}, {}]}
    assert objection(inside) == "was taken inside an epoch by 2 processes, this launch has 1"
    assert objection({**inside, "processes": 1}) is None


def test_all_processes_take_the_checkpoint_that_the_main_one_took(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Another process may not see the newest files of a shared disk yet."""
    recipe, run = make_recipe(train={"epochs": 2}), RunFolder.create(tmp_path / "run")
    trainer = Trainer(recipe, run, parts_of(recipe))
    trainer.fit()
    said = (run.checkpoints / "epoch_0001", ["epoch_0002: manifest.json is missing"])

    class Second(Processes):
        def from_main(self, value: Any) -> Any:
            assert value is None, "it did not look itself"
            return said

    trainer.checkpoints.processes = Second()
    trainer.checkpoints.processes.rank = 1
    assert trainer.checkpoints.find() == said


def test_shares_come_back_in_order() -> None:
    """`everyones` puts together, in order, what `mine` deals out; the gathering itself is replaced."""

    class Dealt(Processes):
        def __init__(self, rank: int, size: int) -> None:
            super().__init__()
            self.rank, self.size = rank, size

        def _gather(self, values: torch.Tensor) -> torch.Tensor:
            return torch.cat([Dealt(rank, self.size).mine(rows, groups) for rank in range(self.size)])

    rows = torch.arange(24).reshape(12, 2)
    for size, groups in ((2, 1), (2, 3), (3, 2), (4, 3)):
        shares = [Dealt(rank, size).mine(rows, groups) for rank in range(size)]
        assert torch.equal(Dealt(0, size).everyones(shares[0], groups), rows)
        per_group = len(rows) // groups // size
        assert torch.equal(shares[1][:per_group], rows[per_group : 2 * per_group]), "consecutive within a group"


def test_a_launch_that_would_silently_be_one_process_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU accelerate's launcher starts a single process for --num_processes 2. What it tells that process is tried."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the launcher starts what it is asked for")
    (tmp_path / "told.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), str(tmp_path / "told.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    told = json.loads(done.stdout)
    for name in told.keys() - os.environ.keys():
        monkeypatch.setenv(name, told[name])
    assert "ACCELERATE_MIXED_PRECISION" in told, "by which a process knows that accelerate's launcher started it"
    monkeypatch.setattr(launch, "_IS_LAUNCHED", True)
    with pytest.raises(UsageError, match=r"asked for several processes and started one.* start them with: torchrun"):
        launch._check_launch(1)


def test_the_error_of_another_process_is_named() -> None:
    class Beside(Processes):
        def any(self, flags: Any) -> list[bool]:
            return [flags[0], True]

    with pytest.raises(RunError, match="another process failed"):
        agreed(Beside(), lambda: None)
