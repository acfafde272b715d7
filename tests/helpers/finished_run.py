"""A run folder with metrics and pictures, made without training."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dag.evaluation.page.serve import PageServer
from dag.recipe.load import load
from dag.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
# Two pictures a prompt, 96 px wide with their frame, and a caption above each.
_COLUMNS, _CELL_PX, _CAPTION_PX = 2, 98, 12
# What a prompt, a path or a version could say to take over a page.
EVIL = "</script><script>alert(1)</script> & <img src=x onerror=alert(2)> {{state}}"
COLOURS = ("red", "orange", "green", "blue", "purple")


def started_run(path: Path, prompts: list[str], epochs: int = 2) -> RunFolder:
    """The folder of a run that has not done anything yet."""
    run = RunFolder.create(path)
    given = [f"train.epochs={epochs}", f"evaluation.images_per_prompt={_COLUMNS}", "train.trajectories=4"]
    recipe = load(ROOT / "recipes/tiny_cpu_db.yaml", given).model_dump(mode="json")
    recipe["prompts"]["texts"] = prompts
    run.write_description({"recipe": recipe, "device": "some machine", "commit": "abc", "versions": {"torch": "2.0"}})
    return run


def add_epoch(run: RunFolder, epoch: int, prompts: int, **metrics: Any) -> None:
    """One more epoch, with a fixed evaluation and its pictures, all of one colour."""
    row: dict[str, Any] = {"epoch": epoch, "trajectories": 4 * epoch, "eval_reward_mean": 1.0 + epoch, "diversity": 0.3}
    if epoch:
        steps = [0.5 * epoch, None, 1.5 * epoch]
        row |= {"reward_mean": 1.5 + epoch, "reward_std": 0.5, "residual_rms": 9.0, "residual_rms_per_step": steps}
    run.metrics.write(row | metrics)
    size = (_COLUMNS * _CELL_PX, prompts * (_CELL_PX + _CAPTION_PX))
    Image.new("RGB", size, COLOURS[epoch % len(COLOURS)]).save(run.sheet(epoch))


def finished_run(path: Path, prompts: list[str]) -> RunFolder:
    """A run of two epochs that is done."""
    run = started_run(path, prompts)
    for epoch in range(3):
        add_epoch(run, epoch, len(prompts))
    return run


def judge(run: RunFolder, name: str, alignment: dict[str, float]) -> None:
    """What `dag.evaluate` writes into a run's folder: the alignment by model."""
    folder = run.path / name
    folder.mkdir()
    rows = "\n".join(f"| {model} | {value} |" for model, value in alignment.items())
    (folder / "evaluation.md").write_text(f"| model | alignment |\n|---|---|\n{rows}\n\nA legend of {name}.\n")
    models = [{"model": model, "alignment": value} for model, value in alignment.items()]
    (folder / "evaluation.json").write_text(json.dumps({"models": models}))


@contextmanager
def served(run: RunFolder) -> Iterator[str]:
    """The address at which a run's page is served."""
    with PageServer(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()
