"""Trajectory balance with a flow of the first noise in training: gradients, sums, its fit to a rollout, forecasts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import disturb, learnt, rolled_out, rows, sampled, trained, trainer_of
from torch import Tensor

from dag.costs.memory import Simulation
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.training.loss import Rollout
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
N, T, ROWS = 8, 4, slice(0, 8)
TINY = Path(__file__).parents[2] / "recipes/tiny"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def flow_recipe(make_recipe: MakeRecipe, prior: str = "pretrained", **sections: Any) -> Recipe:
    objective = {"name": "tb", "log_z": "flow", "prior": prior, **sections.pop("objective", {})}
    train = {"updates": 1, "micro_batch": 4, **sections.pop("train", {})}
    return make_recipe(objective=objective, train=train, **sections)


def gradients(trainer: Trainer, rollout: Rollout) -> tuple[list[Tensor], list[Tensor]]:
    """(of the policy, of the flow) an update of all trajectories, without a step."""
    learner, state = trainer.learner, trainer.begin_epoch(0)
    learner.updates.step = lambda *_: state.end_update({}, {})  # type: ignore[method-assign]
    for _ in StoredTraining(learner, trainer.meter)._update(rollout, ROWS, state, lambda n: None):
        pass
    policy, flow = learner.updates.optimizers()
    return tuple([p.grad.clone() for p in one.parameters if p.grad is not None] for one in (policy, flow))  # type: ignore[return-value]


def same(ours: list[Tensor], theirs: list[Tensor], share: float, factor: float = 1.0) -> None:
    """Assert that all gradients agree, up to a factor, within a share of the largest entry."""
    largest = max(float(one.abs().max()) for one in theirs)
    assert largest > 0
    assert max(float((factor * a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < share * largest


@pytest.mark.parametrize("is_off_policy", [False, True])
@pytest.mark.parametrize("prior", ["pretrained", "none"])
def test_the_gradient_is_autograds_of_the_squared_residual(
    make_recipe: MakeRecipe, run: RunFolder, prior: str, is_off_policy: bool
) -> None:
    """Of policy and flow; off-policy of the present policy's residual, and log p(x_T) has no part in it: the flow holds it."""
    trainer = trainer_of(flow_recipe(make_recipe, prior), run)
    learner, parts = trainer.learner, trainer.components
    if not is_off_policy:
        disturb(parts, 0.02)
    rollout = learner.rollout(sampled(trainer), 0, is_off_policy=is_off_policy)
    if is_off_policy:
        disturb(parts, 0.02)
    assert learner.flow_fit is not None and rollout.terms is not None and parts.flow is not None
    learner.flow_fit.flow.constants += 7.0
    trajectories, schedule = rollout.trajectories, learner.schedule
    text = learner.text.rows(trajectories.prompt_id)
    d = learner.flow_fit.flow(
        trajectories.chain[0], schedule.timesteps[:1].expand(N), torch.zeros(N, dtype=torch.int64), text
    )
    d = d - rollout.terms.log_reward
    for k in range(T):
        states = learner.loss.states(rollout, ROWS, k)
        d = d + schedule.log_pf(states.x_t, states.x_next, states.prediction.guided, k) - trajectories.log_pb[:, k]
    policy, flow = parts.policy.trainable(), list(parts.flow.parameters())
    expected = torch.autograd.grad(0.5 * d.square().mean() / T, [*policy, *flow])
    ours = gradients(trainer, rollout)
    same(ours[0], list(expected[: len(policy)]), 2e-3)
    same(ours[1], list(expected[len(policy) :]), 2e-3)


def test_it_is_sub_trajectory_balance_with_one_piece(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """SubTB towards lambda = infinity without previews: its loss is T d^2, so both gradients are 2 T times these."""
    found = []
    for name in ("tb", "subtb"):
        own = {"log_z": "flow"} if name == "tb" else {"decay": 1e9, "forward_looking": {"source": "none"}}
        recipe = make_recipe(objective={"name": name, "prior": "pretrained", **own}, train={"updates": 1})
        trainer = trainer_of(recipe, RunFolder.create(tmp_path / name))
        disturb(trainer.components, 0.02)
        found.append(gradients(trainer, trainer.learner.rollout(sampled(trainer), 0)))
    for ours, theirs in zip(*found, strict=True):
        same(ours, theirs, 1e-4, 2 * T)


def test_every_trained_step_trains_the_flow(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Half of the steps, weighted for the others, have the flow's full gradient; a window of half of them has half of it."""
    found = {}
    for name, train in {
        "all": {},
        "drawn": {"step_fraction": 0.5},
        "window": {"step_window": [2, 4]},
        "small": {"micro_batch": 1},
    }.items():
        trainer = trainer_of(flow_recipe(make_recipe, train=train), RunFolder.create(tmp_path / name))
        disturb(trainer.components, 0.02)
        found[name] = gradients(trainer, trainer.learner.rollout(sampled(trainer), 0))
    same(found["drawn"][1], found["all"][1], 1e-5)
    same(found["window"][1], found["all"][1], 1e-5, 2.0)
    same(found["small"][1], found["all"][1], 1e-5)
    # With other tiles log P_F is recomputed up to rounding, which moves the ratio by some 1e-4.
    same(found["small"][0], found["all"][0], 1e-3)


def test_long_sums_keep_small_differences(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """Steps of 10^7 nats: float32 sums would lose what the residual consists of."""
    trainer = trainer_of(flow_recipe(make_recipe), run)
    trajectories = sampled(trainer)
    log_pf = 1e7 + torch.arange(N * T).view(N, T).float()
    moved = replace(trajectories, log_pf=log_pf, log_pb=torch.full_like(log_pf, 1e7), reward=torch.zeros(N))
    terms = trainer.learner.log_scale.terms(moved, 0)
    assert trainer.learner.flow_fit is not None
    found = trainer.learner.flow_fit.residuals(moved, terms, ROWS)
    expected = (log_pf.double() - 1e7).sum(1, keepdim=True).float()
    assert found.shape == (N, 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected), "a new flow is zero"


def test_a_warm_up_centres_the_residual_and_trains_the_flow(make_recipe: MakeRecipe, run: RunFolder) -> None:
    recipe = flow_recipe(make_recipe, "none", flow={"warmup_epochs": 1, "slopes": True})
    assert recipe.warmup_epochs == 1
    trainer, trajectories = rolled_out(recipe, run)
    learner = trainer.learner
    policy = [p.clone() for p in trainer.components.policy.trainable()]
    measured = learnt(learner, trajectories, 0)
    assert all(torch.equal(a, b) for a, b in zip(policy, trainer.components.policy.trainable(), strict=True))
    assert len(measured["residual_rms_per_step"]) == 1
    assert learner.flow_fit is not None
    found = learner.flow_fit.residuals(trajectories, learner.log_scale.terms(trajectories, 0), ROWS)
    assert abs(measured["residual_mean"]) > 1
    assert abs(float(found.mean())) < 1e-4 * abs(measured["residual_mean"])
    before = [p.clone() for p in learner.flow_fit.flow.parameters()]
    learner.recipe = recipe.model_copy(update={"flow": recipe.flow.model_copy(update={"passes": 1})})
    learner.fit_flow(learner.rollout(trajectories, 0))
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.flow_fit.flow.parameters(), strict=True))


def test_one_trajectory_is_an_update(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """Without groups, which `log_z: batch` needs."""
    recipe = flow_recipe(make_recipe, train={"epochs": 1, "trajectories": 2, "updates": 2})
    assert rows(trained(recipe, run).path)[-1]["optimizer_step"] == 2


def test_the_key_is_all_that_rtb_needs() -> None:
    recipe = load(TINY / "rtb.yaml", ["objective.log_z=flow"])
    assert recipe.warmup_epochs == 1
    assert recipe.samples_prior
    assert load(TINY / "rtb.yaml").warmup_epochs == 0


def test_the_forecast_has_the_flow(make_recipe: MakeRecipe) -> None:
    with_flow, without = (Simulation(flow_recipe(make_recipe, objective={"log_z": z})) for z in ("flow", "batch"))
    assert with_flow.forecast().standing["flow"] > 0 == without.forecast().standing["flow"]
    assert with_flow.peak("update") > without.peak("update")
