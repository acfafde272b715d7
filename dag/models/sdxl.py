"""Stable Diffusion XL as a policy: two text encoders, and a condition on the picture's size.

A prompt's embedding is one tensor (S + 1, D): the S tokens' rows, which join the last hidden states but one of both encoders, and a
row that begins with the second encoder's pooled embedding and is zero elsewhere. So nothing outside this file knows of it.

Legend: B samples, P prompts, S text tokens, D text width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from dag.errors import RunError
from dag.models.sd import StableDiffusion, check_channels
from dag.models.source import read_config
from dag.models.weights import load_text_encoder, load_tokenizer

# Numbers of the size condition: height and width, twice, and the corner of the crop.
_SIZES = 6


class StableDiffusionXL(StableDiffusion):
    """A Stable Diffusion XL base model; see `StableDiffusion` for arguments and errors."""

    pipeline: ClassVar[Any] = StableDiffusionXLPipeline
    tiny_at_hub: ClassVar[str] = "madebyollin/taesdxl"
    _second: tuple[Any, Any] | None = None
    """The second tokenizer and encoder, until they are freed."""

    def _check(self, folder: Path) -> None:
        unet = read_config(folder, "unet")
        missing = [name for name in ("text_encoder", "text_encoder_2") if not (folder / name).is_dir()]
        if missing or unet.get("addition_embed_type") != "text_time":
            what = f"has no {missing[0]}" if missing else "has a UNet without the size condition"
            raise RunError(f"model.path: {folder} {what}: an SDXL base model is needed, not a refiner")
        check_channels(folder, unet)

    def _vae_dtype(self) -> torch.dtype:
        """bfloat16 in place of float16, in which the activations of the published VAE overflow (`force_upcast`)."""
        overflows = read_config(self.folder, "vae").get("force_upcast", True)
        return torch.bfloat16 if self.dtype == torch.float16 and overflows else self.dtype

    @property
    def text_shape(self) -> tuple[int, int]:
        tokens, width = super().text_shape
        return tokens + 1, width

    @property
    def _pooled_width(self) -> int:
        config = self.denoiser.config
        return int(config.projection_class_embeddings_input_dim) - _SIZES * int(config.addition_time_embed_dim)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, S + 1, D) embeddings on the CPU, in the network's dtype. The text encoders stay until `free_text_encoder`."""
        texts = ["", *prompts]
        tokens, pooled = [], torch.empty(0)
        for tokenizer, encoder in (self._load_text(), self._load_second()):
            length = int(encoder.config.max_position_embeddings)
            found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            # Each part leaves the device at once: the hidden states of all layers would fill it.
            parts = [self._embedded(encoder, ids) for ids in found.input_ids.split(64)]
            tokens.append(torch.cat([hidden for hidden, _ in parts]))
            pooled = torch.cat([first for _, first in parts])
        rows = torch.cat(tokens, dim=2)
        last = functional.pad(pooled, (0, rows.shape[2] - pooled.shape[1]))[:, None]
        embedded = torch.cat([rows, last], dim=1)
        self._uncond = (torch.zeros_like(embedded[:1]) if self._empty_is_zero() else embedded[:1]).to(self.device)
        return embedded[1:]

    def _embedded(self, encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(last hidden states but one, the encoder's first output: of the second one the pooled embeddings), on the CPU."""
        output = encoder(ids.to(self.device), output_hidden_states=True)
        return output.hidden_states[-2].to(self.dtype).cpu(), output[0].to(self.dtype).cpu()

    def _empty_is_zero(self) -> bool:
        """Whether zeros take the place of the empty prompt's embedding, as the published models are sampled."""
        try:
            index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return True
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def free_text_encoder(self) -> None:
        super().free_text_encoder()
        self._second = None

    def _conditioning(self, text: Tensor) -> dict[str, Any]:
        height, width = (side * self.decoder.side for side in self.latent_shape[1:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
        added = {"text_embeds": text[:, -1, : self._pooled_width], "time_ids": sizes.expand(len(text), -1)}
        return {"encoder_hidden_states": text[:, :-1], "added_cond_kwargs": added}

    def _encoders(self) -> dict[str, nn.Module]:
        second = {} if self._second is None else {"second text encoder": self._second[1]}
        return super()._encoders() | second

    def _load_second(self) -> tuple[Any, Any]:
        if self._second is None:
            encoder = load_text_encoder(
                self.folder, self.dtype, self.device, self._variant, "text_encoder_2", CLIPTextModelWithProjection
            )
            self._second = load_tokenizer(self.folder, "tokenizer_2"), encoder
        return self._second
