"""The embedded model's tiny decoder against its full one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image

from dag.assets.build.measure import SAMPLE_PROMPTS
from dag.assets.build.tiny_vae import agreement, decode_flop, predicted
from dag.assets.build.vae import encode
from dag.evaluation import judge

ASSETS = Path(judge.__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ASSETS / "embedded", dtype=torch.float32, use_safetensors=True)


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(ASSETS / "embedded/vae_tiny", use_safetensors=True).eval()


@pytest.fixture(scope="module")
def latents(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """Clean latents of the first picture of each prompt in the model card's grid."""
    grid = Image.open(ASSETS / "samples.png").convert("RGB")
    corners = [(248 * (i % 3), 94 * (i // 3) + 14) for i in range(len(SAMPLE_PROMPTS))]
    tiles = [grid.crop((left, top, left + 80, top + 80)).resize((64, 64)) for left, top in corners]
    pictures = np.stack([np.array(tile) for tile in tiles])
    return encode(pipeline.vae, pictures) * pipeline.vae.config.scaling_factor


def test_pictures(tiny: AutoencoderTiny, pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> None:
    """A decoder that returned each picture's mean colour would reach 13 dB; the model card has figures on held-out scenes."""
    assert tiny.config.scaling_factor == 1
    assert agreement(tiny, pipeline.vae, latents) > 25


@pytest.mark.parametrize(("timestep", "bound"), [(250, 25), (750, 23), (950, 22)])
def test_predicted_pictures(
    tiny: AutoencoderTiny, pipeline: StableDiffusionPipeline, latents: torch.Tensor, timestep: int, bound: float
) -> None:
    timesteps = torch.full((len(latents),), timestep)
    x0_hat = predicted(pipeline, latents, list(SAMPLE_PROMPTS), timesteps, 3.0)
    assert agreement(tiny, pipeline.vae, x0_hat) > bound


def test_it_costs_a_quarter_or_less(tiny: AutoencoderTiny, pipeline: StableDiffusionPipeline) -> None:
    assert 4 * decode_flop(tiny) < decode_flop(pipeline.vae)
