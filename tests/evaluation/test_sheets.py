"""Sheets of pictures: their cells can be cut out again, and they stay small enough to be opened."""

import pytest
import torch

from dag.evaluation import sheets


def test_cells_are_what_a_grid_was_made_of() -> None:
    images = torch.rand(5, 3, 100, 100)
    sheet = sheets.grid(images, ["a"] * 5, 2)
    again = [torch.frombuffer(bytearray(cell.tobytes()), dtype=torch.uint8) for cell in sheets.cells(sheet, 5, 2)]
    for image, cell in zip(images, again, strict=True):
        close = (cell.view(100, 100, 3).permute(2, 0, 1) / 255 - image).abs().max()
        assert float(close) < 1 / 254


def test_a_sheet_stays_small_enough_for_pillow_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "_MOST_PIXELS", 60_000)
    monkeypatch.setattr(sheets, "_MOST_JOINED_PIXELS", 100_000)
    images = torch.rand(6, 3, 128, 128)
    sheet = sheets.grid(images, ["a"] * 6, 2)
    assert 40_000 < sheet.width * sheet.height <= 60_000
    assert len(sheets.cells(sheet, 6, 2)) == 6 and sheets.cells(sheet, 7, 2) == [] == sheets.cells(sheet, 6, 5)
    joined = sheets.before_after(sheet, sheet)
    assert joined.width * joined.height < 110_000
