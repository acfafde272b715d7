"""Builds components, rollouts and updates of a recipe as the trainer does, and disturbs them; what many tests share."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dag.chain.rollout import Batch, Score
from dag.chain.trajectory import ChainStore, Trajectories
from dag.errors import StoppedError
from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.run.meter import PHASES, PhaseMeter
from dag.run.signals import Interrupt
from dag.training.build import Components, build
from dag.training.epoch_state import EpochState
from dag.training.learner import Learner
from dag.training.one_pass import OnePass
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

CPU = torch.device("cpu")
# Metrics that differ between any two runs: times and memory.
MEASURED = {*(f"{kind}_{name}" for kind in ("seconds", "memory_gib") for name in PHASES), "peak_memory_gib"}


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


NEVER = 10**9


class Soon(Interrupt):
    """A signal that comes at a safe point.

    Args:
        points: how many safe points pass before it; NEVER lets the run end.
        number: the signal.
    """

    def __init__(self, points: float, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.left, self.number = points, number

    @property
    def signal(self) -> signal.Signals | None:
        self.left -= 1
        return self.number if self.left < 0 else None

    @signal.setter
    def signal(self, value: object) -> None:
        """Ignored: the signal comes from `points` alone."""


def tiles(recipe: Recipe) -> int:
    """Tiles of a rollout."""
    return math.ceil(recipe.train.trajectories / recipe.sampler.tile)


def micro_batches(recipe: Recipe) -> int:
    """Micro-batches of an epoch's updates on a stored rollout; each is some trajectories at one step."""
    train = recipe.train
    return train.updates * math.ceil(train.trajectories / train.updates / train.micro_batch) * recipe.sampler.steps


def parts_of(recipe: Recipe) -> Components:
    return build(recipe, CPU, warn=lambda text: None)


def trainer_of(recipe: Recipe, run: RunFolder) -> Trainer:
    """A trainer of the recipe, on the CPU."""
    return Trainer(recipe, run, parts_of(recipe))


def rolled_out(recipe: Recipe, run: RunFolder) -> tuple[Trainer, Trajectories]:
    """A trainer of the recipe, and the trajectories of its first epoch."""
    trainer = trainer_of(recipe, run)
    return trainer, sampled(trainer)


def sampled(trainer: Trainer, epoch: int = 0) -> Trajectories:
    """Sample and score the trajectories of an epoch."""
    return trainer.sample(trainer.begin_epoch(epoch))


def updated(trainer: Trainer, trajectories: Trajectories, epoch: int = 0) -> dict[str, Any]:
    """Train on stored trajectories; returns the metrics of the updates."""
    state = trainer.begin_epoch(epoch)
    trainer.train_on(trajectories, state)
    return state.measured


def one_pass(trainer: Trainer, epoch: int = 0) -> tuple[Trajectories, dict[str, Any]]:
    """Train an epoch in one pass; returns its trajectories and the metrics of the updates."""
    state = trainer.begin_epoch(epoch)
    return trainer.train_in_one_pass(state), state.measured


def learnt(learner: Learner, trajectories: Trajectories, epoch: int, score: Score | None = None) -> dict[str, Any]:
    """Train on stored trajectories without a trainer; returns the metrics of the updates."""
    state = fresh_state(learner, epoch)
    for _ in StoredTraining(learner, PhaseMeter(CPU)).steps(state, trajectories, score):
        pass
    return state.measured


def walked(learner: Learner, batch: Batch, epoch: int, scorer: Callable[[Batch], Score]) -> EpochState:
    """Train an epoch in one pass without a trainer; returns the state at its end."""
    state = fresh_state(learner, epoch)
    for _ in OnePass(learner, PhaseMeter(CPU)).steps(state, batch, scorer):
        pass
    return state


def fresh_state(learner: Learner, epoch: int) -> EpochState:
    count = learner.recipe.train.trajectories
    return EpochState(epoch, ChainStore(learner.schedule.num_transitions + 1, count, CPU, CPU))


def disturb(parts: Components, scale: float = 0.05) -> None:
    """Add noise to the adapter and the flow: a new LoRA adds nothing, which would hide what depends on it."""
    generator = torch.Generator().manual_seed(11)
    modules = [*parts.policy.trainable(), *(parts.flow.parameters() if parts.flow is not None else ())]
    with torch.no_grad():
        for parameter in modules:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    parts.policy.weights.refresh()


def write(recipe: Recipe, path: Path) -> str:
    """Write a recipe as a YAML file; returns its path."""
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json(exclude_none=True))))
    return str(path)


def poisoned(trainer: Trainer, sample: int, k: int, times: int) -> None:
    """Make the loss of one transition infinite the first `times` times that it is trained.

    Args:
        sample: the trajectory's sample id.
        k:      the transition's step.
    """
    learner, left = trainer.components.learner, times
    of_step = learner.loss.of_step

    def spoilt(rollout: Any, rows: torch.Tensor, step: int, *rest: Any) -> Any:
        nonlocal left
        output, regulariser = of_step(rollout, rows, step, *rest)
        hit = (rollout.trajectories.sample_id[rows] == sample) & (step == k)
        if left and bool(hit.any()):
            left -= 1
            output = replace(output, loss=torch.where(hit, output.loss * torch.inf, output.loss))
        return output, regulariser

    learner.loss.of_step = spoilt  # type: ignore[method-assign,assignment]


def trained(recipe: Recipe, run: RunFolder) -> RunFolder:
    Trainer(recipe, run, parts_of(recipe)).fit()
    return run


def trained_in_pieces(recipe: Recipe, run: RunFolder, points: int) -> list[str]:
    """Train a run that stops after every `points` safe points and is built anew each time; returns its checkpoints' names."""
    names: list[str] = []
    while (name := piece(recipe, run, points, is_resumed=bool(names))) is not None:
        assert name not in names, "every piece must come further"
        names.append(name)
    return names


def piece(recipe: Recipe, run: RunFolder, points: int, is_resumed: bool) -> str | None:
    """Train until the signal comes; returns the name of the checkpoint that the stop left, None if the run ended."""
    try:
        Trainer(recipe, run, parts_of(recipe), interrupt=Soon(points)).fit(is_resumed)
    except StoppedError as stopped:
        return stopped.saved
    return None
