"""Prepares images for a reward's vision tower, in one of two ways.

Exact: 8-bit pictures, resized by Pillow on the CPU, as in the original code of the reward. Smooth: the tensors themselves, on
their device, for gradients and previews; they are not rounded to 8 bits, and differ from Pillow's resizing by at most one grey
level.

Legend: B images, H x W their size, S the tower's size, all pixels RGB.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 of (B, 3, H, W) images in [0, 1], rounded and clamped as a saved file would be."""
    pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True)
class Preprocessing:
    """Size, normalisation and fit of a tower's pictures.

    `fit: shortest` resizes the shortest side to S and crops the centre (CLIP, BLIP); `longest` resizes the longest
    side and pads with black (HPSv2). `crop_rounding` is how half of an odd margin is rounded: half-even in torchvision, down
    in transformers.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fit: Literal["shortest", "longest"] = "shortest"
    crop_rounding: Literal["half_even", "down"] = "half_even"

    def read(self, images: Tensor, *, smooth: bool) -> Tensor:
        """(B, 3, S, S) normalised pixels, by the method `smooth` or by `exact`."""
        return self.smooth(images) if smooth else self.exact(images)

    def exact(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 pixels on the images' device, as the original code computes them from saved pictures."""
        pictures = to_bytes(images)
        if self.fit == "longest":
            return self.smooth(torch.from_numpy(pictures).to(images.device).permute(0, 3, 1, 2).float() / 255)
        height, width = _shortest_side(pictures.shape[1], pictures.shape[2], self.size)
        resized = [
            np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
            for picture in pictures
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(images.device).permute(0, 3, 1, 2).float() / 255
        return self._normalised(self._centre(pixels))

    def smooth(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float pixels with gradients to the images; nothing is rounded to 8 bits."""
        if self.fit == "longest":
            return self._normalised(self._padded(images))
        height, width = _shortest_side(images.shape[2], images.shape[3], self.size)
        # Width, then height, clipped after each, as in Pillow: resizing both at once would differ at hard edges.
        wide = _bicubic(images, images.shape[2], width).clamp(0, 1)
        return self._normalised(self._centre(_bicubic(wide, height, width).clamp(0, 1)))

    def _centre(self, pixels: Tensor) -> Tensor:
        top, left = (self._margin(side - self.size) for side in pixels.shape[2:])
        return pixels[:, :, top : top + self.size, left : left + self.size]

    def _margin(self, excess: int) -> int:
        return round(excess / 2) if self.crop_rounding == "half_even" else excess // 2

    def _padded(self, images: Tensor) -> Tensor:
        longest = max(images.shape[2:])
        height, width = (round(side * self.size / longest) for side in images.shape[2:])
        pixels = _bicubic(images, height, width)
        down, right = self.size - height, self.size - width
        return functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (_channels(values, pixels.dtype, pixels.device) for values in (self.mean, self.std))
        return (pixels - mean) / std


@cache
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a (C, 1, 1) tensor; the cache avoids a copy to the device in every call."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shortest side `size`, the other cut to whole pixels."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
