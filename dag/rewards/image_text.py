"""Does the picture show what the prompt says: cosine of a CLIP model's image and text embeddings, times 100.

Works on any folder in transformers' CLIPModel format; `embedded` is the small scorer shipped with this package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dag.errors import RunError, UsageError
from dag.rewards.registry import REWARDS

EMBEDDED = Path(__file__).parent.parent / "assets" / "scorer"


class ClipTower:
    """A frozen CLIP model in float32: unit-length embeddings of images and texts."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip import CLIPImageProcessorPil

        folder = EMBEDDED if path == "embedded" else Path(path).expanduser()
        if not folder.is_dir():
            raise UsageError(
                f"image_text.path: there is no folder {path}; give 'embedded' or a folder in CLIPModel format"
            )
        self.device = torch.device(device)
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise RunError(
                f"image_text.path: cannot load a CLIPModel from {folder}: {str(error).splitlines()[0]}"
            ) from None
        self.model.to(self.device).eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, D) float32 unit vectors of (B, 3, H, W) float images in [0, 1], rounded to 8 bits as a file would be."""
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        inputs = self.processor(list(pixels.numpy()), return_tensors="pt", input_data_format="channels_first")
        features = self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device)).pooler_output
        return functional.normalize(features, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(B, D) float32 unit vectors; each distinct text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            length = int(self.model.config.text_config.max_position_embeddings)
            tokens = self.tokenizer(new, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            features = self.model.get_text_features(
                input_ids=tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
            ).pooler_output
            self._texts.update(zip(new, functional.normalize(features, dim=-1), strict=True))
        return torch.stack([self._texts[text] for text in texts])


@REWARDS.register("image_text")
class ImageText:
    """100 * cosine(image, prompt), (B,) float32 in [-100, 100]."""

    takes_device = True

    def __init__(self, path: str = "embedded", device: torch.device | str = "cpu") -> None:
        self.tower = ClipTower(path, device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * (self.tower.embed_images(images) * self.tower.embed_texts(prompts)).sum(-1)
