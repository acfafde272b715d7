"""The base of the rewards that use a CLIP model: the model, and the cosine between pictures and texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dag.recipe.reward_sections import Tower
from dag.rewards.clip import ClipSource, shared_tower
from dag.rewards.pixels import Preprocessing
from dag.rewards.text import Cleaning, openai_cleaning
from dag.rewards.tower import TowerReward
from dag.rewards.weights import Published


class ClipReward(TowerReward):
    """A reward computed from CLIP's embeddings.

    Args:
        published:     the weights that are taken where the section gives no path.
        architecture:  what cannot be read off the published file, see `ClipSource`.
        preprocessing: how the original code prepares pictures, see `ClipSource`.
    """

    def __init__(
        self,
        section: Tower,
        device: torch.device,
        published: Published,
        architecture: Mapping[str, Any] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(section)
        source = ClipSource(
            key=f"{section.name}.path",
            published=published,
            path=section.path,
            tokenizer=section.tokenizer,
            config=section.config,
            architecture=architecture,
            preprocessing=preprocessing,
            dtype=section.dtype,
        )
        self.tower = shared_tower(source, device)

    def cosine(
        self, images: Tensor, texts: Sequence[str], *, smooth: bool, cleaning: Cleaning | None = openai_cleaning
    ) -> Tensor:
        """(B,) cosines between the embeddings of each image and its text."""
        embedded = self.tower.embed_texts(texts, cleaning)
        return (self.tower.embed_images(images, smooth=smooth) * embedded).sum(-1)

    def to(self, device: torch.device) -> None:
        self.tower.to(device)
