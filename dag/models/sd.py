"""Stable Diffusion 1.x / 2.x (and the embedded model) as a policy: text encoder, UNet with adapter, VAE, schedule.

The safety checker is never loaded, no prompt is replaced by the empty one as in training a diffusion model, and every module
stays in eval mode, so that the same state always gives the same prediction.

Legend: B samples, P prompts, S text tokens, D text width, C H W latent.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from dag_kernels import guided
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor, nn

from dag.chain.policy import Prediction
from dag.chain.schedule import PREDICTION_TYPES, Schedule
from dag.errors import RunError, UsageError
from dag.models import lora_file
from dag.models.adapter import TrainedWeights, add_lora
from dag.models.decoder import Decoder
from dag.models.frozen import freeze_convolutions
from dag.models.levers import checkpoint_activations, choose_attention, compile_unet, quantise
from dag.models.source import licence, public_name, read_config
from dag.models.weights import load_module, load_text_encoder, load_tokenizer
from dag.recipe import ForwardLooking, Memory, Recipe, Sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tokens of a prompt if the text encoder's config does not say; transformers' own default.
_CLIP_TOKENS = 77
# A vocabulary of fewer tokens is a closed list of words: a word outside it is split into letters.
_OPEN_VOCABULARY = 10_000


class StableDiffusion:
    """A Stable Diffusion model as a `dag.chain.policy.Policy`.

    Args:
        recipe: its sections model, adapter, sampler and memory are read, and its seed, for the adapter's initial values.
        folder: the model's diffusers folder.
        device: where the denoiser and the VAE are.
        forward_looking: the section that says how previews are decoded; None if there are none.

    Raises:
        UsageError: the recipe asks for what this model cannot do.
        RunError:   the model cannot be read.
    """

    pipeline: ClassVar[Any] = StableDiffusionPipeline
    """diffusers' pipeline, which writes and reads the LoRA."""
    tiny_at_hub: ClassVar[str] = "madebyollin/taesd"
    """The AutoencoderTiny for these latents."""

    def __init__(
        self, recipe: Recipe, folder: Path, device: torch.device, forward_looking: ForwardLooking | None = None
    ) -> None:
        model, sampler, memory = recipe.model, recipe.sampler, recipe.memory
        if model.dtype == "fp16" and device.type == "cpu":
            raise UsageError("model.dtype=fp16 needs a GPU; on a CPU use bf16 or fp32")
        self.device, self.dtype, self.sampler, self.adapter = device, DTYPES[model.dtype], sampler, recipe.adapter
        self.folder, self._variant, self.source = folder, model.variant, model.path
        self._check(folder)
        self.schedule: Schedule = _schedule(self._load_scheduler(), sampler).to(device)
        self.layout = torch.channels_last if memory.channels_last else torch.contiguous_format
        self.attention, self.denoiser = self._load_unet(memory)
        vae_dtype = self._vae_dtype()
        self.decoder = Decoder(
            folder, self._variant, vae_dtype, device, sampler.tile, memory, forward_looking, self.tiny_at_hub
        )
        resolution = model.resolution or self.denoiser.config.sample_size * self.decoder.side
        if resolution % self.decoder.side:
            raise UsageError(f"model.resolution={resolution} must be a multiple of {self.decoder.side} for this VAE")
        side = resolution // self.decoder.side
        self.latent_shape = (int(self.denoiser.config.in_channels), side, side)
        self._text: tuple[Any, Any] | None = None
        self._uncond: Tensor | None = None
        self.weights = self._train_weights(recipe.seed)
        checkpoint_activations(self.denoiser, memory.checkpointing, self.weights.as_now)
        compile_unet(self.denoiser, memory.compile)

    def _check(self, folder: Path) -> None:
        """Raises RunError for a model of another family."""
        unet = read_config(folder, "unet")
        if unet.get("addition_embed_type") or (folder / "text_encoder_2").is_dir():
            raise RunError(
                f"model.path: {folder} has a second text encoder but model_index.json does not name a StableDiffusionXLPipeline"
            )
        check_channels(folder, unet)

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S, D) of a prompt's embedding."""
        tokens = read_config(self.folder, "text_encoder").get("max_position_embeddings", _CLIP_TOKENS)
        return int(tokens), int(self.denoiser.config.cross_attention_dim)

    def blank_prompt(self) -> None:
        """Keep an uninitialised embedding of the empty prompt, instead of calling `encode`; for forecasts on the meta device."""
        self._uncond = torch.empty(1, *self.text_shape, dtype=self.dtype, device=self.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, S, D) embeddings on the CPU, in the network's dtype. The text encoder stays until `free_text_encoder`."""
        tokenizer, encoder = self._load_text()
        length = int(encoder.config.max_position_embeddings)
        tokens = tokenizer(
            ["", *prompts], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            embedded = torch.cat(
                [encoder(ids.to(self.device))[0].to(self.dtype).cpu() for ids in tokens.input_ids.split(64)]
            )
        self._uncond = embedded[:1].to(self.device)
        return embedded[1:]

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """One sentence for each prompt that is too long, and for each with words outside a closed vocabulary."""
        tokenizer, encoder = self._load_text()
        room = int(encoder.config.max_position_embeddings) - 2
        warnings = []
        for prompt in prompts:
            if len(tokenizer.tokenize(prompt)) > room:
                warnings.append(f"prompt {prompt!r} is longer than the text encoder's {room} tokens and is cut")
            unknown = [word for word in re.findall(r"[a-z]+", prompt.lower()) if len(tokenizer.tokenize(word)) > 1]
            if unknown and len(tokenizer) < _OPEN_VOCABULARY:
                warnings.append(f"prompt {prompt!r}: this model does not know {', '.join(map(repr, unknown))}")
        return warnings

    def free_text_encoder(self) -> None:
        self._text = None

    def predict(
        self, x_t: Tensor, t: Tensor, text: Tensor, *, pretrained: bool = False, unguided: bool = False
    ) -> Prediction:
        """The network's outputs at B states, see `dag.chain.policy.Policy`.

        With guidance this is one UNet call on 2B rows, or with `sampler.uncond: frozen` two calls on B rows.
        """
        guidance_scale, B = self.sampler.guidance_scale, len(x_t)
        x_t = x_t.to(self.dtype).contiguous(memory_format=self.layout)
        text = text.to(self.device, self.dtype)
        if unguided or guidance_scale <= 1:
            output = self._run(x_t, t, text, pretrained)
            return Prediction(output, B, 1.0, output)
        if self._uncond is None:
            raise RuntimeError("encode() must come before predict(): it embeds the empty prompt")
        uncond = self._uncond.expand(B, -1, -1)
        if self.sampler.uncond == "frozen":
            # Its weights are not trained, but the policy's output also depends on the state through it.
            with torch.set_grad_enabled(torch.is_grad_enabled() and x_t.requires_grad):
                first = self._run(x_t, t, uncond, pretrained=True)
            output = torch.cat([first, self._run(x_t, t, text, pretrained)])
        else:
            twice = torch.cat([x_t, x_t]).contiguous(memory_format=self.layout)
            output = self._run(twice, torch.cat([t, t]), torch.cat([uncond, text]), pretrained)
        conditional = output[B:]
        if self.sampler.guidance_dtype == "model":
            # Published. In half precision it amplifies the rounding of both branches by about the guidance scale.
            output = guided(conditional, output[:B], guidance_scale)
        return Prediction(output, B, guidance_scale, conditional)

    def _run(self, x_t: Tensor, t: Tensor, text: Tensor, pretrained: bool) -> Tensor:
        if pretrained and self.adapter.kind == "full":
            raise RuntimeError("a full fine-tune keeps no pretrained weights to predict with")
        with self.weights.switched(off=pretrained):
            return self.denoiser(x_t, t, **self._conditioning(text), return_dict=False)[0]

    def _conditioning(self, text: Tensor) -> dict[str, Any]:
        """The UNet's arguments that depend on the prompts, from their embeddings (B, S, D)."""
        return {"encoder_hidden_states": text}

    def decode(self, x_0: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1]."""
        return self.decoder(x_0)

    def preview(self, x0_hat: Tensor, decoder: str | None = None) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1] of predicted latents; `decoder` None takes the recipe's."""
        return self.decoder.preview(x0_hat, decoder)

    def modules(self) -> Iterator[nn.Module]:
        """The UNet and the decoders."""
        yield self.denoiser
        yield from (module for module in (self.decoder.vae, self.decoder.tiny) if module is not None)

    def base_weights(self) -> dict[str, list[Tensor]]:
        """The loaded weights by the name of their network, without LoRA factors; the text encoder's only until it is freed."""
        modules = {"unet": self.denoiser, "vae": self.decoder.vae, **self._encoders()}
        return {
            key: [
                weight
                for name, weight in module.state_dict().items()
                if "lora_" not in name and isinstance(weight, Tensor)
            ]
            for key, module in modules.items()
        }

    def _encoders(self) -> dict[str, nn.Module]:
        """The text encoders by name; none once they are freed."""
        return {} if self._text is None else {"text encoder": self._text[1]}

    def trainable(self) -> list[nn.Parameter]:
        return self.weights.masters

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set the trained weights. Raises RunError if they do not fit this adapter exactly."""
        self.weights.load_state_dict(state)

    def export(self, folder: Path) -> None:
        """Write LoRA factors as pytorch_lora_weights.safetensors (diffusers) and lora_kohya.safetensors, with the base model's
        name and licence in their metadata, or all weights of a full fine-tune as a diffusers folder `unet`."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        if self.adapter.kind == "full":
            # The network may have half-precision copies; the file gets the float32 masters.
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(self.denoiser.config)
            unet.load_state_dict(state, assign=True)
            unet.save_pretrained(folder / "unet")
            return
        self.pipeline.save_lora_weights(
            folder,
            # In peft's names: diffusers' older names cover attention layers only, and it loads no file that mixes both.
            unet_lora_layers=state,
            unet_lora_adapter_metadata=self.denoiser.peft_config["default"].to_dict(),
        )
        save_file(self._kohya_state(state), folder / lora_file.KOHYA)
        for name in (lora_file.DIFFUSERS, lora_file.KOHYA):
            lora_file.label(folder / name, public_name(self.source), licence(self.source, self.folder))

    def _kohya_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state in kohya's names, which ComfyUI and other user interfaces read; alpha is a tensor for each layer."""
        renamed = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in state.items()})
        alphas = {
            name.replace(".lora_down.weight", ".alpha"): torch.tensor(float(self.adapter.alpha))
            for name in renamed
            if name.endswith(".lora_down.weight")
        }
        return {name: tensor.contiguous() for name, tensor in (renamed | alphas).items()}

    def describe(self) -> dict[str, Any]:
        return {
            "path": self.source,
            "pipeline": self.pipeline.__name__,
            "latent_shape": list(self.latent_shape),
            "prediction_type": self.schedule.prediction_type,
            "attention": self.attention,
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "trainable_parameters": sum(p.numel() for p in self.trainable()),
        }

    def _load_unet(self, memory: Memory) -> tuple[str, Any]:
        """(the attention implementation with its reason, the frozen UNet with the recipe's levers)."""
        # Weights to be trained are read in float32, for the masters; frozen ones in the dtype in which they compute.
        dtype = torch.float32 if self.adapter.kind == "full" else self.dtype
        unet = load_module(UNet2DConditionModel, self.folder, "unet", dtype, self.device, self._variant)
        unet.to(memory_format=self.layout)
        attention = choose_attention(unet, memory.attention, self.device)
        quantise(unet, memory.base, self.dtype)
        return attention, unet

    def _load_scheduler(self) -> DDIMScheduler:
        config = read_config(self.folder, "scheduler")
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise RunError(
                f"model.path: {self.folder} predicts {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}"
            )
        return DDIMScheduler.from_config({**config, "clip_sample": False})

    def _vae_dtype(self) -> torch.dtype:
        """The precision in which pictures are decoded."""
        return self.dtype

    def _load_text(self) -> tuple[Any, Any]:
        if self._text is None:
            encoder = load_text_encoder(self.folder, self.dtype, self.device, self._variant)
            self._text = load_tokenizer(self.folder), encoder
        return self._text

    def _train_weights(self, seed: int) -> TrainedWeights:
        if self.adapter.kind == "full":
            self.denoiser.requires_grad_(True)
        else:
            _check_targets(self.denoiser, self.adapter.targets)
            add_lora(self.denoiser, self.adapter, seed)
        freeze_convolutions(self.denoiser)
        return TrainedWeights(self.denoiser, self.dtype)


def check_channels(folder: Path, unet: dict[str, Any]) -> None:
    """Raises RunError for a UNet that takes more channels than it predicts."""
    channels = unet.get("in_channels")
    if channels != unet.get("out_channels"):
        raise RunError(
            f"model.path: {folder} takes {channels} latent channels and predicts {unet.get('out_channels')}: "
            "an inpainting or editing model, not text-to-image"
        )


def _check_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    """Raises UsageError for a target that matches no layer; peft ignores a misspelt one as long as another one matches."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            endings = sorted({re.sub(r".*\.(?=\D)", "", name) for name in layers})
            raise UsageError(
                f"adapter.targets: {target!r} matches no layer of the UNet; layer names end in: {', '.join(endings)}"
            )


def _schedule(scheduler: DDIMScheduler, sampler: Sampler) -> Schedule:
    try:
        return Schedule.from_diffusers(scheduler, sampler.steps, sampler.eta)
    except ValueError as error:
        raise UsageError(str(error)) from None
