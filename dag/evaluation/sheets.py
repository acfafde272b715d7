"""Pictures in captioned grids, and grids side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from dag.rewards.pixels import to_bytes

_CAPTION_PX = 12
_LINE_PX = 2
_SMALLEST_CELL_PX = 96
# Pillow warns of pictures with more than 89 megapixels, and refuses to open those with more than 179.
_MOST_PIXELS, _MOST_JOINED_PIXELS = 80_000_000, 160_000_000
# Grids side by side, and the gap between them.
_ABREAST, _GAP_PX = 4, 12


@dataclass(frozen=True)
class Grid:
    """Where square pictures lie on a sheet: row by row, each under its caption, with a white line below and on its right."""

    columns: int
    side: int
    """Of a picture, in pixels."""

    @classmethod
    def of(cls, width: int, height: int, columns: int) -> "tuple[Grid, int] | None":
        """(the grid, its number of rows) of a sheet with these sizes in pixels; None if it is no such grid."""
        cell, rest = divmod(width, columns) if columns > 0 else (0, 1)
        made = cls(columns, cell - _LINE_PX)
        rows, left = divmod(height, made.height)
        return (made, rows) if rows and not rest and not left and made.side > 0 else None

    @property
    def width(self) -> int:
        """Of a picture and what is around it."""
        return self.side + _LINE_PX

    @property
    def height(self) -> int:
        """Of a picture and what is around it."""
        return self.side + _LINE_PX + _CAPTION_PX

    def size(self, count: int) -> tuple[int, int]:
        """Of a sheet with so many pictures."""
        return self.columns * self.width, math.ceil(count / self.columns) * self.height

    def corner(self, index: int) -> tuple[int, int]:
        """The upper left corner of a picture's caption; the picture begins _CAPTION_PX below it."""
        return index % self.columns * self.width, index // self.columns * self.height


def grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """A grid of images (N, 3, H, W) in [0, 1], row by row, a caption above each.

    Pictures under 96 px are enlarged, and captions that are wider than a picture are shortened. Pictures are made smaller if the
    sheet would have more than 80 megapixels: Pillow refuses to open very large ones.
    """
    pictures = [Image.fromarray(array) for array in to_bytes(images)]
    largest = math.isqrt(_MOST_PIXELS // (columns * math.ceil(len(pictures) / columns))) - _LINE_PX - _CAPTION_PX
    place = Grid(columns, max(1, min(largest, max(pictures[0].width, _SMALLEST_CELL_PX))))
    sheet = Image.new("RGB", place.size(len(pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = place.corner(index)
        text = _shortened(draw, caption, place.side)
        draw.text((left + 1, top), text, fill="black", font_size=_CAPTION_PX - 2)
        resized = picture.resize((place.side, place.side), Image.Resampling.BICUBIC)
        sheet.paste(resized, (left, top + _CAPTION_PX))
    return sheet


def cells(sheet: Image.Image, count: int, columns: int) -> list[Image.Image]:
    """The first `count` pictures of what `grid` drew in so many columns, without their captions; none if it is no such grid."""
    found = Grid.of(*sheet.size, columns)
    if found is None or found[1] * columns < count:
        return []
    place, _ = found
    corners = [place.corner(index) for index in range(count)]
    return [
        sheet.crop((left, top + _CAPTION_PX, left + place.side, top + _CAPTION_PX + place.side))
        for left, top in corners
    ]


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
    """Pictures side by side, at most four in a row, on one sheet; smaller if it would have more than 160 megapixels."""
    pixels = sum(sheet.width * sheet.height for sheet in sheets)
    if pixels > _MOST_JOINED_PIXELS:
        share = math.sqrt(_MOST_JOINED_PIXELS / pixels)
        sheets = [sheet.resize((math.ceil(share * sheet.width), math.ceil(share * sheet.height))) for sheet in sheets]
    width, height = (max(sizes) + _GAP_PX for sizes in zip(*(sheet.size for sheet in sheets), strict=True))
    columns, rows = min(len(sheets), _ABREAST), math.ceil(len(sheets) / _ABREAST)
    joined = Image.new("RGB", (columns * width - _GAP_PX, rows * height - _GAP_PX), "white")
    for index, sheet in enumerate(sheets):
        joined.paste(sheet, (index % _ABREAST * width, index // _ABREAST * height))
    return joined


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """The base model's grid and the trained model's, side by side and titled."""
    return beside([with_title(before, "before"), with_title(after, "after")])
