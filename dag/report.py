"""Pictures of a run: captioned sample grids and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

_CAPTION_PX = 12
_SMALLEST_CELL_PX = 96


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) float in [0, 1] as 8-bit pictures."""
    pixels = (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in pixels]


def grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures row by row, a caption above each; small pictures are enlarged to be seen."""
    pictures = to_pictures(images)
    side = max(pictures[0].width, _SMALLEST_CELL_PX)
    rows = -(-len(pictures) // columns)
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
    """Pictures side by side."""
    joined = Image.new(
        "RGB", (sum(s.width for s in sheets) + 12 * (len(sheets) - 1), max(s.height for s in sheets)), "white"
    )
    left = 0
    for sheet in sheets:
        joined.paste(sheet, (left, 0))
        left += sheet.width + 12
    return joined


def before_after(
    before: Tensor, after: Tensor, captions: tuple[Sequence[str], Sequence[str]], columns: int
) -> Image.Image:
    """The same prompts and seeds from the base model and from the trained one."""
    left = with_title(grid(before, captions[0], columns), "before")
    return beside([left, with_title(grid(after, captions[1], columns), "after")])


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward against trajectories with its spread, the fixed evaluation, and diversity and fidelity if measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    trained = [row for row in rows if row.get("reward_mean") is not None]
    x = [row["trajectories"] for row in trained]
    mean, spread = (np.array([row[key] for row in trained]) for key in ("reward_mean", "reward_std"))
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
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_measured(axis: Any, rows: Sequence[dict[str, Any]], key: str, label: str) -> None:
    points = [(row["trajectories"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
