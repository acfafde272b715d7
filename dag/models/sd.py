"""Stable Diffusion 1.x / 2.x, and the embedded models, as a policy: one CLIP text encoder and a UNet.

Legend: B samples, P prompts, S text tokens, D text width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from dag.errors import RunError
from dag.models.latent_diffusion import LatentDiffusion
from dag.models.source import read_config


class StableDiffusion(LatentDiffusion):
    """A Stable Diffusion model; see `LatentDiffusion` for arguments and errors."""

    pipeline: ClassVar[Any] = StableDiffusionPipeline
    network: ClassVar[Any] = UNet2DConditionModel
    encoders: ClassVar[tuple[Any, ...]] = (CLIPTextModel,)
    tiny_at_hub: ClassVar[str] = "madebyollin/taesd"
    can_train_text: ClassVar[bool] = True

    def _check(self) -> None:
        unet = read_config(self.folder, "unet")
        if unet.get("addition_embed_type") or (self.folder / "text_encoder_2").is_dir():
            raise RunError(
                f"model.path: {self.folder} has a second text encoder but model_index.json does not name a "
                "StableDiffusionXLPipeline"
            )
        check_channels(self.folder, unet)

    @property
    def text_shape(self) -> tuple[int, int]:
        return self.text_encoders[0].tokens, int(self.denoiser.config.cross_attention_dim)

    def _embed(self, ids: Sequence[Tensor]) -> Tensor:
        return self.text_encoders[0](ids[0])[0]

    def _output(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.denoiser(x_t, t, text, return_dict=False)[0]


def check_channels(folder: Path, unet: dict[str, Any]) -> None:
    """Raises RunError for a UNet that takes more channels than it predicts."""
    channels = unet.get("in_channels")
    if channels != unet.get("out_channels"):
        raise RunError(
            f"model.path: {folder} takes {channels} latent channels and predicts {unet.get('out_channels')}: "
            "an inpainting or editing model, not text-to-image"
        )
