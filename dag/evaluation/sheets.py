"""Pictures in captioned grids, and grids side by side."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from dag.rewards.pixels import to_bytes

_CAPTION_PX = 12
_SMALLEST_CELL_PX = 96
# Grids side by side, and the gap between them.
_ABREAST, _GAP_PX = 4, 12


def grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """A grid of images (N, 3, H, W) in [0, 1], row by row, a caption above each.

    Pictures under 96 px are enlarged, and captions that are wider than a picture are shortened.
    """
    pictures = [Image.fromarray(array) for array in to_bytes(images)]
    side = max(pictures[0].width, _SMALLEST_CELL_PX)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + 2), rows * (side + _CAPTION_PX + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * (side + 2), index // columns * (side + _CAPTION_PX + 2)
        draw.text((left + 1, top), _shortened(draw, caption, side), fill="black", font_size=_CAPTION_PX - 2)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top + _CAPTION_PX))
    return sheet


def rows_of(width: int, height: int, columns: int) -> int | None:
    """The number of rows of a grid of square pictures with these sizes in pixels; None if it is no such grid."""
    side, rest = divmod(width, columns) if columns > 0 else (0, 1)
    rows, left = divmod(height, side + _CAPTION_PX)
    return rows if rows and not rest and not left else None


def cells(sheet: Image.Image, count: int, columns: int) -> list[Image.Image]:
    """The first `count` pictures of what `grid` drew in so many columns, without their captions."""
    side = sheet.width // columns - 2
    corners = [
        (index % columns * (side + 2), index // columns * (side + _CAPTION_PX + 2) + _CAPTION_PX)
        for index in range(count)
    ]
    return [sheet.crop((left, top, left + side, top + side)) for left, top in corners]


def _shortened(draw: ImageDraw.ImageDraw, caption: str, width: int) -> str:
    """The caption, or as much of its beginning as fits into so many pixels, and an ellipsis."""

    def fits(text: str) -> bool:
        return draw.textlength(text, font_size=_CAPTION_PX - 2) <= width

    if fits(caption):
        return caption
    kept = len(caption)
    while kept and not fits(caption[:kept] + "…"):
        kept -= 1
    return caption[:kept] + "…"


def with_title(sheet: Image.Image, title: str) -> Image.Image:
    """The picture with a line of text above it."""
    titled = Image.new("RGB", (sheet.width, sheet.height + 20), "white")
    ImageDraw.Draw(titled).text((2, 2), title, fill="black", font_size=14)
    titled.paste(sheet, (0, 20))
    return titled


def beside(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, at most four in a row, on one sheet."""
    width, height = (max(sizes) + _GAP_PX for sizes in zip(*(sheet.size for sheet in sheets), strict=True))
    columns, rows = min(len(sheets), _ABREAST), math.ceil(len(sheets) / _ABREAST)
    joined = Image.new("RGB", (columns * width - _GAP_PX, rows * height - _GAP_PX), "white")
    for index, sheet in enumerate(sheets):
        joined.paste(sheet, (index % _ABREAST * width, index // _ABREAST * height))
    return joined


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """The base model's grid and the trained model's, side by side and titled."""
    return beside([with_title(before, "before"), with_title(after, "after")])
