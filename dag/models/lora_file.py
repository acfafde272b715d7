"""The two files of a trained LoRA, and the notes on its base model that their metadata holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dag.errors import RunError

DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
"""The file in diffusers' layout, and the one that ComfyUI and the web UIs read."""
NAME, LICENCE = "base_model", "base_model_license"
"""Keys of the metadata: a hub id (which has a slash), or the name of a local folder; an identifier of the hub's list."""


@dataclass(frozen=True)
class Part:
    """The LoRA factors of one network."""

    state: dict[str, Tensor]
    """By peft's names, float32 on the CPU."""
    config: dict[str, Any]
    """peft's, with the scale `lora_alpha`."""


def notes(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises RunError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def label(path: Path, name: str, licence: str | None, to: Path | None = None) -> None:
    """Write the name and the licence of the base model into a file's metadata; its tensors and other metadata stay.

    Args:
        licence: None leaves it out.
        to:      the file to write; None takes `path`.

    Raises:
        RunError: `path` cannot be read.
        OSError, SafetensorError: the file cannot be written.
    """
    kept = {key: value for key, value in notes(path).items() if key != LICENCE}
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    save_file(tensors, to or path, kept | {NAME: name} | ({} if licence is None else {LICENCE: licence}))


def save_for_diffusers(folder: Path, pipeline: Any, parts: Mapping[str, Part]) -> None:
    """Write the factors as a pipeline's class loads them.

    In peft's names: diffusers' older names cover attention layers only, and it loads no file that mixes both.
    """
    layers = {f"{component}_lora_layers": part.state for component, part in parts.items()}
    configs = {f"{component}_lora_adapter_metadata": part.config for component, part in parts.items()}
    pipeline.save_lora_weights(folder, **layers, **configs)


def in_kohyas_names(parts: Mapping[str, Part], *, has_two_encoders: bool) -> dict[str, Tensor]:
    """The LoRA factors of a UNet and its text encoders in the names of kohya's scripts; alpha is a tensor for each layer.

    Args:
        has_two_encoders: the model is of a family with two text encoders, which are then numbered.
    """
    found = {}
    for component, part in parts.items():
        named = {f"{component}.{name}": tensor for name, tensor in part.state.items()}
        for name, tensor in convert_state_dict_to_kohya(named).items():
            key = name if has_two_encoders else name.replace("lora_te1_", "lora_te_")
            found[key] = (
                torch.tensor(float(part.config["lora_alpha"])) if name.endswith(".alpha") else tensor.contiguous()
            )
    return found


def folded(state: dict[str, Tensor], component: str, scale: float) -> dict[str, Tensor]:
    """The LoRA factors of a transformer, by peft's names in `state`, with the component's name before them.

    The scale alpha / rank is multiplied into the second factors: programs that read these names do not look for alpha elsewhere.
    """
    return {
        f"{component}.{name}": (scale * tensor if ".lora_B." in name else tensor).contiguous()
        for name, tensor in state.items()
    }
