"""Stable Diffusion 3 and 3.5 as a policy: a transformer that predicts a velocity, two CLIP text encoders, a T5 that may be absent.

A prompt's embedding is one tensor: the tokens' rows of both CLIP encoders side by side, then those of the T5 (zeros without it),
and a row that begins with both pooled embeddings and is zero elsewhere.

Legend: B samples, P prompts, S rows, D width.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dag.models.source import read_config
from dag.models.text import hidden_and_pooled, widened
from dag.models.transformer_diffusion import TransformerDiffusion
from dag.recipe import Recipe

# Tokens of the T5 if the recipe does not say; the pipeline's own default.
_TOKENS = 256


class StableDiffusion3(TransformerDiffusion):
    """A Stable Diffusion 3 or 3.5 model; see `LatentDiffusion` for arguments and errors."""

    pipeline: ClassVar[Any] = StableDiffusion3Pipeline
    network: ClassVar[Any] = SD3Transformer2DModel
    encoders: ClassVar[tuple[Any, ...]] = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    tiny_at_hub: ClassVar[str] = "madebyollin/taesd3"
    patch: ClassVar[int] = 2

    def _tokens(self, recipe: Recipe, index: int) -> int | None:
        return (recipe.model.max_tokens or _TOKENS) if index == 2 else None

    @property
    def text_shape(self) -> tuple[int, int]:
        width = read_config(self.folder, self.component)["joint_attention_dim"]
        return self.text_encoders[0].tokens + self.text_encoders[2].tokens + 1, int(width)

    def _embed(self, ids: Sequence[Tensor]) -> Tensor:
        *clips, t5 = self.text_encoders
        (first, first_pooled), (second, second_pooled) = (
            hidden_and_pooled(clip(found, has_hidden=True)) for clip, found in zip(clips, ids[:2], strict=True)
        )
        width = self.text_shape[1]
        tokens = torch.cat([first, second], dim=2)
        pooled = torch.cat([first_pooled, second_pooled], dim=1)[:, None]
        rows = tokens.new_zeros(len(tokens), t5.tokens, width) if t5.is_absent else t5(ids[2])[0]
        return torch.cat([widened(tokens, width), rows, widened(pooled, width)], dim=1)

    def _output(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        pooled = text[:, -1, : self.denoiser.config.pooled_projection_dim]
        return self.denoiser(x_t, text[:, :-1], pooled, t, return_dict=False)[0]
