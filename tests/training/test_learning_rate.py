"""The policy's learning rate over a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.building import parts_of

from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
BASE = 0.008


def rates_of(recipe: Recipe, folder: Path) -> tuple[list[float], list[float], list[float | None]]:
    """The rates of policy and flow at each update of a run, and the policy's last rate of each epoch as its metrics say."""
    run = RunFolder.create(folder)
    trainer = Trainer(recipe, run, parts_of(recipe))
    updates, policy, flow = trainer.updates, list[float](), list[float]()
    step = updates.policy.step

    def spied() -> float:
        assert updates.flow is not None
        policy.append(updates.policy.optimizer.param_groups[0]["lr"])
        flow.append(updates.flow.optimizer.param_groups[0]["lr"])
        return step()

    updates.policy.step = spied  # type: ignore[method-assign]
    trainer.fit()
    return policy, flow, [row.get("learning_rate") for row in run.metrics.read() if row["epoch"] > 0]


@pytest.mark.parametrize("rollout", ["stored", "one_pass"])
def test_linear_falls_in_equal_steps_to_zero_after_the_last_update(
    make_recipe: MakeRecipe, tmp_path: Path, rollout: str
) -> None:
    train = {"epochs": 3, "updates": 2, "learning_rate": BASE, "learning_rate_schedule": "linear", "rollout": rollout}
    recipe = make_recipe(train=train, flow={"warmup_epochs": 1, "learning_rate": 0.01})
    policy, flow, told = rates_of(recipe, tmp_path / "run")
    assert policy == pytest.approx([BASE, 0.75 * BASE, 0.5 * BASE, 0.25 * BASE], rel=1e-12)
    assert flow == [0.01] * 4
    assert told == [None, policy[1], policy[3]]


def test_replayed_rollouts_and_inner_epochs_count(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train: dict[str, Any] = {"epochs": 2, "updates": 1, "inner_epochs": 2, "learning_rate_schedule": "linear"}
    objective = {"name": "tb", "prior": "pretrained", "log_z": "flow"}
    recipe = make_recipe(
        objective=objective,
        train={**train, "learning_rate": BASE},
        data={"replay": 1},
        flow={"warmup_epochs": 0},
        prompts={"texts": ["a cat", "a dog"], "per_group": 2},
    )
    policy, _, _ = rates_of(recipe, tmp_path / "run")
    assert policy == pytest.approx([BASE, 0.8 * BASE, 0.6 * BASE, 0.4 * BASE, 0.2 * BASE], rel=1e-12)


def test_without_a_schedule_it_stays(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"epochs": 2, "learning_rate": BASE}, flow={"warmup_epochs": 0})
    policy, _, told = rates_of(recipe, tmp_path / "run")
    assert set(policy) == {BASE} and told == [BASE, BASE]
