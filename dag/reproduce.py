"""Run a study and draw it: `python -m dag.reproduce NAME [--scale tiny|paper] [--seeds N] [--jobs K] [--out DIR]`.

    figure3      DAG-DB, DAG-KL and DDPO on learned rewards
    figure4      the same on JPEG compressibility and incompressibility
    comparison   the three with the same trajectories and the same budget of tuning, without a regulariser and with it
    zoo          every objective at equal work of the network
    gradients    score functions against the reward's gradient, exact and learnt: fronts over beta, equal trajectories
    ablations    one choice of DAG-DB at a time
    prior        DAG-DB with the pretrained model as its prior, and without

`tiny` is the embedded model on a CPU, `paper` Stable Diffusion 1.5 with the published settings on one GPU. Runs that are
complete are not run again, interrupted ones are resumed. Each study's folder gets figures (PNG, SVG), curves.csv,
table.csv, and study.html, which holds everything in one file.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dag.costs.forecast import check_budget
from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.evaluation.perceptual import DISTANCES
from dag.evaluation.reproduce import check, reproduce
from dag.evaluation.studies import STUDIES


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(index) for index in range(torch.cuda.device_count())]
        if named is None
        else list(filter(None, named.split(",")))
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dag.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted({name for scale in STUDIES.values() for name in scale}))
    parser.add_argument("--scale", choices=list(STUDIES), default="tiny")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each method; default: the study's, 3")
    parser.add_argument("--jobs", type=int, default=1, metavar="K", help="runs at a time, which share the CPU cores")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<name>-<scale>")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key.sub=value", help="override a key of every recipe"
    )
    parser.add_argument(
        "--distance", action="append", default=[], choices=list(DISTANCES), help="also judge by a perceptual distance"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    # An exception stops the child processes on its way out; SIGTERM's default action would leave them running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = given.out or Path("runs") / f"{given.name}-{given.scale}"
    try:
        studies = STUDIES[given.scale].get(given.name)
        if studies is None:
            raise UsageError(f"--scale {given.scale}: {given.name} is not defined at this scale")
        if given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
            raise UsageError("--jobs and --seeds must be at least 1")
        words, distances = tuple(given.set), tuple(dict.fromkeys(given.distance))
        planned = [
            (out.resolve() / name, replace(study, given=words, distances=distances)) for name, study in studies.items()
        ]
        gpus = _gpus()
        for folder, study in planned:
            check(study, folder, given.seeds or study.seeds, given.jobs, gpus, check_budget)
        problems = []
        for folder, study in planned:
            try:
                failed = reproduce(study, folder, given.seeds or study.seeds, given.jobs, gpus)
                problems += [f"{case.folder.name} failed and is missing in the figures" for case in failed]
            except RunError as error:
                problems.append(f"{folder.name}: {error}")
        if problems:
            raise RunError("; ".join(problems))
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
