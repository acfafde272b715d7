"""From a recipe to the objects that run it, and their description in run.json."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dag_kernels import Kernels, choose
from PIL import features
from torch import Tensor

from dag.chain.policy import Policy
from dag.errors import UsageError
from dag.evaluation.fixed import Evaluator
from dag.models.sd import StableDiffusion
from dag.objectives import OBJECTIVES
from dag.objectives.state_flow import StateFlow
from dag.recipe import PolicyGradient, Recipe, prompts
from dag.rewards import RewardSum
from dag.run.fingerprint import of_texts, of_weights
from dag.run.machine import describe_machine
from dag.run.processes import ALONE, Processes
from dag.training.embeddings import Embeddings
from dag.training.flow_fit import FlowFit
from dag.training.optimizer import Stepper, build_optimizer
from dag.training.plan import make_plan
from dag.training.stored import Learner


@dataclass
class Parts:
    """What a recipe builds."""

    policy: StableDiffusion
    reward: RewardSum
    learner: Learner
    evaluator: Evaluator
    prompts: tuple[str, ...]
    text: Tensor
    """(P, S, D) prompt embeddings on the CPU."""
    fingerprint: dict[str, str]
    """Of the base model and the prompts: a resumed run must have the same."""

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A phase that decodes and scores: what is offloaded comes to the device."""
        with self.reward.at_work(), self.policy.decoder.at_work():
            yield

    def standing(self) -> Iterator[Tensor]:
        """What is in memory between two phases: weights, gradients, optimizer states."""
        decoder, flow = self.policy.decoder, self.flow
        for module in (self.policy.unet, decoder.vae, decoder.tiny, flow):
            if module is not None:
                yield from (*module.parameters(), *module.buffers())
        yield from self.policy.trainable()
        for stepper in self.learner.updates.steppers():
            yield from (p.grad for p in stepper.parameters if p.grad is not None)
            for state in stepper.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

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
    world: Processes = ALONE,
) -> Parts:
    """Load the model and assemble everything. Cheap mistakes (prompts, kernels, rewards) surface before the model is read.

    Args:
        reward: instead of the recipe's own.
        world:  the processes that share the work.
    """
    found = prompts.load_prompts(recipe.prompts)
    texts = (*found.training, *found.held_out)
    try:
        kernels = choose(recipe.kernels, device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    reward = reward or RewardSum(recipe.reward, device)
    looking = None if isinstance(recipe.objective, PolicyGradient) else recipe.objective.forward_looking
    policy = StableDiffusion(recipe.model, recipe.adapter, recipe.sampler, device, recipe.seed, recipe.memory, looking)
    policy.schedule = replace(policy.schedule, kernels=kernels)
    for warning in policy.prompt_warnings(texts):
        warn(f"warning: {warning}")
    fingerprint = {name: of_weights(weights) for name, weights in policy.base_weights().items()}
    fingerprint["prompts"] = of_texts(texts)
    text, held_out = policy.encode(texts).split([len(found.training), len(found.held_out)])
    policy.free_text_encoder()
    learner = learner_of(recipe, policy, text, kernels, warn, world)
    evaluated = (found.held_out, held_out) if recipe.evaluation.held_out else (found.training, text)
    evaluator = Evaluator(recipe, *evaluated, device, world)
    return Parts(policy, reward, learner, evaluator, found.training, text, fingerprint)


def learner_of(
    recipe: Recipe,
    policy: StableDiffusion,
    text: Tensor,
    kernels: Kernels,
    warn: Callable[[str], object] = print,
    world: Processes = ALONE,
) -> Learner:
    """The recipe's objective, optimizers and flow for a policy.

    Args:
        text: (P, S, D) embeddings of the prompts, on the CPU.
    """
    train, device = recipe.train, policy.schedule.timesteps.device
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, kernels)
    optimizer = build_optimizer(policy.trainable(), train.learning_rate, train, train.optimizer)
    stepper = Stepper("policy", optimizer, train.clip_norm, policy.weights, use_scaler=recipe.model.dtype == "fp16")
    embeddings = Embeddings(text, device)
    flow_fit = _flow_fit(recipe, policy, embeddings) if objective.uses_flow else None
    return Learner(recipe, policy, objective, stepper, flow_fit, embeddings, warn, world)


def _flow_fit(recipe: Recipe, policy: Policy, text: Embeddings) -> FlowFit:
    """A fresh state flow with its optimizer; its weights depend on the seed alone."""
    assert not isinstance(recipe.objective, PolicyGradient)
    schedule = policy.schedule
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        flow = StateFlow(policy.latent_shape[0], policy.text_width, schedule.num_transitions, recipe.flow.channels).to(
            schedule.timesteps.device
        )
    optimizer = build_optimizer(list(flow.parameters()), recipe.flow.learning_rate, recipe.train, recipe.flow.optimizer)
    stepper = Stepper("flow", optimizer, recipe.train.clip_norm)
    is_scaled = recipe.objective.residual_scale == "running"
    return FlowFit(flow, stepper, schedule, text, recipe.flow.calibration, is_scaled)


def describe_run(recipe: Recipe, parts: Parts, device: torch.device) -> dict[str, Any]:
    """What run.json holds: enough to know what ran, on what, and to resume it."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "model": parts.policy.describe(),
        "flow_parameters": 0 if parts.flow is None else sum(p.numel() for p in parts.flow.parameters()),
        "plan": asdict(make_plan(recipe)),
        "beta_eff": make_plan(recipe).beta_eff,
        "kernels": {"name": parts.kernels.name, "reason": parts.kernels.reason},
        "reduction_factor": parts.learner.units.reduction_factor,
        **describe_machine(device),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of this code, with -dirty if it was changed; None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
