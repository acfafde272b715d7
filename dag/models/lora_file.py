"""The two files of a trained LoRA, and the notes on its base model that their metadata holds."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
