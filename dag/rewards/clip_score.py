"""Cosine between picture and prompt in CLIP's embedding space, in its usual variants."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dag.rewards.clip import VIT_L, ClipSource, embedded_or, shared_tower
from dag.rewards.registry import REWARDS
from dag.rewards.text import openai_cleaning
from dag.rewards.tower import TowerReward


@REWARDS.register("clip_score")
class ClipScore(TowerReward):
    """scale * cosine(image, prefix + prompt), (B,) float32.

    The defaults are ImageReward's CLIPScore: the plain cosine. Hessel et al. (2021) is `scale: 2.5, clamp: true,
    prefix: "A photo depicts "` with ViT-B/32; torchmetrics is `scale: 100, clamp: true`. A clamp has no gradient
    below 0.
    """

    name = "clip_score"

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        config: str | Mapping[str, Any] | None = None,
        scale: float = 1.0,
        clamp: bool = False,
        prefix: str = "",
        dtype: str = "fp32",
        max_batch: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(max_batch, dtype)
        path = None if path is None else embedded_or(path)
        self.scale, self.clamp, self.prefix = scale, clamp, prefix
        self.tower = shared_tower(ClipSource(f"{self.name}.path", VIT_L, path, tokenizer, config, dtype=dtype), device)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        texts = self.tower.embed_texts([self.prefix + prompt for prompt in prompts], openai_cleaning)
        cosine = (self.tower.embed_images(images, smooth=smooth) * texts).sum(-1)
        return self.scale * (cosine.clamp(min=0) if self.clamp else cosine)

    def to(self, device: torch.device) -> None:
        self.tower.to(device)


@REWARDS.register("image_text")
class ImageText(ClipScore):
    """100 * cosine by the small scorer that ships with this package (`embedded`), or by any CLIP model."""

    name = "image_text"

    def __init__(self, path: str | None = "embedded", scale: float = 100.0, **options: Any) -> None:
        super().__init__(path, scale=scale, **options)
