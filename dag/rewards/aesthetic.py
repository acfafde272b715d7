"""LAION's aesthetic predictor: linear layers on the unit-length CLIP ViT-L/14 image embedding. Prompts are ignored."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dag.rewards.clip import VIT_L, ClipSource, shared_tower
from dag.rewards.registry import REWARDS
from dag.rewards.tower import LinearHead, TowerReward
from dag.rewards.weights import Published, locate, read_state

HEAD = Published("trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",))


@REWARDS.register("aesthetic")
class Aesthetic(TowerReward):
    """Score about 1..10, unbounded: an affine function of the embedding, hence one fixed direction in CLIP space.

    Args:
        path:      CLIP ViT-L/14 as a transformers folder, an OpenAI file or a hub id.
        head:      the predictor's file, `sac+logos+ava1-l14-linearMSE.pth` or DDPO's `aesthetic-model.pth`.
        tokenizer: unused by the score; where CLIP's tokenizer is, if the folder has none.
        config:    CLIPConfig entries that an OpenAI file does not tell.
    """

    def __init__(
        self,
        path: str | None = None,
        head: str | None = None,
        tokenizer: str | None = None,
        config: str | Mapping[str, Any] | None = None,
        dtype: str = "fp32",
        max_batch: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(max_batch, dtype)
        self.tower = shared_tower(ClipSource("aesthetic.path", VIT_L, path, tokenizer, config, dtype=dtype), device)
        state = read_state("aesthetic.head", locate("aesthetic.head", head, HEAD))
        self.head = LinearHead("aesthetic.head", state, self.tower.model.config.projection_dim).to(device)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        return self.head(self.tower.embed_images(images, smooth=smooth))

    def to(self, device: torch.device) -> None:
        self.tower.to(device)
        self.head.to(device)
