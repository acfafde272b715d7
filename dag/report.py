"""The epochs of a run, line by line, and its curves: `python -m dag.report RUN [--watch]`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.evaluation.curves import draw_curves, line
from dag.run.folder import RunFolder


def follow(run: RunFolder, is_watching: bool, interval: float = 2.0) -> None:
    """Print the epochs of a run.

    Args:
        is_watching: go on until the run's last epoch. A run that is resumed from an earlier epoch is followed from there.
        interval:    seconds between looks at the run.
    """
    epochs, shown = run.read_recipe().train.epochs, -1
    while True:
        rows = run.metrics.read()
        if rows and rows[-1]["epoch"] < shown:
            shown = rows[-1]["epoch"]
        for row in rows:
            if row["epoch"] > shown:
                print(line(row, epochs), flush=True)
                shown = row["epoch"]
        if not is_watching or shown >= epochs:
            return
        time.sleep(interval)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dag.report", description="The epochs of a run, and its curves.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--watch", action="store_true", help="go on until the run's last epoch")
    given = parser.parse_args(argv)
    try:
        run = RunFolder.open(given.run)
        follow(run, given.watch)
        if rows := run.metrics.read():
            draw_curves(rows, run.path / "curves.png")
            print(run.path / "curves.png")
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
