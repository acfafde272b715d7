"""A frozen CLIP model that gives embeddings of images and texts. It reads every layout in which CLIP weights are published.

Legend: B images or texts, D embedding width, S the side of the tower's pictures in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from dag.errors import RunError, UsageError
from dag.rewards.conversion import clip_component
from dag.rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocessing
from dag.rewards.text import Cleaning
from dag.rewards.weights import Published, converted, locate, read_config, read_json, read_state

EMBEDDED = Path(__file__).parent.parent / "assets" / "scorer"
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The files of a CLIP model on the hub in transformers' layout.
HUB_FILES = ("*.json", "merges.txt", "model.safetensors", "model-*.safetensors")
VIT_L = Published("openai/clip-vit-large-patch14", HUB_FILES)
# The settings of open_clip's ViT-H-14 that shapes do not show: exact GELU, and 16 heads (80 wide in the vision tower).
VIT_H_CONFIG = {
    "vision_config": {"num_attention_heads": 16, "hidden_act": "gelu"},
    "text_config": {"num_attention_heads": 16, "hidden_act": "gelu"},
}


@dataclass(frozen=True)
class ClipSource:
    """Where a CLIP model comes from and how its inputs are prepared; equal sources share one model."""

    key: str
    """What errors call the weights: the recipe's key, e.g. `hpsv2.path`."""
    published: Published
    path: str | None = None
    """A transformers folder, an OpenAI or open_clip file, a hub id, or `embedded`; None takes `published`."""
    tokenizer: str | None = None
    """A folder or hub id with CLIP's tokenizer; None looks in the model's folder, then at OpenAI's model."""
    config: str | None = None
    """A JSON file of CLIPConfig entries, for weights of an unusual architecture; it replaces `architecture`."""
    architecture: Mapping[str, Any] | None = None
    """The CLIPConfig entries of a published file that its shapes do not show and that differ from OpenAI's models."""
    preprocessing: Preprocessing | None = None
    """How pictures are prepared; its size is replaced by the model's. None takes the folder's preprocessor_config.json, or
    CLIP's own preprocessing."""
    dtype: str = "fp32"


class ClipTower:
    """A CLIP model whose embeddings have unit length and are float32, whatever the model's precision."""

    def __init__(self, source: ClipSource, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.dtype = DTYPES[source.dtype]
        self.model, folder = _load_model(source, self.dtype)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = _load_tokenizer(source, folder)
        size = self.model.config.vision_config.image_size
        self.preprocessing = replace(source.preprocessing or _preprocessing(folder), size=size)
        self._texts: dict[str, Tensor] = {}
        # exp of the trained log-temperature, the factor of cosines. Read once here, since reading waits for the device.
        self.logit_scale = float(self.model.logit_scale.float().exp())

    def to(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device)
        self._texts = {text: embedding.to(device) for text, embedding in self._texts.items()}

    def embed_images(self, images: Tensor, *, smooth: bool = False) -> Tensor:
        """(B, D) embeddings of (B, 3, H, W) images in [0, 1].

        With `smooth` the tensors themselves are embedded, with gradients; without it the 8-bit pictures made from them.
        """
        with torch.set_grad_enabled(smooth and torch.is_grad_enabled()):
            return self.embed_pixels(self.preprocessing.read(images.to(self.device), smooth=smooth))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(B, D) embeddings of preprocessed (B, 3, S, S) pixels."""
        features = self.model.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output
        return _unit(features)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], cleaning: Cleaning | None = None) -> Tensor:
        """(B, D) embeddings; each distinct text is encoded once. `cleaning` is applied before the tokenizer."""
        cleaned = [text if cleaning is None else cleaning(text) for text in texts]
        new = [text for text in dict.fromkeys(cleaned) if text not in self._texts]
        if new:
            length = int(self.model.config.text_config.max_position_embeddings)
            tokens = self.tokenizer(new, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            features = self.model.get_text_features(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
            ).pooler_output
            self._texts.update(zip(new, _unit(features), strict=True))
        return torch.stack([self._texts[text] for text in cleaned])


def _unit(features: Tensor) -> Tensor:
    """The rows, scaled to unit length, in float32 or float64."""
    return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


_shared: WeakValueDictionary[str, ClipTower] = WeakValueDictionary()


def shared_tower(source: ClipSource, device: torch.device | str = "cpu") -> ClipTower:
    """The tower of a source, loaded once for all rewards that name the same weights, inputs and device."""
    # The key only names the source in errors; aesthetic and clip_score read one ViT-L.
    identity = repr((replace(source, key=""), str(device)))
    tower = _shared.get(identity)
    if tower is None:
        tower = _shared[identity] = ClipTower(source, device)
    return tower


def feature_tower(key: str, path: str, device: torch.device | str = "cpu") -> ClipTower:
    """The CLIP model of `embedded`, a folder, a file or a hub id, for measuring pictures."""
    return shared_tower(ClipSource(key, VIT_L, path), device)


def _embedded_or(path: str | None) -> str | None:
    """The path, with `embedded` as the folder of the scorer that ships with this package."""
    return str(EMBEDDED) if path == "embedded" else path


def _load_model(source: ClipSource, dtype: torch.dtype) -> tuple[Any, Path]:
    """(CLIPModel, the folder where a tokenizer may lie beside it)."""
    from transformers import CLIPModel

    location = locate(source.key, _embedded_or(source.path), source.published)
    folder, beside = location, location
    if location.is_file():
        overrides = read_config(source.key.replace("path", "config"), source.config, source.architecture)
        beside = location.parent
        stored = converted(
            source.key,
            location,
            lambda: {"model": clip_component(source.key, read_state(source.key, location), overrides)},
            {"config": overrides},
        )
        folder = stored / "model"
    return load_strictly(source.key, CLIPModel, folder, dtype), beside


def load_strictly(key: str, model_class: Any, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A transformers model from a local folder. Raises RunError unless every weight is found and used."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, RuntimeError and safetensors' own for damaged folders.
        reason = str(error).partition("\n")[0]
        raise RunError(f"{key}: cannot load a {model_class.__name__} from {folder}: {reason}") from None
    wrong = {name: sorted(map(str, report.get(name) or ())) for name in ("missing_keys", "mismatched_keys")}
    wrong["unexpected_keys"] = [
        name for name in sorted(report.get("unexpected_keys") or ()) if not name.endswith("position_ids")
    ]
    for name, keys in wrong.items():
        if keys:
            raise RunError(f"{key}: {folder} does not fit {model_class.__name__}: {name.replace('_', ' ')} {keys[:3]}")
    return model


def _load_tokenizer(source: ClipSource, folder: Path) -> Any:
    from transformers import CLIPTokenizer

    key = source.key.replace("path", "tokenizer")
    place = folder
    if source.tokenizer is not None:
        place = locate(key, _embedded_or(source.tokenizer), VIT_L)
    elif not _has_tokenizer(folder):
        names = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
        place = locate(key, None, Published(VIT_L.repo, names))
    try:
        return CLIPTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{key}: cannot load a CLIP tokenizer from {place}: {reason}") from None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _preprocessing(folder: Path) -> Preprocessing:
    """The preprocessing that a transformers folder asks for; CLIP's own constants where it says nothing."""
    path = folder / "preprocessor_config.json"
    config = read_json("preprocessor_config.json", path) if path.is_file() else {}
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    return Preprocessing(mean=tuple(mean), std=tuple(std))
