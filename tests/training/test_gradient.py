"""The gradient of the reward in training: exact and learnt, the critic, the trust region, informative steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import disturb, rolled_out, trainer_of, updated
from torch import Tensor

from dag.chain.rollout import Batch
from dag.objectives.log_scale import RewardScale
from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.training.critic_fit import CriticFit, preview_steps
from dag.training.flow_gradient import Rewarded
from dag.training.trainer import Trainer
from dag.training.updates import informative_steps

MakeRecipe = Callable[..., Recipe]
PATHWISE: dict[str, Any] = {
    "name": "dag_kl",
    "policy_gradient": "pathwise",
    "prior": "pretrained",
    "learnt_flow": False,
    "forward_looking": {"weight": "one"},
}
LEARNT: dict[str, Any] = {**PATHWISE, "reward_gradient": "learnt"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


# -- d log F / d x ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "uncond", "has_flow"),
    [(1, "trained", False), (1, "frozen", False), (1, "trained", True), (4, "trained", True)],
)
def test_the_flows_gradient_is_that_of_the_whole_chain(
    make_recipe: MakeRecipe, run: RunFolder, k: int, uncond: str, has_flow: bool
) -> None:
    """Learnt flow, denoiser, decoder and reward, against a central difference along a random direction.

    k = 4 is the final latent, which has no learnt flow.
    """
    recipe = make_recipe(objective={**PATHWISE, "learnt_flow": has_flow}, sampler={"uncond": uncond})
    trainer, trajectories = rolled_out(recipe, run)
    disturb(trainer.components)
    learner, pulls = trainer.learner, trainer.learner.loss.pulls
    learner.log_scale.reward_scale = RewardScale(mean=7.0, sd=2.5, is_set=True)
    if learner.flow_fit is not None:
        learner.flow_fit.flow.scale.fill_(300.0)  # so that its slope is of the reward's size
    assert pulls is not None
    rows, score = torch.arange(3), trainer.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id))
    x, prompt_id = trajectories.states(k, rows), trajectories.prompt_id[rows]
    policy, schedule, text = learner.policy, learner.schedule, learner.text.rows(prompt_id)

    def log_F(x: Tensor) -> Tensor:
        with torch.no_grad():
            if k == 4:
                return learner.log_scale.log_reward(score(policy.decode(x), rows), 0)
            guided = policy.predict(x, schedule.timesteps[k].expand(3), text).guided
            return learner.log_scale.log_looking(score(policy.preview(schedule.x0_hat(x, guided, k)), rows), 0, k)

    def log_F_tilde(x: Tensor) -> Tensor:
        if k == 4 or learner.flow_fit is None:
            return torch.zeros(3)
        with torch.no_grad():
            return learner.flow_fit.log_F_tilde_at(x, prompt_id, torch.full((3,), k))

    look = pulls.flow_gradient.at(x, k, Rewarded(prompt_id, score, rows, 0))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    step = 2e-3
    above, below = x + step * direction, x - step * direction
    difference = (log_F(above) + log_F_tilde(above) - log_F(below) - log_F_tilde(below)) / (2 * step)
    slope = (look.y * direction).flatten(1).sum(1)
    torch.testing.assert_close(look.log_looking, log_F(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, difference, rtol=0.02, atol=0.02 * float(difference.abs().max()))


@pytest.mark.parametrize("options", [{"jacobian": "pretrained"}, {"name": "nabla_db", "learnt_flow": True}], ids=str)
def test_checkpointing_does_not_change_the_gradient_of_the_pretrained_model(
    make_recipe: MakeRecipe, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its passes are recomputed when the adapter is on again, and must be recomputed without it."""
    section, found = {**PATHWISE, **options}, []
    if section["name"] == "nabla_db":
        del section["policy_gradient"]
    for checkpointing in ("none", "full"):
        recipe = make_recipe(objective=section, memory={"checkpointing": checkpointing}, train={"updates": 1})
        trainer, trajectories = rolled_out(recipe, RunFolder.create(tmp_path / checkpointing))
        disturb(trainer.components)
        found.append([p.grad.clone() for p in gradients_of(trainer, trajectories, monkeypatch) if p.grad is not None])
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 2e-5 * scale


def gradients_of(trainer: Trainer, trajectories: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trained weights with their gradients in an update that makes no step."""
    monkeypatch.setattr("dag.training.optimizer.ClippedOptimizer.step", lambda stepper: 0.0)
    updated(trainer, trajectories)
    monkeypatch.undo()
    return [parameter for optimizer in trainer.updates.optimizers() for parameter in optimizer.parameters]


def gradients_under(
    make_recipe: MakeRecipe, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int, **section: Any
) -> list[Tensor]:
    """The policy's gradients in an update with this objective, of the same trajectories and the same disturbed policy."""
    recipe = make_recipe(objective=section, sampler={"steps": steps}, train={"updates": 1}, flow={"warmup_epochs": 0})
    trainer, trajectories = rolled_out(recipe, RunFolder.create(folder))
    disturb(trainer.components)
    return [p.grad.clone() for p in gradients_of(trainer, trajectories, monkeypatch) if p.grad is not None]


def test_means_of_log_probs_scale_the_gradient_as_they_scale_a_score_functions(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With means and beta / D the target is that of sums and beta; residual and log P_F are each D times smaller."""
    D, section = 4 * 8 * 8, PATHWISE
    options = {"beta": {"value": 20.0 / D}, "log_prob_reduction": "mean"}
    sums = gradients_under(make_recipe, tmp_path / "sum", monkeypatch, 4, **section)
    means = gradients_under(make_recipe, tmp_path / "mean", monkeypatch, 4, **{**section, **options})
    for a, b in zip(sums, means, strict=True):
        torch.testing.assert_close(D**2 * b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_nabla_dbs_residuals_are_weighted_by_their_steps_variance_or_averaged(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chain of one step the two weights differ by one factor, and the forward residual is DAG-KL's pathwise loss."""
    nabla = {"name": "nabla_db", "prior": "pretrained", "learnt_flow": False, "forward_looking": {"weight": "one"}}
    found = {
        name: gradients_under(make_recipe, tmp_path / name, monkeypatch, 1, **section)
        for name, section in {"variance": nabla, "one": {**nabla, "weight": "one"}, "dag_kl": PATHWISE}.items()
    }
    recipe = make_recipe(sampler={"steps": 1})
    sigma = trainer_of(recipe, RunFolder.create(tmp_path / "schedule")).learner.schedule.sigma[0]
    for variance, one, dag_kl in zip(found["variance"], found["one"], found["dag_kl"], strict=True):
        expected = 2 / (sigma.square() * 4 * 8 * 8) * variance
        # Sums of float32 numbers in the same order, of which only the size differs.
        torch.testing.assert_close(one, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        torch.testing.assert_close(dag_kl, variance)


def test_the_gradient_does_not_depend_on_how_many_pictures_go_back_at_a_time(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer, _ = rolled_out(make_recipe(objective=PATHWISE), run)
    reward, policy = trainer.components.reward, trainer.components.policy
    latents = torch.randn(5, *policy.latent_shape)
    whole = reward.gradient(latents, ["a cat"] * 5, policy.decode, chunk=5)
    parts = reward.gradient(latents, ["a cat"] * 5, policy.decode, chunk=2)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_exact_and_learnt_gradients_of_a_mix_add(make_recipe: MakeRecipe, run: RunFolder) -> None:
    mix = [{"name": "colourfulness", "weight": 2.0}, {"name": "compressibility", "weight": 0.5}]
    trainer, trajectories = rolled_out(make_recipe(objective=PATHWISE, reward=mix, reward_critic={"width": 8}), run)
    learner, pulls = trainer.learner, trainer.learner.loss.pulls
    assert pulls is not None and learner.critic_fit is not None
    updated(trainer, trajectories)
    rows, score = torch.arange(2), trainer.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id))
    latents, prompt_id = trajectories.states(4, rows).float(), trajectories.prompt_id[rows]
    exact, learnt = score.gradient(latents, rows), learner.critic_fit.value_and_gradient(latents, prompt_id)
    value, gradient = pulls.flow_gradient._reward(latents, Rewarded(prompt_id, score, rows, 0), is_preview=False)
    assert torch.equal(value, exact[0] + learnt[0]) and torch.equal(gradient, exact[1] + learnt[1])
    # What the critic learns is the sum without the reward whose gradient is exact.
    assert learner.critic_fit.previews is not None
    final = learner.critic_fit.previews.reward.view(8, -1)[:2, -1]
    torch.testing.assert_close(final, trajectories.reward[rows] - exact[0], rtol=1e-3, atol=1e-2)


# -- the critic ---------------------------------------------------------------------------------------------------


def critic_of(make_recipe: MakeRecipe, run: RunFolder, **section: Any) -> CriticFit:
    recipe = make_recipe(objective=LEARNT, reward_critic={"width": 16, "passes": 20, **section})
    fit = trainer_of(recipe, run).learner.critic_fit
    assert fit is not None
    return fit


def latents(seed: int, count: int = 48) -> Tensor:
    return torch.randn(count, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_critic_learns_a_reward_that_depends_on_the_prompt(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """The mean of the first channel for one prompt, minus it for the other."""
    fit, prompt_id = critic_of(make_recipe, run, held_out=0.25), torch.arange(96) % 3 % 2
    sign = 1.0 - 2.0 * prompt_id
    for seed in range(3):
        x = latents(seed, 96) + torch.randn(96, 3, 1, 1, 1, generator=torch.Generator().manual_seed(9 + seed))
        measured = fit.learn(x, sign[:, None] * x[:, :, 0].mean((2, 3)), prompt_id)
    assert measured["critic_correlation"] > 0.85
    assert measured["critic_correlation_before"] > 0.8
    _, gradient = fit.value_and_gradient(x[:2, 0], prompt_id[:2])
    assert gradient[0, 0].mean() > 0 > gradient[1, 0].mean()


def test_the_critics_gradient_is_compared_with_the_exact_one_where_there_is_one(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, trajectories = rolled_out(make_recipe(objective=LEARNT, reward_critic={"width": 8}), run)
    assert "critic_cosine" not in updated(trainer, trajectories), "the first updates have no critic before them"
    reward, rows = trainer.components.reward, list[int]()
    gradient = reward.gradient

    def counted(latents: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(latents))
        return gradient(latents, *others)

    monkeypatch.setattr(reward, "gradient", counted)
    measured = updated(trainer, trajectories, epoch=1)
    assert rows == [1] * 8, "one graph of the decoder at a time"
    assert -1 < measured["critic_cosine"] < 1
    norms, kls = measured["gradient_norm_per_step"], measured["pretrained_kl_per_step"]
    assert len(norms) == len(kls) == 4
    assert all(norm > 0 for norm in norms) and all(kl > 0 for kl in kls)


def test_the_critic_keeps_the_newest_rollouts_and_holds_some_trajectories_out(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    fit = critic_of(make_recipe, run, rollouts=2, passes=1, held_out=0.25)
    for seed in range(3):
        fit.learn(latents(seed, 8), torch.full((8, 3), float(seed)), torch.zeros(8, dtype=torch.int64))
    assert fit.previews is not None
    assert fit.previews.rollout.unique().tolist() == [1, 2]
    assert fit.previews.reward.unique().tolist() == [1.0, 2.0]
    held = fit.previews.is_held_out.view(2, 8, 3)
    assert torch.equal(held.all(2), held.any(2)), "a trajectory is held out with all its previews"
    assert held.all(2).sum(1).tolist() == [2, 2]


def test_the_critic_takes_the_weights_with_the_least_error_on_what_is_held_out(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, errors = critic_of(make_recipe, run), iter([5.0, 3.0, 4.0, 4.5])
    seen = []

    def error(previews: object) -> float:
        seen.append(next(fit.critic.parameters()).detach().clone())
        return next(errors)

    monkeypatch.setattr(fit, "_error", error)
    measured = fit.learn(latents(0, 8), torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    assert measured["critic_error"] == 3.0
    assert len(seen) == 4, "two passes without a lower error end the training"
    assert torch.equal(next(fit.critic.parameters()), seen[1])


@pytest.mark.parametrize(("T", "stride", "expected"), [(4, 1, [0, 1, 2, 3]), (50, 1, 11), (50, 5, 11), (1, 1, [0])])
def test_previews_are_spread_over_the_scored_states(T: int, stride: int, expected: Any) -> None:
    steps = preview_steps(T, stride)
    assert steps == expected if isinstance(expected, list) else len(steps) == expected
    assert steps == sorted(set(steps))
    assert all(k % stride == 0 or k >= T - 3 for k in steps)
    assert steps[0] == 0 and steps[-1] == T - 1


def test_previews_from_the_chain_are_those_that_were_scored(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer, trajectories = rolled_out(make_recipe(objective=LEARNT), run)
    learner, policy = trainer.learner, trainer.components.policy
    previews = learner._previews(trajectories, [0, 2])
    for column, k in enumerate([0, 2]):
        images = policy.preview(previews[:, column].float())
        texts = [trainer.components.prompts[i] for i in trajectories.prompt_id.tolist()]
        reward = trainer.components.reward.total(images, texts)
        assert trajectories.x0_hat_reward is not None
        torch.testing.assert_close(reward, trajectories.x0_hat_reward[:, k], rtol=2e-3, atol=2e-3)


# -- steps and their size -----------------------------------------------------------------------------------------


def test_informative_steps_are_drawn_as_often_as_they_should_be() -> None:
    informativeness = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    generator, T, count, draws = torch.Generator().manual_seed(0), 8, 3, 4000
    drawn = torch.zeros(T)
    for _ in range(draws):
        steps = informative_steps(informativeness, count, generator)
        assert len({k for k, _ in steps}) == count
        for k, weight in steps:
            drawn[k] += 1
            assert weight <= T / count + 1e-9
    # A quarter uniform, the rest in proportion; the first exceeds 1, and what it leaves goes to the others.
    wanted = count * (0.25 / T + 0.75 * informativeness / informativeness.sum())
    rest = wanted.clone()
    rest[0] = 0
    expected = torch.cat([torch.ones(1), rest[1:] * (count - 1) / rest.sum()])
    assert (drawn / draws).tolist() == pytest.approx(expected.tolist(), abs=4 * 0.5 / draws**0.5)


def kl_between(trainer: Trainer, before: list[Tensor], after: list[Tensor]) -> float:
    """The mean KL of transitions from the policy with some outputs, one tensor for each step, to that with others."""
    pairs = enumerate(zip(before, after, strict=True))
    found = [trainer.learner.schedule.policy_kl(second, first, k) for k, (first, second) in pairs]
    return float(torch.stack(found).mean())


@torch.no_grad()
def outputs(trainer: Trainer, trajectories: Any) -> list[Tensor]:
    """The policy's outputs at the states of the first 8 trajectories."""
    learner, found = trainer.learner, []
    text = learner.text.rows(trajectories.prompt_id[:8])
    for k in range(4):
        x, t = trajectories.states(k, slice(0, 8)), learner.schedule.timesteps[k].expand(8)
        found.append(learner.policy.predict(x, t, text).guided)
    return found


@pytest.mark.parametrize(("rollout", "chain_dtype"), [("stored", "fp32"), ("stored", "bf16"), ("one_pass", "bf16")])
def test_an_update_stays_inside_the_trust_region(
    make_recipe: MakeRecipe, tmp_path: Path, rollout: str, chain_dtype: str
) -> None:
    """Also where stored states are rounded, and in the second update of a rollout, which the first has moved away from."""
    options = {"rollout": rollout, "chain_dtype": chain_dtype}
    free, _ = moved_by_updates(make_recipe, RunFolder.create(tmp_path / "free"), None, **options)
    bound, measured = moved_by_updates(make_recipe, RunFolder.create(tmp_path / "bound"), 1e-3, **options)
    assert min(free) > 3e-3
    # In one pass the probes are other trajectories than those that are measured here.
    assert all(3e-4 < kl < (1.001e-3 if rollout == "stored" else 3e-3) for kl in bound)
    assert 3e-4 < measured["update_kl"] <= 1e-3
    assert 0.01 < measured["step_scale"] < 1


def moved_by_updates(
    make_recipe: MakeRecipe, run: RunFolder, max_kl: float | None, rollout: str, chain_dtype: str
) -> tuple[list[float], dict[str, Any]]:
    """(the KL that each of two updates moves the policy by, on the first 8 of its trajectories; the metrics)."""
    train = {"rollout": rollout, "learning_rate": 0.02, "max_kl": max_kl, "trajectories": 16, "micro_batch": 8}
    recipe = make_recipe(objective=PATHWISE, train=train, sampler={"tile": 8, "chain_dtype": chain_dtype})
    trainer, trajectories = rolled_out(recipe, run)
    halves = [trajectories, trajectories if rollout == "one_pass" else sliced(trajectories, 8)]
    moved, step = list[float](), trainer.updates.step

    def spied(state: Any, probes: Any = ()) -> None:
        before = outputs(trainer, halves[len(moved)])
        step(state, probes)
        moved.append(kl_between(trainer, before, outputs(trainer, halves[len(moved)])))

    trainer.updates.step = spied  # type: ignore[method-assign]
    if rollout == "stored":
        return moved, updated(trainer, trajectories)
    state = trainer.begin_epoch(0)
    trainer.train_in_one_pass(state)
    return moved, state.measured


def sliced(trajectories: Any, start: int) -> Any:
    """The trajectories without the first ones."""
    return replace(trajectories, chain=trajectories.chain[:, start:], prompt_id=trajectories.prompt_id[start:])
