"""The schema of a recipe: every key, its default, its unit and its cost. Imports no torch.

A recipe is data; `dag.recipe.load` reads one. Sections are frozen and refuse unknown keys.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dag.recipe.reward_sections import RewardTerm
from dag.recipe.section import Section


class Model(Section):
    path: str = Field(min_length=1)
    """`embedded`, a local diffusers folder, or a hub id (SD 1.x / 2.x architecture); `random-sd15` is that architecture with
    random weights, for benchmarks."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """File variant, e.g. `fp16`: half the download."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What networks are held and compute in; there is no autocast. What is trained has a float32 master, and its gradients are
    summed there; log-probs and losses are float32."""
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
    uncond: Literal["trained", "frozen"] = "trained"
    """`frozen` takes the unconditional branch from the pretrained model, without gradient: a quarter less work. The result
    is then the policy that adapts the conditional branch alone, which plain diffusers cannot sample."""
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
    stride: int = Field(1, ge=1)
    """Score every n-th state and the last three; in between the newest score stands in. Costs 1/n of the decodes."""
    decoder: Literal["full", "half", "tiny"] = "full"
    """What shows x0_hat to the reward: the VAE; the VAE at half the side, enlarged again (a quarter of the work); or an
    AutoencoderTiny. The final picture is always decoded in full."""
    decoder_path: str | None = None
    """Folder or hub id of the AutoencoderTiny; null takes the embedded model's, or TAESD for any other model."""


def is_scored(k: int, num_transitions: int, stride: int) -> bool:
    """Whether state k's own x0_hat is scored: every `stride`-th and the last three."""
    return k % stride == 0 or k >= num_transitions - 3


class _Objective(Section):
    """What every objective's section can be asked."""

    def problems(self, recipe: "Recipe") -> list[str]:
        """Mistakes that involve this section and others of its recipe."""
        return []


class Balance(_Objective):
    """An objective that balances a learnt state flow."""

    beta: Beta
    prior: Literal["none", "pretrained"] = "none"
    """What the target holds besides exp(beta r): nothing (published), or the pretrained model, p_pretrained exp(beta r).
    Then log P_F is balanced against the pretrained log P_F; one more UNet forward per sampled transition."""
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

    def problems(self, recipe: "Recipe") -> list[str]:
        problems, section = [], self.forward_looking
        if section.stride > 1 and section.source != "rollout":
            problems.append(f"objective.forward_looking.stride={section.stride} needs source=rollout")
        if section.decoder_path is not None and section.decoder != "tiny":
            problems.append("objective.forward_looking.decoder_path belongs to decoder=tiny")
        if recipe.adapter.kind == "full" and self.prior == "pretrained":
            problems.append(
                "objective.prior=pretrained needs adapter.kind=lora: a full fine-tune keeps no pretrained copy"
            )
        return problems


class DetailedBalance(Balance):
    name: Literal["dag_db"]


class KLDivergence(Balance):
    name: Literal["dag_kl"]
    weight: float = Field(1.0, gt=0)
    """Weight of the policy term against the flow's regression (published: `klpf`)."""
    baseline: Literal["per_step", "mixed", "running"] = "per_step"
    """Leave-one-out mean over rows of the same step, (published) over all rows whatever their step, or the running mean
    per step over earlier rollouts, which is all that `train.rollout: one_pass` can know."""
    normalise_advantage: bool = False
    """Divide by the leave-one-out sd (published); the step then never anneals as the residual vanishes."""
    advantage_clip: float | None = Field(None, gt=0)
    """Clip of the (scaled or normalised) advantage; published 5."""
    clip_range: float = Field(0.2, gt=0)
    """PPO clip of the ratio, for the second and later updates of a rollout (published 1e-4 with the mean)."""

    def problems(self, recipe: "Recipe") -> list[str]:
        problems, train = super().problems(recipe), recipe.train
        if self.baseline == "running":
            if self.normalise_advantage:
                problems.append(
                    "objective.normalise_advantage divides by a leave-one-out sd: not with baseline=running"
                )
            return problems
        if train.rollout == "one_pass":
            problems.append(
                f"train.rollout=one_pass: objective.baseline={self.baseline} needs the whole update; use running"
            )
        if train.trajectories // train.updates < 2:
            problems.append("train.updates: DAG-KL's leave-one-out baseline needs at least 2 trajectories per update")
        return problems


class PolicyGradient(_Objective):
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


OptimizerKind = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
"""bitsandbytes' `adamw8bit` keeps its states in 8 bits, 2 bytes a weight instead of 8; `paged_adamw8bit` also lets them
move to CPU memory when a GPU is full. Layers under 4096 weights keep 32 bits."""


class Flow(Section):
    channels: tuple[Annotated[int, Field(ge=1)], ...] = (64, 128, 256, 256)
    """Widths of the state-flow network, one stage (each halves the side) per entry."""
    learning_rate: float = Field(3e-3, gt=0)
    """By default ten times the policy's: detailed balance needs a flow that keeps up."""
    optimizer: OptimizerKind = "adamw"
    """The flow's."""
    warmup_epochs: int = Field(1, ge=0)
    """First epochs that train the flow alone."""
    calibration: float = Field(0.5, ge=0, le=1)
    """Share by which each rollout moves the flow's per-step constants to a zero mean residual; 0 never (published)."""
    passes: int = Field(0, ge=0)
    """Extra flow-only updates on each rollout before the policy's (after them in one pass, whose chains are then kept);
    cheap beside the UNet."""


class Regulariser(Section):
    sampling: float = Field(0.0, ge=0)
    """Weight of mean_dims |o - o_sampling|^2 (published `unetreg`: 1)."""
    pretrained_kl: float = Field(0.0, ge=0)
    """Weight of the per-step KL to the pretrained model, in nats summed over dims; one more UNet forward per transition."""


class Train(Section):
    rollout: Literal["stored", "one_pass"] = "stored"
    """`stored` samples an epoch, then trains on its chains; `one_pass` back-propagates while it samples: one UNet pass per
    transition for both, no stored chain, every update strictly on-policy. Not for DDPO, which waits for the reward."""
    epochs: int = Field(100, ge=1)
    """Rollouts; one epoch = one rollout and its updates."""
    trajectories: int = Field(64, ge=2)
    """Trajectories per epoch."""
    updates: int = Field(2, ge=1)
    """Optimizer updates per epoch; each takes an equal share of the trajectories."""
    inner_epochs: int = Field(1, ge=1)
    """Times each rollout is used."""
    micro_batch: int = Field(8, ge=1)
    """Rows per UNet backward; memory grows with it, the gradient does not depend on it. Halved when a GPU runs out."""
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
    optimizer: OptimizerKind = "adamw"
    """The policy's."""


class Memory(Section):
    """Levers on memory; none of them changes what is computed beyond the stated rounding."""

    budget_gib: float | None = Field(None, gt=0)
    """Refuse a run that is predicted to need more, before anything is loaded; on a GPU also the allocator's limit."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute UNet activations in backward: of every block (about 1.4x the time), or of the finest resolution alone,
    which holds most of them."""
    base: Literal["compute", "int8", "nf4"] = "compute"
    """Frozen linear layers under LoRA in `model.dtype`, or quantised by bitsandbytes to 8 or 4 bits: another base model."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """`auto` is PyTorch's own (flash or memory-efficient kernels); xformers needs a GPU."""
    compile: Literal[False, True, "unet"] = False
    """torch.compile of the UNet's transformer blocks (true), or of the whole UNet at fixed shapes (`unet`), which takes
    minutes more for each number of rows, with and without gradients, with and without the adapter; run.json counts the
    graphs. Without CUDA graphs: in one pass a step is back-propagated after the forward pass of the next, while a CUDA graph
    that is replayed overwrites what the backward pass of its last replay still needs."""
    channels_last: bool = True
    """Memory layout of convolutions."""
    chains: Literal["device", "cpu"] = "device"
    """Where stored chains wait; `cpu` copies them to pinned memory while the next tile is sampled."""
    offload_vae: bool = False
    """Keep the VAE on the CPU while the UNet trains; costs its transfer twice an epoch."""
    decode_batch: int | None = Field(None, ge=1)
    """Pictures per VAE call; default: the sampler's tile."""


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
    minutes: float | None = Field(30.0, gt=0)
    """Inside an epoch: minutes after the last checkpoint until the next, between two micro-batches; null takes none there.
    It holds the trajectories in flight and, in the middle of an update, its gradients."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""


class Recipe(Section):
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the noise, the prompts and every initialisation."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """How transitions are computed: fused Triton kernels on a GPU where they launch (`auto`), or plain PyTorch."""
    deterministic: bool = False
    """On a GPU, the same bits every time: a resumed run is then the undisturbed one bit for bit, and one pass the stored
    rollout, as they always are on a CPU. Slower, and attention's backward pass needs more scratch memory."""
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
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides metrics.jsonl, which is always written."""

    @property
    def balance(self) -> Balance | None:
        """The objective's section if it balances a state flow; None for an objective without one."""
        return self.objective if isinstance(self.objective, Balance) else None

    @property
    def forward_looking(self) -> ForwardLooking | None:
        """How the x0_hat of intermediate states are scored; None if none of them is."""
        section = None if self.balance is None else self.balance.forward_looking
        return None if section is None or section.source == "none" else section

    @property
    def has_prior(self) -> bool:
        """Whether log P_F is balanced against the pretrained model's."""
        return self.balance is not None and self.balance.prior == "pretrained"

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
    problems += recipe.objective.problems(recipe)
    if train.rollout == "one_pass":
        problems += _one_pass_problems(recipe)
    if recipe.sampler.uncond == "frozen" and adapter.kind == "full":
        problems.append("sampler.uncond=frozen needs adapter.kind=lora: a full fine-tune keeps no pretrained copy")
    if recipe.memory.base != "compute" and adapter.kind == "full":
        problems.append(f"memory.base={recipe.memory.base} needs adapter.kind=lora: quantised weights are frozen")
    if adapter.kind == "lora" and not adapter.targets:
        problems.append("adapter.targets: name at least one layer")
    if adapter.kind == "full" and recipe.regulariser.pretrained_kl > 0:
        problems.append("regulariser.pretrained_kl needs adapter.kind=lora: a full fine-tune keeps no pretrained copy")
    if not recipe.flow.channels:
        problems.append("flow.channels: name at least one width")
    problems += _deterministic_problems(recipe)
    if recipe.evaluation.held_out and recipe.prompts.set not in ("drawbench", "hpdv2"):
        problems.append("evaluation.held_out: only prompts.set=drawbench and hpdv2 keep prompts back")
    return problems


def _deterministic_problems(recipe: Recipe) -> list[str]:
    """Levers that may compute other bits the next time."""
    if not recipe.deterministic:
        return []
    problems = []
    if recipe.memory.attention == "xformers":
        problems.append("deterministic=true: memory.attention=xformers adds in any order; use auto")
    if recipe.memory.compile:
        found = str(recipe.memory.compile).lower()
        problems.append(f"deterministic=true: memory.compile={found} picks kernels by timing them; use false")
    return problems


def _one_pass_problems(recipe: Recipe) -> list[str]:
    """Keys that one-pass training could only ignore."""
    train, balance = recipe.train, recipe.balance
    if balance is None:
        name = recipe.objective.name
        return [f"train.rollout=one_pass: {name} needs the final reward before its first gradient; use stored"]
    problems = []
    if balance.forward_looking.source == "current":
        problems.append(
            "train.rollout=one_pass: the rollout's policy is the current one; use forward_looking.source=rollout"
        )
    if train.inner_epochs > 1:
        problems.append(f"train.rollout=one_pass: train.inner_epochs={train.inner_epochs} needs stored chains; use 1")
    if recipe.regulariser.sampling > 0:
        problems.append("train.rollout=one_pass: regulariser.sampling is zero on-policy; use 0")
    if recipe.sampler.log_pf_at == "unrounded":
        problems.append("train.rollout=one_pass: sampler.log_pf_at=unrounded has no meaning without a stored chain")
    if recipe.memory.offload_vae:
        problems.append("train.rollout=one_pass: memory.offload_vae gains nothing, every step decodes; use false")
    if any(getattr(term, "offload", False) for term in recipe.reward):
        problems.append("train.rollout=one_pass: reward.offload gains nothing, every step scores; use false")
    if recipe.memory.chains == "cpu":
        problems.append("train.rollout=one_pass: memory.chains=cpu has no chains to move; use device")
    if balance.beta.unit == "reward_sd" and recipe.flow.warmup_epochs == 0:
        problems.append(
            "train.rollout=one_pass: objective.beta.unit=reward_sd is measured in a warm-up; set flow.warmup_epochs to 1 or more"
        )
    return problems
