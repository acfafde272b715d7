"""Builds the parts of a recipe and one scored rollout, as the trainer does."""

import json
import signal
from pathlib import Path
from typing import Any

import torch

from dag.interrupt import Interrupt
from dag.ledger import PHASES
from dag.parts import Parts, build
from dag.recipe import Recipe
from dag.run_folder import RunFolder
from dag.trainer import Trainer
from dag.trajectory import Trajectories

CPU = torch.device("cpu")
# What no two runs share.
MEASURED = {*(f"{kind}_{name}" for kind in ("seconds", "memory_gib") for name in PHASES), "peak_memory_gib"}


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


class Soon(Interrupt):
    """A signal that comes at the n-th resting point."""

    def __init__(self, points: float, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.left, self.number = points, number

    @property
    def signal(self) -> signal.Signals | None:
        self.left -= 1
        return self.number if self.left < 0 else None

    @signal.setter
    def signal(self, value: object) -> None:
        """Nothing else sets it."""


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
    parts.policy.weights.refresh()
