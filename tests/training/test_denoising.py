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
from dag.training.past import PastPolicies
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
N, K = 8, 2
PAST: dict[str, Any] = {"name": "dpo", "strength": 50.0, "reference": "past", "past": 2}
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
    [{**PAST, "flip": "anchor"}, {"name": "regression", "weights": "top"}, {"name": "regression"}],
    ids=str,
)
def test_the_whole_run_trains(make_recipe: MakeRecipe, tmp_path: Path, objective: dict[str, Any]) -> None:
    recipe = make_recipe(objective={"form": "denoise", "draws": 2, **objective}, prompts=GROUPS)
    trainer, _ = rolled_out(recipe, RunFolder.create(tmp_path / "run"))
    before = [parameter.clone() for parameter in trainer.components.policy.trainable()]
    trainer.state = None
    trainer.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.components.policy.trainable(), strict=True))


# -- an earlier policy as the reference (SePPO) -------------------------------------------------------------------

SIGN = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0])


def test_the_reference_is_a_kept_policy_and_the_present_one_comes_back(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, denoising, rollout = made(make_recipe, run, is_disturbed=False, **PAST)
    past, masters = trainer.learner.past, trainer.learner.policy.weights.masters
    assert past is not None

    def error() -> Tensor:
        with torch.no_grad():
            return denoising._error(rollout, slice(0, N), 3, 0)

    errors = []
    for number in range(3):
        errors.append(error())
        past.remember()
        for parameter in masters:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        trainer.learner.policy.weights.refresh()
    now, present = [parameter.detach().clone() for parameter in masters], error()
    found = [denoising._reference(rollout, slice(0, N), update, 0) for update in range(8)]
    of_past = {
        min(range(3), key=lambda n: float((errors[n] - denoising_error(past, seed, error)).abs().max()))
        for seed in range(8)
    }
    assert of_past == {1, 2}, "the oldest of three is not kept, and the others are drawn"
    assert len({tuple(one.tolist()) for one in found}) > 1
    assert all(torch.equal(a, b) for a, b in zip(now, masters, strict=True))
    assert torch.equal(error(), present)
    restored = type(past)(2, trainer.learner.policy)
    restored.load(past.tensors() | {"baseline": torch.zeros(1)})
    assert all(
        torch.equal(a, b)
        for one, two in zip(past.weights, restored.weights, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def denoising_error(past: PastPolicies, seed: int, error: Callable[[], Tensor]) -> Tensor:
    with past.one_of(seed):
        return error()


def test_where_the_reference_is_ahead_at_the_better_picture_the_worse_one_is_imitated_too(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer, denoising, rollout = made(make_recipe, run, **PAST, flip="anchor")
    assert trainer.learner.past is not None
    trainer.learner.past.remember()
    cases, pairs = set(), ((0, 1), (3, 2), (6, 7))
    for scale in (0.05, -0.1):  # from the reference, then beyond it to the other side
        disturb(trainer.components, scale)
        with torch.no_grad():
            ours = denoising._error(rollout, slice(0, N), 3, 0)
        worse = ours - denoising._reference(rollout, slice(0, N), 3, 0)
        found = losses(denoising, rollout, SIGN)[0]
        for best, worst in pairs:
            is_ahead = bool(worse[best] > 0)
            cases.add(is_ahead)
            margin = worse[best] + (worse[worst] if is_ahead else -worse[worst])
            torch.testing.assert_close(found[best], -torch.nn.functional.logsigmoid(-25 * margin), rtol=1e-4, atol=1e-5)
    assert cases == {True, False}
