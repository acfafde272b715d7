"""Finds the folder that `model.path` names: the embedded model, a local folder, or a download from the hub."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dag import hub, recipe
from dag.errors import RunError, UsageError

_ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = _ASSETS / "embedded"
# Configurations without weights, for plans and benchmarks.
_ARCHITECTURES = {f"random-{name}": _ASSETS / "architectures" / name for name in ("sd15", "sdxl")}
# Licences of base models that have no card beside their weights; identifiers of the hub's list.
_LICENCES = {
    "embedded": "apache-2.0",
    **dict.fromkeys(
        (
            "compvis/stable-diffusion-v1-4",
            "runwayml/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        "creativeml-openrail-m",
    ),
    **dict.fromkeys(
        (f"stabilityai/stable-diffusion-{name}" for name in ("2", "2-base", "2-1", "2-1-base", "xl-base-1.0")),
        "openrail++",
    ),
}
_LOCAL_HINT = "or give the path of a local diffusers folder: --set model.path=/path/to/model"


def local_folder(path: str) -> Path | None:
    """The folder that a path names without a download, or None if the path is a hub id.

    Raises UsageError if it is neither a folder nor a hub id.
    """
    if path == "embedded":
        return EMBEDDED
    if path in _ARCHITECTURES:
        return _ARCHITECTURES[path]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UsageError(
            f"model.path: {path} is a file; a diffusers folder is needed (single-file checkpoints must be converted)"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return None
    raise UsageError(f"model.path: there is no folder {path}, and it does not look like a hub id (owner/name)")


def public_name(path: str) -> str:
    """The name of a model for readers on other machines: a hub id or a name of this package as it is, a folder's own name."""
    folder = local_folder(path)
    if folder is None or folder == EMBEDDED or is_architecture(folder):
        return path
    return folder.resolve().name


def licence(path: str, folder: Path | None = None) -> str | None:
    """The licence of a model: as its card says, README.md in `folder`, else as known for a hub id; None if neither says."""
    stated = None if folder is None else _front_matter(folder / "README.md").get("license")
    return stated if isinstance(stated, str) and stated else _LICENCES.get(path.lower())


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the beginning of a model card; empty if there is no card or none in it."""
    try:
        _, _, rest = card.read_text(encoding="utf-8").partition("---\n")
        found = yaml.safe_load(rest.partition("\n---")[0])
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def counted_as(path: str) -> str:
    """`path`, or for a hub id the architecture whose configs are counted in its place: an SDXL by its name, else an SD 1.5."""
    if local_folder(path) is not None:
        return path
    return "random-sdxl" if re.search(r"xl|playground-v2", path.lower()) else "random-sd15"


def is_architecture(folder: Path) -> bool:
    """Whether the folder holds configs without weights, so that its modules get random ones."""
    return folder in _ARCHITECTURES.values()


def resolve(model: recipe.Model) -> Path:
    """The model's folder, downloaded if need be. Raises UsageError for a wrong path, RunError for a failed download."""
    folder = local_folder(model.path)
    return folder if folder is not None else _download(model)


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """The JSON config of one component of a diffusers folder. Raises RunError if it is missing or cannot be read."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folder / component / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = " (a transformer model such as SD3 or FLUX?)" if (folder / "transformer").is_dir() else ""
        raise RunError(
            f"model.path: {folder} has no {component}/{name}; a Stable Diffusion folder in diffusers format is needed{hint}"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"model.path: cannot read {path}: {error}") from None


def _download(model: recipe.Model) -> Path:
    variant = f".{model.variant}" if model.variant else ""
    weights = [f"{encoder}/model{variant}*.safetensors*" for encoder in ("text_encoder", "text_encoder_2")]
    weights += [
        f"{part}/diffusion_pytorch_model{variant}{rest}"
        for part in ("unet", "vae")
        for rest in (".safetensors", "-*", ".safetensors.index*")
    ]
    patterns = ["README.md", "model_index.json", "*/*.json", "tokenizer/*", "tokenizer_2/*", *weights]
    return hub.snapshot("model.path", model.path, patterns, _LOCAL_HINT, model.revision, ["safety_checker/*"])
