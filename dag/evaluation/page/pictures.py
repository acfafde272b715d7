"""The sheets of pictures of a run, as JPEGs that are small enough for one page."""

import io
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from dag.errors import UsageError
from dag.evaluation.page.charts import spread
from dag.evaluation.page.facts import Facts
from dag.evaluation.sheets import Grid
from dag.recipe.prompts import load_prompts
from dag.run.folder import RunFolder

MOST_SHEETS = 24
# Bytes of all sheets together, which base64 makes a third larger, and of one.
_ALL_BYTES, _MOST_BYTES = 6_500_000, 900_000
# From the finest to the coarsest: pixels, and JPEG's quality.
_LADDER = [(pixels, quality) for pixels in (4e6, 2.4e6, 1.5e6, 0.9e6, 0.5e6) for quality in (88, 76, 64)]
_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Sheet:
    """One evaluation's pictures, with the same prompts and seeds as the others'."""

    epoch: int
    path: Path
    stamp: int
    """When the file was written, in ns."""
    size: tuple[int, int]
    """Of the original, in pixels."""
    jpeg: bytes


def read_sheets(run: RunFolder) -> tuple[list[Sheet], list[str]]:
    """The sheets of a run, at most MOST_SHEETS of them, and a sentence for each that is left out as unusable."""
    numbered = [(re.fullmatch(r"epoch_(\d+)\.png", path.name), path) for path in run.samples.glob("epoch_*.png")]
    files = sorted((int(match[1]), path) for match, path in numbered if match)
    files = [files[index] for index in spread(len(files), MOST_SHEETS)]
    # Not divided by the number of sheets so far: a page that follows a run would encode all of them again and again.
    budget = min(_MOST_BYTES, _ALL_BYTES // MOST_SHEETS) if len(files) > _ALL_BYTES // _MOST_BYTES else _MOST_BYTES
    sheets, complaints = [], []
    for epoch, path in files:
        try:
            stamp = path.stat().st_mtime_ns
            size, jpeg = _encoded(path, stamp, budget)
            sheets.append(Sheet(epoch, path, stamp, size, jpeg))
        except _DAMAGE:
            complaints.append(f"samples/{path.name} cannot be read and is left out.")
    same = [sheet for sheet in sheets if sheet.size == sheets[-1].size]
    if len(same) < len(sheets):
        complaints.append("Pictures of evaluations with another number of prompts are left out.")
    return same, complaints


@lru_cache(maxsize=2 * MOST_SHEETS)
def _encoded(path: Path, stamp: int, most_bytes: int) -> tuple[tuple[int, int], bytes]:
    """(size of the original, a JPEG of at most so many bytes, or the smallest there is). `stamp` tells files of one name apart."""
    with Image.open(path) as opened:
        original = opened.convert("RGB")
    for pixels, quality in _LADDER:
        scale = min(1.0, math.sqrt(pixels / (original.width * original.height)))
        size = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
        buffer = io.BytesIO()
        smaller = original if scale == 1 else original.resize(size, Image.Resampling.LANCZOS)
        smaller.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= most_bytes:
            break
    return original.size, buffer.getvalue()


def layout(facts: Facts, sheets: list[Sheet]) -> dict[str, Any]:
    """How a sheet is cut into strips, one for each prompt: rows, the strip's width over its height, and the prompts.

    A sheet of unknown layout is one strip.
    """
    if not sheets:
        return {"rows": 0, "ratio": 1.0, "prompts": []}
    (width, height), columns = sheets[-1].size, facts.asked("evaluation.images_per_prompt")
    found = Grid.of(width, height, columns) if isinstance(columns, int) else None
    rows = 1 if found is None else found[1]
    prompts = _prompts(facts)[:rows] if rows > 1 else []
    return {"rows": rows, "ratio": width / (height / rows), "prompts": prompts}


def _prompts(facts: Facts) -> list[str]:
    """The prompts of the fixed evaluation, from the first; empty if this version cannot read them any more."""
    try:
        recipe = facts.run.read_recipe()
        found = load_prompts(recipe.prompts)
    except UsageError:
        return []
    return list(found.held_out if recipe.evaluation.held_out else found.training)
