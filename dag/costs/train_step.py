"""One row of `dag.bench train-step`: a recipe's training loop, or the published one, timed and counted."""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dag.costs import flops
from dag.costs.forecast import forecast
from dag.costs.live_bytes import LiveBytes
from dag.costs.published_work import Published
from dag.recipe import Recipe
from dag.recipe.reward_sections import RewardTerm, Tower
from dag.rewards import Reward, RewardSum, build_reward
from dag.run.folder import RunFolder
from dag.run.gpu import GIB
from dag.run.meter import PhaseMeter
from dag.training.build import build
from dag.training.trainer import Trainer

Row = dict[str, Any]

LITERAL = "published amount of work"


def measure(label: str, recipe: Recipe, device: torch.device, repeats: int, is_predicted: bool = True) -> Row:
    """Measure one row: an untimed epoch, in which FLOP are counted, then `repeats` timed ones.

    Args:
        label:        the row's name; LITERAL measures the published loop in place of the recipe's.
        is_predicted: also add the peak that `--plan` would print, which takes seconds of a CPU.

    Returns:
        ms by phase are milliseconds per transition of one trajectory, from the epoch with the median total time.
    """
    with trainer_of(recipe, device) as trainer:
        components, epoch = trainer.components, epoch_of(label, recipe, trainer)
        flop, counted = _counted_epoch(epoch, trainer, device)
        if recipe.memory.compile:
            timed_epoch(epoch, trainer)  # compiles, which the counted epoch does not
        runs = [timed_epoch(epoch, trainer) for _ in range(repeats)]
        memory = _peak(trainer.meter, device)
    count = recipe.train.trajectories * components.policy.schedule.num_transitions
    middle = sorted(runs, key=lambda seconds: seconds["total"])[len(runs) // 2]
    row: Row = {
        "label": label,
        "micro_batch": components.learner.updates.micro_batch,
        **{
            f"ms_{phase}": round(1e3 * seconds / count, 3) for phase, seconds in middle.items() if phase != "evaluation"
        },
        "ms_total_spread": [round(1e3 * run["total"] / count, 3) for run in runs],
        "trajectories_per_hour": round(3600 * recipe.train.trajectories / middle["total"], 1),
        "gflop_per_transition": round(flop / count / 1e9, 3),
        "tflop_per_second": round(flop / middle["total"] / 1e12, 4),
        "utilisation": round(flop / middle["total"] / _matmul_flop_per_second(device, components.policy.dtype), 4),
        **{name: round(size / GIB, 4) for name, size in (memory | counted).items()},
    }
    if is_predicted and label != LITERAL:
        # Predicted at the micro-batch that was measured: where memory runs out, training halves the recipe's.
        train = recipe.train.model_copy(update={"micro_batch": components.learner.updates.micro_batch})
        changes = {"train": train, "kernels": components.kernels.name}
        row["predicted_gib"] = round(_predicted(recipe.model_copy(update=changes)), 4)
    return row


@contextmanager
def trainer_of(recipe: Recipe, device: torch.device) -> Iterator[Trainer]:
    """Yield a trainer of the recipe that downloads no reward network, in a run folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        reward = RewardSum(recipe.reward, device, build=without_download)
        components = build(recipe, device, warn=_warn, reward=reward)
        yield Trainer(recipe, RunFolder.create(Path(folder) / "run"), components)


def _warn(text: str) -> None:
    """Print warnings about memory only; others, such as prompts that are cut, do not matter here."""
    if "memory" in text:
        print(text, flush=True)


def _predicted(recipe: Recipe) -> float:
    """Predicted peak in GiB, without the evaluation, which the bench does not run."""
    return max(size for name, size in forecast(recipe).phases.items() if name != "evaluation") / GIB


def epoch_of(label: str, recipe: Recipe, trainer: Trainer) -> Callable[[], object]:
    """A function that runs one epoch of the recipe's loop or, where `label` is LITERAL, of the published one."""
    if label == LITERAL:
        published = Published(recipe, trainer.components, trainer.sampling.scorer)
        return lambda: published.epoch(trainer.sampling.batch(0), trainer.meter.timed)

    def epoch() -> None:
        trainer.begin_epoch(0)
        trainer.learn()

    return epoch


def timed_epoch(epoch: Callable[[], object], trainer: Trainer) -> dict[str, float]:
    """Run an epoch; returns its seconds by phase, and in total."""
    trainer.meter.start_epoch()
    _synchronise()
    start = time.perf_counter()
    epoch()
    _synchronise()
    return {**trainer.meter.seconds, "total": time.perf_counter() - start}


def _counted_epoch(epoch: Callable[[], object], trainer: Trainer, device: torch.device) -> tuple[int, dict[str, int]]:
    """Run an epoch and count its FLOP; without a GPU run another one and count its peak bytes of tensors."""
    with flops.counter() as counter:
        epoch()
    counted = {}
    if device.type != "cuda":
        with LiveBytes() as live:
            live.include(trainer.components.standing())
            epoch()
        counted["peak_tensors_gib"] = live.peak
    return counter.get_total_flops(), counted


@functools.cache
def _matmul_flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of ten large matrix products, which stands for the machine's peak speed."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        _synchronise()
        start = time.perf_counter()
        a @ b
        _synchronise()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def without_download(term: RewardTerm, device: torch.device) -> Reward:
    """The reward, with random weights where the published ones would have to be fetched."""
    if isinstance(term, Tower) and term.path is None:
        term = term.model_copy(update={"path": "random"})
    return build_reward(term, device)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(meter: PhaseMeter, device: torch.device) -> dict[str, int]:
    """Peak bytes of the last epoch on a GPU. Empty on a CPU, where resident memory says little about a GPU's."""
    meter.read()
    return {"peak_allocated_gib": meter.in_use, "peak_reserved_gib": meter.held} if device.type == "cuda" else {}
