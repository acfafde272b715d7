"""Objectives on pictures that are noised anew: regression and preferences."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import disturb, rolled_out
from torch import Tensor

from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.training.denoising import Denoising
from dag.training.loss import Rollout, Tables
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
N, K = 8, 2
GROUPS: dict[str, Any] = {"texts": ["a cat", "a dog"], "per_group": K}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def made(
    make_recipe: MakeRecipe, run: RunFolder, *, is_disturbed: bool = True, **objective: Any
) -> tuple[Trainer, Denoising, Rollout]:
    recipe = make_recipe(objective={"form": "denoise", **objective}, prompts=GROUPS)
    trainer, trajectories = rolled_out(recipe, run)
    if is_disturbed:
        disturb(trainer.components)
    denoising = trainer.learner.losses
    assert isinstance(denoising, Denoising)
    return trainer, denoising, trainer.learner.rollout(trajectories, 0)


def losses(denoising: Denoising, rollout: Rollout, advantage: Tensor, rows: slice = slice(0, N)) -> list[Tensor]:
    """(B,) the losses of two draws."""
    tables = Tables(advantage[:, None].expand(-1, 4))
    return [step.output.loss for step in denoising.steps(rollout, rows, [(0, 1.0), (1, 1.0)], tables, update=3)]


def test_the_loss_is_that_of_predicting_the_noise(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """With equal weights it is plain denoising; here epsilon is predicted, so the exact output is the noise itself."""
    trainer, denoising, rollout = made(make_recipe, run, name="regression")
    x_k, k, wanted = denoising._noised(rollout, slice(0, N), 3, 0)
    x_0 = rollout.trajectories.states(4, slice(0, N)).float()
    alpha_bar = trainer.learner.schedule.alpha_bar_t[k][:, None, None, None].float()
    torch.testing.assert_close(x_k, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        text = trainer.learner.text.rows(rollout.trajectories.prompt_id)
        t = trainer.learner.schedule.timesteps[k]
        conditional = trainer.learner.policy.predict(x_k, t, text).conditional
    expected = (conditional - wanted).square().flatten(1).mean(1)
    torch.testing.assert_close(losses(denoising, rollout, torch.zeros(N))[0], expected, rtol=1e-4, atol=1e-5)
    doubled = losses(denoising, rollout, torch.tensor([1.0, -1.0] * 4))[0]
    torch.testing.assert_close(doubled, torch.tensor([2.0, 0.0] * 4) * expected, rtol=1e-4, atol=1e-5)


def test_pictures_of_a_group_share_level_and_noise_and_draws_differ(make_recipe: MakeRecipe, run: RunFolder) -> None:
    _, denoising, rollout = made(make_recipe, run, name="regression")
    _, k, noise = denoising._noised(rollout, slice(0, N), 3, 0)
    _, again, same = denoising._noised(rollout, slice(2, 4), 3, 0)
    _, _, other = denoising._noised(rollout, slice(0, N), 4, 0)
    assert torch.equal(k[0::K], k[1::K])
    assert len(set(k.tolist())) > 1
    torch.testing.assert_close(noise[0::K], noise[1::K], rtol=1e-3, atol=1e-3)
    assert torch.equal(again, k[2:4]), "the rows of a micro-batch do not matter"
    torch.testing.assert_close(same, noise[2:4])
    assert float((noise[0] - noise[2]).abs().max()) > 0.1
    assert float((noise - other).abs().max()) > 0.1


def test_at_the_pretrained_model_a_preference_costs_log_two(make_recipe: MakeRecipe, run: RunFolder) -> None:
    _, denoising, rollout = made(make_recipe, run, is_disturbed=False, name="dpo", strength=100.0)
    found = losses(denoising, rollout, torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0]))[0]
    assert found.tolist() == pytest.approx([math.log(2), 0, 0, math.log(2), 0, 0, math.log(2), 0], abs=1e-5)


def test_a_preference_compares_the_pictures_of_a_group(make_recipe: MakeRecipe, run: RunFolder) -> None:
    _, denoising, rollout = made(make_recipe, run, name="dpo", strength=50.0)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0])
    with torch.no_grad():
        ours, theirs = (
            denoising._error(rollout, slice(0, N), 3, 0, pretrained=pretrained) for pretrained in (False, True)
        )
    worse = ours - theirs
    for best, worst in ((0, 1), (3, 2), (6, 7)):
        expected = -torch.nn.functional.logsigmoid(-25.0 * (worse[best] - worse[worst]))
        torch.testing.assert_close(losses(denoising, rollout, sign)[0][best], expected, rtol=1e-4, atol=1e-5)
    assert float(worse.abs().max()) > 1e-4


@pytest.mark.parametrize(
    "objective",
    [{"name": "dpo", "strength": 10.0}, {"name": "regression", "weights": "top"}, {"name": "regression"}],
    ids=str,
)
def test_the_whole_run_trains(make_recipe: MakeRecipe, tmp_path: Path, objective: dict[str, Any]) -> None:
    recipe = make_recipe(objective={"form": "denoise", "draws": 2, **objective}, prompts=GROUPS)
    trainer, _ = rolled_out(recipe, RunFolder.create(tmp_path / "run"))
    before = [parameter.clone() for parameter in trainer.components.policy.trainable()]
    trainer.state = None
    trainer.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.components.policy.trainable(), strict=True))
