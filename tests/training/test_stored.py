"""Updates on stored chains of a tiny random Stable Diffusion: ratios, micro-batches, switches, recentring of the flow."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dag_kernels import penalty
from helpers.building import disturb, learnt, rolled_out, sampled, trainer_of, updated

from dag.chain.rollout import Batch
from dag.chain.trajectory import Trajectories
from dag.objectives import UpdateScalars
from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
KL = {"name": "dag_kl", "residual_scale": "running", "huber": 3.0}
DB = {"name": "dag_db", "residual_scale": "running", "huber": 3.0}
DDPO = {"name": "ddpo"}
PATHWISE: dict[str, Any] = {"name": "dag_kl", "beta": {"value": 20.0}, "policy_gradient": "pathwise"}
NABLA: dict[str, Any] = {"name": "nabla_db", "beta": {"value": 20.0}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


class Seen(Exception):  # noqa: N818
    """The first update has made its gradients, which is all that is asked for."""


def gradients(trainer: Trainer, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients of the first update, at the moment when the optimizer would step."""
    learner, captured = trainer.components.learner, list[list[torch.Tensor]]()

    def capture(stepper: Any) -> float:
        captured.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stepper.parameters])
        if len(captured) == len(list(learner.updates.optimizers())):
            raise Seen
        return 0.0

    monkeypatch.setattr("dag.training.optimizer.ClippedOptimizer.step", capture)
    with pytest.raises(Seen):
        learnt(learner, trajectories, 0, trainer.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id)))
    monkeypatch.undo()
    return [gradient for group in captured for gradient in group]


# The objective has no part in log P_F: every precision with one of them, and the others with one precision.
@pytest.mark.parametrize(
    ("objective", "dtype", "chain"),
    [
        *((DB, dtype, chain) for dtype in ("fp32", "bf16") for chain in ("fp32", "fp16", "bf16")),
        (KL, "bf16", "fp16"),
        (DDPO, "bf16", "fp16"),
    ],
)
def test_ratio_is_exactly_one_with_equal_tiles(
    make_recipe: MakeRecipe, run: RunFolder, objective: dict[str, Any], dtype: str, chain: str
) -> None:
    """Recomputing log P_F at the stored state gives the stored number bit for bit, whatever the precision."""
    recipe = make_recipe(
        objective=objective,
        sampler={"chain_dtype": chain},
        train={"micro_batch": 4, "updates": 1},
        model={"dtype": dtype},
    )
    trainer = trainer_of(recipe, run)
    disturb(trainer.components)
    trajectories = sampled(trainer, 0)
    metrics = updated(trainer, trajectories, 0)
    assert metrics["ratio_max_dev"] == 0.0


def test_published_log_pf_at_the_unrounded_state_is_off(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """A switch reproduces the published code: with bf16 states the ratio is not one even before an update."""
    recipe = make_recipe(sampler={"chain_dtype": "bf16", "log_pf_at": "unrounded"}, train={"updates": 1})
    trainer, trajectories = rolled_out(recipe, run)
    assert updated(trainer, trajectories, 0)["ratio_max_dev"] > 1e-3


@pytest.mark.parametrize(
    "objective", [DB, KL, DDPO, {**KL, "baseline": "mixed", "normalise_advantage": True}, PATHWISE, NABLA], ids=str
)
def test_gradient_does_not_depend_on_the_micro_batch(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, objective: dict[str, Any]
) -> None:
    found = []
    for micro_batch in (1, 4):
        recipe = make_recipe(
            objective=objective,
            train={"micro_batch": micro_batch},
            regulariser={"sampling": 1.0, "pretrained_kl": 0.1},
        )
        trainer = trainer_of(recipe, run)
        disturb(trainer.components)
        trajectories = sampled(trainer, 0)
        found.append(gradients(trainer, trajectories, monkeypatch))
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    assert scale > 0
    # Smaller micro-batches add float32 numbers in another order.
    assert worst < 2e-5 * scale


@pytest.mark.parametrize(
    "change",
    [
        {"objective": {"detach_next": False}},
        {"objective": {"prior": "pretrained"}},
        {"objective": {"log_prob_reduction": "mean"}},
        {"objective": {"huber": 0.01}},
        {"objective": {"residual_scale": "running"}},
        {"objective": {"step_weight": "balanced"}},
        {"objective": {"forward_looking": {"source": "none"}}},
        {"objective": {"forward_looking": {"weight": "one"}}},
        {"objective": {"forward_looking": {"prediction": "conditional"}}},
        {"objective": {"forward_looking": {"coefficients": "bf16"}}},
        {"objective": {"beta": {"value": 40.0}}},
        {"objective": {"beta": {"value": 20.0, "unit": "reward_sd"}}},
        {"objective": {"beta": {"value": 20.0, "anneal": "linear_from_zero"}}},
        {"sampler": {"noise_dtype": "bf16"}},
        {"sampler": {"chain_dtype": "bf16"}},
        {"sampler": {"guidance_scale": 1.0}},
        {"sampler": {"eta": 0.7}},
        {"flow": {"calibration": 0.0}},
        {"flow": {"passes": 1}},
        {"flow": {"slopes": True}},
        {"regulariser": {"sampling": 1.0}},
        {"regulariser": {"pretrained_kl": 1.0}},
        {"train": {"step_fraction": 0.5}},
        {"train": {"step_fraction": 0.5, "keep_terminal": False}},
        {"adapter": {"alpha": 8.0}},
        {"model": {"dtype": "bf16"}},
    ],
    ids=str,
)
def test_every_switch_changes_the_gradient(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """A key of a recipe that changes nothing would go unnoticed otherwise."""
    sections = {name: dict(section) for name, section in change.items()}
    if "objective" in sections:
        sections["objective"] = {"name": "dag_db", "beta": {"value": 20.0}, **sections["objective"]}
    if not _UNCHANGED:
        _UNCHANGED.extend(of_a_moved_policy(make_recipe(), run, monkeypatch))
    found = of_a_moved_policy(make_recipe(**sections), run, monkeypatch)
    assert any(not torch.equal(a, b) for a, b in zip(found, _UNCHANGED, strict=True))


_UNCHANGED: list[torch.Tensor] = []
"""The gradients without a change, which all these tests compare with."""


def of_a_moved_policy(recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients when the policy has moved since the rollout: the pull towards its old predictions is then not zero."""
    trainer, old = rolled_out(recipe, run)
    disturb(trainer.components)
    return gradients(trainer, old, monkeypatch)


def test_current_forward_looking_scores_the_moved_policy(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source: current` equals `source: rollout` until the policy moves, and then differs."""

    def both(move: bool) -> list[list[torch.Tensor]]:
        found = []
        for source in ("rollout", "current"):
            recipe = make_recipe(objective={"forward_looking": {"source": source}}, train={"micro_batch": 4})
            trainer, trajectories = rolled_out(recipe, run)
            if move:
                disturb(trainer.components)
            found.append(gradients(trainer, trajectories, monkeypatch))
        return found

    assert all(torch.equal(a, b) for a, b in zip(*both(move=False), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*both(move=True), strict=True))


def test_sampling_regulariser_is_zero_on_policy_and_bounded_by_rounding(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer, trajectories = rolled_out(make_recipe(regulariser={"sampling": 1.0}), run)
    learner, rows = trainer.components.learner, torch.arange(4)
    for k in range(4):
        _, regulariser = learner.loss.of_step(learner.rollout(trajectories, 0), rows, k)
        assert float(regulariser.detach().max()) < 1e-9


def test_pretrained_kl_is_zero_for_a_fresh_adapter_and_positive_afterwards(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer, trajectories = rolled_out(make_recipe(regulariser={"pretrained_kl": 1.0}), run)
    learner, rows = trainer.components.learner, torch.arange(4)
    rollout = learner.rollout(trajectories, 0)
    assert learner.loss.of_step(rollout, rows, 1)[1].abs().max() == 0
    disturb(trainer.components)
    assert learner.loss.of_step(rollout, rows, 1)[1].min() > 0


def test_calibration_centres_the_residuals_of_its_rollout(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, trajectories = rolled_out(make_recipe(flow={"warmup_epochs": 1}), run)
    learner = trainer.components.learner
    first = learnt(learner, trajectories, 0)
    assert learner.flow_fit is not None
    residuals = learner.flow_fit.residuals(trajectories, learner.log_scale.terms(trajectories, 0), torch.arange(8))
    means, before = residuals.mean(0).abs().max(), max(map(abs, first["residual_mean_per_step"]))
    assert before > 10
    assert float(means) < 1e-4 * before


def test_warmup_trains_the_flow_alone(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, trajectories = rolled_out(make_recipe(flow={"warmup_epochs": 1, "passes": 1}), run)
    parts = trainer.components
    assert parts.flow is not None
    policy, flow = [p.clone() for p in parts.policy.trainable()], [p.clone() for p in parts.flow.parameters()]
    learnt(parts.learner, trajectories, 0)
    assert all(torch.equal(a, b) for a, b in zip(policy, parts.policy.trainable(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(flow, parts.flow.parameters(), strict=True))
    learnt(parts.learner, trajectories, 1)
    assert any(not torch.equal(a, b) for a, b in zip(policy, parts.policy.trainable(), strict=True))


def test_step_subsets_keep_the_terminal_and_are_unbiased(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, _ = rolled_out(make_recipe(sampler={"steps": 10}, train={"step_fraction": 0.3}), run)
    learner, totals = trainer.components.learner, torch.zeros(10)
    draws = 3000
    for step in range(draws):
        learner.updates.optimizer_step = step
        chosen = learner.updates.choose_steps()
        assert len(chosen) == 3
        assert chosen[-1] == (9, 1.0)
        for k, weight in chosen:
            totals[k] += weight
    # Every step counts once on average; 5 standard errors of a 2-in-9 draw with weight 4.5.
    assert float((totals / draws - 1).abs().max()) < 5 * (4.5 * 3.5 / 4.5 / draws) ** 0.5 * 1.5


def test_only_the_steps_of_the_window_are_trained(make_recipe: MakeRecipe, run: RunFolder) -> None:
    updates = rolled_out(make_recipe(sampler={"steps": 10}, train={"step_window": [2, 6]}), run)[
        0
    ].components.learner.updates
    assert updates.choose_steps() == [(k, 1.0) for k in range(2, 6)]
    updates.recipe = make_recipe(sampler={"steps": 10}, train={"step_window": [2, 6], "step_fraction": 0.5})
    drawn = updates.choose_steps()
    assert [weight for _, weight in drawn] == [2.0, 2.0], "the last step is not in the window, so none is kept"
    assert {k for k, _ in drawn} <= {2, 3, 4, 5}


def test_gradient_checkpointing_changes_nothing(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for on in (False, True):
        trainer, trajectories = rolled_out(make_recipe(memory={"checkpointing": "full" if on else "none"}), run)
        assert trainer.components.policy.denoiser.is_gradient_checkpointing is on
        found.append(gradients(trainer, trajectories, monkeypatch))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_eight_bit_optimizer_trains(make_recipe: MakeRecipe, run: RunFolder) -> None:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes keeps tensors under 4096 elements in fp32: a wide adapter has 8-bit states.
    recipe = make_recipe(train={"optimizer": "adamw8bit"}, adapter={"rank": 600})
    trainer, trajectories = rolled_out(recipe, run)
    updated(trainer, trajectories, 0)
    optimizer = trainer.components.learner.updates.policy.optimizer
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())


def test_a_gradient_that_stays_non_finite_stops_the_run(make_recipe: MakeRecipe, run: RunFolder) -> None:
    from dag.errors import RunError

    trainer, trajectories = rolled_out(make_recipe(), run)
    with torch.no_grad():
        trainer.components.policy.trainable()[0].fill_(float("nan"))
    with pytest.raises(RunError, match="policy's gradient was not finite"):
        _train(trainer, trajectories, epochs=5)


def _train(trainer: Trainer, trajectories: Trajectories, epochs: int) -> None:
    for epoch in range(epochs):
        updated(trainer, trajectories, epoch)


def test_residuals_of_micro_batches_are_those_of_whole_trajectories(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """Residuals from micro-batches (with the network) equal those from the rollout's numbers, also in the last step."""
    trainer, trajectories = rolled_out(make_recipe(train={"micro_batch": 4}), run)
    disturb(trainer.components)
    trajectories = sampled(trainer, 0)
    learner, rows = trainer.components.learner, torch.tensor([5, 0, 2, 7])
    assert learner.flow_fit is not None
    rollout = learner.rollout(trajectories, 0)
    assert rollout.terms is not None
    table = learner.flow_fit.residuals(trajectories, rollout.terms, rows)
    assert table.shape == (4, 4)
    for k in range(4):
        found = learner.loss.of_step(rollout, rows, k)[0].residual
        assert found is not None
        # Sums of 10^2 nats in float32.
        torch.testing.assert_close(found, table[:, k], rtol=1e-5, atol=2e-3)
    without_reward = trajectories.reward + 1.0
    changed = learner.rollout(replace(trajectories, reward=without_reward), 0)
    assert changed.terms is not None
    moved = learner.flow_fit.residuals(trajectories, changed.terms, rows) - table
    assert moved[:, :3].abs().max() == 0
    assert moved[:, 3].abs().min() > 1


def test_advantages_belong_to_their_rows(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, trajectories = rolled_out(make_recipe(objective=KL), run)
    learner, rows = trainer.components.learner, torch.tensor([3, 6, 4])
    assert learner.flow_fit is not None
    rollout = learner.rollout(trajectories, 0)
    assert rollout.terms is not None
    found = StoredTraining(learner, trainer.meter)._tables(rollout, rows, None).advantage
    residuals = learner.flow_fit.residuals(trajectories, rollout.terms, rows)
    fit = learner.flow_fit
    expected = learner.objective.advantages(
        UpdateScalars(residuals=residuals, residual_scale=fit.residual_scale, running_mean=fit.baseline)
    )
    assert found is not None and expected is not None
    assert torch.equal(found[rows], expected)
    assert float(expected.abs().min()) > 0


@pytest.mark.parametrize("objective", [DB, KL, DDPO])
def test_fused_kernels_give_the_same_gradient(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, objective: dict[str, Any]
) -> None:
    """Triton, through its interpreter if there is no GPU, against PyTorch on the same rollout."""
    pytest.importorskip("triton")
    found, ratios = [], []
    for kernels in ("torch", "triton"):
        recipe = make_recipe(
            objective=objective,
            regulariser={"sampling": 1.0, "pretrained_kl": 0.1},
            train={"trajectories": 4, "micro_batch": 2, "updates": 1},
        ).model_copy(update={"kernels": kernels})
        trainer = trainer_of(recipe, run)
        assert trainer.components.kernels.name == kernels
        disturb(trainer.components)
        trajectories = sampled(trainer, 0)
        ratios.append(updated(trainer, trajectories, 0)["ratio_max_dev"])
        trainer = trainer_of(recipe, run)
        disturb(trainer.components)
        found.append(gradients(trainer, trajectories, monkeypatch))
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    # Noise that differs by 2e-6 moves log-probs of 10^2 nats by a few 1e-4.
    assert worst < 1e-3 * scale
    assert ratios == [0.0, 0.0]


def test_scaled_residuals_weigh_the_steps_once(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """The loss of step k is (s_k / mean s) g(delta / s_k); without scaling it is g(delta)."""
    for objective, scales in ((DB, torch.tensor([1.0, 2.0, 5.0, 8.0])), ({"name": "dag_db", "huber": 3.0}, None)):
        trainer, trajectories = rolled_out(make_recipe(objective=objective), run)
        learner, rows = trainer.components.learner, torch.arange(4)
        assert learner.flow_fit is not None
        if scales is not None:
            learner.flow_fit.residual_scale = scales
        rollout = learner.rollout(trajectories, 0)
        for k in range(4):
            output = learner.loss.of_step(rollout, rows, k)[0]
            assert output.residual is not None
            s, weight = (1.0, 1.0) if scales is None else (float(scales[k]), float(scales[k]) / 4.0)
            torch.testing.assert_close(output.loss.detach(), weight * penalty(output.residual / s, 3.0))


def test_a_baseline_learns_the_reward_of_the_final_picture(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """From x0_hat at every state, and only after the updates: a value that knew the rollout would explain its noise."""
    recipe = make_recipe(objective={"name": "ddpo", "baseline": "value"}, flow={"warmup_epochs": 1})
    trainer, trajectories = rolled_out(recipe, run)
    learner, T = trainer.components.learner, recipe.sampler.steps
    lesson = learner.critic_lesson(trajectories, None)
    assert lesson is not None
    assert torch.equal(lesson.reward, trajectories.reward[:, None].expand(-1, T + 1))
    found = trajectories.x0_hat_old(learner.schedule, slice(0, 8), 1)
    torch.testing.assert_close(lesson.latents[:, 1].float(), found, rtol=1e-3, atol=1e-3)
    values = learner.state_values(trajectories, slice(0, 4))
    assert values is not None
    assert values.shape == (4, T)
    updated(trainer, trajectories)
    assert learner.critic_fit is not None
    assert learner.critic_fit.mean == pytest.approx(float(trajectories.reward.mean()), rel=1e-5)
    again = learner.state_values(trajectories, slice(0, 4))
    assert again is not None
    assert not torch.equal(again, values)
