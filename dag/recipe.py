"""The schema of a recipe: every key, its default, its unit and its cost. Imports no torch.

A recipe is data; `dag.recipe_file` reads one. Sections are frozen and refuse unknown keys.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A group of keys; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_as_number(cls, data: Any) -> Any:
        """Python counts true as 1; a recipe does not."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{key} is not a switch: true and false do not belong there")
        return data


class Model(Section):
    path: str = Field(min_length=1)
    """`embedded`, a local diffusers folder, or a hub id (SD 1.x / 2.x architecture)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """File variant, e.g. `fp16`: half the download."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of frozen weights and of autocast. Trainable weights, log-probs and losses stay fp32."""
    resolution: int | None = Field(None, ge=8, le=4096)
    """Side of the square picture in pixels; default: the model's own."""


class Adapter(Section):
    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank factors, `full` every UNet weight (about 16 bytes a weight with AdamW)."""
    rank: int = Field(4, ge=1)
    """LoRA rank; memory and capacity grow with it."""
    alpha: float = Field(4.0, gt=0)
    """LoRA scale is alpha / rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Name endings of the UNet layers that get LoRA factors."""


class Sampler(Section):
    steps: int = Field(50, ge=1, le=1000)
    """Denoising steps T; time per trajectory grows with it."""
    eta: float = Field(1.0, gt=0, le=1)
    """DDIM variance scale; 1 is DDPM. 0 has no density and is refused."""
    guidance_scale: float = Field(5.0, ge=0)
    """Classifier-free guidance; <= 1 samples the conditional branch alone, at half the cost."""
    tile: int = Field(8, ge=1)
    """Samples per UNet call while sampling; memory grows with it."""
    chain_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """How visited states are stored. The rounded value is the state."""
    guidance_dtype: Literal["fp32", "model"] = "fp32"
    """Precision of the guidance combination. `model` is the published behaviour: it amplifies rounding."""
    noise_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the injected noise. `bf16` is the published behaviour."""
    log_pf_at: Literal["stored", "unrounded"] = "stored"
    """Where the sampling-time log P_F is evaluated. `unrounded` is published: the ratio is then off at step 0."""


class Prompts(Section):
    set: Literal["simple_animals", "imagenet", "imagenet_animals", "imagenet_dogs", "drawbench", "hpdv2"] | None = None
    """A named prompt set; drawbench and hpdv2 are not shipped and need `path`."""
    path: str | None = None
    """Your copy of drawbench (a CSV file) or hpdv2 (a folder of JSON files)."""
    style: Literal["anime", "concept-art", "paintings", "photo"] | None = None
    """One style of hpdv2; null takes all four."""
    file: str | None = None
    """A UTF-8 text file, one prompt a line, or .jsonl with a `prompt` key."""
    texts: tuple[str, ...] | None = None
    """Prompts written in the recipe."""

    @model_validator(mode="after")
    def _one_source(self) -> "Prompts":
        given = [name for name in ("set", "file", "texts") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of set, file, texts (found: {', '.join(given) or 'none'})")
        if self.texts is not None and not (self.texts and all(text.strip() for text in self.texts)):
            raise ValueError("texts must hold at least one prompt and no empty one")
        if self.path is not None and self.set not in ("drawbench", "hpdv2"):
            raise ValueError("path belongs to set: drawbench and set: hpdv2; for prompts of your own use file")
        if self.style is not None and self.set != "hpdv2":
            raise ValueError("style belongs to set: hpdv2")
        return self


class _Reward(Section):
    weight: float = 1.0
    """Factor in the sum of rewards."""


class Compressibility(_Reward):
    name: Literal["compressibility"]


class Incompressibility(_Reward):
    name: Literal["incompressibility"]


class Colourfulness(_Reward):
    name: Literal["colourfulness"]


class Tower(_Reward):
    """A reward with a neural network."""

    path: str | None = None
    """Local file or folder, or hub id, of its weights; null takes the published ones from the hub."""
    tokenizer: str | None = None
    """Folder or hub id of its tokenizer; null looks beside the weights, then at the hub."""
    config: str | None = None
    """JSON file of an architecture that an original-layout file does not tell; only unusual ones need it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network; heads and normalisation stay fp32. Half the memory, scores move by a few per cent."""
    max_batch: int = Field(16, ge=1)
    """Pictures per forward pass; memory grows with it, scores do not depend on it."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` is the policy's device; `cpu` costs no GPU memory, and time."""
    offload: bool = False
    """Keep the network on the CPU while the policy trains; costs its transfer twice an epoch."""


class Aesthetic(Tower):
    name: Literal["aesthetic"]
    head: str | None = None
    """LAION's predictor, `sac+logos+ava1-l14-linearMSE.pth`; null takes TRL's copy from the hub."""


class ClipScore(Tower):
    name: Literal["clip_score"]
    scale: float = 1.0
    """Factor of the cosine: 2.5 is Hessel et al., 100 is torchmetrics."""
    clamp: bool = False
    """Negative cosines count as 0, in both of these; they then have no gradient."""
    prefix: str = ""
    """Before every prompt; Hessel et al.: `A photo depicts `."""


class ImageText(ClipScore):
    name: Literal["image_text"]  # type: ignore[assignment]
    path: str | None = "embedded"
    """`embedded`, the scorer that ships with this package, or any CLIP model."""
    scale: float = 100.0
    """Factor of the cosine."""


class PickScore(Tower):
    name: Literal["pickscore"]


class HPSv2(Tower):
    name: Literal["hpsv2"]
    version: Literal["v2.1", "v2.0"] = "v2.1"
    """Which published weights; a `path` of your own says itself."""


class ImageReward(Tower):
    name: Literal["image_reward"]


class Http(_Reward):
    """A reward in another process or on another machine: `python -m dag.rewards.serve`, or your own server."""

    name: Literal["http"]
    url: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """Gets POST {"images": [base64 PNG, ...], "prompts": [...]}, answers {"rewards": [...]}."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for one answer."""
    retries: int = Field(6, ge=0)
    """Attempts after a failed one, with pauses of 1, 2, 4, ... at most 30 seconds: six bridge about a minute."""
    max_batch: int = Field(16, ge=1)
    """Pictures per request."""


class Custom(_Reward):
    name: Literal["custom"]
    path: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """`module:function` or `file.py:function`: (images (B,3,H,W) in [0,1], prompts) -> (B,) float32."""


RewardTerm = Annotated[
    Compressibility
    | Incompressibility
    | Colourfulness
    | ImageText
    | ClipScore
    | Aesthetic
    | ImageReward
    | HPSv2
    | PickScore
    | Http
    | Custom,
    Field(discriminator="name"),
]


class Beta(Section):
    value: float = Field(gt=0)
    """Inverse temperature: log R = beta * reward, in nats per `unit`."""
    unit: Literal["reward", "reward_sd"] = "reward"
    """`reward_sd` standardises the reward by the mean and sd of the first rollout, so beta transfers between rewards."""
    anneal: Literal["none", "linear", "linear_from_zero"] = "none"
    """`linear` rises from 1/n over the first n = half of the epochs; `linear_from_zero` is published: epoch 0 has no reward."""


class ForwardLooking(Section):
    source: Literal["rollout", "current", "none"] = "rollout"
    """Whose x0_hat is scored: the rollout's own (once per state), the current policy's (published: two extra decodes
    and rewards and one extra UNet pass per transition), or nothing."""
    weight: Literal["alpha_bar", "one"] = "alpha_bar"
    """w_k in log F = log F~ + beta w_k r(x0_hat). `one` is published; x0_hat is noise at high noise levels."""
    prediction: Literal["guided", "conditional"] = "guided"
    """`conditional` is published: x0_hat without guidance although the policy is guided."""
    coefficients: Literal["fp32", "bf16"] = "fp32"
    """`bf16` is published: alpha_bar rounds to 1 at the last step, so x0_hat(t=1) is not denoised."""


class _Balance(Section):
    beta: Beta
    log_prob_reduction: Literal["sum", "mean"] = "sum"
    """`sum` over latent dims is the density; `mean` is published and multiplies the effective beta by their number."""
    forward_looking: ForwardLooking = ForwardLooking()
    detach_next: bool = True
    """Stop the gradient through log F of the next state. False is published, and biased."""
    huber: float | None = Field(None, gt=0)
    """Residuals beyond this many (scaled) nats count linearly; null squares them all (published)."""
    residual_scale: Literal["none", "running"] = "none"
    """`running` counts each step's residual in its running sd, so that no step drowns the others."""
    step_weight: Literal["one", "balanced"] = "one"
    """Weight of a step's policy gradient; `balanced` tames the last, nearly deterministic steps."""


class DetailedBalance(_Balance):
    name: Literal["dag_db"]


class KLDivergence(_Balance):
    name: Literal["dag_kl"]
    weight: float = Field(1.0, gt=0)
    """Weight of the policy term against the flow's regression (published: `klpf`)."""
    baseline: Literal["per_step", "mixed"] = "per_step"
    """Leave-one-out mean over rows of the same step, or (published) over all rows whatever their step."""
    normalise_advantage: bool = False
    """Divide by the leave-one-out sd (published); the step then never anneals as the residual vanishes."""
    advantage_clip: float | None = Field(None, gt=0)
    """Clip of the (scaled or normalised) advantage; published 5."""
    clip_range: float = Field(0.2, gt=0)
    """PPO clip of the ratio, for the second and later updates of a rollout (published 1e-4 with the mean)."""


class PolicyGradient(Section):
    name: Literal["ddpo"]
    log_prob_reduction: Literal["sum", "mean"] = "mean"
    """`mean` is ddpo-pytorch's scale, to which its clip range belongs."""
    clip_range: float = Field(1e-4, gt=0)
    """PPO clip of the ratio."""
    advantage_clip: float = Field(5.0, gt=0)
    """Clip of the normalised advantage."""
    per_prompt: int | None = Field(None, ge=2)
    """Normalise rewards by the last this many of the same prompt (once half of them are there); null: by the epoch."""
    step_weight: Literal["one", "balanced"] = "one"
    """Weight of a step's policy gradient; `balanced` tames the last, nearly deterministic steps."""


ObjectiveTerm = Annotated[DetailedBalance | KLDivergence | PolicyGradient, Field(discriminator="name")]


class Flow(Section):
    channels: tuple[Annotated[int, Field(ge=1)], ...] = (64, 128, 256, 256)
    """Widths of the state-flow network, one stage (each halves the side) per entry."""
    learning_rate: float = Field(3e-3, gt=0)
    """By default ten times the policy's: detailed balance needs a flow that keeps up."""
    warmup_epochs: int = Field(1, ge=0)
    """First epochs that train the flow alone."""
    calibration: float = Field(0.5, ge=0, le=1)
    """Share by which each rollout moves the flow's per-step constants to a zero mean residual; 0 never (published)."""
    passes: int = Field(0, ge=0)
    """Extra flow-only updates on each rollout before the policy's; cheap beside the UNet."""


class Regulariser(Section):
    sampling: float = Field(0.0, ge=0)
    """Weight of mean_dims |o - o_sampling|^2 (published `unetreg`: 1)."""
    pretrained_kl: float = Field(0.0, ge=0)
    """Weight of the per-step KL to the pretrained model, in nats summed over dims; one more UNet forward per transition."""


class Train(Section):
    epochs: int = Field(100, ge=1)
    """Rollouts; one epoch = one rollout and its updates."""
    trajectories: int = Field(64, ge=2)
    """Trajectories per epoch."""
    updates: int = Field(2, ge=1)
    """Optimizer updates per epoch; each takes an equal share of the trajectories."""
    inner_epochs: int = Field(1, ge=1)
    """Times each rollout is used."""
    micro_batch: int = Field(8, ge=1)
    """Rows per UNet backward; memory grows with it, the gradient does not depend on it."""
    step_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the steps trained per update; the rest of the chain is skipped, unbiasedly."""
    keep_terminal: bool = True
    """Always train the last transition, where the final reward enters. False is published."""
    learning_rate: float = Field(3e-4, gt=0)
    """AdamW learning rate of the policy."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's beta1, beta2, for policy and flow."""
    weight_decay: float = Field(1e-4, ge=0)
    """AdamW's decay, for policy and flow."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradient norm clip, separately for policy and flow."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` (bitsandbytes) keeps the policy's states in 8 bits: 2 bytes a weight instead of 8."""
    gradient_checkpointing: bool = False
    """Recompute UNet activations in backward: about 1.4x the time, a fraction of the memory."""


class Evaluation(Section):
    every: int = Field(10, ge=1)
    """Epochs between evaluations; there is always one before and one after training."""
    prompts: int = Field(8, ge=1)
    """How many prompts, from the first, the fixed evaluation uses."""
    held_out: bool = False
    """Evaluate on the prompts that the set keeps back (drawbench, hpdv2) instead of on those trained on."""
    images_per_prompt: int = Field(4, ge=2)
    """Fixed seeds per prompt."""
    diversity: str | None = None
    """Image features for within-prompt diversity: `embedded` or a CLIPModel folder; null skips it."""
    fidelity: bool = False
    """Judge whether the picture shows the prompt's noun; for the embedded model's prompts only."""


class Checkpoint(Section):
    every: int = Field(10, ge=1)
    """Epochs between checkpoints; there is always one at the end."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""


class Recipe(Section):
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the noise, the prompts and every initialisation."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """How transitions are computed: fused Triton kernels on a GPU (`auto`), or plain PyTorch."""
    model: Model
    adapter: Adapter = Adapter()
    sampler: Sampler = Sampler()
    prompts: Prompts
    reward: tuple[RewardTerm, ...]
    """One reward or a list of them, summed with their weights."""
    objective: ObjectiveTerm
    flow: Flow = Flow()
    regulariser: Regulariser = Regulariser()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides metrics.jsonl, which is always written."""

    @field_validator("reward", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


def validate(recipe: Recipe) -> list[str]:
    """Mistakes that involve several keys, each naming them; empty if there are none."""
    problems = []
    train, adapter = recipe.train, recipe.adapter
    if not recipe.reward:
        problems.append("reward: give at least one")
    if train.trajectories % train.updates:
        problems.append(f"train.updates={train.updates} must divide train.trajectories={train.trajectories}")
    group = train.trajectories // train.updates
    if isinstance(recipe.objective, KLDivergence) and group < 2:
        problems.append("train.updates: DAG-KL's leave-one-out baseline needs at least 2 trajectories per update")
    if adapter.kind == "lora" and not adapter.targets:
        problems.append("adapter.targets: name at least one layer")
    if adapter.kind == "full" and recipe.regulariser.pretrained_kl > 0:
        problems.append("regulariser.pretrained_kl needs adapter.kind=lora: a full fine-tune keeps no pretrained copy")
    if not recipe.flow.channels:
        problems.append("flow.channels: name at least one width")
    if recipe.evaluation.held_out and recipe.prompts.set not in ("drawbench", "hpdv2"):
        problems.append("evaluation.held_out: only prompts.set=drawbench and hpdv2 keep prompts back")
    return problems
