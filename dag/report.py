"""What a run shows of itself: captioned sample grids, curves, a line an epoch.

`python -m dag.report RUN [--watch]` prints the lines of a run, with `--watch` as they come, and draws its curves anew.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dag import durable
from dag.curves import trained
from dag.errors import RunError, UsageError, exit_code
from dag.run_folder import RunFolder

_CAPTION_PX = 12
_SMALLEST_CELL_PX = 96
# Sheets.
_ABREAST, _GAP_PX = 4, 12


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) float in [0, 1] as 8-bit pictures."""
    pixels = (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in pixels]


def grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures row by row, a caption above each; small pictures are enlarged to be seen."""
    pictures = to_pictures(images)
    side = max(pictures[0].width, _SMALLEST_CELL_PX)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + 2), rows * (side + _CAPTION_PX + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * (side + 2), index // columns * (side + _CAPTION_PX + 2)
        draw.text((left + 1, top), caption, fill="black", font_size=_CAPTION_PX - 2)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top + _CAPTION_PX))
    return sheet


def with_title(sheet: Image.Image, title: str) -> Image.Image:
    titled = Image.new("RGB", (sheet.width, sheet.height + 20), "white")
    ImageDraw.Draw(titled).text((2, 2), title, fill="black", font_size=14)
    titled.paste(sheet, (0, 20))
    return titled


def beside(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, in as many rows as it takes to stay readable on a page."""
    width, height = (max(sizes) + _GAP_PX for sizes in zip(*(sheet.size for sheet in sheets), strict=True))
    columns, rows = min(len(sheets), _ABREAST), math.ceil(len(sheets) / _ABREAST)
    joined = Image.new("RGB", (columns * width - _GAP_PX, rows * height - _GAP_PX), "white")
    for index, sheet in enumerate(sheets):
        joined.paste(sheet, (index % _ABREAST * width, index // _ABREAST * height))
    return joined


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Grids of the base model and of the trained one, side by side."""
    return beside([with_title(before, "before"), with_title(after, "after")])


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward against trajectories with its spread, the fixed evaluation, and diversity and fidelity if measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    drawn = trained(rows)
    x = [row["trajectories"] for row in drawn]
    mean, spread = (np.array([row[key] for row in drawn]) for key in ("reward_mean", "reward_std"))
    left.plot(x, mean, label="rollouts (mean, 1 sd)")
    left.fill_between(x, mean - spread, mean + spread, alpha=0.2)
    _plot_measured(left, rows, "eval_reward_mean", "fixed evaluation")
    left.set(xlabel="trajectories", ylabel="reward")
    left.legend(fontsize=8)
    for key, label in (("diversity", "diversity within a prompt"), ("fidelity_top1", "judged noun right")):
        _plot_measured(right, rows, key, label)
    right.set(xlabel="trajectories", ylim=(0, None))
    if right.lines:
        right.legend(fontsize=8)
    figure.tight_layout()
    with durable.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _plot_measured(axis: Any, rows: Sequence[dict[str, Any]], key: str, label: str) -> None:
    points = [(row["trajectories"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)


# -- lines --------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any], epochs: int) -> str:
    """An epoch of metrics.jsonl in one line."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    if row.get("reward_mean") is not None:
        parts.append(f"reward {row['reward_mean']:.3f} ± {row['reward_std']:.3f}")
    for key, label in (
        ("residual_rms", "residual rms"),
        ("ratio_max_dev", "ratio dev"),
        ("eval_reward_mean", "eval reward"),
    ):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.4g}")
    for key, label in (("diversity", "diversity"), ("fidelity_top1", "fidelity")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.3f}")
    seconds = sum(value for key, value in row.items() if key.startswith("seconds_"))
    return "  ".join(parts) + (f"  {seconds:.1f} s" if seconds else "")


def follow(run: RunFolder, is_watching: bool, interval: float = 2.0) -> None:
    """Print a run's epochs; watching, until its last one. A resumed run may step back and is followed from there."""
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
    sys.exit(main())
