"""ImageReward v1.0 (Xu et al. 2023): a BLIP text encoder with cross-attention to the picture, and linear layers on its [CLS]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dag.errors import UsageError
from dag.recipe.reward_sections import ImageReward as Section
from dag.rewards.clip import DTYPES, load_strictly
from dag.rewards.conversion import image_reward_components
from dag.rewards.pixels import Preprocessing
from dag.rewards.registry import REWARDS
from dag.rewards.tower import LinearHead, TowerReward
from dag.rewards.weights import Published, converted, locate, read_config, read_state

PUBLISHED = Published("zai-org/ImageReward", ("ImageReward.pt",))
TOKENIZER = Published("google-bert/bert-base-uncased", ("tokenizer*", "vocab.txt"))
# The mean and the standard deviation of the model's scores on its authors' validation pictures.
MEAN, SD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35


@REWARDS.register("image_reward")
class ImageReward(TowerReward):
    """(head(h_[CLS]) - MEAN) / SD, about -2..2, (B,) float32.

    The section's `path` is ImageReward.pt or a folder that holds it, its `tokenizer` is bert-base-uncased's, and its
    `config` is a JSON file {"vision": {...}, "text": {...}} of transformers' BLIP settings.
    """

    def __init__(self, section: Section, device: torch.device) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__(section)
        key, self.dtype = "image_reward.path", DTYPES[section.dtype]
        overrides = read_config("image_reward.config", section.config)
        location = locate(key, section.path, PUBLISHED)
        if location.is_dir():
            raise UsageError(f"{key}: the folder {location} holds no {PUBLISHED.files[0]}; give that file")
        folder = converted(
            key,
            location,
            lambda: image_reward_components(key, read_state(key, location), overrides),
            {"config": overrides},
        )
        self.vision = load_strictly(key, BlipVisionModel, folder / "vision", self.dtype)
        self.text = load_strictly(key, BlipTextModel, folder / "text", self.dtype, add_pooling_layer=False)
        head = read_state(key, folder / "head" / "model.safetensors")
        self.head = LinearHead(key, head, self.text.config.hidden_size)
        self.tokenizer = _tokenizer(section.tokenizer, location.parent)
        self.preprocessing = Preprocessing(size=self.vision.config.image_size)
        self._read: tuple[str, ...] = ()
        self._ids = self._mask = torch.empty(0)
        for module in (self.vision, self.text):
            module.eval().requires_grad_(False)
        self.to(device)

    def to(self, device: torch.device) -> None:
        self.device, self._read = device, ()
        for module in (self.vision, self.text, self.head):
            module.to(device)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        images = images.to(self.device)
        pixels = self.preprocessing.read(images, smooth=smooth)
        return self.score_pixels(pixels, prompts)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of preprocessed (B, 3, S, S) pixels."""
        # Not the pooled output, to which transformers applies the final layer norm a second time.
        picture = self.vision(pixel_values=pixels.to(self.dtype)).last_hidden_state
        ids, mask = self._tokens(tuple(prompts))
        hidden = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=picture,
            is_decoder=False,  # a bidirectional mask
        ).last_hidden_state
        return (self.head(hidden[:, 0]) - MEAN) / SD

    def _tokens(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """(token ids (B, S), attention mask (B, 1, 1, S)) on the device, with S = MAX_TOKENS.

        Both are kept for the next call, since a micro-batch asks for the same prompts again and again. The mask has the form
        in which it is added to attention scores: given one of shape (B, S), transformers checks in every call whether it
        masks anything, which waits for the device.
        """
        if prompts != self._read:
            options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
            tokens = self.tokenizer(list(prompts), **options)
            lowest = torch.finfo(self.dtype).min
            mask = (1 - tokens.attention_mask[:, None, None].to(self.dtype)) * lowest
            self._ids, self._mask = tokens.input_ids.to(self.device), mask.to(self.device)
            self._read = prompts
        return self._ids, self._mask


def _tokenizer(path: str | None, beside: Path) -> Any:
    """BERT's tokenizer with ImageReward's two added tokens, which take the vocabulary's next ids."""
    from transformers import BertTokenizer

    key = "image_reward.tokenizer"
    if path is None and (beside / "vocab.txt").is_file():
        path = str(beside)
    place = locate(key, path, TOKENIZER)
    try:
        tokenizer = BertTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{key}: cannot load a BERT tokenizer from {place}: {reason}") from None
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer
