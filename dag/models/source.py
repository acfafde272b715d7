"""Finds the folder that `model.path` names: the embedded model, a local folder, or a download from the hub."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dag import hub, recipe
from dag.errors import RunError, UsageError

_ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED, EMBEDDED_FLOW = _ASSETS / "embedded", _ASSETS / "embedded_flow"
SHIPPED = {"embedded": EMBEDDED, "embedded_flow": EMBEDDED_FLOW}
# Configurations without weights, for plans and benchmarks.
_ARCHITECTURES = {
    f"random-{name}": _ASSETS / "architectures" / name
    for name in ("sd15", "sdxl", "sd35m", "sd35l", "flux", "flux-schnell")
}
# Side of the latent of a model whose config names none, as FLUX's.
_TRANSFORMERS_SIDE = 128
# Licences of base models that have no card beside their weights; identifiers of the hub's list, or the names on the models' cards.
_LICENCES = {
    **dict.fromkeys(SHIPPED, "apache-2.0"),
    "black-forest-labs/flux.1-schnell": "apache-2.0",
    "black-forest-labs/flux.1-dev": "flux-1-dev-non-commercial-license",
    **dict.fromkeys(
        (f"stabilityai/stable-diffusion-3.5-{size}" for size in ("medium", "large", "large-turbo")),
        "stabilityai-ai-community",
    ),
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
# The architecture of a hub id, by what its name has.
_BY_NAME = {
    r"schnell": "random-flux-schnell",
    r"flux": "random-flux",
    r"(sd|stable-diffusion)-?3\.?5?-large": "random-sd35l",
    r"(sd|stable-diffusion)-?3": "random-sd35m",
    r"xl|playground-v2": "random-sdxl",
}
_LOCAL_HINT = "or give the path of a local diffusers folder: --set model.path=/path/to/model"


def local_folder(path: str) -> Path | None:
    """The folder that a path names without a download, or None if the path is a hub id.

    Raises UsageError if it is neither a folder nor a hub id.
    """
    if path in SHIPPED:
        return SHIPPED[path]
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
    if folder is None or path in SHIPPED or is_architecture(folder):
        return path
    return folder.resolve().name


def licence(path: str, folder: Path | None = None) -> str | None:
    """The licence of a model: as its card says, README.md in `folder`, else as known for a hub id; None if neither says."""
    card = {} if folder is None else _front_matter(folder / "README.md")
    # Licences that are not on the hub's list have their name in a key of their own.
    stated = card.get("license_name") if card.get("license") == "other" else card.get("license")
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
    """`path`, or for a hub id the architecture whose configs are counted in its place, by its name; else an SD 1.5."""
    if local_folder(path) is not None:
        return path
    return next((found for pattern, found in _BY_NAME.items() if re.search(pattern, path.lower())), "random-sd15")


def is_architecture(folder: Path) -> bool:
    """Whether the folder holds configs without weights, so that its modules get random ones."""
    return folder in _ARCHITECTURES.values()


def resolve(model: recipe.Model) -> Path:
    """The model's folder, downloaded if need be. Raises UsageError for a wrong path, RunError for a failed download."""
    folder = local_folder(model.path)
    return folder if folder is not None else _download(model)


def component_folder(folder: Path, name: str) -> Path:
    """The folder of a component of a diffusers folder. The embedded flow model shares all but two with the embedded model."""
    is_shared = folder == EMBEDDED_FLOW and name not in ("unet", "scheduler")
    return (EMBEDDED if is_shared else folder) / name


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """The JSON config of one component of a diffusers folder. Raises RunError if it is missing or cannot be read."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = component_folder(folder, component) / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        is_unnamed = component == "unet" and (folder / "transformer").is_dir()
        hint = ", and its model_index.json names no pipeline with a transformer that is known" if is_unnamed else ""
        raise RunError(
            f"model.path: {folder} has no {component}/{name}; a folder in diffusers format is needed{hint}"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"model.path: cannot read {path}: {error}") from None


def latent_shape(folder: Path, resolution: int | None, patch: int = 1) -> tuple[int, int, int]:
    """(C, H, W) of a latent of a square picture.

    Args:
        resolution: the picture's side in pixels; None takes the model's own.
        patch:      of which H and W must be multiples.

    Raises:
        UsageError: a resolution that does not fit the model.
        RunError:   a config is missing or cannot be read.
    """
    vae, denoiser = read_config(folder, "vae"), read_config(folder, denoiser_of(folder))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution = resolution or int(denoiser.get("sample_size") or _TRANSFORMERS_SIDE) * factor
    if resolution % (factor * patch):
        raise UsageError(f"model.resolution={resolution} must be a multiple of {factor * patch} for this model")
    # A transformer may take several latent elements as one token, whose channels its own config counts.
    has_unet = denoiser_of(folder) == "unet"
    channels = denoiser["in_channels"] if has_unet else vae["latent_channels"]
    return int(channels), resolution // factor, resolution // factor


def denoiser_of(folder: Path) -> str:
    """The name of the denoiser's folder."""
    return "transformer" if (folder / "transformer").is_dir() else "unet"


def _download(model: recipe.Model) -> Path:
    variant = f".{model.variant}" if model.variant else ""
    encoders = [f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    weights = [
        f"{encoder}/model{variant}{rest}"
        for encoder in encoders
        for rest in (".safetensors", "-*", ".safetensors.index*")
    ]
    weights += [
        f"{part}/diffusion_pytorch_model{variant}{rest}"
        for part in ("unet", "transformer", "vae")
        for rest in (".safetensors", "-*", ".safetensors.index*")
    ]
    tokenizers = [f"tokenizer{suffix}/*" for suffix in ("", "_2", "_3")]
    patterns = ["README.md", "model_index.json", "*/*.json", *tokenizers, *weights]
    return hub.snapshot("model.path", model.path, patterns, _LOCAL_HINT, model.revision, ["safety_checker/*"])
