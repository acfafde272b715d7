"""Sections of a recipe about the model: what is loaded, what of it is trained, and how it is sampled. Imports no torch."""

from typing import Literal

from pydantic import Field

from dag.recipe.section import Section


class Model(Section):
    path: str = Field(min_length=1)
    """`embedded` or `embedded_flow`, a local diffusers folder, or a hub id (architecture of SD 1.x / 2.x, SDXL, SD 3.x or FLUX.1).
    `random-sd15`, `-sdxl`, `-sd35m`, `-sd35l`, `-flux` and `-flux-schnell` are architectures with random weights, for
    benchmarks."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files, e.g. `fp16`, which halves the download."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which the networks are stored and compute; there is no autocast. Each trained weight also has a float32
    master, on which its gradients are summed. Log-probs and losses are float32."""
    resolution: int | None = Field(None, ge=8, le=4096)
    """Side of the square picture in pixels; null takes the model's own."""
    max_tokens: int | None = Field(None, ge=1, le=512)
    """Tokens to which prompts are padded or cut for a T5 text encoder (SD 3.x, FLUX); null takes the pipeline's own, 256 or 512.
    They take part in attention: memory and time grow with them, and the model is used as it was trained only with its own."""


class TextAdapter(Section):
    rank: int = Field(4, ge=1)
    """LoRA rank."""
    alpha: float = Field(4.0, gt=0)
    """The LoRA factors' product is scaled by alpha / rank."""


class Adapter(Section):
    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank factors; `full` trains every weight of the denoiser, at about 16 bytes a weight with AdamW."""
    rank: int = Field(4, ge=1)
    """LoRA rank; memory and capacity grow with it."""
    alpha: float = Field(4.0, gt=0)
    """The LoRA factors' product is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Name endings of the denoiser's layers that get LoRA factors; null takes attention's projections. With `text_encoder` an
    empty list leaves the denoiser as it is (TexForce)."""
    text_encoder: TextAdapter | None = None
    """Also train LoRA factors in the attention of the text encoders (SD 1.x / 2.x, SDXL), through which prompts are read."""

    @property
    def factors(self) -> str:
        """The LoRA factors in words, as "rank 4, alpha 8"; empty without any."""
        found = [] if self.kind == "full" or self.targets == () else [f"rank {self.rank}, alpha {self.alpha:g}"]
        if self.text_encoder is not None:
            found.append(f"text encoder rank {self.text_encoder.rank}, alpha {self.text_encoder.alpha:g}")
        return "; ".join(found)


class Sampler(Section):
    steps: int = Field(50, ge=1, le=1000)
    """Denoising steps T; time per trajectory grows with it."""
    eta: float = Field(1.0, gt=0, le=1)
    """DDIM's variance scale; 1 is DDPM. 0 is refused: its steps are deterministic and have no density."""
    sde: Literal["posterior", "flow_grpo"] = "posterior"
    """The stochastic sampler: `posterior`, which keeps signal and noise of every level exactly, or `flow_grpo`, which Flow-GRPO
    published for flow-matching models (its noise level a is sqrt(2) eta). Detailed balance needs the first with eta 1, unless
    `objective.prior` is `pretrained`: only its noising kernel does not depend on the picture."""
    shift: float | None = Field(None, gt=0)
    """Of a flow-matching model: how far its noise levels are shifted towards the noise; null takes the model's own."""
    guidance_embedding: float | None = Field(None, ge=0)
    """The guidance scale that a model with guidance built in is told (FLUX.1-dev); null takes the pipeline's own, 3.5."""
    guidance_scale: float = Field(5.0, ge=0)
    """Scale of classifier-free guidance; <= 1 samples the conditional branch alone, at half the cost."""
    tile: int = Field(8, ge=1)
    """Samples per UNet call while sampling (two rows each with guidance); memory grows with it."""
    chain_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision in which states are stored. The rounded value is the state: log-probs and the next UNet call use it."""
    uncond: Literal["trained", "frozen"] = "trained"
    """`frozen` takes the unconditional branch of guidance from the pretrained model, without gradient: a quarter less work.
    Only the conditional branch is then adapted, and plain diffusers cannot sample such a policy."""
    guidance_dtype: Literal["fp32", "model"] = "fp32"
    """Precision in which guidance combines the two branches. `model` (published) is `model.dtype`: it amplifies rounding."""
    noise_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the injected noise; `bf16` is published."""
    log_pf_at: Literal["stored", "unrounded"] = "stored"
    """State at which log P_F is evaluated while sampling: the stored one, or the one before it was rounded (published). With
    `unrounded` the ratio of P_F now to P_F then is not 1 even before the first update."""
