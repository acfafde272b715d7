"""What a reward's network takes of memory, from its architecture alone; nothing is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dag.accounting import peak_of
from dag.reward_terms import RewardTerm, Tower
from dag.rewards.clip import DTYPES, EMBEDDED


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


@dataclass(frozen=True)
class Footprint:
    """Bytes on the reward's device."""

    weights: int
    activations: int
    """Beyond the weights, at the peak of one forward pass of `max_batch` pictures."""


def footprint(term: RewardTerm) -> Footprint:
    """Of the published network of this name; of one from elsewhere only if it has that architecture."""
    if not isinstance(term, Tower):
        return Footprint(0, 0)
    dtype = DTYPES[term.dtype]
    with torch.device("meta"):
        towers, score, size = architecture(term.name)
        pixels = torch.empty(term.max_batch, 3, size, size, dtype=dtype)
    weights = [p for tower in towers for p in tower.to(dtype).parameters()]

    def forward() -> None:
        with torch.no_grad():
            score(pixels)

    total = sum(weight.nbytes for weight in weights)
    return Footprint(total, peak_of(forward, [*weights, pixels]) - total)


def architecture(name: str) -> tuple[list[nn.Module], Any, int]:
    """(the networks of a reward with the default device's initial weights, its image tower, the side it reads)."""
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
