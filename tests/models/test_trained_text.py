"""Text encoders that are trained: gradients, the pretrained reference, what follows their changes, and the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers.building import disturb, parts_of, rolled_out, trained, updated
from safetensors.torch import load_file
from torch import Tensor

from dag.costs.weightless import Weightless
from dag.errors import UsageError
from dag.models.sd import StableDiffusion
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
TEXT = {"text_encoder": {"rank": 2, "alpha": 3.0}}
TEXT_ALONE = {**TEXT, "targets": []}
DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


@pytest.fixture
def make(make_recipe: MakeRecipe) -> MakeRecipe:
    return lambda **sections: make_recipe(**{"adapter": TEXT, **sections})


def policy_of(recipe: Recipe) -> tuple[StableDiffusion, Tensor, Tensor, Tensor]:
    """A policy whose factors are not zero, with states (3, C, H, W), timesteps (3,) and rows of three prompts."""
    parts = parts_of(recipe)
    disturb(parts, 0.2)
    policy = cast(StableDiffusion, parts.policy)
    x_t = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    return policy, x_t, policy.schedule.timesteps[1].expand(3), policy.encode(["a cat", "a dog", "a cat"])


def of_text(policy: StableDiffusion) -> list[tuple[str, Tensor]]:
    named = zip(policy.weights.names, policy.weights.masters, strict=True)
    return [(name, master) for name, master in named if name.startswith("text_encoder.")]


def test_the_gradient_is_that_through_the_embeddings(make: MakeRecipe) -> None:
    """The chain rule by hand: the loss's gradient at the embeddings, then that of the text encoder."""
    policy, x_t, t, text = policy_of(make())
    loss = policy.predict(x_t, t, text).guided.square().sum()
    loss.backward()
    found = [master.grad.clone() for _, master in of_text(policy) if master.grad is not None]
    assert len(found) == 8  # four projections of its one layer
    policy.weights.forget()
    for master in policy.trainable():
        master.grad = None
    embedded, empty = policy.text.conditions(text, pretrained=False)
    leaves = [part.detach().requires_grad_(True) for part in (embedded, empty)]
    both = torch.cat([leaves[1].expand(3, -1, -1), leaves[0]])
    uncond, cond = policy.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, return_dict=False)[0].chunk(2)
    (uncond + policy.sampler.guidance_scale * (cond - uncond)).square().sum().backward()
    torch.autograd.backward([embedded, empty], [leaf.grad for leaf in leaves])
    for (name, weight), gradient in zip(of_text(policy), found, strict=True):
        assert weight.grad is not None and float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@DTYPES
def test_the_pretrained_policy_reads_by_the_pretrained_encoder(make: MakeRecipe, dtype: str) -> None:
    recipe = make(model={"dtype": dtype})
    policy, x_t, t, text = policy_of(recipe)
    plain = cast(StableDiffusion, parts_of(recipe.model_copy(update={"adapter": type(recipe.adapter)()})).policy)
    expected = plain.predict(x_t, t, plain.encode(["a cat", "a dog", "a cat"])).guided.detach()
    assert torch.equal(policy.predict(x_t, t, text, pretrained=True).guided, expected)
    assert not torch.equal(policy.predict(x_t, t, text).guided, expected)
    assert torch.equal(policy.pretrained_text(text), plain.encode(["a cat", "a dog", "a cat"]))


@DTYPES
def test_embeddings_follow_every_change_of_the_weights(make: MakeRecipe, dtype: str) -> None:
    """Without gradients they are kept from step to step, so a change that is not seen would be sampled with the old weights."""
    policy, x_t, t, text = policy_of(make(model={"dtype": dtype}))

    @torch.no_grad()
    def predicted() -> Tensor:
        return policy.predict(x_t, t, text).guided

    first, state = predicted(), {name: weight.clone() for name, weight in policy.state_dict().items()}
    assert torch.equal(predicted(), first)
    with torch.no_grad():
        of_text(policy)[0][1].add_(1.0)
    policy.weights.refresh()
    second = predicted()
    assert not torch.equal(second, first)
    with torch.enable_grad():
        torch.testing.assert_close(policy.predict(x_t, t, text).guided.detach(), second, rtol=0, atol=0)
    policy.load_state_dict(state)
    assert torch.equal(predicted(), first)


def test_the_frozen_branch_of_guidance_has_no_gradient_and_stays(make: MakeRecipe) -> None:
    policy, x_t, t, text = policy_of(make(sampler={"uncond": "frozen"}))
    prediction = policy.predict(x_t, t, text)
    uncond = prediction.branches[:3]
    assert torch.equal(uncond, policy.predict(x_t, t, text, pretrained=True).branches[:3])
    assert torch.autograd.grad(prediction.branches.sum(), of_text(policy)[0][1])[0].abs().max() > 0


OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow": {"objective": {"name": "dag_db", "prior": "pretrained"}},
    "one_pass": {"train": {"rollout": "one_pass", "updates": 1}, "regulariser": {"pretrained_kl": 1e-4}},
    "critic": {
        "objective": {"name": "dag_kl", "policy_gradient": "pathwise", "prior": "pretrained"},
        "reward": {"name": "compressibility"},
        "reward_critic": {"width": 8, "passes": 1, "rollouts": 1},
        "flow": {"warmup_epochs": 1},
    },
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_it_trains_with_what_reads_prompts_beside_the_policy(make: MakeRecipe, tmp_path: Path, kind: str) -> None:
    recipe = make(**OBJECTIVES[kind])
    before = parts_of(recipe).policy.state_dict()
    run = trained(recipe, RunFolder.create(tmp_path / "run"))
    after = load_file(next(iter(sorted(run.checkpoints.iterdir(), reverse=True))) / "policy.safetensors")
    assert before.keys() == after.keys()
    for part in ("text_encoder.", "down_blocks."):
        assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part)), part


def test_the_denoiser_can_stay_as_it_is(make: MakeRecipe, tmp_path: Path) -> None:
    trainer, trajectories = rolled_out(make(adapter=TEXT_ALONE), RunFolder.create(tmp_path / "run"))
    policy = cast(StableDiffusion, trainer.components.policy)
    assert {name.partition(".")[0] for name in policy.state_dict()} == {"text_encoder"}
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    assert updated(trainer, trajectories)["ratio_max_dev"] == 0
    assert any(not torch.equal(before[name], weight) for name, weight in policy.state_dict().items())
    policy.export(tmp_path)
    for file, start in (("pytorch_lora_weights", "text_encoder.text_model."), ("lora_kohya", "lora_te_text_model_")):
        assert all(name.startswith(start) for name in load_file(tmp_path / f"{file}.safetensors")), file


def test_a_forecast_holds_the_encoder_and_its_factors() -> None:
    plain, with_text = (
        Weightless(load(ROOT / "recipes/tiny_cpu_db.yaml", changes)).standing()
        for changes in ([], ["adapter.text_encoder={rank: 3}"])
    )
    assert not plain["text encoders"]
    assert sum(tensor.numel() for tensor in with_text["text encoders"]) == pytest.approx(450_560, rel=0.001)
    # Two layers, four projections, factors of 128 x 3 each, in float32.
    added = sum(tensor.nbytes for tensor in with_text["trained weights"]) - sum(
        tensor.nbytes for tensor in plain["trained weights"]
    )
    assert added == 2 * 4 * 2 * 128 * 3 * 4


REFUSED = {
    "full": ({"adapter.kind": "full"}, "adapter.text_encoder needs adapter.kind=lora"),
    "nothing": ({"adapter.text_encoder": "null"}, "adapter.targets: name at least one layer"),
    "sd3": ({"model.path": "random-sd35m", "model.dtype": "bf16"}, "adapter.text_encoder is for Stable Diffusion"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_in_words(kind: str) -> None:
    changes, message = REFUSED[kind]
    keys = {"adapter.targets": "[]", "adapter.text_encoder": "{rank: 2}"} | changes
    with pytest.raises(UsageError, match=message):
        Weightless(load(ROOT / "recipes/tiny_flow_cpu.yaml", [f"{key}={value}" for key, value in keys.items()]))


def test_networks_beside_the_policy_know_prompts_by_their_pretrained_embeddings(make: MakeRecipe) -> None:
    """Tokens have the shape of narrow embeddings, so that the critic would take them without an error."""
    parts = parts_of(make(**OBJECTIVES["critic"]))
    assert parts.learner.critic_fit is not None
    assert parts.learner.critic_fit.critic.prompts.shape == (2, 16)
    assert {*parts.policy.trained_encoders()} <= {*parts.policy.modules()}, "what stays in memory is counted by them"
