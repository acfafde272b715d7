"""Objectives that follow the reward's gradient along a chain: adjoint sweeps against autograd through the whole chain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import CPU, disturb, fresh_state, sampled, trainer_of
from torch import Tensor

from dag.chain.rollout import Batch, Score
from dag.chain.trajectory import Trajectories
from dag.objectives import pathwise
from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.run.meter import PhaseMeter
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer
from dag.training.updates import last_steps

MakeRecipe = Callable[..., Recipe]
N, T = 8, 4


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def disturbed(recipe: Recipe, run: RunFolder) -> tuple[Trainer, Trajectories, Score]:
    """A trainer whose adapter is not zero, its first trajectories, and what scores them."""
    trainer = trainer_of(recipe, run)
    disturb(trainer.components)
    trajectories = sampled(trainer)
    return trainer, trajectories, trainer.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id))


def first_gradient(
    trainer: Trainer, trajectories: Trajectories, score: Score, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """The policy's gradients of an update of all trajectories, without a step."""
    monkeypatch.setattr("dag.training.optimizer.ClippedOptimizer.step", lambda stepper: 0.0)
    learner = trainer.learner
    for _ in StoredTraining(learner, PhaseMeter(CPU)).steps(fresh_state(learner, 0), trajectories, score):
        pass
    monkeypatch.undo()
    return taken(trainer)


def taken(trainer: Trainer) -> list[Tensor]:
    """The policy's gradients, which are cleared."""
    parameters = list(trainer.updates.policy.parameters)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    trainer.updates.policy.zero_grad()
    return found


def replayed(trainer: Trainer, trajectories: Trajectories, first: int, *, pretrained: bool = False) -> list[Tensor]:
    """The states x_first ... x_T of a chain with the noise that it was sampled with, as functions of each other and the policy."""
    learner, rows = trainer.learner, torch.arange(N)
    schedule, text = learner.schedule, learner.text.rows(trajectories.prompt_id)
    states = [trajectories.states(first, rows).detach().float().requires_grad_(True)]
    for k in range(first, T):
        x_t, x_next = trajectories.states(k, rows), trajectories.states(k + 1, rows)
        t = schedule.timesteps[k].expand(N)
        with torch.no_grad():
            noise = x_next - schedule._mean(x_t, learner.policy.predict(x_t, t, text, pretrained=pretrained).guided, k)
        output = learner.policy.predict(states[-1], t, text, pretrained=pretrained).guided
        states.append(schedule._mean(states[-1], output, k) + noise)
    return states


@pytest.mark.parametrize("last", [1, 2, T])
@pytest.mark.parametrize("goal", [None, 1e3, -1e3])
def test_a_sweep_has_the_gradient_of_autograd_through_the_chain(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, last: int, goal: float | None
) -> None:
    """The mean reward's gradient over the number of steps, by which every objective's loss is divided; a goal turns its sign."""
    recipe = make_recipe(
        objective={"name": "backprop", "last": last, "goal": goal}, train={"updates": 1, "micro_batch": 4}
    )
    trainer, trajectories, score = disturbed(recipe, run)
    ours = first_gradient(trainer, trajectories, score, monkeypatch)
    end = replayed(trainer, trajectories, T - last)[-1]
    _, gradient = score.gradient(end.detach(), torch.arange(N))
    sign = 1.0 if goal is None or goal > 0 else -1.0
    trainer.updates.policy.backward(-sign * (gradient * end).sum() / (N * T))
    theirs = taken(trainer)
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    assert scale > 0
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 2e-4 * scale


@pytest.mark.parametrize("margin", [None, 1e3, -1e3])
def test_refls_gradient_goes_through_one_output(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, margin: float | None
) -> None:
    recipe = make_recipe(
        objective={"name": "refl", "margin": margin}, train={"updates": 1, "micro_batch": 4, "step_window": [2, 3]}
    )
    trainer, trajectories, score = disturbed(recipe, run)
    ours = first_gradient(trainer, trajectories, score, monkeypatch)
    if margin == -1e3:
        assert all(float(gradient.abs().max()) == 0 for gradient in ours), "all rewards are above the margin"
        return
    learner, rows = trainer.learner, torch.arange(N)
    x = trajectories.states(2, rows)
    output = learner.policy.predict(
        x, learner.schedule.timesteps[2].expand(N), learner.text.rows(trajectories.prompt_id)
    ).guided
    clean = learner.schedule.x0_hat(x, output, 2)
    _, gradient = score.gradient(clean.detach(), rows, is_preview=True)
    trainer.updates.policy.backward(-(gradient * clean).sum() / (N * T))
    theirs = taken(trainer)
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 2e-5 * scale


def test_the_lean_adjoint_is_the_gradient_through_the_pretrained_chain(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step, also those that are not trained, passes it on; beta multiplies it."""
    recipe = make_recipe(
        objective={"name": "adjoint", "beta": {"value": 20.0}},
        train={"updates": 1, "micro_batch": 8, "step_window": [1, 3]},
    )
    trainer, trajectories, score = disturbed(recipe, run)
    found: dict[int, Tensor] = {}
    against = pathwise.against_pretrained

    def seen(schedule: Any, k: int, y: Tensor, pretrained: Tensor) -> pathwise.Target:
        found[k] = y
        return against(schedule, k, y, pretrained)

    monkeypatch.setattr(pathwise, "against_pretrained", seen)
    ours = first_gradient(trainer, trajectories, score, monkeypatch)
    assert sorted(found) == [1, 2]
    assert max(float(gradient.abs().max()) for gradient in ours) > 0
    states = replayed(trainer, trajectories, 1, pretrained=True)
    _, gradient = score.gradient(states[-1].detach(), torch.arange(N))
    for k, x_next in ((1, states[1]), (2, states[2])):
        (expected,) = torch.autograd.grad((gradient * states[-1]).sum(), x_next, retain_graph=True)
        torch.testing.assert_close(found[k], 20.0 * expected, rtol=1e-4, atol=1e-4 * float(20 * expected.abs().max()))


@pytest.mark.parametrize("name", ["backprop", "refl", "adjoint"])
def test_the_gradient_does_not_depend_on_the_micro_batch(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    section: dict[str, Any] = {"name": name, **({"last": 3} if name == "backprop" else {})}
    found = []
    for micro_batch in (1, 4):
        recipe = make_recipe(
            objective=section,
            train={"updates": 1, "micro_batch": micro_batch},
            regulariser={"sampling": 1.0, "pretrained_kl": 0.1},
        )
        trainer, trajectories, score = disturbed(recipe, RunFolder.create(tmp_path / str(micro_batch)))
        found.append(first_gradient(trainer, trajectories, score, monkeypatch))
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 5e-5 * scale


def test_the_number_of_last_steps_is_fixed_or_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    assert last_steps(2, 5, generator) == [(3, 1.0), (4, 1.0)]
    drawn = [last_steps((1, 3), 5, generator) for _ in range(300)]
    assert all(steps[-1] == (4, 1.0) for steps in drawn)
    for count in (1, 2, 3):
        share = sum(len(steps) == count for steps in drawn) / 300
        assert share == pytest.approx(1 / 3, abs=0.12), "four standard errors"
