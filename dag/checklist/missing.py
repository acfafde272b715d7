"""Lists what has not been measured on a GPU yet, and where its figures go: `python -m dag.bench missing [DIR]`."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dag.checklist.runner import Checklist, gpu_of
from dag.checklist.stages import Stage, stages
from dag.errors import UsageError
from dag.evaluation.study import ROOT

# The folders of checklists that ran on GPUs.
RESULTS = "recipes/results"
_SAYS_SO = "not measured"


def add_command(commands: Any) -> None:
    """Add the arguments of `python -m dag.bench missing`."""
    parser: argparse.ArgumentParser = commands.add_parser("missing", help="what is not measured on a GPU yet")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="a checklist's, not committed yet")


def show(folder: Path | None, root: Path = ROOT) -> int:
    """Print for every stage which GPUs it was measured on, then the lines of this repository that say "not measured".

    Args:
        folder: a checklist's folder to count besides those under RESULTS.

    Raises:
        UsageError: `folder` holds no checklist.
    """
    if folder is not None and not (folder / "checklist.json").is_file():
        raise UsageError(f"{folder}: no checklist there (checklist.json is missing)")
    found = [inside for inside in sorted((root / RESULTS).glob("*/")) if gpu_of(inside)]
    if folder is not None and gpu_of(folder):
        found.append(folder)
    elif folder is not None:
        print(f"{folder} is of a machine without a GPU: it measures nothing here")
    chosen = stages(has_gpu=True)
    lines = {stage: list(_measured(stage, chosen, found)) for stage in chosen}
    for stage, measured in lines.items():
        file, words = stage.place
        goes_to = f"{file} at '{words}'" + (f", {stage.others}" if stage.others else "")
        print(f"{stage.name:15} {'; '.join(measured) or _SAYS_SO}\n{'':15} {stage.what}; goes to {goes_to}")
    print(f"{sum(map(bool, lines.values()))} of {len(chosen)} stages are measured; rows go to {RESULTS}/<GPU>/")
    print(f"\nlines that say '{_SAYS_SO}':")
    for line in _sayings(root):
        print(line)
    return 0


def _measured(stage: Stage, chosen: list[Stage], folders: list[Path]) -> Iterator[str]:
    """Yield one phrase for each checklist that has rows of a stage without an error."""
    for folder in folders:
        rows = Checklist(folder, chosen).rows(stage)
        good = sum(not row.get("error") for row in rows)
        if good:
            yield f"{good} of {len(rows)} rows on {gpu_of(folder)} in {folder}"


def _sayings(root: Path) -> Iterator[str]:
    """Yield `file:line: text` for every line of the documents and recipes that says "not measured"."""
    patterns = [f"{folder}/**/{name}" for folder in ("dag", "kernels", "recipes") for name in ("README.md", "*.yaml")]
    for file in (root / "README.md", *(file for pattern in patterns for file in sorted(root.glob(pattern)))):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if _SAYS_SO in line:
                yield f"  {file.relative_to(root)}:{number}: {line.strip()[:110]}"
