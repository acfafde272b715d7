"""`python -m dag.report`: the lines and curves of a run; and sheets of pictures."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor

from dag import report
from dag.evaluation import sheets
from dag.recipe.load import load
from dag.run.folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run of three epochs, without any row of metrics yet."""
    folder = RunFolder.create(tmp_path / "run")
    recipe = load(ROOT / "recipes/tiny_cpu_db.yaml", ["train.epochs=3"])
    folder.write_description({"recipe": recipe.model_dump(mode="json")})
    return folder


def row(epoch: int, reward: float | None = None) -> dict[str, Any]:
    trained = {} if reward is None else {"reward_mean": reward, "reward_std": 0.5, "seconds_update": 1.5}
    return {"epoch": epoch, "trajectories": 4 * epoch, "eval_reward_mean": None, **trained}


def test_lines_and_curves_of_a_run(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in range(3):
        run.metrics.write(row(epoch, 1.0 + epoch if epoch else None))
    assert report.main([str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "epoch 0/3",
        "epoch 1/3  reward 2.000 ± 0.500  1.5 s",
        "epoch 2/3  reward 3.000 ± 0.500  1.5 s",
    ]
    assert (run.path / "curves.png").stat().st_size > 0


def test_a_watched_run_is_followed_to_its_end_and_through_a_resume(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in range(2):
        run.metrics.write(row(epoch, 1.0))
    kept = run.metrics.text()
    run.metrics.write(row(2, 1.0))
    watcher = threading.Thread(target=report.follow, args=(run, True, 0.02))
    watcher.start()
    watcher.join(0.2)
    assert watcher.is_alive(), "the third epoch is still to come"
    run.metrics.restore(kept)
    watcher.join(0.2)
    run.metrics.write(row(2, 7.0))
    run.metrics.write(row(3, 8.0))
    watcher.join(5)
    assert not watcher.is_alive()
    shown = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert shown[-2:] == [["epoch 2/3", "reward 7.000 ± 0.500"], ["epoch 3/3", "reward 8.000 ± 0.500"]]
    assert len(shown) == 5


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({}))
    assert report.main([str(tmp_path)]) == 2
    assert "holds no recipe" in capsys.readouterr().err


def test_many_sheets_take_several_rows() -> None:
    colours = ("red", "green", "blue", "black", "orange")
    joined = sheets.beside([Image.new("RGB", (30, 20), colour) for colour in colours])
    width, height, gap, abreast, rows = 30, 20, 12, 4, 2
    assert joined.size == (abreast * width + (abreast - 1) * gap, rows * height + (rows - 1) * gap)
    places = [(index * (width + gap), 0) for index in range(abreast)] + [(0, height + gap)]
    assert [joined.getpixel(place) for place in places] == [ImageColor.getrgb(colour) for colour in colours]
    assert sheets.beside([Image.new("RGB", (30, 20))] * 2).size == (72, 20)


def test_long_captions_do_not_run_into_each_other() -> None:
    """Pixels of the next picture's caption are those that it has beside a short one."""
    long, short, images = "a very long prompt about a cat that flies over the moon", "x", torch.zeros(2, 3, 96, 96)
    beside_long, beside_short = (sheets.grid(images, [caption, "cat"], 2) for caption in (long, short))
    second = (98, 0, 196, 12)
    assert beside_long.crop(second).tobytes() == beside_short.crop(second).tobytes()
    first = (0, 0, 98, 12)
    assert beside_long.crop(first).tobytes() != beside_short.crop(first).tobytes()
