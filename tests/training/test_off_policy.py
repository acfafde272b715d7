"""Training on trajectories of another policy: replayed rollouts, and given pictures noised by P_B."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.building import disturb, parts_of, rolled_out, rows, sampled, trained, trained_in_pieces
from PIL import Image
from safetensors.torch import load_file

from dag.chain.levels import Levels
from dag.chain.noising import noised_chain
from dag.chain.sample_ids import first_of_group, of_given
from dag.chain.schedule import Schedule
from dag.chain.trajectory import draw_noise
from dag.costs.memory import Simulation
from dag.objectives.transition import residual_table
from dag.recipe import Recipe, Sampler
from dag.run.folder import RunFolder
from dag.training.loss import Rollout
from dag.training.plan import make_plan
from dag.training.replay import with_present_log_pf
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
GROUPS: dict[str, Any] = {"texts": ["a cat", "a dog"], "per_group": 2}
N = slice(0, 8)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """A folder of six 20 x 16 pictures of noise: four of a cat, two of a fox, which the recipes' prompts do not name."""
    folder, generator = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    lines = []
    for number in range(6):
        name = f"deep/{number}.png"
        Image.fromarray(generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": "a cat" if number < 4 else "a fox", "reward": 1}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def off_policy(trainer: Trainer, epoch: int = 0) -> Rollout:
    return trainer.learner.rollout(sampled(trainer, epoch), epoch, groups=2, is_off_policy=True)


# -- log P_F of the present policy --------------------------------------------------------------------------------


def test_before_an_update_log_pf_is_that_of_the_rollout_and_afterwards_the_present_policys(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer = Trainer(recipe := make_recipe(objective={"name": "tb"}), run, parts_of(recipe))
    rollout, loss = off_policy(trainer), trainer.learner.loss
    same = with_present_log_pf(loss, rollout, N, recipe.sampler.tile).trajectories.log_pf
    assert torch.equal(same, rollout.trajectories.log_pf), "one tile, one policy: bit for bit"
    disturb(trainer.components)
    moved = with_present_log_pf(loss, rollout, slice(2, 4), 1)
    tables = moved.trajectories.log_pf, rollout.trajectories.log_pf
    assert torch.equal(*(table[[0, 1, 4, 5, 6, 7]] for table in tables)), "other rows stay"
    k, part = 2, slice(2, 4)
    x_t, x_next = (rollout.trajectories.states(step, part) for step in (k, k + 1))
    output = loss.policy.predict(x_t, loss.schedule.timesteps[k].expand(2), loss.text_of(rollout, part)).guided
    torch.testing.assert_close(
        moved.trajectories.log_pf[part, k], loss.schedule.log_pf(x_t, x_next, output, k).detach()
    )
    assert moved.terms is not None and torch.equal(moved.terms.log_pf, moved.trajectories.log_pf)
    assert float((tables[0] - tables[1])[part].abs().min()) > 1e-3


@pytest.mark.parametrize("prior", ["none", "pretrained"])
def test_the_gradient_off_policy_is_autograds_of_the_present_policys_variance(
    make_recipe: MakeRecipe, run: RunFolder, prior: str
) -> None:
    """VarGrad of trajectories that an earlier policy sampled; with P_B their first noise has its own log-density."""
    recipe = make_recipe(objective={"name": "tb", "prior": prior}, train={"updates": 1, "micro_batch": 8})
    trainer = Trainer(recipe, run, parts_of(recipe))
    rollout, learner = off_policy(trainer), trainer.learner
    disturb(trainer.components, 0.02)
    trajectories, schedule = rollout.trajectories, learner.schedule
    sums = torch.zeros(8)
    for k in range(schedule.num_transitions):
        states = learner.loss.states(rollout, N, k)
        sums = (
            sums + schedule.log_pf(states.x_t, states.x_next, states.prediction.guided, k) - trajectories.log_pb[:, k]
        )
    assert rollout.terms is not None
    e = sums - rollout.terms.log_reward
    if prior == "none":
        e = e + torch.distributions.Normal(0, 1).log_prob(trajectories.chain[0]).flatten(1).sum(1)
    weights = trainer.components.policy.trainable()
    expected = torch.autograd.grad(0.5 * 8 * e.var() / (8 * schedule.num_transitions), weights)
    training, state = StoredTraining(learner, trainer.meter), trainer.begin_epoch(0)
    learner.updates.step = lambda *_: state.end_update({}, {})  # type: ignore[method-assign]
    for _ in training._update(rollout, N, state, lambda n: None):
        pass
    assert float(max(gradient.abs().max() for gradient in expected)) > 1e-3
    for parameter, gradient in zip(weights, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "tb", "prior": "pretrained"},
        {"name": "tb", "log_z": "flow"},
        {"name": "subtb", "forward_looking": {"source": "none"}},
        {"name": "dag_db", "forward_looking": {"source": "none"}},
        {"name": "regression", "form": "chain"},
        {"name": "dpo", "form": "chain"},
    ],
    ids=lambda objective: objective["name"],
)
def test_off_policy_the_ratio_is_one_wherever_the_policy_is(
    make_recipe: MakeRecipe, run: RunFolder, objective: dict[str, Any]
) -> None:
    trainer, trajectories = rolled_out(make_recipe(objective=objective, prompts=GROUPS), run)
    disturb(trainer.components)
    state, tables = trainer.begin_epoch(0), []
    rollout = trainer.learner.rollout(trajectories, 0, groups=2, is_off_policy=True)
    training = StoredTraining(trainer.learner, trainer.meter)
    formed = training._tables
    training._tables = lambda *given: tables.append(formed(*given)) or tables[-1]  # type: ignore[method-assign,func-returns-value]
    for _ in training._update(rollout, slice(0, 4), state, lambda n: None):
        pass
    assert max(map(float, state.sums.ratio_dev)) == 0
    if objective["name"] == "regression":
        assert tables[0].advantage is not None
        weight = tables[0].advantage[:4]
        assert float(weight.min()) > 0, "nothing pushes away from a picture that another policy made"
        torch.testing.assert_close(weight.view(2, 2, 4).mean(1), torch.ones(2, 4))


# -- replayed rollouts --------------------------------------------------------------------------------------------


def test_the_last_rollouts_are_trained_on_again(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(
        objective={"name": "regression", "form": "denoise", "draws": 1},
        data={"replay": 1},
        train={"epochs": 3, "trajectories": 4},
        evaluation={"every": 3, "prompts": 1},
        checkpoint={"every": 3},
        sampler={"steps": 2},
    )
    seen: list[tuple[int, bool]] = []
    original = StoredTraining._update

    def update(self: StoredTraining, rollout: Rollout, part: Any, state: Any, on_rows: Any) -> Any:
        seen.append((int(rollout.trajectories.sample_id[part][0]), rollout.is_off_policy))
        yield from original(self, rollout, part, state, on_rows)

    monkeypatch.setattr(StoredTraining, "_update", update)
    trained(recipe, run)
    # Two updates of two trajectories for each rollout; epoch n has the ids from 4 n on.
    epochs = [[0], [4, 0], [8, 4]]
    assert seen == [
        (first + 2 * half, place > 0) for epoch in epochs for place, first in enumerate(epoch) for half in (0, 1)
    ]
    assert [row["optimizer_step"] for row in rows(run.path)] == [0, 2, 6, 10]


RESUMED: dict[str, dict[str, Any]] = {
    "replay_and_folder": {
        "data": {"folder": "", "sample": True, "replay": 1},
        "objective": {"name": "tb"},
        "sampler": {"tile": 4, "steps": 2},
    },
    "folder_of_ends": {
        "data": {"folder": ""},
        "objective": {"name": "dpo", "form": "denoise", "draws": 2},
        "sampler": {"tile": 2},
    },
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_in_pieces_is_the_undisturbed_one(
    make_recipe: MakeRecipe, tmp_path: Path, pictures: str, kind: str
) -> None:
    sections = RESUMED[kind]
    recipe = make_recipe(
        **{**sections, "data": {**sections["data"], "folder": pictures}},
        prompts=GROUPS,
        train={"epochs": 2, "trajectories": 4, "micro_batch": 2},
        evaluation={"every": 2, "images_per_prompt": 2, "prompts": 1},
        checkpoint={"every": 100},
    )
    undisturbed, parted = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "parted"))
    trained(recipe, undisturbed)
    assert len(trained_in_pieces(recipe, parted, 6 if kind == "folder_of_ends" else 9)) > 1
    assert rows(undisturbed.path) == rows(parted.path)
    assert rows(parted.path)[-1]["optimizer_step"] > 2
    ours, theirs = (load_file(run.weights / "pytorch_lora_weights.safetensors") for run in (undisturbed, parted))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- given pictures -----------------------------------------------------------------------------------------------


def test_a_pictures_chain_has_the_noise_levels_and_log_densities_of_p_b(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    trainer = Trainer(recipe := make_recipe(objective={"name": "tb"}), run, parts_of(recipe))
    schedule = trainer.learner.schedule
    x_0 = torch.full((500, 4, 8, 8), 2.0)
    chain, log_pb = noised_chain(schedule, x_0, torch.arange(500), 0, recipe.sampler)
    levels = [
        *zip(schedule.signal_t, schedule.noise_t, strict=True),
        (schedule.signal_next[-1], schedule.noise_next[-1]),
    ]
    for state, (signal, noise_level) in zip(chain, levels, strict=True):
        assert float(state.mean()) == pytest.approx(2 * float(signal), abs=0.02)
        assert float(state.std()) == pytest.approx(float(noise_level), abs=0.02)
    for k in range(schedule.num_transitions):
        rho = schedule.alpha_bar_t[k] / schedule.signal_next[k] ** 2
        expected = torch.distributions.Normal(rho.sqrt() * chain[k + 1], (1 - rho).sqrt()).log_prob(chain[k])
        torch.testing.assert_close(log_pb[:, k], expected.flatten(1).sum(1), rtol=1e-4, atol=0.05)
    noise = draw_noise(0, torch.arange(500), 0, (4, 8, 8), torch.float32)
    torch.testing.assert_close(chain[0], schedule.noising_x[0] * chain[1] + schedule.noising_std[0] * noise)


def test_detailed_balance_holds_on_given_pictures_of_a_point_mass() -> None:
    """P_F of data at one point, with log F its density at each level: every residual is zero, though P_B made the chain."""
    alpha_bar = torch.tensor([0.05, 0.3, 0.7, 0.95, 0.99], dtype=torch.float64)
    levels = Levels(torch.arange(4, 0, -1), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    schedule = Schedule.from_levels(levels, "sample")
    x_0 = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    chain, log_pb = noised_chain(schedule, x_0, torch.arange(3), 0, Sampler(steps=4))
    log_pf = torch.stack([schedule.log_pf(chain[k], chain[k + 1], x_0, k) for k in range(4)], 1)
    log_F = torch.stack(
        [
            torch.distributions.Normal(a.sqrt() * x_0, (1 - a).sqrt()).log_prob(state).flatten(1).sum(1)
            for a, state in zip(alpha_bar, chain, strict=True)
        ],
        1,
    )
    residuals = residual_table(log_F[:, :-1], torch.zeros(3, 4), log_pf, log_pb, log_F[:, -1])
    assert float(residuals.abs().max()) < 1e-3


def test_given_pictures_become_trajectories(make_recipe: MakeRecipe, run: RunFolder, pictures: str) -> None:
    recipe = make_recipe(objective={"name": "tb", "prior": "pretrained"}, data={"folder": pictures}, prompts=GROUPS)
    trainer, found = rolled_out(recipe, run)
    made, policy = trainer.components, trainer.components.policy
    assert made.prompts == ("a cat", "a dog", "a fox")
    batch, files = trainer.given.batch(0)
    assert found.prompt_id.tolist() == batch.prompt_id.tolist()
    assert set(found.prompt_id.tolist()) == {0, 2}, "nothing is drawn of a dog"
    assert torch.equal(first_of_group(found.sample_id, 2)[::2], found.sample_id[::2])
    for first, second in zip(files[::2], files[1::2], strict=True):
        assert first != second, "a group compares different pictures"
    middle = np.asarray(Image.open(files[0]))[:, 2:18].astype(np.float32) / 255
    x_0 = policy.decoder.encode(torch.from_numpy(middle).permute(2, 0, 1)[None])
    vae: Any = policy.decoder.vae
    posterior = vae.encode(2 * torch.from_numpy(middle).permute(2, 0, 1)[None] - 1).latent_dist
    torch.testing.assert_close(x_0, vae.config.scaling_factor * posterior.mean)
    chain, log_pb = noised_chain(policy.schedule, x_0, found.sample_id[:1], 0, recipe.sampler)
    torch.testing.assert_close(found.chain[:, :1], chain, rtol=1e-4, atol=1e-4)
    reward = made.reward.total(policy.decode(chain[-1]), ["a cat"])
    torch.testing.assert_close(found.reward[:1], reward, rtol=1e-3, atol=1e-3)
    k = 1
    output = policy.predict(chain[k], policy.schedule.timesteps[k].expand(1), made.text[found.prompt_id[:1]]).guided
    expected = policy.schedule.log_pf(chain[k], chain[k + 1], output, k)  # nothing is trained yet
    torch.testing.assert_close(found.log_pb[:1, k], expected.detach(), rtol=1e-3, atol=0.1)
    assert float((found.log_pb[:1] - log_pb).abs().min()) > 1


def test_ids_of_given_pictures_begin_at_a_group() -> None:
    for per_group in (1, 3, 4):
        ids = of_given(12, 12, per_group)
        groups = first_of_group(ids, per_group).view(-1, per_group)
        assert bool((groups == groups[:, :1]).all())


# -- the price ----------------------------------------------------------------------------------------------------


def test_the_plan_prices_what_was_not_sampled(make_recipe: MakeRecipe) -> None:
    """Eight trajectories of four steps, two branches each, in two updates; tb passes once more for the present log P_F."""

    def planned(epochs: int = 2, **sections: Any) -> tuple[int, int, int]:
        plan = make_plan(make_recipe(prompts=GROUPS, **sections, train={"epochs": epochs}))
        return plan.unet_rows_per_epoch, plan.rewards_per_epoch, plan.updates

    tb, draws = {"name": "tb"}, {"name": "dpo", "form": "denoise", "draws": 3}
    assert planned(objective=tb) == (8 * 4 * 2 * 2, 8, 4)
    assert planned(epochs=5, objective=tb, data={"replay": 2}) == (8 * 4 * 2 * (2 + 2 * 2), 8, 2 * (1 + 2 + 3 + 3 + 3))
    assert planned(objective=tb, data={"folder": "x"}) == (8 * 4 * 2 * 2, 8, 4)
    assert planned(objective={**tb, "prior": "pretrained"}, data={"folder": "x"}) == (8 * 4 * 2 * 3, 8, 4)
    assert planned(objective=tb, data={"folder": "x", "sample": True}) == (8 * 4 * 2 * 4, 16, 8)
    assert planned(objective=draws) == (8 * (4 * 2 + 3 * 2), 8, 4)
    assert planned(objective=draws, data={"folder": "x"}) == (8 * 3 * 2, 8, 4)


def test_the_forecast_counts_kept_chains(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory as a phase begins; the phases themselves are not run here, but that of given pictures is."""
    counted = Simulation._peak_of
    monkeypatch.setattr(Simulation, "_peak_of", lambda self, run, existing: sum(t.nbytes for t in existing))

    def kept(form: str, **sections: Any) -> dict[str, int]:
        simulation = Simulation(make_recipe(objective={"name": "regression", "form": form}, **sections))
        return {name: simulation.peak(name) for name in simulation.phases()}

    state = 8 * 4 * 8 * 8 * 4
    for form, states in (("chain", 5), ("denoise", 1)):
        without, replayed = kept(form), kept(form, data={"replay": 2})
        assert {name: replayed[name] - without[name] for name in without} == dict.fromkeys(without, 2 * states * state)
        given = kept(form, data={"folder": "x"})
        assert given.keys() == {"given pictures", "update", "evaluation"}
        assert given["update"] - without["update"] == (states - 5) * state
        assert given["evaluation"] == without["evaluation"]
    aside = {"data": {"replay": 2}, "memory": {"chains": "cpu"}}
    assert kept("chain", **aside) == kept("chain", memory={"chains": "cpu"})
    monkeypatch.setattr(Simulation, "_peak_of", counted)
    recipe = make_recipe(objective={"name": "tb", "prior": "pretrained"}, data={"folder": "x", "sample": True})
    simulation = Simulation(recipe)
    assert simulation.phases() == ("rollout", "given pictures", "update", "evaluation")
    assert simulation.peak("given pictures") > 2 * simulation.made.chain(8, 5).nbytes
