"""Loads the modules of a diffusers folder: with its weights, or with random ones if it holds configs alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from dag.errors import RunError
from dag.models.source import EMBEDDED, component_folder, is_architecture, read_config

# Loading the text encoder takes no time that a progress bar would have to explain.
disable_progress_bar()


def load_module(
    component: Any, folder: Path, name: str, dtype: torch.dtype, device: torch.device, variant: str | None = None
) -> Any:
    """The component `name` of a diffusers folder on `device`, in eval mode without gradients. Raises RunError.

    On the meta device it has no weights.
    """
    config = read_config(folder, name)
    if is_architecture(folder) or device.type == "meta":
        module = random_weights(component.from_config, config, dtype, device)
    else:
        options = {"torch_dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
        try:
            module = component.from_pretrained(component_folder(folder, name), **options)
        except Exception as error:
            raise RunError(f"model.path: cannot load {name} from {folder}: {_first_line(error)}") from None
    return module.to(device).eval().requires_grad_(False)


def load_text_encoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
    name: str = "text_encoder",
    component: Any = CLIPTextModel,
) -> Any:
    """A text encoder on `device`, in eval mode without gradients. Raises RunError.

    Args:
        name:      its folder.
        component: its class.
    """
    if is_architecture(folder):
        config = component.config_class(**read_config(folder, name))
        module = random_weights(component, config, dtype, device)
    else:
        module = _from_transformers(component, folder, name, dtype=dtype, variant=variant)
    return module.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path, name: str = "tokenizer", component: Any = CLIPTokenizer) -> Any:
    """A tokenizer. A folder without weights gets the embedded model's: to random weights no word means anything."""
    if is_architecture(folder):
        folder, name = EMBEDDED, "tokenizer"
    return _from_transformers(component, folder, name)


def _from_transformers(component: Any, folder: Path, name: str, **options: Any) -> Any:
    place = component_folder(folder, name)
    if not place.is_dir():
        raise RunError(f"model.path: {folder} has no {name} folder; a complete diffusers folder is needed")
    try:
        return component.from_pretrained(place, local_files_only=True, **options)
    except Exception as error:
        raise RunError(f"model.path: cannot load {name} from {folder}: {_first_line(error)}") from None


def random_weights(build: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A module with random weights that depend on its architecture alone; on the meta device it has none."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        # Made in `dtype`: in float32 a large network would need twice its memory, or four times. Float16 has no CPU initialisers.
        torch.set_default_dtype(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        try:
            # diffusers' own `to` would warn that the weights are not trained.
            return nn.Module.to(build(config), dtype)
        finally:
            torch.set_default_dtype(default)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
