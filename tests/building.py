"""Builds the parts of a recipe and one scored rollout, as the trainer does."""

import torch

from dag.parts import Parts, build
from dag.recipe import Recipe
from dag.run_folder import RunFolder
from dag.trainer import Trainer
from dag.trajectory import Trajectories

CPU = torch.device("cpu")


def parts_of(recipe: Recipe) -> Parts:
    return build(recipe, CPU, warn=lambda text: None)


def rolled_out(recipe: Recipe, run: RunFolder) -> tuple[Trainer, Trajectories]:
    """A trainer and its first epoch's trajectories."""
    trainer = Trainer(recipe, run, parts_of(recipe))
    return trainer, trainer.sample(0)


def disturb(parts: Parts, scale: float = 0.05) -> None:
    """Give the adapter (and the flow) non-zero weights: a fresh LoRA adds nothing, and hides what depends on it."""
    generator = torch.Generator().manual_seed(11)
    modules = [*parts.policy.trainable(), *(parts.flow.parameters() if parts.flow is not None else ())]
    with torch.no_grad():
        for parameter in modules:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
