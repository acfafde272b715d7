"""JPEG size in kB, as DDPO (Black et al. 2024) defines it: Pillow, quality 95, 4:2:0."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dag.rewards.pixels import to_bytes
from dag.rewards.registry import REWARDS, PixelReward


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """(B,) float32 kB (1 kB = 1000 bytes) of (B, 3, H, W) float images in [0, 1], rounded to 8 bits."""
    sizes = []
    for picture in to_bytes(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


@REWARDS.register("compressibility")
class Compressibility(PixelReward):
    """-kB of the JPEG: smooth pictures score high."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -jpeg_kilobytes(images)


@REWARDS.register("incompressibility")
class Incompressibility(PixelReward):
    """kB of the JPEG: detail and noise score high."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return jpeg_kilobytes(images)
