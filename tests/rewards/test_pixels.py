"""Preprocessing for reward networks: the exact path equals Pillow's, the differentiable one is within a grey level of it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dag.rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocessing, to_bytes


def picture(height: int, width: int) -> Tensor:
    """A picture (1, 3, H, W) with soft gradients, hard edges and noise, in multiples of 1/255."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x * y).sqrt()])
    image[:, height // 4 : height // 2, width // 3 : width // 2] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    noise = torch.rand(3, height // 3, width // 3, generator=torch.Generator().manual_seed(1))
    image[:, -(height // 3) :, -(width // 3) :] = noise
    return (image[None] * 255).round() / 255


def grey_levels(pixels: Tensor) -> Tensor:
    """Undo the normalisation, to grey levels 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels * std + mean) * 255


def test_bytes_are_rounded_and_clamped() -> None:
    values = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1.3])
    image = values[:, None, None, None].expand(-1, 3, 1, 1)
    assert to_bytes(image)[:, 0, 0, 0].tolist() == [0, 0, 1, 128, 255, 255]
    assert to_bytes(image.bfloat16())[3, 0, 0, 0] == 128


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 60), (60, 96), (50, 51)])
def test_the_exact_path_is_transformers_own(height: int, width: int) -> None:
    from transformers.models.clip import CLIPImageProcessorPil

    image = picture(height, width)
    side = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    expected = processor(Image.fromarray(to_bytes(image)[0]), return_tensors="pt")["pixel_values"]
    found = Preprocessing(size=32, crop_rounding="down").exact(image)
    assert found.shape == (1, 3, 32, 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_odd_margins_are_cut_as_torchvision_does_or_as_transformers_does() -> None:
    """Of an excess of 3 px, 1.5 px go on each side: half-even cuts 2, rounding down 1. Of 1 px, 0.5: both cut 0."""
    for width, half_even in ((35, 2), (33, 0)):
        image = torch.arange(width).expand(1, 3, 32, width) / 255
        first = {
            rounding: round(float(grey_levels(Preprocessing(size=32, crop_rounding=rounding).exact(image))[0, 0, 0, 0]))
            for rounding in ("half_even", "down")
        }
        assert first == {"half_even": half_even, "down": (width - 32) // 2}


@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 90), (70, 128), (20, 24)])
def test_the_smooth_path_is_within_a_grey_level_of_pillow(height: int, width: int) -> None:
    image, preprocessing = picture(height, width), Preprocessing(size=56)
    difference = grey_levels(preprocessing.smooth(image)) - grey_levels(preprocessing.exact(image))
    # Pillow rounds to integers after each of its two passes, horizontal and vertical.
    assert float(difference.abs().max()) < 1.1
    assert float(difference.abs().mean()) < 0.3


def test_the_longest_side_fits_and_the_rest_is_black_before_normalisation() -> None:
    image, preprocessing = picture(64, 40), Preprocessing(size=32, fit="longest")
    pixels = grey_levels(preprocessing.exact(image))
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(pixels, grey_levels(preprocessing.smooth(image)))
    black = pixels.abs().amax((0, 1, 2)) < 1e-3
    assert black.nonzero().flatten().tolist() == [*range(6), *range(26, 32)]


def test_a_picture_of_the_towers_size_is_not_resampled() -> None:
    image = picture(32, 32)
    for fit in ("shortest", "longest"):
        preprocessing = Preprocessing(size=32, fit=fit)
        np.testing.assert_allclose(grey_levels(preprocessing.exact(image)), image * 255, atol=1e-3)
        np.testing.assert_allclose(grey_levels(preprocessing.smooth(image)), image * 255, atol=1e-3)
