"""Time and memory of training, in the same process as the published amount of work.

    python -m dag.bench train-step --recipe R [--set key=value ...] [--literal] [--ablation] [--cap-gib G] [--json FILE]
    python -m dag.bench count --recipe R
    python -m dag.bench launches --recipe R [--json FILE]
    python -m dag.bench previews --recipe R
    python -m dag.bench storage --recipe R
    python -m dag.bench profile --recipe R
    python -m dag.bench trial --recipe R
    python -m dag.bench checklist DIR [--minutes M]
    python -m dag.bench missing [DIR]

A row is one epoch of a recipe's own training loop, repeated: seconds per transition by phase, trajectories per hour, peak
memory, predicted peak, FLOP per transition. `--literal` adds the published amount of work (`dag.costs.published_work`) and the
ratio to it; `--ablation` goes from there to everything on, one lever at a time. Models and rewards of the hub are replaced by
their architectures with random weights: the work is the same, and nothing is downloaded. `count` runs nothing: it counts
FLOP from the configs. `launches` runs a few transitions of the recipe's own loop on the meta device and counts what they
would ask of a GPU (`dag.costs.rehearsal`). `previews` and `storage` measure what cheaper decoders and half-precision chains change
(`dag.costs.lever_error`). `profile` tells which kernels take the time, `trial` starts, stops and resumes `train_dag.py` itself.

`checklist` is everything that wants a GPU, within ten minutes, into one folder; `missing` tells which of it has not been
measured, and where it goes.
"""

import argparse
import functools
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from dag_kernels import table

from dag.chain.rollout import Batch
from dag.checklist import missing, runner, trial_run
from dag.costs import flops, lever_error, profiling, rehearsal
from dag.costs.live_bytes import GIB
from dag.costs.train_step import LITERAL, Row, measure, without_download
from dag.errors import RunError, UsageError, exit_code
from dag.models.source import local_folder
from dag.recipe import PolicyGradient, Recipe
from dag.recipe.load import load
from dag.rewards import RewardSum
from dag.run.determinism import deterministic, reserve_workspace
from dag.run.durable import write_json
from dag.run.folder import RunFolder
from dag.run.gpu import free_memory, limit_memory, out_of_memory_ends, this_device
from dag.run.machine import describe_machine
from dag.training.build import build, git_commit
from dag.training.trainer import Trainer

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
    work = [*cases(given.recipe, given.set, given.trajectories, given.ablation), *_variants(given)]
    literal = None
    if given.literal:
        # Before the cap: the published loop may use the whole card.
        literal = _measured(LITERAL, _published(given), device, given)
        yield _with_ratio(literal, literal)
    if given.cap_gib is not None:
        limit_memory(device, given.cap_gib)
    for label, recipe in work:
        yield _with_ratio(_measured(label, recipe, device, given), literal)


def _variants(given: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """(label, recipe) of each `--variant`."""
    common = _common(given.recipe, given.set, given.trajectories)
    for variant in given.variant:
        yield variant, load(given.recipe, [*common, *variant.split()])


def _measured(label: str, recipe: Recipe, device: torch.device, given: argparse.Namespace) -> Row:
    """A row; with `error` in place of its figures where the card is too small for it, or something broke."""
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


def _published(given: argparse.Namespace) -> Recipe:
    """The recipe's model, reward and sizes, with no lever on."""
    common = _common(given.recipe, given.set, given.trajectories)
    return load(given.recipe, [*common, *_STORED, "memory.checkpointing=none"])


def _with_ratio(row: Row, literal: Row | None) -> Row:
    if "error" in row:
        print(f"{row['label']:30} not measured: {row['error']}", flush=True)
        return row
    if literal is not None and "error" not in literal:
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
    """Rewards of x0_hat by decoder and stride, against the full VAE at every state."""
    trainer, batch = _rolled_by(given, ["objective.forward_looking.decoder=tiny"], device)
    with trainer.parts.scoring():
        for row in lever_error.previews(trainer.parts, trainer.recipe, batch, trainer.tile_scorer(batch)):
            yield row
            print(
                f"decoder {row['decoder']:5} stride {row['stride']}  bias {row['bias']:+.3f} sd  rms {row['rms']:.3f} sd  "
                f"correlation within a step {row['correlation']:.3f}",
                flush=True,
            )


def storage(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Chains by dtype: bytes, and how far log P_F moves between sampling and training."""
    trainer, batch = _rolled_by(given, [], device)
    for row in lever_error.storage(trainer.parts, trainer.recipe, batch):
        yield row
        print(
            f"chain {row['chain']}, log P_F at the {row['log_pf_at']:9} state  {row['bytes']:8} bytes a trajectory  "
            f"log P_F off by {row['log_pf_error']:.3g} nats  ratio by {row['ratio_error']:.3g}, of means by "
            f"{row['ratio_error_of_means']:.3g}",
            flush=True,
        )


def profile(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """What an epoch of the recipe's loop spends its time on."""
    _, recipe = next(cases(given.recipe, given.set, given.trajectories, is_ablation=False))
    yield from profiling.rows(recipe, device)


def trial(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """`train_dag.py` from its start to its export, once in one go and once with a stop in the middle."""
    yield from trial_run.rows(given.recipe, given.set, device.type)


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
    if "times_published" in row and literal is not None:
        work = literal["gflop_per_transition"] / row["gflop_per_transition"]
        line += f"  {row['times_published']:.2f} x published (by FLOP {work:.2f})"
    return line


def environment(device: torch.device) -> Row:
    """What a figure depends on."""
    machine = describe_machine(device)
    return {**machine.pop("versions"), **machine, "commit": git_commit()}


def tell_machine() -> None:
    """One line of JSON, for `dag.checklist.runner`."""
    device = this_device()
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    print(json.dumps({"gpu": gpu, "cuda": torch.version.cuda, **environment(device)}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dag.bench", description="Time and memory of training.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("train-step", help="epochs of a recipe's training loop")
    step.add_argument("--literal", action="store_true", help="also the published amount of work, and the ratio to it")
    step.add_argument("--ablation", action="store_true", help="one lever after the other")
    step.add_argument(
        "--variant", action="append", default=[], metavar="key.sub=value", help="one more row, with this override"
    )
    step.add_argument(
        "--cap-gib", type=float, metavar="G", help="hold the GPU's allocator to G GiB (not for --literal)"
    )
    step.add_argument("--repeats", type=int, default=3, metavar="N", help="timed epochs a row; their median counts")
    step.add_argument("--no-prediction", action="store_true", help="leave out the predicted peak: seconds less a row")
    counting = commands.add_parser("count", help="FLOP of a transition for each lever, without running anything")
    launching = commands.add_parser(
        "launches", help="kernels, host copies and peak memory of a transition, without a GPU"
    )
    looking = commands.add_parser("previews", help="rewards of x0_hat by decoder and stride, against the full VAE")
    storing = commands.add_parser("storage", help="bytes and rounding of stored chains, by dtype")
    profiled = commands.add_parser("profile", help="the kernels of an epoch by their time, and the GPU's idle share")
    tried = commands.add_parser("trial", help="train_dag.py started, stopped in the middle, and resumed")
    for command in (step, profiled):
        command.add_argument("--trajectories", type=int, metavar="N", help="per epoch; default: one micro-batch")
    for command in (looking, storing):
        command.add_argument("--trajectories", type=int, default=16, metavar="N", help="default: 16")
    for command in (step, counting, launching, looking, storing, profiled, tried):
        command.add_argument("--recipe", required=True, metavar="FILE")
        command.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override a key")
        command.add_argument("--json", type=Path, metavar="FILE")
        command.add_argument("--csv", type=Path, metavar="FILE", help="append each row there as it comes")
        command.add_argument("--stage", default="", metavar="NAME", help="what the rows in --csv are to be called")
    runner.add_command(commands)
    missing.add_command(commands)
    return parser


_ROWS_OF = {
    "train-step": train_step,
    "count": count,
    "launches": launches,
    "previews": previews,
    "storage": storage,
    "profile": profile,
    "trial": trial,
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if any("deterministic=true" in text for text in (*getattr(given, "set", ()), *getattr(given, "variant", ()))):
        reserve_workspace()  # cuBLAS looks for it once, at the first product of the first row
    device = this_device()
    try:
        if given.command == "checklist":
            return runner.run(given.folder, given.minutes, device.type == "cuda")
        if given.command == "missing":
            return missing.show(given.folder)
        return _write_rows(given, device)
    except (UsageError, RunError) as error:
        return exit_code(error)


def _write_rows(given: argparse.Namespace, device: torch.device) -> int:
    """The command's rows, each on the disk before the next begins."""
    if getattr(given, "repeats", 1) < 1:
        raise UsageError(f"--repeats {given.repeats}: at least 1")
    for option in ("json", "csv"):
        path = getattr(given, option)
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--{option} {path}: {path.parent} is no folder")
    rows: list[Row] = []
    for row in _ROWS_OF[given.command](given, device):
        rows.append(row)
        if given.json is not None:
            write_json(given.json, {"environment": environment(device), "rows": rows})
        if given.csv is not None:
            cap = getattr(given, "cap_gib", None) if device.type == "cuda" else None
            table.append(given.csv, {"stage": given.stage, "recipe": given.recipe, "cap_gib": cap, **row})
    return 0 if any("error" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
