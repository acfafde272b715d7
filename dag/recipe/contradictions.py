"""Mistakes of a recipe that involve several keys. Imports no torch."""

from dag.recipe.first_order_sections import Backpropagation
from dag.recipe.objective_sections import Around, NablaBalance, ScalarBalance
from dag.recipe.reward_sections import Tower
from dag.recipe.schema import Recipe


def validate(recipe: Recipe) -> list[str]:
    """Mistakes that involve several keys, each named in it; empty if there are none."""
    problems = []
    train, adapter = recipe.train, recipe.adapter
    if not recipe.reward:
        problems.append("reward: give at least one")
    if train.trajectories % train.updates:
        problems.append(f"train.updates={train.updates} must divide train.trajectories={train.trajectories}")
    group = recipe.prompts.per_group
    if train.trajectories // train.updates % group:
        problems.append(
            f"prompts.per_group={group} must divide the trajectories of an update, {train.trajectories // train.updates}"
        )
    problems += recipe.objective.problems(
        Around(
            is_one_pass=train.rollout == "one_pass",
            keeps_pretrained=adapter.kind == "lora",
            per_update=train.trajectories // train.updates,
            per_group=group,
            micro_batch=train.micro_batch,
            black_boxes=tuple(term.name for term in recipe.reward if not term.has_gradient),
            steps=recipe.sampler.steps,
            chooses_steps=train.step_fraction < 1 or train.step_window is not None,
        )
    )
    if train.rollout == "one_pass":
        problems += _one_pass_problems(recipe)
    problems += _sampler_problems(recipe)
    problems += _step_choice_problems(recipe)
    problems += _gradient_problems(recipe)
    if recipe.sampler.uncond == "frozen" and adapter.kind == "full":
        problems.append("sampler.uncond=frozen needs adapter.kind=lora: a full fine-tune keeps no pretrained copy")
    if recipe.memory.base != "compute" and adapter.kind == "full":
        problems.append(f"memory.base={recipe.memory.base} needs adapter.kind=lora: quantised weights are frozen")
    if adapter.kind == "lora" and adapter.targets == () and adapter.text_encoder is None:
        problems.append("adapter.targets: name at least one layer, or train adapter.text_encoder")
    if adapter.kind == "full" and adapter.text_encoder is not None:
        problems.append("adapter.text_encoder needs adapter.kind=lora: it is a LoRA beside the denoiser's")
    if adapter.kind == "full" and recipe.regulariser.pretrained_kl > 0:
        problems.append("regulariser.pretrained_kl needs adapter.kind=lora: a full fine-tune keeps no pretrained copy")
    if not recipe.flow.channels:
        problems.append("flow.channels: name at least one width")
    if recipe.flow.slopes and recipe.flow.calibration == 0:
        problems.append("flow.slopes=true: flow.calibration=0 never moves the slopes; use 0.5")
    if recipe.objective.num_draws:
        inert = {
            "regulariser": recipe.regulariser.changed("sampling", "pretrained_kl"),
            "train": train.changed("max_kl"),
        }
        problems += [
            f"{section}.{key} has no effect with objective.form=denoise"
            for section, keys in inert.items()
            for key in keys
        ]
    problems += _data_problems(recipe)
    problems += _deterministic_problems(recipe)
    if recipe.evaluation.held_out and recipe.prompts.set not in ("drawbench", "hpdv2"):
        problems.append("evaluation.held_out: only prompts.set=drawbench and hpdv2 keep prompts back")
    return problems


def _data_problems(recipe: Recipe) -> list[str]:
    """Keys that contradict training on trajectories of another policy."""
    data, objective, train = recipe.data, recipe.objective, recipe.train
    problems = data.problems()
    if not data.keys:
        return problems
    given = f"data.{data.keys[0]}"
    if objective.needs_own_rollouts:
        problems.append(f"{given}: not with objective.name={objective.name}: {objective.needs_own_rollouts}")
    if train.rollout == "one_pass":
        problems.append(f"{given}: train.rollout=one_pass trains while it samples; use stored")
    if recipe.regulariser.sampling > 0:
        problems.append(f"{given}: regulariser.sampling pulls towards the policy that sampled; use pretrained_kl")
    if data.samples:
        return problems
    if objective.fits_flow:
        problems.append(f"{given}: {objective.name}'s flow is fitted to sampled rollouts; set data.sample=true")
    if train.inner_epochs > 1:
        problems.append(
            f"train.inner_epochs={train.inner_epochs} repeats sampled rollouts, and {given} takes their place"
        )
    if recipe.prompts.shared_start:
        problems.append(f"prompts.shared_start is about sampled rollouts, and {given} takes their place")
    return problems


def _sampler_problems(recipe: Recipe) -> list[str]:
    """What contradicts an objective that balances its steps against the noising kernel, or draws from it."""
    objective = recipe.objective
    if isinstance(objective, Backpropagation) and objective.copies > 1:
        return _copies_problems(recipe, f"objective.copies={objective.copies}")
    if recipe.sampler.sde == "flow_grpo" and recipe.takes_noising:
        return [
            "sampler.sde=flow_grpo: no noising kernel reverses its steps, so no balance against P_B can hold; "
            "set objective.prior=pretrained, or use posterior"
        ]
    return []


def _copies_problems(recipe: Recipe, asked: str) -> list[str]:
    """What contradicts last steps that are drawn anew."""
    problems = []
    if recipe.sampler.sde == "flow_grpo":
        problems.append(
            f"{asked}: sampler.sde=flow_grpo leaves states noisier than their level, to which no P_B leads back; use posterior"
        )
    if recipe.regulariser.sampling > 0:
        problems.append(
            f"{asked}: regulariser.sampling pulls towards outputs while sampling, which steps drawn anew lack; use pretrained_kl"
        )
    return problems


def _gradient_problems(recipe: Recipe) -> list[str]:
    """Keys that contradict an objective which takes the reward's gradient."""
    balance, problems = recipe.balance, []
    if isinstance(balance, NablaBalance) and balance.has_flow:
        unused = recipe.flow.changed("passes", "slopes")
        problems += [
            f"flow.{key} belongs to flows that learn values; nabla_db's learns by its gradient" for key in unused
        ]
    if balance is not None and not balance.has_flow:
        unused = [f"flow.{key}" for key in recipe.flow.changed("passes", "slopes")]
        if isinstance(balance, ScalarBalance):
            unused += [f"objective.{key}" for key in balance.changed("detach_next", "huber", "residual_scale")]
        problems += [f"{key} has no effect with objective.learnt_flow=false" for key in unused]
    if balance is not None and balance.forward_looking.weight == "fitted" and recipe.forward_looking is None:
        problems.append("objective.forward_looking.weight=fitted has no effect with source=none")
    group = recipe.train.trajectories // recipe.train.updates
    if recipe.has_critic and recipe.train.rollout == "one_pass" and group < 2:
        problems.append(
            "train.updates: in one pass the reward critic needs at least 2 trajectories an update, to hold one out"
        )
    is_late = recipe.train.rollout == "one_pass" or recipe.fits_critic_afterwards
    if recipe.has_critic and is_late and recipe.warmup_epochs == 0:
        problems.append(
            "reward_critic: in one pass, with control_variate and with baseline=value the policy is trained before the critic "
            "has seen its rollout; set flow.warmup_epochs to 1 or more"
        )
    return problems


def _step_choice_problems(recipe: Recipe) -> list[str]:
    """Steps that do not exist; keys that contradict `train.step_choice: informative`, or leave it without effect."""
    train, T, problems = recipe.train, recipe.sampler.steps, []
    first, end = train.step_window or (0, T)
    if not first < end <= T:
        problems.append(
            f"train.step_window=[{first}, {end}]: give the first step and the one after the last, within 0 and sampler.steps={T}"
        )
    if train.step_choice == "uniform":
        return problems
    if recipe.forward_looking is None:
        problems.append(
            "train.step_choice=informative is measured on the rewards of x0_hat, which this recipe does not have"
        )
    if train.step_fraction == 1:
        problems.append("train.step_choice=informative has no effect with train.step_fraction=1: all steps are trained")
    if train.keep_terminal:
        problems.append(
            "train.step_choice=informative draws the last step like all others; set train.keep_terminal=false"
        )
    return problems


def _deterministic_problems(recipe: Recipe) -> list[str]:
    """Keys that contradict `deterministic`: with them the same run may compute other bits."""
    if not recipe.deterministic:
        return []
    problems = []
    if recipe.memory.attention == "xformers":
        problems.append("deterministic=true: memory.attention=xformers adds in any order; use auto")
    if recipe.differentiates_rewards and any(isinstance(term, Tower) for term in recipe.reward):
        problems.append(
            "deterministic=true: on a GPU the gradient of resizing pictures adds in any order; use a reward without a network"
        )
    if recipe.memory.compile:
        found = str(recipe.memory.compile).lower()
        problems.append(f"deterministic=true: memory.compile={found} picks kernels by timing them; use false")
    return problems


def _one_pass_problems(recipe: Recipe) -> list[str]:
    """Keys that contradict `train.rollout: one_pass`, or would have no effect with it."""
    train, balance = recipe.train, recipe.balance
    if balance is None:
        name = recipe.objective.name
        return [f"train.rollout=one_pass: {name} trains on complete trajectories; use stored"]
    problems = []
    if balance.forward_looking.source == "current":
        problems.append(
            "train.rollout=one_pass: the rollout's policy is the current one; use forward_looking.source=rollout"
        )
    if train.inner_epochs > 1:
        problems.append(f"train.rollout=one_pass: train.inner_epochs={train.inner_epochs} needs stored chains; use 1")
    if recipe.regulariser.sampling > 0:
        problems.append("train.rollout=one_pass: regulariser.sampling is zero on-policy; use 0")
    if recipe.sampler.log_pf_at == "unrounded":
        problems.append("train.rollout=one_pass: sampler.log_pf_at=unrounded has no meaning without a stored chain")
    if recipe.memory.offload_vae:
        problems.append("train.rollout=one_pass: memory.offload_vae gains nothing, every step decodes; use false")
    if any(getattr(term, "offload", False) for term in recipe.reward):
        problems.append("train.rollout=one_pass: reward.offload gains nothing, every step scores; use false")
    if recipe.memory.chains == "cpu":
        problems.append("train.rollout=one_pass: memory.chains=cpu has no chains to move; use device")
    if balance.beta.unit == "reward_sd" and recipe.flow.warmup_epochs == 0:
        problems.append(
            "train.rollout=one_pass: objective.beta.unit=reward_sd is measured in a warm-up; set flow.warmup_epochs to 1 or more"
        )
    return problems
