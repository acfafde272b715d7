"""Measures time and memory of training, beside the amount of work that the published code does.

    python -m dag.bench train-step --recipe R [--set key=value ...] [--literal] [--ablation] [--cap-gib G] [--json FILE]
    python -m dag.bench count --recipe R
    python -m dag.bench launches --recipe R [--json FILE]
    python -m dag.bench previews --recipe R
    python -m dag.bench storage --recipe R
    python -m dag.bench profile --recipe R
    python -m dag.bench trial --recipe R
    python -m dag.bench checklist DIR [--minutes M]
    python -m dag.bench missing [DIR]

A row of `train-step` measures epochs of a recipe's own training loop: milliseconds per transition by phase, trajectories per
hour, peak memory, predicted peak, FLOP per transition. `--literal` adds a row for the published amount of work
(`dag.costs.published_work`), in the same process, and the ratio to it; `--ablation` has a row for each lever, each with the
levers before it, and rows by the reward's gradient. Models and rewards of the hub are replaced by their architectures with
random weights: the work is the same, and nothing is downloaded.

`count` runs nothing: it counts FLOP from the configs. `launches` runs a few transitions of the recipe's loop on the meta device
and counts what they would ask of a GPU (`dag.costs.rehearsal`). `previews` and `storage` measure the errors of cheaper decoders
and half-precision chains (`dag.costs.lever_error`). `profile` shows which kernels take the time. `trial` starts, stops and
resumes `train_dag.py` itself.

`checklist` measures everything that needs a GPU, within ten minutes, into one folder; `missing` lists what of it has not been
measured yet, and where its figures go.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from dag_kernels import table

from dag.checklist import missing, runner, trial_run
from dag.costs.commands import count, launches, previews, profile, storage, train_step
from dag.costs.train_step import Row
from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.recipe import shipped
from dag.run.determinism import reserve_workspace
from dag.run.durable import write_json
from dag.run.gpu import this_device
from dag.run.machine import environment


def trial(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rows of `train_dag.py` from start to export, once without a stop and once stopped and resumed."""
    yield from trial_run.rows(given.recipe, given.set, device.type)


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
        reserve_workspace()  # cuBLAS reads this setting only once, at the first matrix product of the first row
    device = this_device()
    try:
        if given.command in ("checklist", "missing") and not shipped.is_checkout():
            raise UsageError(
                f"{given.command}: needs a checkout of this project's repository; this code is installed without"
            )
        if given.command == "checklist":
            return runner.run(given.folder, given.minutes, device.type == "cuda")
        if given.command == "missing":
            return missing.show(given.folder)
        return _write_rows(given, device)
    except (UsageError, RunError) as error:
        return exit_code(error)


def _write_rows(given: argparse.Namespace, device: torch.device) -> int:
    """Measure the command's rows and write each to the disk before the next begins; 1 if all rows have errors."""
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
    sys.exit(quiet_on_broken_pipe(main))
