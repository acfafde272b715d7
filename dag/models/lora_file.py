"""The two files of a trained LoRA, and the notes on its base model that their metadata holds."""

from pathlib import Path

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


def in_kohyas_names(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The LoRA factors of a UNet, by peft's names in `state`, in the names of kohya's scripts; alpha is a tensor for each layer."""
    renamed = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in state.items()})
    alphas = {
        name.replace(".lora_down.weight", ".alpha"): torch.tensor(float(alpha))
        for name in renamed
        if name.endswith(".lora_down.weight")
    }
    return {name: tensor.contiguous() for name, tensor in (renamed | alphas).items()}


def folded(state: dict[str, Tensor], component: str, scale: float) -> dict[str, Tensor]:
    """The LoRA factors of a transformer, by peft's names in `state`, with the component's name before them.

    The scale alpha / rank is multiplied into the second factors: programs that read these names do not look for alpha elsewhere.
    """
    return {
        f"{component}.{name}": (scale * tensor if ".lora_B." in name else tensor).contiguous()
        for name, tensor in state.items()
    }
