"""A model as wide as the embedded one and a third as deep: for what is counted while it trains, operation by operation."""

from pathlib import Path
from shutil import copytree

import torch

from dag.models.source import EMBEDDED

TINY = "vae_tiny"
"""The folder of its AutoencoderTiny, for `objective.forward_looking.decoder_path`."""


def build(folder: Path) -> Path:
    """Write the model's folder: 32-pixel pictures of 16x16x4 latents, random weights, the embedded model's text encoder."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    copytree(EMBEDDED, folder, ignore=lambda path, names: {"unet", "vae", TINY} & {*names})
    torch.manual_seed(1)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(64,), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=128,
        mid_block_type=None,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8, sample_size=32, mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(16, 16), num_encoder_blocks=(0, 0),
        num_decoder_blocks=(1, 0),
    ).save_pretrained(folder / TINY)  # fmt: skip
    return folder
