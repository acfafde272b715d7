"""Time and memory of training, in the same process as the published amount of work.

    python -m dag.bench train-step --recipe R [--set key=value ...] [--literal] [--ablation] [--cap-gib G] [--json FILE]
    python -m dag.bench count --recipe R
    python -m dag.bench previews --recipe R
    python -m dag.bench storage --recipe R

A row is one epoch of a recipe's own training loop, repeated: seconds per transition by phase, trajectories per hour, peak
memory, predicted peak, FLOP per transition. `--literal` adds the published amount of work (`dag.published`) and the ratio
to it; `--ablation` goes from there to everything on, one lever at a time. Models and rewards of the hub are replaced by
their architectures with random weights: the work is the same, and nothing is downloaded. `count` runs nothing: it counts
FLOP from the configs. `previews` and `storage` measure what cheaper decoders and half-precision chains change
(`dag.approximations`).
"""

import argparse
import functools
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dag import approximations, flops
from dag.accounting import GIB
from dag.durable import write_json
from dag.errors import RunError, UsageError, exit_code
from dag.machine import describe_machine
from dag.models.source import local_folder
from dag.parts import build, git_commit
from dag.recipe import PolicyGradient, Recipe
from dag.recipe_file import load
from dag.rewards import RewardSum
from dag.rollout import Batch
from dag.run_folder import RunFolder
from dag.timing import LITERAL, Row, measure, without_download
from dag.trainer import Trainer

# Every row trains every transition once, one update per rollout.
_COMMON = (
    "train.updates=1",
    "train.inner_epochs=1",
    "train.step_fraction=1",
    "flow.warmup_epochs=0",
    "flow.passes=0",
    "regulariser.sampling=0",
    "regulariser.pretrained_kl=0",
    "objective.prior=none",
)
_STORED = (
    "train.rollout=stored",
    "objective.forward_looking.source=rollout",
    "objective.forward_looking.decoder=full",
    "objective.forward_looking.decoder_path=null",
    "objective.forward_looking.stride=1",
    "sampler.uncond=trained",
)
_ONE_PASS = (
    "train.rollout=one_pass",
    "sampler.log_pf_at=stored",
    "memory.chains=device",
    "memory.offload_vae=false",
)
# Each with the ones before it.
ABLATION: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stored, scored once", _STORED),
    ("one pass", _ONE_PASS),
    ("+ tiny decoder for x0_hat", ("objective.forward_looking.decoder=tiny",)),
    ("+ every second x0_hat scored", ("objective.forward_looking.stride=2",)),
    ("+ frozen unconditional branch", ("sampler.uncond=frozen",)),
)


def cases(path: str, given: Sequence[str], trajectories: int | None, is_ablation: bool) -> Iterator[tuple[str, Recipe]]:
    """(label, recipe) of each row after the published one."""
    overrides = _common(path, given, trajectories)
    recipe = load(path, overrides)
    assert not isinstance(recipe.objective, PolicyGradient)
    looking = recipe.objective.forward_looking
    if not is_ablation:
        scored = {"rollout": "scored once", "current": "scored in training", "none": "not scored"}[looking.source]
        yield ("one pass" if recipe.train.rollout == "one_pass" else f"stored, {scored}"), recipe
        return
    for label, lever in ABLATION:
        overrides += lever
        if looking.decoder_path is not None and "objective.forward_looking.decoder=tiny" in lever:
            overrides.append(f"objective.forward_looking.decoder_path={looking.decoder_path}")
        yield label, load(path, overrides)


def _common(path: str, given: Sequence[str], trajectories: int | None) -> list[str]:
    """The overrides of every row."""
    overrides, recipe = list(given), load(path, given)
    if isinstance(recipe.objective, PolicyGradient):
        raise UsageError(f"{path}: the bench times objectives with a flow, not ddpo")
    overrides += _COMMON
    if recipe.objective.beta.unit == "reward_sd":
        overrides.append("objective.beta.unit=reward")
    if recipe.objective.name == "dag_kl":
        overrides += ["objective.baseline=running", "objective.normalise_advantage=false"]
    if local_folder(recipe.model.path) is None:
        overrides += ["model.path=random-sd15", "model.variant=null"]
    return [*overrides, f"train.trajectories={trajectories or max(2, recipe.train.micro_batch)}"]


def train_step(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rows, printed as they come; the published amount of work first."""
    literal = None
    if given.literal:
        # Before the cap: the published loop may use the whole card.
        literal = _measured(LITERAL, _published(given), device, given.repeats)
        if literal is not None:
            yield _with_ratio(literal, literal)
    if given.cap_gib is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap_gib * GIB / total))
    for label, recipe in cases(given.recipe, given.set, given.trajectories, given.ablation):
        row = _measured(label, recipe, device, given.repeats)
        if row is not None:
            yield _with_ratio(row, literal)


def _measured(label: str, recipe: Recipe, device: torch.device, repeats: int) -> Row | None:
    """A row, or None and a line where the card is too small for it."""
    row = None
    try:
        row = measure(label, recipe, device, repeats)
    except (torch.OutOfMemoryError, RunError) as error:
        print(f"{label:30} not measured: {str(error).partition(chr(10))[0]}", flush=True)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return row


def _published(given: argparse.Namespace) -> Recipe:
    """The recipe's model, reward and sizes, with no lever on."""
    common = _common(given.recipe, given.set, given.trajectories)
    return load(given.recipe, [*common, *_STORED, "memory.checkpointing=none"])


def _with_ratio(row: Row, literal: Row | None) -> Row:
    if literal is not None:
        row["times_published"] = round(row["trajectories_per_hour"] / literal["trajectories_per_hour"], 3)
    print(_shown(row, literal), flush=True)
    return row


def count(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """FLOP of every case, from configs alone."""
    literal = flops.of_published(load(given.recipe, [*_common(given.recipe, given.set, None), *_STORED]))
    published = sum(literal.values())
    work: dict[str, Callable[[], flops.Work]] = {LITERAL: lambda: literal}
    for label, recipe in cases(given.recipe, given.set, None, is_ablation=True):
        work[label] = functools.partial(flops.of_recipe, recipe)
    for label, counted in work.items():
        parts = counted()
        ratio = published / sum(parts.values())
        yield {"label": label, "gflop": {kind: round(value, 2) for kind, value in parts.items()}, "ratio": ratio}
        shown = " + ".join(f"{kind} {value:.2f}" for kind, value in parts.items() if value >= 0.005)
        print(f"{label:30} {sum(parts.values()):9.2f} GFLOP a transition, published / this = {ratio:.2f}  ({shown})")


def previews(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rewards of x0_hat by decoder and stride, against the full VAE at every state."""
    trainer, batch = _rolled_by(given, ["objective.forward_looking.decoder=tiny"], device)
    with trainer.parts.scoring():
        for row in approximations.previews(trainer.parts, trainer.recipe, batch, trainer.tile_scorer(batch)):
            yield row
            print(
                f"decoder {row['decoder']:5} stride {row['stride']}  bias {row['bias']:+.3f} sd  rms {row['rms']:.3f} sd  "
                f"correlation within a step {row['correlation']:.3f}",
                flush=True,
            )


def storage(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Chains by dtype: bytes, and how far log P_F moves between sampling and training."""
    trainer, batch = _rolled_by(given, [], device)
    for row in approximations.storage(trainer.parts, trainer.recipe, batch):
        yield row
        print(
            f"chain {row['chain']}, log P_F at the {row['log_pf_at']:9} state  {row['bytes']:8} bytes a trajectory  "
            f"log P_F off by {row['log_pf_error']:.3g} nats  ratio by {row['ratio_error']:.3g}, of means by "
            f"{row['ratio_error_of_means']:.3g}",
            flush=True,
        )


def _rolled_by(given: argparse.Namespace, overrides: list[str], device: torch.device) -> tuple[Trainer, Batch]:
    """A trainer of the recipe, stored, and the batch of its first epoch."""
    path, chosen = given.recipe, [*given.set, *overrides, "train.rollout=stored"]
    if local_folder(load(path, chosen).model.path) is None:
        chosen += ["model.path=random-sd15", "model.variant=null"]
    recipe = load(path, [*chosen, f"train.trajectories={given.trajectories}", "train.updates=1"])
    parts = build(recipe, device, warn=lambda text: None, reward=RewardSum(recipe.reward, device, without_download))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, RunFolder.create(Path(folder) / "run"), parts)
    return trainer, trainer.batch(0)


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
    if literal is not None:
        work = literal["gflop_per_transition"] / row["gflop_per_transition"]
        line += f"  {row['times_published']:.2f} x published (by FLOP {work:.2f})"
    return line


def environment(device: torch.device) -> Row:
    """What a figure depends on."""
    machine = describe_machine(device)
    return {**machine.pop("versions"), **machine, "commit": git_commit()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dag.bench", description="Time and memory of training.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("train-step", help="epochs of a recipe's training loop")
    step.add_argument("--literal", action="store_true", help="also the published amount of work, and the ratio to it")
    step.add_argument("--ablation", action="store_true", help="one lever after the other")
    step.add_argument(
        "--cap-gib", type=float, metavar="G", help="hold the GPU's allocator to G GiB (not for --literal)"
    )
    step.add_argument("--trajectories", type=int, metavar="N", help="per epoch; default: one micro-batch")
    step.add_argument("--repeats", type=int, default=3, metavar="N", help="timed epochs a row; their median counts")
    counting = commands.add_parser("count", help="FLOP of a transition for each lever, without running anything")
    looking = commands.add_parser("previews", help="rewards of x0_hat by decoder and stride, against the full VAE")
    storing = commands.add_parser("storage", help="bytes and rounding of stored chains, by dtype")
    for command in (looking, storing):
        command.add_argument("--trajectories", type=int, default=16, metavar="N", help="default: 16")
    for command in (step, counting, looking, storing):
        command.add_argument("--recipe", required=True, metavar="FILE")
        command.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override a key")
        command.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commands_of = {"train-step": train_step, "count": count, "previews": previews, "storage": storage}
    rows: list[Row] = []
    try:
        if getattr(given, "repeats", 1) < 1:
            raise UsageError(f"--repeats {given.repeats}: at least 1")
        if given.json is not None and not given.json.parent.is_dir():
            raise UsageError(f"--json {given.json}: {given.json.parent} is no folder")
        for row in commands_of[given.command](given, device):
            rows.append(row)
            if given.json is not None:
                write_json(given.json, {"environment": environment(device), "rows": rows})
    except (UsageError, RunError) as error:
        return exit_code(error)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
