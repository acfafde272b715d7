"""Slopes of the state flow in training: what they narrow, how far a rollout moves them, one pass against stored chains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.building import one_pass, rolled_out, sampled, trainer_of

from dag.errors import UsageError
from dag.objectives.transition import constant_shift, slope_shift, with_slopes
from dag.recipe import Recipe
from dag.recipe.load import parse
from dag.run.folder import RunFolder
from dag.training.flow_fit import FlowFit
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
ALL = slice(0, 8)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def flow_fit_of(trainer: Trainer) -> FlowFit:
    found = trainer.components.learner.flow_fit
    assert found is not None
    return found


def tables(trainer: Trainer, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(residuals, q) of a new rollout of the policy."""
    learner, flow_fit = trainer.components.learner, flow_fit_of(trainer)
    trajectories = sampled(trainer, epoch)
    rows, terms = slice(0, trajectories.num_trajectories), learner.log_scale.terms(trajectories, epoch)
    excess = flow_fit.excess(trajectories, rows)
    assert excess is not None
    return flow_fit.residuals(trajectories, terms, rows), excess


def test_slopes_without_calibration_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UsageError, match=r"flow.slopes=true: flow.calibration=0 never moves the slopes"):
        make_recipe(flow={"slopes": True, "calibration": 0.0})


def test_the_excess_is_that_of_the_state_before_each_step(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, trajectories = rolled_out(make_recipe(flow={"slopes": True}), run)
    found = flow_fit_of(trainer).excess(trajectories, ALL)
    expected = trajectories.chain[:-1].float().flatten(2).square().mean(2).T - 1
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain, _ = rolled_out(make_recipe(), run)
    assert flow_fit_of(plain).excess(trajectories, ALL) is None


def test_the_first_rollout_moves_the_flow_all_the_way_and_later_ones_by_the_rate(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer = trainer_of(make_recipe(flow={"slopes": True, "calibration": 0.25}), run)
    flow_fit = flow_fit_of(trainer)
    residuals, excess = tables(trainer, 0)
    slopes, constants = torch.zeros(4), torch.zeros(4)
    for rate in (1.0, 0.25):
        residuals = residuals - torch.tensor([300.0, 200.0, 100.0, 50.0]) * excess  # norms that both fits shall find
        step = rate * slope_shift(residuals, excess)
        slopes += step
        constants += rate * constant_shift(with_slopes(residuals, excess, step))
        flow_fit.recentre(residuals, excess)
        assert float(step[0]) > 1
        assert flow_fit.flow.slopes is not None
        assert torch.equal(flow_fit.flow.slopes, slopes)
        assert torch.equal(flow_fit.flow.constants, constants)


def test_residual_scales_are_those_of_the_narrowed_residuals(make_recipe: MakeRecipe, run: RunFolder) -> None:
    recipe = make_recipe(flow={"slopes": True}, objective={"residual_scale": "running"})
    trainer = trainer_of(recipe, run)
    flow_fit = flow_fit_of(trainer)
    residuals, excess = tables(trainer, 0)
    flow_fit.recentre(residuals, excess)
    moved, _ = tables(trainer, 0)
    # The network's last layer is zero, so that the new `scale` changes nothing. Sums of 10^2 nats in float32.
    torch.testing.assert_close(flow_fit.residual_scale, moved.std(0, correction=0), rtol=1e-3, atol=1e-3)
    assert float(moved.mean(0).abs().max()) < 1e-3 * float(residuals.mean(0).abs().max())
    assert float(flow_fit.residual_scale.mean()) < 0.99 * float(residuals.std(0, correction=0).mean())


def test_one_pass_moves_the_slopes_as_a_stored_rollout_does(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(flow={"slopes": True}, train={"updates": 1, "rollout": "one_pass"})
    trained, stored = (trainer_of(recipe, RunFolder.create(tmp_path / name)) for name in ("one_pass", "stored"))
    one_pass(trained, 1)
    flow_fit_of(stored).recentre(*tables(stored, 1))
    ours, theirs = flow_fit_of(trained).flow, flow_fit_of(stored).flow
    assert ours.slopes is not None and theirs.slopes is not None and float(ours.slopes.abs().max()) > 1
    assert torch.equal(ours.slopes, theirs.slopes)
    assert torch.equal(ours.constants, theirs.constants)


def test_held_out_residuals_of_the_embedded_model_are_narrower(run: RunFolder) -> None:
    """Slopes of 16 chains, judged on 16 others: the first step is far narrower, the second narrower, none much wider.

    The residuals are those without a reward, since the slopes are for the noise of log P_F - log P_B.
    """
    data = {
        "model": {"path": "embedded"},
        "sampler": {"steps": 5, "guidance_scale": 1.0, "tile": 16},
        "prompts": {"set": "simple_animals"},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "dag_db", "beta": {"value": 1e-6}, "forward_looking": {"source": "none"}},
        "flow": {"slopes": True, "channels": [8]},
        "train": {"trajectories": 16, "updates": 1},
    }
    trainer = trainer_of(parse(data, "embedded"), run)
    slopes = slope_shift(*tables(trainer, 0))
    residuals, excess = tables(trainer, 1)
    before, after = residuals.std(0), with_slopes(residuals, excess, slopes).std(0)
    ratio = after / before
    print("standard deviation after / before:", ratio.tolist())
    assert float(ratio[0]) < 0.6
    assert float(ratio[1]) < 0.95
    # Twice the sampling error of a standard deviation of 16 chains.
    assert float(ratio.max()) < 1 + 2 / (2 * 16) ** 0.5
