"""DRaFT-LV: the last step drawn anew several times, and its gradient averaged (`objective.copies`)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.building import disturb, fresh_state, sampled, trained, trainer_of
from torch import Tensor

from dag.chain.policy import Prediction
from dag.chain.rollout import Batch, Score, last_latents
from dag.chain.trajectory import Trajectories, draw_noise
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.run.meter import PhaseMeter
from dag.training import ascent
from dag.training.ascent import Ascent
from dag.training.loss import Rollout, Tables
from dag.training.plan import make_plan
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
N, T, ROWS = 8, 4, slice(0, 8)
ANEW = 1 << 31  # the first step of the counter-based noise of these draws
TINY = Path(__file__).parents[2] / "recipes/tiny"
KL = {"pretrained_kl": 0.1}


def of_copies(make_recipe: MakeRecipe, copies: int, **sections: Any) -> Recipe:
    section = {"name": "backprop", "copies": copies, **sections.pop("objective", {})}
    train = {"updates": 1, "micro_batch": 4, **sections.pop("train", {})}
    return make_recipe(objective=section, train=train, **sections)


def flow_of_copies(copies: int, eta: float = 1.0) -> Recipe:
    """A flow-matching model, whose chain ends in a deterministic step that is no transition."""
    changes = (
        f"objective.copies={copies}",
        f"sampler.eta={eta}",
        "model.path=embedded_flow",
        "sampler.guidance_scale=1",
    )
    sizes = ("sampler.steps=4", "train.trajectories=8", "train.updates=1", "train.micro_batch=8", "sampler.tile=8")
    return load(TINY / "draft.yaml", [*changes, *sizes])


def disturbed(recipe: Recipe, folder: Path) -> tuple[Trainer, Trajectories, Score]:
    trainer = trainer_of(recipe, RunFolder.create(folder))
    disturb(trainer.components)
    trajectories = sampled(trainer)
    return trainer, trajectories, trainer.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id))


def gradient(trainer: Trainer, trajectories: Trajectories, score: Score) -> Tensor:
    """The policy's gradient of an update of all trajectories, as one vector, without a step."""
    learner, state = trainer.learner, fresh_state(trainer.learner, 0)
    learner.updates.step = lambda *_: state.end_update({}, {})  # type: ignore[method-assign]
    for _ in StoredTraining(learner, PhaseMeter(torch.device("cpu"))).steps(state, trajectories, score):
        pass
    return taken(trainer)


def taken(trainer: Trainer) -> Tensor:
    """The policy's gradient as one vector; it is cleared."""
    found = torch.cat([p.grad.flatten() for p in trainer.updates.policy.parameters if p.grad is not None])
    trainer.updates.policy.zero_grad()
    return found


def close(ours: Tensor, theirs: Tensor, share: float) -> bool:
    """Whether all entries agree within a share of the largest."""
    assert float(theirs.abs().max()) > 0
    return float((ours - theirs).abs().max()) < share * float(theirs.abs().max())


# -- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "eta", "goal"),
    [
        ("diffusion", 1.0, None),
        ("diffusion", 0.5, None),
        ("flow", 0.5, None),
        ("diffusion", 1.0, 1e3),
        ("diffusion", 1.0, -1e3),
    ],
)
def test_the_gradient_is_the_mean_of_autograds_through_each_draw(
    make_recipe: MakeRecipe, tmp_path: Path, model: str, eta: float, goal: float | None
) -> None:
    """The stored step and two others, which begin at the stored end; divided by the number of steps, as every loss is."""
    sections = {"objective": {"goal": goal}, "sampler": {"eta": eta}}
    recipe = flow_of_copies(3, eta) if model == "flow" else of_copies(make_recipe, 3, **sections)
    trainer, trajectories, score = disturbed(recipe, tmp_path / "run")
    ours, learner = gradient(trainer, trajectories, score), trainer.learner
    policy, schedule = learner.policy, learner.schedule
    text, last = learner.text.rows(trajectories.prompt_id), schedule.num_transitions - 1
    end, t = trajectories.states(last + 1, ROWS), schedule.timesteps[last].expand(N)
    starts = [trajectories.states(last, ROWS)]
    for copy in (1, 2):
        noise = draw_noise(trajectories.seed, trajectories.sample_id, ANEW + 2 * copy, policy.latent_shape, end.dtype)
        starts.append(schedule.noising_x[last] * end + schedule.noising_std[last] * noise)
    sign = -1.0 if goal is not None and goal < 0 else 1.0
    for copy, x_t in enumerate(starts):
        mean = schedule.step_mean(x_t, policy.predict(x_t, t, text).guided, last)
        where = ANEW + 2 * copy + 1 if copy else last
        noise = draw_noise(trajectories.seed, trajectories.sample_id, where, policy.latent_shape, end.dtype)
        x_next = (mean + schedule.sigma[last] * noise).detach().requires_grad_(True)
        clean = last_latents(policy, x_next, text)
        _, slope = score.gradient(clean.detach(), torch.arange(N))
        (adjoint,) = (slope,) if clean is x_next else torch.autograd.grad(clean, x_next, slope)
        trainer.updates.policy.backward(-sign * (adjoint * mean).sum() / (3 * N * schedule.num_transitions))
    assert close(ours, taken(trainer), 2e-4)


def test_one_copy_is_the_stored_step_alone(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("nothing is drawn anew")

    monkeypatch.setattr(ascent, "draw_noise_anew", refuse)
    trainer, trajectories, score = disturbed(of_copies(make_recipe, 1), tmp_path / "run")
    rollout = trainer.learner.rollout(trajectories, 0, score)
    (step,) = trainer.learner.losses.steps(rollout, ROWS, [(T - 1, 1.0)], Tables(), 5)
    assert (step.k, step.weight) == (T - 1, 1.0)


def test_it_does_not_depend_on_the_micro_batch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        recipe = of_copies(make_recipe, 3, train={"micro_batch": size}, regulariser=KL)
        found.append(gradient(*disturbed(recipe, tmp_path / str(size))))
    assert close(found[0], found[1], 5e-5)


def test_the_kl_to_the_pretrained_model_is_taken_at_each_draw(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The mean over the draws, each at its own state."""
    trainer, trajectories, score = disturbed(of_copies(make_recipe, 3, regulariser=KL), tmp_path / "run")
    rollout, learner = trainer.learner.rollout(trajectories, 0, score), trainer.learner
    text, k, found = learner.text.rows(trajectories.prompt_id), T - 1, []
    for copy, step in enumerate(learner.losses.steps(rollout, ROWS, [(k, 1.0)], Tables(), 0)):
        assert step.weight == 1 / 3
        x_t = trajectories.states(k, ROWS)
        if copy:
            noise = draw_noise(0, trajectories.sample_id, ANEW + 2 * copy, learner.policy.latent_shape, x_t.dtype)
            x_t = learner.schedule.noised_back(trajectories.states(T, ROWS), noise, k)
        t = learner.schedule.timesteps[k].expand(N)
        now, before = (learner.policy.predict(x_t, t, text, pretrained=old).guided for old in (False, True))
        expected = 0.1 * learner.schedule.policy_kl(now, before, k)
        torch.testing.assert_close(step.regulariser.detach(), expected.detach(), rtol=1e-3, atol=1e-6)
        found.append(step.regulariser.detach())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


# -- a linear-Gaussian policy -------------------------------------------------------------------------------------


class Bowl:
    """The reward -|x - 1|^2 / 2 of latents."""

    def gradient(self, latents: Tensor, rows: Tensor, **_: bool) -> tuple[Tensor, Tensor]:
        return -0.5 * (latents - 1).square().flatten(1).sum(1), 1 - latents


def test_draws_have_the_mean_of_the_closed_form_and_their_noise_averages_out(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output w x of one weight. With x = r e + c epsilon noised back from the end e, alpha = mean_x + b w and m = r e, the
    gradient of -r(alpha x + sigma epsilon') in w is, summed over the latent,

        mean  -b (m - alpha (m^2 + c^2)),    variance  b^2 (c^2 (1 - 2 alpha m)^2 + 2 alpha^2 c^4 + sigma^2 (m^2 + c^2))

    Of n draws the stored one is fixed, so the variance of the average is (n - 1) / n^2 of this.
    """
    recipe = of_copies(make_recipe, 1)
    trainer, trajectories, _ = disturbed(recipe, tmp_path / "run")
    learner, k = trainer.learner, T - 1
    w = torch.tensor(0.3, requires_grad=True)
    # Steps that are wide enough for their noise to matter.
    schedule = replace(
        learner.schedule, sigma=learner.schedule.sigma + 0.3, noising_std=learner.schedule.noising_std + 0.2
    )
    monkeypatch.setattr(
        learner.policy, "predict", lambda x, t, text, **_: Prediction(w * x.float(), len(x), 1.0, w * x.float())
    )
    for owner in (learner.policy, learner.loss):
        monkeypatch.setattr(owner, "schedule", schedule)
    rollout = Rollout(trajectories, None, 0, 1, Bowl())  # type: ignore[arg-type]
    a, b, r, c, sigma = (
        float(column[k])
        for column in (
            schedule.mean_x, schedule.mean_output, schedule.noising_x, schedule.noising_std, schedule.sigma
        )
    )  # fmt: skip
    alpha, m = a + 0.3 * b, r * trajectories.states(T, ROWS).double()
    mean = float((-b * (m - alpha * (m**2 + c**2))).sum())
    spread = c**2 * (1 - 2 * alpha * m) ** 2 + 2 * alpha**2 * c**4 + sigma**2 * (m**2 + c**2)
    variance, updates = float((b**2 * spread).sum()), 300

    def gradients(copies: int) -> Tensor:
        """(updates, copies) the gradient in w of each draw's loss, weighted."""
        losses = Ascent(of_copies(make_recipe, copies), learner.policy, learner.loss, learner.log_scale)
        found = []
        for update in range(updates):
            steps = losses.steps(rollout, ROWS, [(k, 1.0)], Tables(), update)
            found.append([float(torch.autograd.grad(s.weight * s.output.loss.sum(), w)[0]) for s in steps])
        return torch.tensor(found, dtype=torch.float64)

    for copies in (2, 4):
        each = gradients(copies)
        assert each.shape == (updates, copies)
        assert bool((each[:, 0] == each[0, 0]).all()), "the stored step"
        drawn = copies * each[:, 1:].mean(1)
        assert float(drawn.mean()) == pytest.approx(mean, abs=4 * (variance / (copies - 1) / updates) ** 0.5)
        # A variance from so many draws has a relative standard error of sqrt(2 / updates).
        expected = (copies - 1) / copies**2 * variance
        assert float(each.sum(1).var()) == pytest.approx(expected, rel=4 * (2 / updates) ** 0.5)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("model", ["diffusion", "flow"])
def test_draws_have_the_noise_levels_of_the_chain(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, eta: float
) -> None:
    """A policy that knows its one picture: states drawn anew are a x_0 + s epsilon at both ends of the step, whatever eta is."""
    recipe = flow_of_copies(2, eta) if model == "flow" else of_copies(make_recipe, 2, sampler={"eta": eta})
    trainer, trajectories, _ = disturbed(recipe, tmp_path / "run")
    learner, schedule = trainer.learner, trainer.learner.schedule
    k, count = schedule.num_transitions - 1, 400

    def exact(x: Tensor, t: Tensor, text: Tensor, **_: bool) -> Prediction:
        output = (0.7 - schedule.x0_x[k] * x) / schedule.x0_output[k]
        return Prediction(output, len(x), 1.0, output)

    monkeypatch.setattr(learner.policy, "predict", exact)
    shape = learner.policy.latent_shape
    end = schedule.signal_next[k] * 0.7 + schedule.noise_next[k] * torch.randn(count, *shape)
    ids = torch.arange(count)
    many = replace(trajectories, chain=end.expand(k + 2, *end.shape), sample_id=ids, prompt_id=torch.zeros_like(ids))
    drawn = learner.losses._drawn_anew(Rollout(many, None, 0, 1), slice(0, count), k, 7)  # type: ignore[attr-defined]
    levels = (schedule.signal_t[k], schedule.noise_t[k]), (schedule.signal_next[k], schedule.noise_next[k])
    for state, (signal, noise) in zip(drawn, levels, strict=True):
        error = float(noise) / state.numel() ** 0.5
        assert float(state.mean()) == pytest.approx(0.7 * float(signal), abs=4 * error)
        assert float(state.std()) == pytest.approx(float(noise), abs=4 * error / 2**0.5)
    assert not torch.equal(drawn[1], end)
    rounded = Rollout(replace(many, chain=many.chain.half()), None, 0, 1)
    drawn = learner.losses._drawn_anew(rounded, slice(0, count), k, 7)  # type: ignore[attr-defined]
    assert [state.dtype for state in drawn] == [torch.float16] * 2, "as the chain is stored"


# -- runs ---------------------------------------------------------------------------------------------------------


def test_no_two_draws_of_a_run_share_their_noise(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trajectory meets each number once: in every update, every repetition of a rollout and every copy."""
    seen: list[tuple[int, int]] = []
    original = ascent.draw_noise_anew

    def draw(seed: int, sample_id: Tensor, number: int, *rest: Any) -> Tensor:
        seen.extend((int(one), number) for one in sample_id)
        return original(seed, sample_id, number, *rest)

    monkeypatch.setattr(ascent, "draw_noise_anew", draw)
    recipe = of_copies(make_recipe, 3, train={"epochs": 2, "updates": 1, "inner_epochs": 2, "trajectories": 4})
    trained(recipe, RunFolder.create(tmp_path / "run"))
    assert len(seen) == len(set(seen)) == 2 * 2 * 4 * 2 * 2, "epochs, repetitions, trajectories, copies, noises of each"


def test_the_plan_prices_the_copies(make_recipe: MakeRecipe) -> None:
    """Eight trajectories of four steps, two branches: each copy is trained and rewarded, and all but the stored one drawn."""

    def planned(copies: int, **sections: Any) -> tuple[int, int]:
        plan = make_plan(of_copies(make_recipe, copies, **sections))
        return plan.unet_rows_per_epoch, plan.rewards_per_epoch

    assert planned(1) == (2 * 8 * (4 + 1), 8 + 8)
    assert planned(3) == (2 * 8 * (4 + 3 + 2), 8 + 3 * 8)
    assert planned(3, regulariser=KL) == (2 * 8 * (4 + 3 + 2 + 3), 8 + 3 * 8)
    assert planned(3, train={"inner_epochs": 2}) == (2 * 8 * (4 + 2 * (3 + 2)), 8 + 2 * 3 * 8)


def test_the_plan_counts_what_an_update_runs(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of_copies(make_recipe, 3, regulariser=KL)
    trainer, trajectories, score = disturbed(recipe, tmp_path / "run")
    calls, policy = SimpleNamespace(rows=0, rewards=0), trainer.learner.policy
    predict, reward = policy.predict, score.gradient

    def counted(x: Tensor, *rest: Any, **options: Any) -> Prediction:
        calls.rows += len(x)
        return predict(x, *rest, **options)

    def rewarded(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.rewards += len(x)
        return reward(x, *rest, **options)

    monkeypatch.setattr(policy, "predict", counted)
    monkeypatch.setattr(score, "gradient", rewarded)
    gradient(trainer, trajectories, score)
    plan = make_plan(recipe)
    assert plan.unet_rows_per_epoch == 2 * (N * T + calls.rows)
    assert plan.rewards_per_epoch == N + calls.rewards
