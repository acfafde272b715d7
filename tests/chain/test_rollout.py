"""Sampling: states, noise, precision; and the prompts of an epoch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dag_kernels import standard_normal
from helpers.building import disturb, parts_of, rolled_out
from torch.distributions import Normal

from dag.chain.rollout import SampledTile, generate, generate_beside_pretrained, sample_tile, walk
from dag.chain.schedule import INITIAL_NOISE
from dag.recipe import Recipe
from dag.recipe.prompts import draw
from dag.run.folder import RunFolder

MakeRecipe = Callable[..., Recipe]


def test_the_stored_state_is_the_state(make_recipe: MakeRecipe) -> None:
    """Each stored state follows from the stored state before it, the network and the seed alone."""
    recipe = make_recipe(sampler={"chain_dtype": "fp16"})
    parts = parts_of(recipe)
    policy, schedule, ids = parts.policy, parts.policy.schedule, torch.tensor([3, 8])
    text = parts.text[torch.tensor([0, 1])]
    tile = sample_tile(policy, text, ids, recipe.seed, recipe.sampler)
    assert tile.chain.dtype == torch.float16
    assert torch.equal(tile.chain[0], standard_normal(recipe.seed, ids, INITIAL_NOISE, (4, 8, 8)).half())
    for k in range(4):
        with torch.no_grad():
            output = policy.predict(tile.chain[k], schedule.timesteps[k].expand(2), text).guided
        expected = schedule.sample_next(
            tile.chain[k], output, standard_normal(recipe.seed, ids, k, (4, 8, 8)), k
        ).half()
        assert torch.equal(tile.chain[k + 1], expected)
        assert torch.equal(tile.log_pf[:, k], schedule.log_pf(tile.chain[k], tile.chain[k + 1], output, k))
        assert torch.equal(tile.log_pb[:, k], schedule.log_pb(tile.chain[k], tile.chain[k + 1], k))


def test_trajectories_of_a_group_may_begin_in_the_same_noise(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = {"texts": ["a cat", "a dog"], "per_group": 2}
    apart, shared = (
        rolled_out(
            make_recipe(prompts={**prompts, "shared_start": is_shared}), RunFolder.create(tmp_path / str(is_shared))
        )
        for is_shared in (False, True)
    )
    own, ours = apart[1].chain, shared[1].chain
    assert torch.equal(ours[0, 0::2], own[0, 0::2])
    assert torch.equal(ours[0, 1::2], own[0, 0::2])
    assert not torch.equal(ours[1, 1], ours[1, 0])
    assert not torch.equal(ours[0, 2], ours[0, 0])
    # A resumed epoch recomputes outputs from two states and the noise of the step between them.
    trajectories, schedule = shared[1], shared[0].components.policy.schedule
    text = shared[0].components.text[trajectories.prompt_id]
    with torch.no_grad():
        predicted = shared[0].components.policy.predict(ours[0], schedule.timesteps[0].expand(8), text).guided
    torch.testing.assert_close(trajectories.output_old(schedule, slice(0, 8), 0), predicted, rtol=1e-3, atol=1e-3)


def test_only_trained_steps_keep_a_graph(make_recipe: MakeRecipe) -> None:
    """A graph for every step would give the same gradients, and use the memory of all of them."""
    recipe = make_recipe()
    parts = parts_of(recipe)
    text, ids = parts.text[:1].repeat(2, 1, 1), torch.arange(2)
    steps = walk(parts.policy, text, ids, recipe.seed, recipe.sampler, trained={1, 3})
    assert [step.k for step in steps if step.prediction.branches.requires_grad] == [1, 3]


def test_a_prior_takes_the_place_of_the_noising_kernel(make_recipe: MakeRecipe) -> None:
    """log P_B is then log p_pre of the same step, also for a trained policy; an untrained one has log P_F = log P_B."""
    recipe = make_recipe()
    parts = parts_of(recipe)
    policy, schedule, text = parts.policy, parts.policy.schedule, parts.text[torch.tensor([0, 1])]

    def sampled() -> SampledTile:
        return sample_tile(policy, text, torch.tensor([3, 8]), recipe.seed, recipe.sampler, has_prior=True)

    untrained = sampled()
    torch.testing.assert_close(untrained.log_pb, untrained.log_pf, rtol=1e-6, atol=0)
    disturb(parts)
    tile = sampled()
    assert (tile.log_pb - tile.log_pf).abs().max() > 0.1
    for k in range(4):
        x_t, x_next = tile.chain[k], tile.chain[k + 1]
        with torch.no_grad():
            output = policy.predict(x_t, schedule.timesteps[k].expand(2), text, pretrained=True).guided
        assert torch.equal(tile.log_pb[:, k], schedule.log_pf(x_t, x_next, output, k))


def test_how_far_drawn_trajectories_are_from_the_pretrained_models(make_recipe: MakeRecipe) -> None:
    """The KL is that of `torch.distributions` along the same trajectories, and the images are those of `generate`."""
    recipe = make_recipe()
    parts = parts_of(recipe)
    disturb(parts)
    policy, schedule, text, ids = parts.policy, parts.policy.schedule, parts.text, torch.tensor([3, 8])
    images, kl = generate_beside_pretrained(policy, text, ids, recipe.seed, recipe.sampler, tile=1)
    assert torch.equal(images, generate(policy, text, ids, recipe.seed, recipe.sampler, tile=1))
    total = 0.0
    for row in range(2):
        for step in walk(policy, text[row : row + 1], ids[row : row + 1], recipe.seed, recipe.sampler):
            t = schedule.timesteps[step.k].expand(1)
            with torch.no_grad():
                pretrained = policy.predict(step.x_t, t, text[row : row + 1], pretrained=True).guided
            means = (
                schedule.sample_next(step.x_t, o, torch.zeros_like(o), step.k)
                for o in (step.prediction.guided, pretrained)
            )
            ours, theirs = (Normal(mean, schedule.sigma[step.k]).log_prob(step.x_next).sum() for mean in means)
            total += float(ours - theirs)
    assert kl == pytest.approx(total / 2, rel=1e-4)
    assert abs(kl) > 0.1


@pytest.mark.parametrize("per_group", [1, 3])
def test_the_prompts_of_an_epoch_are_shuffled_rounds_of_groups(per_group: int) -> None:
    drawn = draw(4, 6 * per_group, seed=3, epoch=1, per_group=per_group)
    groups = drawn.reshape(-1, per_group)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:4, 0]) == [0, 1, 2, 3], "a complete round"
    assert len(set(groups[4:, 0])) == 2
    assert (drawn != draw(4, 6 * per_group, seed=3, epoch=2, per_group=per_group)).any()


def test_a_trajectory_does_not_depend_on_its_tile(make_recipe: MakeRecipe) -> None:
    parts = parts_of(make_recipe())
    text, ids = parts.text[torch.tensor([0, 1, 0, 1])], torch.tensor([3, 8, 9, 4])
    sampler = make_recipe().sampler
    together = sample_tile(parts.policy, text, ids, 0, sampler)
    for row in range(4):
        alone = sample_tile(parts.policy, text[row : row + 1], ids[row : row + 1], 0, sampler)
        torch.testing.assert_close(alone.chain[:, 0], together.chain[:, row], rtol=1e-4, atol=1e-4)


def test_guidance_one_is_the_conditional_branch(make_recipe: MakeRecipe) -> None:
    guided, plain = (
        parts_of(make_recipe(sampler={"guidance_scale": 1.000001})),
        parts_of(make_recipe(sampler={"guidance_scale": 1.0})),
    )
    x_t, t, text = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), plain.text
    with torch.no_grad():
        one, two = plain.policy.predict(x_t, t, text), guided.policy.predict(x_t, t, text)
    assert torch.equal(one.guided, one.conditional)
    torch.testing.assert_close(one.guided, two.guided, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_dtype", ["fp32", "model"])
def test_the_conditional_branch_is_the_one_with_the_prompt(make_recipe: MakeRecipe, guidance_dtype: str) -> None:
    both = parts_of(make_recipe(sampler={"guidance_scale": 5.0, "guidance_dtype": guidance_dtype}))
    alone = parts_of(make_recipe(sampler={"guidance_scale": 1.0}))
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    empty = both.policy.encode(["", ""])
    with torch.no_grad():
        found = both.policy.predict(x_t, t, both.text)
        cond, uncond = (alone.policy.predict(x_t, t, text).guided for text in (alone.text, empty))
    assert float((cond - uncond).abs().max()) > 1e-2, "the prompt must matter"
    torch.testing.assert_close(found.conditional, cond, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.guided, uncond + 5.0 * (cond - uncond), rtol=1e-3, atol=1e-3)


def test_guidance_in_fp32_beats_guidance_in_half_precision(make_recipe: MakeRecipe) -> None:
    """Compared with guidance in float64 from the same branches, fp32 adds no error, the model's own dtype does."""
    errors = {}
    for dtype in ("fp32", "model"):
        parts = parts_of(make_recipe(model={"dtype": "bf16"}, sampler={"guidance_scale": 7.5, "guidance_dtype": dtype}))
        policy, text = parts.policy, parts.text
        x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500, 500])
        branches: list[torch.Tensor] = []
        handle = policy.denoiser.register_forward_hook(
            lambda module, inputs, output, seen=branches: seen.append(output[0].double())
        )
        with torch.no_grad():
            guided = policy.predict(x_t, t, text).guided
        handle.remove()
        uncond, cond = branches[0].chunk(2)
        errors[dtype] = float((guided.double() - (uncond + 7.5 * (cond - uncond))).abs().max())
    assert errors["fp32"] < 1e-5 < errors["model"]


def test_old_outputs_are_recomputed_from_the_chain(make_recipe: MakeRecipe) -> None:
    parts = parts_of(make_recipe())
    recipe = make_recipe()
    disturb(parts)
    ids, text = torch.tensor([0, 1]), parts.text
    tile = sample_tile(parts.policy, text, ids, 0, recipe.sampler)
    schedule = parts.policy.schedule
    for k in range(4):
        with torch.no_grad():
            output = parts.policy.predict(tile.chain[k], schedule.timesteps[k].expand(2), text).guided
        noise = standard_normal(0, ids, k, (4, 8, 8))
        # The bound: four float32 roundings of numbers of the states' size, divided by b.
        bound = 4 * 2**-24 * float(tile.chain.abs().max()) / float(schedule.mean_output[k].abs())
        found = schedule.output_of(tile.chain[k], tile.chain[k + 1], noise, k)
        torch.testing.assert_close(found, output, rtol=0, atol=2 * bound)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_sample_and_train(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path, prediction_type: str
) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": prediction_type}))
    parts = parts_of(make_recipe(model={"path": str(folder)}))
    assert parts.policy.schedule.prediction_type == prediction_type
    images = generate(parts.policy, parts.text, [1, 2], 0, make_recipe().sampler)
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


def test_a_deterministic_last_step_is_part_of_decoding(make_recipe: MakeRecipe, tmp_path, tiny_model) -> None:  # type: ignore[no-untyped-def]
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "set_alpha_to_one": True}))
    parts = parts_of(make_recipe(model={"path": str(folder)}))
    schedule = parts.policy.schedule
    assert schedule.final is not None
    assert schedule.num_transitions == 3
    tile = sample_tile(parts.policy, parts.text, torch.tensor([0, 1]), 0, make_recipe().sampler)
    assert len(tile.chain) == 4
    with torch.no_grad():
        output = parts.policy.predict(tile.chain[-1], torch.tensor([schedule.final.timestep] * 2), parts.text).guided
    assert torch.equal(tile.x_0, schedule.final(tile.chain[-1], output))
