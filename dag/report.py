"""The epochs of a run, its curves and its page: `python -m dag.report RUN [--watch | --html | --serve [PORT]]`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.evaluation.curves import draw_curves, line
from dag.evaluation.page.document import write_page
from dag.evaluation.page.serve import serve
from dag.run.folder import RunFolder

_PORT = 8321


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


def _print_epochs(run: RunFolder, is_watching: bool) -> None:
    follow(run, is_watching)
    if rows := run.metrics.read():
        draw_curves(rows, run.path / "curves.png")
        print(run.path / "curves.png")


def _write_page(run: RunFolder) -> None:
    try:
        print(write_page(run))
    except OSError as error:
        raise RunError(f"{run.page}: cannot be written: {error.strerror}") from None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dag.report", description="The epochs of a run, and its curves.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--watch", action="store_true", help="go on until the run's last epoch")
    way.add_argument("--html", action="store_true", help="write RUN/report.html, one file with everything in it")
    way.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=_PORT,
        metavar="PORT",
        help=f"show the page in this machine's browser and renew it while the run goes on (default port {_PORT})",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    try:
        run = RunFolder.open(given.run)
        if given.html:
            _write_page(run)
        elif given.serve is not None:
            serve(run, given.serve)
        else:
            _print_epochs(run, given.watch)
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
