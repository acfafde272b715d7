"""The program that draws with a run's weights in plain diffusers, for its model card and its page. Imports no diffusers itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dag.models.source import SHIPPED

XL, SD3, FLUX = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
_EMBEDDED_FLOW = "embedded_flow"
_ANY = "DiffusionPipeline"
_UNET = ("unet", "UNet2DConditionModel")
# Folder and class of the denoiser, by the pipeline.
_DENOISERS = {
    "StableDiffusionPipeline": _UNET,
    XL: _UNET,
    SD3: ("transformer", "SD3Transformer2DModel"),
    FLUX: ("transformer", "FluxTransformer2DModel"),
}
# What FLUX is trained with if the recipe does not say; `dag.models.flux` has the same. Without guidance built in, the pipeline's
# own number of tokens is another.
FLUX_GUIDANCE, _FLUX_TOKENS = 3.5, {True: 512, False: 256}
_FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

Asked = Callable[[str], Any]


@dataclass(frozen=True)
class Family:
    """What diffusers must be told of a model."""

    pipeline: str
    """Its class in diffusers."""
    is_flow: bool = False
    """Whether it predicts a velocity."""
    takes_guidance: bool = False
    """Whether its network is told a guidance scale."""

    @classmethod
    def of(cls, described: object, path: object, pipeline: str = _ANY) -> "Family":
        """The family of a run's model.

        Args:
            described: section `model` of run.json, as far as it is there.
            path:      `model.path`.
            pipeline:  taken if run.json names none that is known.
        """
        told = described if isinstance(described, dict) else {}
        named = told.get("pipeline")
        if isinstance(named, str) and named in _DENOISERS:
            pipeline = named
        is_flow = told.get("prediction_type") == "velocity" or pipeline in (SD3, FLUX) or path == _EMBEDDED_FLOW
        return cls(pipeline, is_flow, bool(told.get("takes_guidance", pipeline == FLUX)))

    @property
    def component(self) -> str:
        """The denoiser's folder."""
        return _DENOISERS.get(self.pipeline, _UNET)[0]

    @property
    def network(self) -> str:
        """The denoiser's class in diffusers."""
        return _DENOISERS.get(self.pipeline, _UNET)[1]


class Place(NamedTuple):
    """Where a program finds a model or weights."""

    name: str
    """A folder, a hub id or a shipped model's name."""
    comment: str = ""
    """For the reader of the program."""


def program(asked: Asked, family: Family, base: Place, weights: Place, prompt: str = "a cat") -> str:
    """Python that draws a picture with the trained weights, by the recipe's steps and guidance.

    A diffusion model is sampled as in training, a flow model along its ODE: see `deviation`.

    Args:
        asked:   gives the value of a dotted key of the recipe; None, where it has no such key, is left out.
        weights: folder or hub id of the LoRA; the run's folder of weights for a full fine-tune.
    """
    is_full, is_shipped = asked("adapter.kind") == "full", base.name in SHIPPED
    classes = {family.pipeline} | ({family.network} if is_full else set())
    if not family.is_flow:
        classes.add("DDIMScheduler")
    elif base.name == _EMBEDDED_FLOW:
        classes |= {family.network, _FLOW_SCHEDULER}
    shipped = "from dag.models.source import SHIPPED  # the models that come with the code that trained it"
    trained = weights._replace(name=f"{weights.name}/{family.component}") if is_full else weights
    return "\n".join(
        [
            *(["import numpy"] if family.is_flow else []),
            "import torch",
            f"from diffusers import {', '.join(sorted(classes))}",
            *([shipped] if is_shipped else []),
            "",
            # The embedded flow model's folder has a denoiser and a scheduler; the rest is the embedded model's.
            'base = SHIPPED["embedded"]' if is_shipped else _assigned("base", base),
            _assigned("trained" if is_full else "lora", trained),
            *_opened(asked, family, base),
            *_scheduled(asked, family),
            f"pipe.{family.component} = {family.network}.from_pretrained(trained, torch_dtype=dtype).to(device)"
            if is_full
            else 'pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")',
            f"image = pipe({_quoted(prompt)}, {', '.join(_arguments(asked, family))}).images[0]",
            'image.save("picture.png")',
        ]
    )


def deviation(family: Family) -> str:
    """A sentence on how the program's pictures differ from those of training; "" for a diffusion model."""
    if not family.is_flow:
        return ""
    return (
        "The code takes the steps of the ODE, without noise, through the noise levels of training, which sampled with noise: "
        "diffusers' pipeline of this model cannot. So its pictures are not those of the run."
    )


def other_programs(family: Family, file: str) -> str:
    """How ComfyUI and the web UIs use the LoRA in `file`, as Markdown with no markup but `code`."""
    if family.is_flow and family.component == "unet":
        return (
            f"`{file}` holds the LoRA in the names of kohya's scripts. ComfyUI and the web UIs take a UNet of Stable Diffusion for "
            "a diffusion model, which this is not: use diffusers."
        )
    names = (
        " It holds diffusers' names of the transformer's layers, with alpha multiplied into the factors (not tried in ComfyUI)."
        if family.component == "transformer"
        else ""
    )
    return (
        f"Put `{file}` into `ComfyUI/models/loras/` and add the node Load LoRA behind the base model, strength 1. There is no "
        f"trigger word.{names}"
    )


def _opened(asked: Asked, family: Family, base: Place) -> list[str]:
    """The lines that load the base model."""
    half = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(str(asked("model.dtype")))
    dtype = f'{half} if device == "cuda" else torch.float32' if half else "torch.float32"
    options = [f"{key}={_quoted(value)}" for key in ("revision", "variant") if (value := asked(f"model.{key}"))]
    lines = ['device = "cuda" if torch.cuda.is_available() else "cpu"', f"dtype = {dtype}"]
    if base.name == _EMBEDDED_FLOW:
        lines += [
            'flow = SHIPPED["embedded_flow"]',
            f'unet = {family.network}.from_pretrained(flow, subfolder="unet", torch_dtype=dtype)',
            f'scheduler = {_FLOW_SCHEDULER}.from_pretrained(flow, subfolder="scheduler")',
        ]
        options = ["unet=unet", "scheduler=scheduler"]
    given = ", ".join(["base", *options, "torch_dtype=dtype"])
    return [*lines, f"pipe = {family.pipeline}.from_pretrained({given}).to(device)"]


def _scheduled(asked: Asked, family: Family) -> list[str]:
    """The lines that make the pipeline's scheduler that of training."""
    if not family.is_flow:
        return ["pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"]
    lines, shift = [], asked("sampler.shift")
    if shift is not None:
        options = f"shift={shift!r}, use_dynamic_shifting=False"
        lines.append(f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {options})")
    if family.component == "unet":
        lines.append("pipe.scheduler.init_noise_sigma = 1.0  # this pipeline reads it, and flow schedulers have none")
    return [*lines, f"steps = {asked('sampler.steps')!r}"]


def _arguments(asked: Asked, family: Family) -> list[str]:
    """The arguments of the pipeline's call, but for the prompt."""
    scale, side = asked("sampler.guidance_scale"), asked("model.resolution")
    given: dict[str, Any] = {"num_inference_steps": asked("sampler.steps"), "guidance_scale": scale}
    if family.pipeline == FLUX:
        given |= _of_flux(asked, family, scale)
    elif family.pipeline == SD3:
        given["max_sequence_length"] = asked("model.max_tokens")
    if not family.is_flow:
        given["eta"] = asked("sampler.eta")
    given |= {"height": side, "width": side}
    arguments = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    if family.is_flow:
        arguments[0] = "num_inference_steps=steps, sigmas=numpy.linspace(1, 1 / steps, steps)"
    return arguments


def _of_flux(asked: Asked, family: Family, scale: Any) -> dict[str, Any]:
    """FLUX's pipeline has another name for classifier-free guidance; its guidance_scale is what the network is told."""
    told = asked("sampler.guidance_embedding")
    is_guided = isinstance(scale, int | float) and scale > 1
    return {
        "guidance_scale": (FLUX_GUIDANCE if told is None else told) if family.takes_guidance else None,
        "negative_prompt": "" if is_guided else None,
        "true_cfg_scale": scale if is_guided else None,
        "max_sequence_length": asked("model.max_tokens") or _FLUX_TOKENS[family.takes_guidance],
    }


def _assigned(name: str, place: Place) -> str:
    return f"{name} = {_quoted(place.name)}" + (f"  # {place.comment}" if place.comment else "")


def _quoted(text: Any) -> str:
    """The text as a Python literal."""
    return json.dumps(text, ensure_ascii=False) if isinstance(text, str) else repr(text)
