"""Stable Diffusion XL as a policy: two text encoders, and a condition on the picture's size.

A prompt's embedding is one tensor (S + 1, D): the S tokens' rows, which join the last hidden states but one of both encoders, and a
row that begins with the second encoder's pooled embedding and is zero elsewhere. So nothing outside this file knows of it.

Legend: B samples, P prompts, S text tokens, D text width.
"""

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dag.errors import RunError
from dag.models.latent_diffusion import LatentDiffusion
from dag.models.sd import check_channels
from dag.models.source import read_config
from dag.models.text import hidden_and_pooled, widened

# Numbers of the size condition: height and width, twice, and the corner of the crop.
_SIZES = 6


class StableDiffusionXL(LatentDiffusion):
    """A Stable Diffusion XL base model; see `LatentDiffusion` for arguments and errors."""

    pipeline: ClassVar[Any] = StableDiffusionXLPipeline
    network: ClassVar[Any] = UNet2DConditionModel
    encoders: ClassVar[tuple[Any, ...]] = (CLIPTextModel, CLIPTextModelWithProjection)
    tiny_at_hub: ClassVar[str] = "madebyollin/taesdxl"
    can_train_text: ClassVar[bool] = True

    def _check(self) -> None:
        unet = read_config(self.folder, "unet")
        missing = [name for name in ("text_encoder", "text_encoder_2") if not (self.folder / name).is_dir()]
        if missing or unet.get("addition_embed_type") != "text_time":
            what = f"has no {missing[0]}" if missing else "has a UNet without the size condition"
            raise RunError(f"model.path: {self.folder} {what}: an SDXL base model is needed, not a refiner")
        check_channels(self.folder, unet)

    def _vae_dtype(self) -> torch.dtype:
        """bfloat16 in place of float16, in which the activations of the published VAE overflow (`force_upcast`)."""
        overflows = read_config(self.folder, "vae").get("force_upcast", True)
        return torch.bfloat16 if self.dtype == torch.float16 and overflows else self.dtype

    @property
    def text_shape(self) -> tuple[int, int]:
        return self.text_encoders[0].tokens + 1, int(self.denoiser.config.cross_attention_dim)

    @property
    def _pooled_width(self) -> int:
        config = self.denoiser.config
        return int(config.projection_class_embeddings_input_dim) - _SIZES * int(config.addition_time_embed_dim)

    def _embed(self, ids: Sequence[Tensor]) -> Tensor:
        (first, _), (second, pooled) = (
            hidden_and_pooled(encoder(found, has_hidden=True))
            for encoder, found in zip(self.text_encoders, ids, strict=True)
        )
        rows = torch.cat([first, second], dim=2)
        return torch.cat([rows, widened(pooled[:, None], rows.shape[2])], dim=1)

    def _empty(self, texts: Tensor) -> Tensor:
        """Zeros, as the published models are sampled, unless the model says otherwise."""
        try:
            index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            index = {}
        return torch.zeros_like(texts) if index.get("force_zeros_for_empty_prompt", True) else texts

    def _output(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        height, width = (side * self.decoder.side for side in self.latent_shape[1:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
        added = {"text_embeds": text[:, -1, : self._pooled_width], "time_ids": sizes.expand(len(text), -1)}
        return self.denoiser(x_t, t, text[:, :-1], added_cond_kwargs=added, return_dict=False)[0]
