"""FLUX.1 as a policy: a transformer over 2x2 patches of the latent that predicts a velocity, a CLIP and a T5 text encoder.

A prompt's embedding is one tensor: the T5's rows, and a row that begins with the CLIP's pooled embedding and is zero elsewhere. The
chain has the VAE's latents, (16, H, W); they become tokens inside the network's call.

FLUX.1-dev has guidance built in: its network is told the guidance scale, `sampler.guidance_embedding`.

Legend: B samples, P prompts, S rows, D width, C H W latent.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, T5EncoderModel

from dag.errors import UsageError
from dag.models.source import is_architecture, read_config
from dag.models.text import widened
from dag.models.transformer_diffusion import TransformerDiffusion
from dag.recipe import Recipe

# The pipeline's defaults: the guidance scale, and the T5's tokens with and without guidance built in.
_GUIDANCE, _TOKENS = 3.5, {True: 512, False: 256}


class Flux(TransformerDiffusion):
    """A FLUX.1 model; see `LatentDiffusion` for arguments and errors."""

    pipeline: ClassVar[Any] = FluxPipeline
    network: ClassVar[Any] = FluxTransformer2DModel
    encoders: ClassVar[tuple[Any, ...]] = (CLIPTextModel, T5EncoderModel)
    tiny_at_hub: ClassVar[str] = "madebyollin/taef1"
    patch: ClassVar[int] = 2

    def _check(self) -> None:
        super()._check()
        if self.takes_guidance and self.sampler.guidance_scale > 1:
            raise UsageError(
                f"sampler.guidance_scale={self.sampler.guidance_scale:g}: this model has guidance built in; set it to 1, and "
                "sampler.guidance_embedding to the scale that the network is told"
            )

    @property
    def takes_guidance(self) -> bool:
        return bool(read_config(self.folder, self.component).get("guidance_embeds"))

    def _tokens(self, recipe: Recipe, index: int) -> int | None:
        return (recipe.model.max_tokens or _TOKENS[self.takes_guidance]) if index == 1 else None

    @property
    def text_shape(self) -> tuple[int, int]:
        width = read_config(self.folder, self.component)["joint_attention_dim"]
        return self.text_encoders[1].tokens + 1, int(width)

    def _embed(self, ids: Sequence[Tensor]) -> Tensor:
        clip, t5 = self.text_encoders
        pooled = clip(ids[0]).pooler_output
        tokens, width = self.text_shape
        has_t5 = not is_architecture(self.folder)
        rows = t5(ids[1])[0] if has_t5 else pooled.new_zeros(len(pooled), tokens - 1, width)
        return torch.cat([rows, widened(pooled[:, None], width)], dim=1)

    def _output(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        height, width = (side // 2 for side in x_t.shape[2:])
        guidance = None
        if self.takes_guidance:
            scale = _GUIDANCE if self.sampler.guidance_embedding is None else self.sampler.guidance_embedding
            guidance = torch.full((len(x_t),), scale, device=x_t.device)
        tokens = self.denoiser(
            hidden_states=functional.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=text[:, :-1],
            pooled_projections=text[:, -1, : self.denoiser.config.pooled_projection_dim],
            timestep=t / 1000,  # the network multiplies it again
            img_ids=_places(height, width, x_t),
            txt_ids=x_t.new_zeros(text.shape[1] - 1, 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        maps = tokens.transpose(1, 2).unflatten(2, (height, width))
        return functional.pixel_shuffle(maps, 2).contiguous()  # the order in memory that kernels read


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 3) the row and the column of each token, after a zero, on the device and in the dtype of `like`."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=2).flatten(0, 1).to(like.dtype)
