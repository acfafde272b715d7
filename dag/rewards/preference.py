"""Human-preference models on CLIP ViT-H/14: PickScore and HPSv2."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dag.rewards.clip import ClipSource, shared_tower
from dag.rewards.pixels import Preprocessing
from dag.rewards.registry import REWARDS
from dag.rewards.text import openai_cleaning
from dag.rewards.tower import TowerReward
from dag.rewards.weights import Published

_FILES = ("*.json", "model.safetensors", "model-*.safetensors", "merges.txt")
PICKSCORE = Published("yuvalkirstain/PickScore_v1", _FILES)
HPS = {
    "v2.1": Published("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
    "v2.0": Published("xswu/HPSv2", ("HPS_v2_compressed.pt",)),
}
# open_clip's ViT-H-14: heads of 80 in the vision tower, exact GELU.
_VIT_H = {
    "vision_config": {"num_attention_heads": 16, "hidden_act": "gelu"},
    "text_config": {"num_attention_heads": 16, "hidden_act": "gelu"},
}


_PICKSCORE_PIXELS = Preprocessing(crop_rounding="down")
_HPS_PIXELS = Preprocessing(fit="longest")


@REWARDS.register("pickscore")
class PickScore(TowerReward):
    """exp(logit_scale) * cosine(image, prompt), about 20 (Kirstain et al. 2023); the raw logit, no softmax."""

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        config: str | Mapping[str, Any] | None = None,
        dtype: str = "fp32",
        max_batch: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(max_batch, dtype)
        source = ClipSource("pickscore.path", PICKSCORE, path, tokenizer, config, _VIT_H, _PICKSCORE_PIXELS, dtype)
        self.tower = shared_tower(source, device)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        # Its own code uses the bare tokenizer: no cleaning.
        cosine = (self.tower.embed_images(images, smooth=smooth) * self.tower.embed_texts(prompts)).sum(-1)
        return self.tower.logit_scale * cosine

    def to(self, device: torch.device) -> None:
        self.tower.to(device)


@REWARDS.register("hpsv2")
class HPSv2(TowerReward):
    """cosine(image, prompt) of Human Preference Score v2 (Wu et al. 2023), about 0.2..0.3.

    Args:
        version: "v2.1" (better, the default) or "v2.0" (the original package's default); a `path` of your own
            says itself which it is.
    """

    def __init__(
        self,
        path: str | None = None,
        version: str = "v2.1",
        tokenizer: str | None = None,
        config: str | Mapping[str, Any] | None = None,
        dtype: str = "fp32",
        max_batch: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(max_batch, dtype)
        source = ClipSource("hpsv2.path", HPS[version], path, tokenizer, config, _VIT_H, _HPS_PIXELS, dtype)
        self.tower = shared_tower(source, device)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        texts = self.tower.embed_texts(prompts, openai_cleaning)
        return (self.tower.embed_images(images, smooth=smooth) * texts).sum(-1)

    def to(self, device: torch.device) -> None:
        self.tower.to(device)
