"""A reward's network with random weights, for benchmarks: it costs what the published one costs, without a download."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dag.recipe.reward_sections import Tower
from dag.rewards.clip import DTYPES, EMBEDDED
from dag.rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocessing
from dag.rewards.tower import TowerReward


def _tower(width: int, layers: int, heads: int, **others: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | others


# OpenAI's ViT-L/14, and the ViT-H/14 that PickScore and HPSv2 were trained from.
_VIT_L: dict[str, Any] = {
    "vision_config": _tower(1024, 24, 16, patch_size=14),
    "text_config": _tower(768, 12, 12),
    "projection_dim": 768,
}
_VIT_H: dict[str, Any] = {
    "vision_config": _tower(1280, 32, 16, patch_size=14),
    "text_config": _tower(1024, 24, 16),
    "projection_dim": 1024,
}
_CLIP = {"aesthetic": _VIT_L, "clip_score": _VIT_L, "pickscore": _VIT_H, "hpsv2": _VIT_H}
_BLIP_VISION = _tower(1024, 24, 16, image_size=224)


class StandIn(TowerReward):
    """Scores a picture by the mean of its embedding. The text tower is not run: it would encode each prompt only once."""

    def __init__(self, section: Tower, device: torch.device) -> None:
        super().__init__(section)
        self.device, self.dtype = device, DTYPES[section.dtype]
        with torch.random.fork_rng(devices=[]), device:
            torch.manual_seed(0)
            self.towers, self.forward, size = architecture(section.name)
        for tower in self.towers:
            tower.to(self.dtype).eval().requires_grad_(False)
        self.preprocessing = Preprocessing(mean=CLIP_MEAN, std=CLIP_STD, size=size)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        pixels = self.preprocessing.read(images.to(self.device), smooth=smooth).to(self.dtype)
        return self.forward(pixels).pooler_output.float().mean(1)

    def to(self, device: torch.device) -> None:
        self.device = device
        for tower in self.towers:
            tower.to(device)


def architecture(name: str) -> tuple[list[nn.Module], Any, int]:
    """(a reward's networks with random weights on the default device, the function of its image tower, its pictures' side)."""
    return _image_reward() if name == "image_reward" else _clip(name)


def _clip(name: str) -> tuple[list[nn.Module], Any, int]:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(EMBEDDED) if name == "image_text" else CLIPConfig(**_CLIP[name])
    model = CLIPModel(config)
    return [model], lambda pixels: model.get_image_features(pixel_values=pixels), config.vision_config.image_size


def _image_reward() -> tuple[list[nn.Module], Any, int]:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(BlipVisionConfig(**_BLIP_VISION))
    text = BlipTextModel(BlipTextConfig(encoder_hidden_size=1024))
    return [vision, text], lambda pixels: vision(pixel_values=pixels), 224
