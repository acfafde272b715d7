"""Share a trained LoRA with a model card: `python -m dag.publish RUN --to FOLDER|hub:OWNER/NAME [--public] [--base OWNER/NAME]`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from dag import hub
from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.evaluation import publish
from dag.run.folder import RunFolder

_HUB = "hub:"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dag.publish", description="Share a trained LoRA: both layouts, a model card, the recipe."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--to", required=True, metavar="FOLDER|hub:OWNER/NAME", help="a new folder, or a hub repository"
    )
    parser.add_argument(
        "--public", action="store_true", help="a new hub repository that everyone sees; default: private"
    )
    parser.add_argument(
        "--base", metavar="OWNER/NAME", help="hub id of the base model, if the run took it from a local folder"
    )
    return parser.parse_args(argv)


def published(given: argparse.Namespace) -> str:
    """Write the folder or push it to the hub; returns where it is now."""
    if given.base is not None:
        hub.check_repo("--base", given.base)
    if not given.to.startswith(_HUB):
        if given.public:
            raise UsageError(f"--public: belongs to --to {_HUB}OWNER/NAME; {given.to} is a folder")
        publish.to_folder(RunFolder.open(given.run), Path(given.to), given.base)
        return given.to
    key, repo = f"--to {given.to}", given.to.removeprefix(_HUB)
    hub.check_repo(key, repo)
    run = RunFolder.open(given.run)
    hub.check_token(key)
    with tempfile.TemporaryDirectory() as folder:
        try:
            publish.fill(Path(folder), run, repo.partition("/")[2], repo, given.base)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
        return hub.push(key, Path(folder), repo, given.public, "LoRA, model card, recipe")


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    try:
        print(published(given))
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; nothing was published", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
