"""Builds the objects that a recipe describes, and describes them for run.json."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from dag_kernels import Kernels, choose
from PIL import features
from torch import Tensor

from dag.chain.policy import Policy
from dag.errors import UsageError
from dag.evaluation.fixed import Evaluator
from dag.models import families
from dag.objectives import OBJECTIVES
from dag.objectives.reward_critic import RewardCritic
from dag.objectives.state_flow import StateFlow
from dag.recipe import Recipe, ScalarBalance, captions, prompts
from dag.recipe.captions import Captioned
from dag.rewards import RewardSum
from dag.run.fingerprint import of_texts, of_weights
from dag.run.machine import describe_machine, git_commit
from dag.run.processes import ALONE, Processes
from dag.training.critic_fit import CriticFit
from dag.training.embeddings import Embeddings
from dag.training.flow_fit import FlowFit
from dag.training.learner import Learner
from dag.training.optimizer import ClippedOptimizer, build_optimizer
from dag.training.plan import irreversible, make_plan


@dataclass
class Components:
    """The objects of a training run."""

    policy: Policy
    reward: RewardSum
    learner: Learner
    evaluator: Evaluator
    prompts: tuple[str, ...]
    """P prompts to train on: first the recipe's, which are sampled, then others of given pictures."""
    num_sampled: int
    """How many of them are sampled."""
    pictures: tuple[Captioned, ...]
    """The pictures of `data.folder`."""
    text: Tensor
    """(P, S, D) the prompts as the policy's `encode` returned them, on the CPU."""
    fingerprint: dict[str, str]
    """Fingerprints of the base model's networks and of the prompts; a resumed run must have the same."""

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A context in which offloaded decoders and reward networks are on the device, to decode and score."""
        with self.reward.at_work(), self.policy.decoder.at_work():
            yield

    def standing(self) -> Iterator[Tensor]:
        """Tensors that stay in memory between phases: weights, gradients and optimizer states, without the reward's networks."""
        for module in (*self.policy.modules(), *self.learner.networks()):
            yield from (*module.parameters(), *module.buffers())
        yield from self.policy.trainable()
        for clipped in self.learner.optimizers():
            yield from (p.grad for p in clipped.parameters if p.grad is not None)
            for state in clipped.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    @property
    def device(self) -> torch.device:
        return self.learner.device

    @property
    def kernels(self) -> Kernels:
        return self.policy.schedule.kernels

    @property
    def flow(self) -> StateFlow | None:
        return None if self.learner.flow_fit is None else self.learner.flow_fit.flow


def build(
    recipe: Recipe,
    device: torch.device,
    warn: Callable[[str], object] = print,
    reward: RewardSum | None = None,
    processes: Processes = ALONE,
) -> Components:
    """Load the model and build everything else. Mistakes in prompts, kernels and rewards raise before the model is read.

    Args:
        warn:      called with one line for each warning.
        reward:    taken instead of the recipe's rewards.
        processes: share the work.

    Raises:
        UsageError: the recipe asks for what cannot be done.
        RunError:   the model or a reward cannot be loaded.
    """
    found = prompts.load_prompts(recipe.prompts)
    pictures = captions.given_pictures(recipe)
    known = set(found.training)
    training = (*found.training, *dict.fromkeys(one.text for one in pictures if one.text not in known))
    texts = (*training, *found.held_out)
    try:
        kernels = choose(recipe.kernels, device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    reward = reward or RewardSum(recipe.reward, device)
    policy = families.load(recipe, device, recipe.forward_looking, kernels)
    if (line := irreversible(recipe)) is not None:
        warn(f"warning: {line}")
    for warning in policy.prompt_warnings(texts):
        warn(f"warning: {warning}")
    text, held_out = policy.encode(texts).split([len(training), len(found.held_out)])
    # After encoding, since only then all text encoders are there.
    fingerprint = {name: of_weights(weights) for name, weights in policy.base_weights().items()}
    fingerprint["prompts"] = of_texts(texts)
    if pictures:
        fingerprint["folder of pictures"] = captions.fingerprint(pictures)
    policy.free_text_encoder()
    learner = learner_of(recipe, policy, text, kernels, warn, processes)
    num_sampled = len(found.training)
    evaluated = (found.held_out, held_out) if recipe.evaluation.held_out else (found.training, text[:num_sampled])
    evaluator = Evaluator(recipe, *evaluated, device, processes)
    return Components(policy, reward, learner, evaluator, training, num_sampled, pictures, text, fingerprint)


def learner_of(
    recipe: Recipe,
    policy: Policy,
    text: Tensor,
    kernels: Kernels,
    warn: Callable[[str], object] = print,
    processes: Processes = ALONE,
) -> Learner:
    """The learner of a policy: the recipe's objective, optimizers and state flow.

    Args:
        text: the prompts as the policy's `encode` returned them.
        warn: called with one line for each warning.
    """
    train, device = recipe.train, policy.schedule.timesteps.device
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, kernels, recipe.prompts.per_group)
    optimizer = build_optimizer(policy.trainable(), train.learning_rate, train, train.optimizer)
    use_scaler = recipe.model.dtype == "fp16"
    clipped = ClippedOptimizer("policy", optimizer, train.clip_norm, policy.weights, use_scaler)
    embeddings, flow_fit, critic_fit = Embeddings(text, device), None, None
    # Flow and critic must know which prompt it is, not how the policy reads it.
    if objective.uses_flow:
        fixed = policy.pretrained_text(text)
        flow_fit = _flow_fit(recipe, policy, embeddings if fixed is text else Embeddings(fixed, device))
    if recipe.has_critic:
        critic_fit = _critic_fit(recipe, policy, policy.pretrained_text(text), processes)
    return Learner(recipe, policy, objective, clipped, flow_fit, critic_fit, embeddings, warn, processes)


def _flow_fit(recipe: Recipe, policy: Policy, text: Embeddings) -> FlowFit:
    """A new state flow with its optimizer. The flow's initial weights depend on the seed alone."""
    section, schedule = recipe.objective, policy.schedule
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        flow = StateFlow(
            policy.latent_shape[0],
            policy.text_shape[1],
            1 if section.flow_is_log_z else schedule.num_transitions,
            recipe.flow.channels,
            recipe.flow.slopes,
        ).to(schedule.timesteps.device)
    optimizer = build_optimizer(list(flow.parameters()), recipe.flow.learning_rate, recipe.train, recipe.flow.optimizer)
    clipped = ClippedOptimizer("flow", optimizer, recipe.train.clip_norm)
    is_scaled = isinstance(section, ScalarBalance) and section.residual_scale == "running"
    return FlowFit(flow, clipped, schedule, text, recipe.flow.calibration, is_scaled)


def _critic_fit(recipe: Recipe, policy: Policy, text: Tensor, processes: Processes) -> CriticFit:
    """A new reward critic with its optimizer. Its initial weights depend on the seed alone."""
    section = recipe.reward_critic
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        critic = RewardCritic(policy.latent_shape, text, section.width).to(policy.schedule.timesteps.device)
    optimizer = build_optimizer(list(critic.parameters()), section.learning_rate, recipe.train, "adamw")
    return CriticFit(critic, ClippedOptimizer("critic", optimizer, recipe.train.clip_norm), recipe, processes)


def describe_run(recipe: Recipe, components: Components, device: torch.device) -> dict[str, Any]:
    """The content of run.json: the recipe, which a resumed run reads, what was built from it, and the machine."""
    critic_fit = components.learner.critic_fit
    return {
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "model": components.policy.describe(),
        "flow_parameters": 0 if components.flow is None else sum(p.numel() for p in components.flow.parameters()),
        "critic_parameters": 0 if critic_fit is None else sum(p.numel() for p in critic_fit.critic.parameters()),
        "plan": asdict(make_plan(recipe)),
        "beta_eff": make_plan(recipe).beta_eff,
        "kernels": {"name": components.kernels.name, "reason": components.kernels.reason},
        "reduction_factor": components.learner.log_scale.reduction_factor,
        **describe_machine(device),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "commit": git_commit(),
    }
