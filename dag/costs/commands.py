"""The rows of each `dag.bench` command, each printed as soon as it is measured."""

import argparse
import functools
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dag.chain.rollout import Batch
from dag.costs import flops, lever_error, profiling, rehearsal
from dag.costs.ablation import cases, published, variants
from dag.costs.train_step import LITERAL, Row, measure, without_download
from dag.errors import RunError, UsageError
from dag.models.source import counted_as, local_folder
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.rewards import RewardSum
from dag.run.determinism import deterministic
from dag.run.folder import RunFolder
from dag.run.gpu import free_memory, limit_memory, out_of_memory_ends
from dag.training.build import build
from dag.training.trainer import Trainer


def train_step(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """One row for each case; with `--literal` the published amount of work comes first."""
    work = [*cases(given.recipe, given.set, given.trajectories, given.ablation), *variants(given)]
    literal = None
    if given.literal:
        # Measured before the allocator is capped: the published loop may use the complete GPU.
        literal = _measured(LITERAL, published(given.recipe, given.set, given.trajectories), device, given)
        yield _with_ratio(literal, literal)
    if given.cap_gib is not None:
        limit_memory(device, given.cap_gib)
    for label, recipe in work:
        yield _with_ratio(_measured(label, recipe, device, given), literal)


def _measured(label: str, recipe: Recipe, device: torch.device, given: argparse.Namespace) -> Row:
    """Measure one row. If memory is too small or something breaks, the row has `error` in place of its figures."""
    row: Row = {"label": label}
    try:
        with out_of_memory_ends("out of GPU memory"), deterministic(recipe.deterministic):
            row = measure(label, recipe, device, given.repeats, is_predicted=not given.no_prediction)
    except (RunError, UsageError) as error:
        row["error"] = str(error).partition("\n")[0]
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    if device.type == "cuda":
        free_memory()
    return row


def _with_ratio(row: Row, literal: Row | None) -> Row:
    """Print a row, with its speed relative to the published amount of work where that was measured."""
    if "error" in row:
        print(f"{row['label']:30} not measured: {row['error']}", flush=True)
        return row
    if literal is not None and "error" not in literal:
        row["times_published"] = round(row["trajectories_per_hour"] / literal["trajectories_per_hour"], 3)
    print(_shown(row, literal), flush=True)
    return row


def count(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """GFLOP of one transition in every case, from the models' configs alone."""
    literal = flops.of_published(published(given.recipe, given.set, None))
    total = sum(literal.values())
    work: dict[str, Callable[[], flops.Work]] = {LITERAL: lambda: literal}
    for label, recipe in cases(given.recipe, given.set, None, is_ablation=True):
        work[label] = functools.partial(flops.of_recipe, recipe)
    for label, counted in work.items():
        parts = counted()
        ratio = total / sum(parts.values())
        yield {"label": label, "gflop": {kind: round(value, 2) for kind, value in parts.items()}, "ratio": ratio}
        shown = " + ".join(f"{kind} {value:.2f}" for kind, value in parts.items() if value >= 0.005)
        print(f"{label:30} {sum(parts.values()):9.2f} GFLOP a transition, published / this = {ratio:.2f}  ({shown})")


def launches(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Kernels, host copies and peak memory of one transition, counted without a GPU."""
    found = rehearsal.rehearse(load(given.recipe, given.set))
    row = rehearsal.row_of(given.recipe, found)
    yield row
    for part, number in row["launches_of"].items():
        print(f"{part:20} {number:6} launches  {100 * row['shares'][part]:5.1f} %")
    copies = ", ".join(f"{number} at {at}" for at, number in row["host_copies_at"].items())
    print(
        f"one transition: {row['launches']} launches, {row['host_copies']} copies between host and device"
        f"{f' ({copies})' if copies else ''}, {row['host_copies_per_tile']} more a micro-batch; peak {row['peak_gib']:.2f} GiB"
    )


def previews(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """How far rewards of x0_hat are off, by decoder and stride; the reference is the full VAE at every state."""
    trainer, batch = _rolled_by(given, ["objective.forward_looking.decoder=tiny"], device)
    with trainer.components.scoring():
        score = trainer.sampling.scorer(batch)
        for row in lever_error.previews(trainer.components, trainer.recipe, batch, score):
            yield row
            print(
                f"decoder {row['decoder']:5} stride {row['stride']}  bias {row['bias']:+.3f} sd  rms {row['rms']:.3f} sd  "
                f"correlation within a step {row['correlation']:.3f}",
                flush=True,
            )


def storage(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Stored chains by dtype: their bytes, and how far log P_F differs between sampling and training."""
    trainer, batch = _rolled_by(given, [], device)
    for row in lever_error.storage(trainer.components, trainer.recipe, batch):
        yield row
        print(
            f"chain {row['chain']}, log P_F at the {row['log_pf_at']:9} state  {row['bytes']:8} bytes a trajectory  "
            f"log P_F off by {row['log_pf_error']:.3g} nats  ratio by {row['ratio_error']:.3g}, of means by "
            f"{row['ratio_error_of_means']:.3g}",
            flush=True,
        )


def profile(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The kernels that took most of an epoch of the recipe's loop, and the GPU's idle share."""
    _, recipe = next(cases(given.recipe, given.set, given.trajectories, is_ablation=False))
    yield from profiling.rows(recipe, device)


def _rolled_by(given: argparse.Namespace, overrides: list[str], device: torch.device) -> tuple[Trainer, Batch]:
    """A trainer of the recipe with stored chains, and the batch of its first epoch; nothing is downloaded."""
    path, chosen = given.recipe, [*given.set, *overrides, "train.rollout=stored"]
    model = load(path, chosen).model.path
    if local_folder(model) is None:
        chosen += [f"model.path={counted_as(model)}", "model.variant=null"]
    recipe = load(path, [*chosen, f"train.trajectories={given.trajectories}", "train.updates=1"])
    components = build(
        recipe, device, warn=lambda text: None, reward=RewardSum(recipe.reward, device, without_download)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, RunFolder.create(Path(folder) / "run"), components)
    return trainer, trainer.sampling.batch(0)


def _shown(row: Row, literal: Row | None) -> str:
    memory = row.get("peak_allocated_gib", row.get("peak_tensors_gib", 0.0))
    phases = " + ".join(f"{name[3:]} {row[name]:.2f}" for name in ("ms_sample", "ms_reward", "ms_update") if row[name])
    line = (
        f"{row['label']:30} {row['ms_total']:9.2f} ms a transition ({phases})  {row['trajectories_per_hour']:8.1f} trajectories/h  "
        f"{row['gflop_per_transition']:9.2f} GFLOP  {row['tflop_per_second']:7.3f} TFLOP/s "
        f"({100 * row['utilisation']:.0f} % of a matrix product)  peak {memory:.3f} GiB"
    )
    if "predicted_gib" in row:
        line += f" (predicted {row['predicted_gib']:.3f})"
    if "times_published" in row and literal is not None:
        work = literal["gflop_per_transition"] / row["gflop_per_transition"]
        line += f"  {row['times_published']:.2f} x published (by FLOP {work:.2f})"
    return line
