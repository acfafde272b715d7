"""The protocol of rewards over HTTP: JSON with base64 PNG, never a pickle.

POST {"images": ["iVBORw0...", ...], "prompts": ["a cat", ...]}   ->   200 {"rewards": [5.1, ...]}
                                                                   or  4xx / 5xx {"error": "why"}
"""

import base64
import binascii
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dag.rewards.pixels import to_bytes


def encode_request(images: Tensor, prompts: Sequence[str]) -> bytes:
    """The body that asks for the scores of (B, 3, H, W) images in [0, 1]; they are sent as 8-bit PNGs."""
    return json.dumps({"images": [_png(picture) for picture in to_bytes(images)], "prompts": list(prompts)}).encode()


def decode_request(body: bytes, max_images: int, max_side: int, max_pixels: int = 1 << 62) -> tuple[Tensor, list[str]]:
    """((B, 3, H, W) float32 images in [0, 1], prompts) of a body. Raises ValueError, whose text is meant for the client."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    images = data.get("images") if isinstance(data, dict) else None
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(images, list) or not isinstance(prompts, list):
        raise ValueError('expected {"images": [base64 PNG, ...], "prompts": [text, ...]}')
    if not all(isinstance(entry, str) for entry in [*images, *prompts]):
        raise ValueError("images and prompts must be strings")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    if not 1 <= len(images) <= max_images:
        raise ValueError(f"{len(images)} images; allowed are 1 to {max_images} a request")
    pictures, pixels = [], 0
    for number, text in enumerate(images):
        with _opened(number, text) as image:
            if max(image.size) > max_side:
                raise ValueError(f"image {number} is {image.size[0]}x{image.size[1]}; at most {max_side} a side")
            if (pixels := pixels + image.size[0] * image.size[1]) > max_pixels:
                raise ValueError(f"the images have more than {max_pixels} pixels together; send fewer at a time")
            pictures.append(_decoded(number, image))
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError("all images of a request must have one size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, prompts


def decode_response(body: bytes, count: int) -> Tensor:
    """The (count,) float32 scores of a server's answer. Raises ValueError if the body is anything else."""
    try:
        rewards = json.loads(body)["rewards"]
        values = torch.tensor([float(value) for value in rewards], dtype=torch.float32)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f'expected {{"rewards": [{count} numbers]}}, found {body[:80]!r}') from None
    if values.shape != (count,):
        raise ValueError(f"expected {count} rewards, found {len(values)}")
    return values


def error_of(body: bytes) -> str:
    """The `error` text of a refusal, or the beginning of the body if it has none."""
    try:
        data: Any = json.loads(body)
        return str(data["error"])
    except (ValueError, KeyError, TypeError):
        return repr(body[:80])


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    # The least compression: the network is fast, and compressing more takes longer than scoring.
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _opened(number: int, text: str) -> Image.Image:
    """The picture, of which only the PNG header is read: its size is checked before anything is decoded."""
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"image {number} is not a base64 PNG") from None


def _decoded(number: int, image: Image.Image) -> np.ndarray:
    """The picture's pixels, (H, W, 3) uint8."""
    try:
        return np.array(image.convert("RGB"))
    except (OSError, SyntaxError):
        raise ValueError(f"image {number} is not a base64 PNG") from None
