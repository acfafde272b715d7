"""What all families share: a denoiser with an adapter, a decoder, a schedule and text encoders, as a `dag.chain.policy.Policy`.

The safety checker is never loaded, no prompt is replaced by the empty one as in training a diffusion model, and every module
stays in eval mode, so that the same state always gives the same prediction.

Legend: B samples, P prompts, S rows of a prompt's embedding, D their width, C H W latent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from dag_kernels import guided
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from dag.chain.policy import Prediction
from dag.errors import UsageError
from dag.models import lora_file
from dag.models.adapter import TrainedWeights, add_lora
from dag.models.decoder import Decoder
from dag.models.frozen import freeze_convolutions
from dag.models.levers import checkpoint_activations, choose_attention, compile_network, quantise
from dag.models.prompt_text import FixedText, TrainedText, names_in_files
from dag.models.scheduler import chain_of
from dag.models.source import is_architecture, latent_shape, licence, public_name
from dag.models.text import TextEncoder
from dag.models.weights import load_module
from dag.recipe import ForwardLooking, Memory, Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LatentDiffusion(ABC):
    """A diffusion model in latent space; a family says how its prompts are embedded and what its network takes.

    Args:
        recipe: its sections model, adapter, sampler and memory are read, and its seed, for the adapter's initial values.
        folder: the model's diffusers folder.
        device: where the denoiser and the VAE are.
        forward_looking: the section that says how previews are decoded; None if there are none.

    Raises:
        UsageError: the recipe asks for what this model cannot do.
        RunError:   the model cannot be read.
    """

    pipeline: ClassVar[Any]
    """diffusers' pipeline, which writes and reads the LoRA."""
    network: ClassVar[Any]
    """diffusers' class of the denoiser."""
    component: ClassVar[str] = "unet"
    """The denoiser's folder."""
    encoders: ClassVar[tuple[Any, ...]]
    """transformers' classes of the text encoders, in the order of their folders."""
    tiny_at_hub: ClassVar[str]
    """The AutoencoderTiny for these latents."""
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """The layers that get LoRA factors if the recipe names none."""
    patch: ClassVar[int] = 1
    """Side in latent elements of what the denoiser sees as one token; the latent's side must be a multiple."""
    has_channels_last: ClassVar[bool] = True
    """Whether the denoiser has convolutions, for which `memory.channels_last` is."""
    can_train_text: ClassVar[bool] = False
    """Whether its text encoders can have LoRA factors."""

    def __init__(
        self, recipe: Recipe, folder: Path, device: torch.device, forward_looking: ForwardLooking | None = None
    ) -> None:
        model, sampler, memory = recipe.model, recipe.sampler, recipe.memory
        if model.dtype == "fp16" and device.type == "cpu":
            raise UsageError("model.dtype=fp16 needs a GPU; on a CPU use bf16 or fp32")
        self.device, self.dtype, self.sampler, self.adapter = device, DTYPES[model.dtype], sampler, recipe.adapter
        self.folder, self._variant, self.source = folder, model.variant, model.path
        self._check()
        self.latent_shape = latent_shape(folder, model.resolution, self.patch)
        self.schedule = chain_of(folder, sampler, self.tokens(self.latent_shape)).to(device)
        self._check_keys(recipe)
        self.layout = (
            torch.channels_last if memory.channels_last and self.has_channels_last else torch.contiguous_format
        )
        self.text_encoders = [
            TextEncoder(folder, i, kind, self.dtype, device, self._variant, self._tokens(recipe, i))
            for i, kind in enumerate(self.encoders)
        ]
        self.attention, self.denoiser = self._load_denoiser(memory)
        self.decoder = Decoder(
            folder, self._variant, self._vae_dtype(), device, sampler.tile, memory, forward_looking, self.tiny_at_hub
        )
        self.text = self._prompt_text(recipe.seed)
        self.weights = self._train_weights(recipe.seed)
        checkpoint_activations(self.denoiser, memory.checkpointing, self.weights.as_now)
        compile_network(self.denoiser, memory.compile)

    @classmethod
    def tokens(cls, latent_shape: tuple[int, int, int]) -> int:
        """The number of tokens of a picture inside the denoiser."""
        return latent_shape[1] * latent_shape[2] // cls.patch**2

    # -- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def _check(self) -> None:
        """Raises RunError for a model of another family, UsageError for a recipe that it cannot run."""

    @property
    def takes_guidance(self) -> bool:
        """Whether the network is told a guidance scale."""
        return False

    def _check_keys(self, recipe: Recipe) -> None:
        """Raises UsageError for a key of the recipe that this model would ignore."""
        if recipe.model.max_tokens is not None and T5EncoderModel not in self.encoders:
            raise UsageError("model.max_tokens is for models with a T5 text encoder, which this is not; leave it out")
        looks_in_bf16 = recipe.forward_looking is not None and recipe.forward_looking.coefficients == "bf16"
        if looks_in_bf16 and self.schedule.prediction_type == "velocity":
            raise UsageError(
                "objective.forward_looking.coefficients=bf16 is the published code's rounding for diffusion models; this is a "
                "flow-matching model, use fp32"
            )
        if recipe.adapter.text_encoder is not None and not self.can_train_text:
            raise UsageError(
                "adapter.text_encoder is for Stable Diffusion 1.x, 2.x and XL, which this is not; leave it out"
            )
        if recipe.sampler.guidance_embedding is not None and not self.takes_guidance:
            raise UsageError(
                "sampler.guidance_embedding is for models that are told a guidance scale, which this is not; use guidance_scale"
            )

    @property
    @abstractmethod
    def text_shape(self) -> tuple[int, int]:
        """(S, D) of a prompt's embedding."""

    @abstractmethod
    def _embed(self, ids: Sequence[Tensor]) -> Tensor:
        """(P, S, D) embeddings in the network's dtype, at the tokens of each text encoder, as `TextEncoder.ids` gives them."""

    @abstractmethod
    def _output(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The denoiser's output (B, C, H, W) at states of shape (B, C, H, W), timesteps (B,) and embeddings (B, S, D)."""

    def _tokens(self, recipe: Recipe, index: int) -> int | None:
        """The tokens to which a text is padded for one encoder; None for the encoder's own number."""
        return None

    def _empty(self, texts: Tensor) -> Tensor:
        """(1, S, D) what takes the place of a prompt without guidance, from the empty prompt's embedding."""
        return texts

    def _vae_dtype(self) -> torch.dtype:
        """The precision in which pictures are decoded."""
        return self.dtype

    # -- prompts -----------------------------------------------------------------------------------------------------

    def blank_prompt(self) -> Tensor:
        """A prompt's row of unknown content, see `dag.chain.policy.Policy`."""
        return self.text.blank(self.text_shape)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The rows of prompts, see `dag.chain.policy.Policy`. The text encoders stay until `free_text_encoder`."""
        return self.text.encode(prompts)

    def pretrained_text(self, rows: Tensor) -> Tensor:
        """(P, S, D) the pretrained embeddings of prompts' rows, on the CPU."""
        return self.text.pretrained(rows)

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """One sentence for each prompt that is too long, and for each with words outside a closed vocabulary.

        With several encoders the one that reads the most tokens counts: what it reads is not lost.
        """
        present = [encoder for encoder in self.text_encoders if not encoder.is_absent] or self.text_encoders
        return max(present, key=lambda encoder: encoder.tokens).warnings(prompts)

    def free_text_encoder(self) -> None:
        self.text.free()

    # -- prediction --------------------------------------------------------------------------------------------------

    def predict(
        self, x_t: Tensor, t: Tensor, text: Tensor, *, pretrained: bool = False, unguided: bool = False
    ) -> Prediction:
        """The network's outputs at B states, see `dag.chain.policy.Policy`.

        With guidance this is one call of the denoiser on 2B rows, or with `sampler.uncond: frozen` two calls on B rows.
        """
        guidance_scale, B = self.sampler.guidance_scale, len(x_t)
        x_t = x_t.to(self.dtype).contiguous(memory_format=self.layout)
        embedded, empty = self.text.conditions(text, pretrained=pretrained)
        if unguided or guidance_scale <= 1:
            output = self._run(x_t, t, embedded, pretrained)
            return Prediction(output, B, 1.0, output)
        if self.sampler.uncond == "frozen":
            # Its weights are not trained, but the policy's output also depends on the state through it.
            with torch.set_grad_enabled(torch.is_grad_enabled() and x_t.requires_grad):
                uncond = self.text.conditions(text, pretrained=True)[1].expand(B, -1, -1)
                first = self._run(x_t, t, uncond, pretrained=True)
            output = torch.cat([first, self._run(x_t, t, embedded, pretrained)])
        else:
            twice = torch.cat([x_t, x_t]).contiguous(memory_format=self.layout)
            both = torch.cat([empty.expand(B, -1, -1), embedded])
            output = self._run(twice, torch.cat([t, t]), both, pretrained)
        conditional = output[B:]
        if self.sampler.guidance_dtype == "model":
            # Published. In half precision it amplifies the rounding of both branches by about the guidance scale.
            output = guided(conditional, output[:B], guidance_scale)
        return Prediction(output, B, guidance_scale, conditional)

    def _run(self, x_t: Tensor, t: Tensor, text: Tensor, pretrained: bool) -> Tensor:
        if pretrained and self.adapter.kind == "full":
            raise RuntimeError("a full fine-tune keeps no pretrained weights to predict with")
        with self.weights.switched(off=pretrained):
            return self._output(x_t, t, text)

    def decode(self, x_0: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1]."""
        return self.decoder(x_0)

    def preview(self, x0_hat: Tensor, decoder: str | None = None) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1] of predicted latents; `decoder` None takes the recipe's."""
        return self.decoder.preview(x0_hat, decoder)

    def modules(self) -> Iterator[nn.Module]:
        """The denoiser, the decoders, and text encoders that are trained."""
        yield self.denoiser
        yield from self.trained_encoders()
        yield from (module for module in (self.decoder.vae, self.decoder.tiny) if module is not None)

    def trained_encoders(self) -> list[nn.Module]:
        return list(self.text.networks().values())

    # -- weights -----------------------------------------------------------------------------------------------------

    def base_weights(self) -> dict[str, list[Tensor]]:
        """The loaded weights by the name of their network, without LoRA factors; text encoders' only until they are freed."""
        modules = {self.component: self.denoiser, "vae": self.decoder.vae}
        modules |= {encoder.name: encoder.module for encoder in self.text_encoders if encoder.module is not None}
        return {
            key: [
                weight
                for name, weight in module.state_dict().items()
                if "lora_" not in name and isinstance(weight, Tensor)
            ]
            for key, module in modules.items()
        }

    def trainable(self) -> list[nn.Parameter]:
        return self.weights.masters

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set the trained weights. Raises RunError if they do not fit this adapter exactly."""
        self.weights.load_state_dict(state)

    def export(self, folder: Path) -> None:
        """Write LoRA factors as pytorch_lora_weights.safetensors (diffusers) and lora_kohya.safetensors (other programs), with
        the base model's name and licence in their metadata, or all weights of a full fine-tune as a diffusers folder."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter.kind == "full":
            # The network may have half-precision copies; the file gets the float32 masters.
            with torch.device("meta"):
                network = self.network.from_config(self.denoiser.config)
            # Stable Diffusion 3 keeps its table of positions as a buffer, which is not trained.
            network.load_state_dict(self.denoiser.state_dict() | self.state_dict(), assign=True)
            network.save_pretrained(folder / self.component)
            return
        parts = self._lora_parts()
        lora_file.save_for_diffusers(folder, self.pipeline, parts)
        save_file(self._for_other_programs(parts), folder / lora_file.KOHYA)
        for name in (lora_file.DIFFUSERS, lora_file.KOHYA):
            lora_file.label(folder / name, public_name(self.source), licence(self.source, self.folder))

    def _lora_parts(self) -> dict[str, lora_file.Part]:
        """The LoRA factors of each network that has some, by its folder."""
        parts = {}
        for prefix, network in self.weights.networks.items():
            state = {name: master.detach().cpu().contiguous() for name, master in self.weights.of(prefix).items()}
            if state:
                config = cast(Any, network).peft_config["default"].to_dict()
                parts[prefix[:-1] or self.component] = lora_file.Part(
                    names_in_files(state) if prefix else state, config
                )
        return parts

    def _for_other_programs(self, parts: dict[str, lora_file.Part]) -> dict[str, Tensor]:
        """The factors in the names of kohya's scripts, which ComfyUI and the web UIs read for a UNet."""
        return lora_file.in_kohyas_names(parts, has_two_encoders=len(self.encoders) > 1)

    def describe(self) -> dict[str, Any]:
        return {
            "path": self.source,
            "pipeline": self.pipeline.__name__,
            "latent_shape": list(self.latent_shape),
            "prediction_type": self.schedule.prediction_type,
            "takes_guidance": self.takes_guidance,
            "attention": self.attention,
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "trainable_parameters": sum(p.numel() for p in self.trainable()),
        }

    # -- loading -----------------------------------------------------------------------------------------------------

    def _load_denoiser(self, memory: Memory) -> tuple[str, Any]:
        """(the attention implementation with its reason, the frozen denoiser with the recipe's levers)."""
        # Weights to be trained are read in float32, for the masters; frozen ones in the dtype in which they compute.
        dtype = torch.float32 if self.adapter.kind == "full" else self.dtype
        # To be quantised, layers go to the GPU one by one: unquantised the denoiser may not fit it. Random weights are made there.
        is_direct = memory.base == "compute" or is_architecture(self.folder)
        place = self.device if is_direct else torch.device("cpu")
        network = load_module(self.network, self.folder, self.component, dtype, place, self._variant)
        network.to(memory_format=self.layout)
        attention = choose_attention(network, memory.attention, self.device)
        quantise(network, memory.base, self.dtype, self.device)
        return attention, network

    def _train_weights(self, seed: int) -> TrainedWeights:
        if self.adapter.kind == "full":
            self.denoiser.requires_grad_(True)
        else:
            targets = self.targets if self.adapter.targets is None else self.adapter.targets
            if targets:
                add_lora(self.denoiser, self.adapter.rank, self.adapter.alpha, targets, seed)
        freeze_convolutions(self.denoiser)
        weights = TrainedWeights({"": self.denoiser, **self.text.networks()}, self.dtype)
        if isinstance(self.text, TrainedText):
            self.text.weights = weights
        return weights

    def _prompt_text(self, seed: int) -> FixedText:
        parts = self.text_encoders, self._embed, self._empty, self.device, self.dtype
        adapter = self.adapter.text_encoder
        return FixedText(*parts) if adapter is None else TrainedText(*parts, adapter, seed)
