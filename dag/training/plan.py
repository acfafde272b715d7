"""Counts what a recipe will do, without loading any weight, for `--plan` and run.json."""

import math
from dataclasses import dataclass

from dag.errors import RunError
from dag.models.source import counted_as, latent_shape, local_folder
from dag.recipe import AdjointMatching, Backpropagation, NablaBalance, Recipe, is_scored

# Work of a backward pass of the denoiser under LoRA, in forward passes: 1.2 is that of the recipes in `recipes/tiny/`.
_BACKWARD = 1.2


@dataclass(frozen=True)
class Plan:
    """How much a recipe's run computes."""

    latent_elements: int
    """D, the number of elements of one latent."""
    counted_as: str
    """The model whose configs were read: the recipe's, or the architecture that a hub model is taken for."""
    trajectories: int
    """Trajectories of the complete run, each once: sampled ones, and those of given pictures."""
    updates: int
    """Optimizer steps of the policy in the complete run."""
    transitions_per_update: int
    unet_rows_per_epoch: int
    """UNet forward rows (two per state with guidance) in sampling and training, without evaluations; of an epoch in which
    `data.replay` has all its rollouts."""
    rewards_per_epoch: int
    """Images that are decoded and scored in an epoch."""
    beta_eff: float | None
    """Effective beta, in nats per unit of reward, if log-probs were sums; None for an objective without a flow."""


def latent_elements(recipe: Recipe) -> int:
    """D. A folder without configs, which loading will refuse, counts as an SD 1.5."""
    folder = local_folder(counted_as(recipe.model.path))
    assert folder is not None
    try:
        return math.prod(latent_shape(folder, recipe.model.resolution))
    except RunError:
        standing_in = local_folder("random-sd15")
        assert standing_in is not None
        return math.prod(latent_shape(standing_in, recipe.model.resolution))


def irreversible(recipe: Recipe) -> str | None:
    """One line about a recipe that balances steps with less noise against a noising kernel that cannot reverse them, else None."""
    if not recipe.takes_noising or recipe.sampler.eta == 1:
        return None
    return (
        f"sampler.eta={recipe.sampler.eta:g}, objective.prior=none: only with eta 1 can the noising kernel P_B reverse P_F; "
        "residuals cannot all become zero"
    )


def _trained_steps(recipe: Recipe) -> int:
    """Steps of a trajectory that an update trains, at most, or pictures that it noises anew."""
    train, objective = recipe.train, recipe.objective
    first, end = train.step_window or (0, recipe.sampler.steps)
    if isinstance(objective, Backpropagation):
        return objective.most_passes
    return objective.num_draws or max(1, math.ceil(train.step_fraction * (end - first)))


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. An epoch's numbers are those after the warm-up."""
    train, T = recipe.train, recipe.sampler.steps
    D = latent_elements(recipe)
    data, objective, steps = recipe.data, recipe.objective, _trained_steps(recipe)
    drawn_anew = objective.copies - 1 if isinstance(objective, Backpropagation) else 0
    branches = 2 if recipe.sampler.guidance_scale > 1 else 1
    others, sources = data.replay + (data.folder is not None), data.samples + (data.folder is not None)
    trained_rows = train.trajectories * steps * _passes_of_an_epoch(recipe)
    # In one pass the sampling pass is the training pass.
    sampled_rows = train.trajectories * T * data.samples
    training_rows = branches * trained_rows * (train.rollout == "stored")
    if objective.num_draws:  # of the conditional branch alone, and of the reference
        training_rows = trained_rows * (2 if recipe.has_prior else 1)
    extra = train.trajectories * drawn_anew * _passes_of_an_epoch(recipe)
    if recipe.regulariser.pretrained_kl > 0:
        extra += trained_rows
    extra += train.trajectories * T * sources if recipe.samples_prior else 0
    extra += train.trajectories * T * others if objective.weighs_by_log_pf else 0
    extra += trained_rows * _gradient_passes(recipe)
    extra += math.ceil(train.trajectories * _passes_of_an_epoch(recipe) * _swept_steps(recipe))
    previews, section = 0, recipe.forward_looking
    if section is not None:
        previews = train.trajectories * sum(is_scored(k, T, section.stride) for k in range(T))
        if section.source == "current":
            extra += trained_rows
            previews += 2 * trained_rows - train.trajectories * train.inner_epochs
    if any(recipe.exact_rewards):
        previews += trained_rows
    beta_eff = None
    if recipe.target is not None:
        beta_eff = recipe.target.beta.value * (D if recipe.objective.log_prob_reduction == "mean" else 1)
    return Plan(
        latent_elements=D,
        counted_as=counted_as(recipe.model.path),
        trajectories=train.epochs * train.trajectories * sources,
        updates=policy_updates(recipe),
        transitions_per_update=train.trajectories // train.updates * steps,
        unet_rows_per_epoch=training_rows + branches * (sampled_rows + extra),
        rewards_per_epoch=train.trajectories * sources + previews,
        beta_eff=beta_eff,
    )


def policy_updates(recipe: Recipe) -> int:
    """Updates of the policy in the complete training."""
    train = recipe.train
    return train.updates * sum(
        _passes_of_an_epoch(recipe, epoch) for epoch in range(recipe.warmup_epochs, train.epochs)
    )


def training_passes(recipe: Recipe) -> float:
    """Guided forward passes of the denoiser in the complete training; a backward pass counts as 1.2, evaluations do not count."""
    train, objective = recipe.train, recipe.objective
    branches, trained = 2 if recipe.sampler.guidance_scale > 1 else 1, train.trajectories * _passes_of_an_epoch(recipe)
    steps = float(_trained_steps(recipe))
    if isinstance(objective, Backpropagation) and not isinstance(objective.last, int):
        steps = sum(objective.last) / 2
    backward = steps * (1 + _gradient_backwards(recipe)) + _swept_steps(recipe)
    if objective.num_draws:  # of the conditional branch alone
        backward /= branches
    surplus = (_trained_steps(recipe) - steps) * trained  # of the plan, which takes the largest number of steps
    forward = make_plan(recipe).unet_rows_per_epoch / branches - surplus
    return train.epochs * (forward + _BACKWARD * backward * trained)


def _passes_of_an_epoch(recipe: Recipe, epoch: int | None = None) -> int:
    """How often an epoch trains on `train.trajectories`: new ones, and those of another policy; None is a late epoch.

    The first epochs have few rollouts to replay.
    """
    data = recipe.data
    replayed = data.replay if epoch is None else min(epoch, data.replay)
    return recipe.train.inner_epochs * data.samples + (data.folder is not None) + replayed


def _gradient_passes(recipe: Recipe) -> int:
    """UNet forward passes of a trained transition for the gradient of log F, besides those of sampling and training."""
    balance, is_stored = recipe.balance, recipe.train.rollout == "stored"
    if balance is None or not balance.takes_gradient:
        return 0
    at_the_next_state = is_stored or balance.jacobian == "pretrained"
    of_the_pretrained = recipe.has_prior and (is_stored or not recipe.samples_prior)
    has_reverse = isinstance(balance, NablaBalance) and balance.has_flow and recipe.has_prior
    return int(at_the_next_state) + int(of_the_pretrained and recipe.regulariser.pretrained_kl == 0) + int(has_reverse)


def _gradient_backwards(recipe: Recipe) -> int:
    """Backward passes to the states of a trained transition, for the gradient of log F and nabla-DB's reverse residual."""
    balance = recipe.balance
    if balance is None or not balance.takes_gradient:
        return 0
    has_reverse = isinstance(balance, NablaBalance) and balance.has_flow
    return int(balance.jacobian != "none") + has_reverse * (1 + recipe.has_prior)


def _swept_steps(recipe: Recipe) -> float:
    """Steps of a trajectory that adjoint matching goes back through, there and back, to the first of those that it trains."""
    if not isinstance(recipe.objective, AdjointMatching):
        return 0.0
    T, steps = recipe.sampler.steps, _trained_steps(recipe)
    return T - (T - steps) / (steps + 1)  # the expected first of so many steps, drawn uniformly


def _target(recipe: Recipe) -> str:
    """The distribution that the objective aims at, in words; "" for one that only maximises the reward."""
    if recipe.target is None:
        return ""
    return f" towards {'p_pretrained ' if recipe.has_prior else ''}exp(beta r)"


def _gradients(recipe: Recipe) -> str:
    """Where the gradients of the rewards come from, in words; "" for an objective that does not take them."""
    if not recipe.objective.takes_gradient:
        return ""
    kinds = ["learnt" if is_learnt else "exact" for is_learnt in recipe.learnt_rewards]
    return f"; gradient {' + '.join(kinds)}"


def _given(recipe: Recipe, num_pictures: int) -> list[str]:
    """The line about trajectories that the present policy did not sample, if there are any."""
    data, parts = recipe.data, []
    if data.folder is not None:
        place = "after" if data.sample else "in the place of"
        parts.append(
            f"{recipe.train.trajectories} an epoch of {num_pictures} pictures in {data.folder}, {place} the rollout"
        )
    if data.replay:
        parts.append(f"the last {data.replay} rollouts once more in each epoch")
    return [f"data          {'; '.join(parts)}"] if parts else []


def describe(recipe: Recipe, num_prompts: int, num_pictures: int = 0) -> str:
    """The plan as text for the terminal.

    Args:
        num_pictures: pictures in `data.folder`.
    """
    plan, train, sampler = make_plan(recipe), recipe.train, recipe.sampler
    is_known = plan.counted_as == recipe.model.path
    known = (
        "from the model's config" if is_known else f"of {plan.counted_as}: the model's files are not on this machine"
    )
    updates = train.updates * _passes_of_an_epoch(recipe)
    lines = [
        f"model         {recipe.model.path}, {recipe.model.dtype}, {recipe.adapter.kind} {recipe.adapter.factors}".rstrip(),
        f"latent        D = {plan.latent_elements} elements per sample ({known})",
        f"prompts       {num_prompts}",
        f"reward        {' + '.join(f'{term.weight:g} {term.name}' for term in recipe.reward)}{_gradients(recipe)}",
        f"objective     {recipe.objective.name}{_target(recipe)}, log-probs reduced by {recipe.objective.log_prob_reduction}",
        f"sampling      {sampler.steps} steps, eta {sampler.eta:g}, guidance {sampler.guidance_scale:g}, {sampler.tile} at a time",
        *_given(recipe, num_pictures),
        f"per epoch     {plan.trajectories // train.epochs} trajectories, {plan.rewards_per_epoch} images decoded and scored, "
        f"{plan.unet_rows_per_epoch} UNet rows",
        f"updates       {updates} per epoch over {plan.transitions_per_update} transitions each, "
        f"micro-batch {train.micro_batch}",
        f"learning rate {train.learning_rate:g}{', lowered to zero' * (train.learning_rate_schedule == 'linear')}",
        f"run           {train.epochs} epochs, {plan.trajectories} trajectories, {plan.updates} policy updates, "
        f"{training_passes(recipe):,.0f} guided passes of the denoiser (a backward pass counted as {_BACKWARD:g})",
    ]
    if recipe.target is not None:
        beta = recipe.target.beta
        unit = "sd of the first rollout's reward" if beta.unit == "reward_sd" else "unit of reward"
        lines.append(f"beta          {beta.value:g}, effective inverse temperature {plan.beta_eff:g} nats per {unit}")
    if (line := irreversible(recipe)) is not None:
        lines.append(f"reversal      {line}")
    if train.micro_batch != sampler.tile and train.rollout == "stored" and recipe.data.samples:
        lines.append(
            f"ratio         micro-batch {train.micro_batch} is not the tile {sampler.tile}: log P_F is recomputed up to float "
            "rounding; set them equal for a first ratio of exactly 1"
        )
    return "\n".join(lines)
