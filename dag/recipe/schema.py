"""The schema of a recipe: every key, its default, its unit and its cost. Imports no torch.

A recipe is data; `dag.recipe.load` reads one. Sections are frozen and refuse unknown keys. "Published" means: as the code that
Zhang et al. (2025) published does it, where that differs from the default.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dag.recipe.data_sections import Data
from dag.recipe.first_order_sections import AdjointMatching, Backpropagation, RewardFeedback
from dag.recipe.model_sections import Adapter, Model, Sampler
from dag.recipe.network_sections import Flow, OptimizerKind, RewardCritic
from dag.recipe.objective_sections import (
    Balance,
    DetailedBalance,
    ForwardLooking,
    KLDivergence,
    NablaBalance,
    ScalarBalance,
    Target,
)
from dag.recipe.reward_sections import RewardTerm
from dag.recipe.section import Section
from dag.recipe.table_sections import (
    DirectPreference,
    PolicyGradient,
    Regression,
    SubTrajectoryBalance,
    TrajectoryBalance,
)


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
    """The prompts themselves."""
    per_group: int = Field(1, ge=1)
    """Trajectories of a group: they share their prompt and are in one update. Objectives compare rewards within groups."""
    shared_start: bool = False
    """The trajectories of a group also begin in the same noise x_T, so that they differ by the noise of their steps alone
    (published for D3PO and DanceGRPO). Evaluations are not affected."""

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
        if self.shared_start and self.per_group == 1:
            raise ValueError("shared_start needs groups; set per_group to 2 or more")
        return self


class Regulariser(Section):
    sampling: float = Field(0.0, ge=0)
    """Weight of |o - o_sampling|^2, the mean over the latent, between the network's output now and while sampling (`unetreg` in
    the published code, where it is 1)."""
    pretrained_kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence of each step from the pretrained model's, in nats summed over the latent; one more UNet
    forward pass per trained transition."""


class Train(Section):
    rollout: Literal["stored", "one_pass"] = "stored"
    """`stored` samples an epoch, then trains on its chains. `one_pass` back-propagates while it samples: one UNet pass per
    transition serves both, no chain is stored, and every update is strictly on-policy. DDPO needs `stored`: its first gradient
    needs the final reward."""
    epochs: int = Field(100, ge=1)
    """Number of epochs; an epoch is one rollout and its updates."""
    trajectories: int = Field(64, ge=2)
    """Trajectories per epoch."""
    updates: int = Field(2, ge=1)
    """Optimizer updates per epoch; each takes an equal share of the trajectories. `data` may add as many for older ones."""
    inner_epochs: int = Field(1, ge=1)
    """Times that each new rollout is trained on."""
    micro_batch: int = Field(8, ge=1)
    """Transitions per UNet backward pass; memory grows with it, the gradient does not depend on it. Halved whenever a GPU runs
    out of memory."""
    step_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the steps that an update trains. They are drawn at random and weighted for the skipped ones, so the gradient
    stays unbiased, unless `keep_terminal` leaves the last step alone."""
    keep_terminal: bool = True
    """Train the last transition, where the final reward enters, in every update. False is published."""
    step_choice: Literal["uniform", "informative"] = "uniform"
    """How the trained steps are drawn: `informative` draws those more often in which more of the reward is decided, as measured on
    the rollouts. It takes the place of `keep_terminal`."""
    step_window: tuple[Annotated[int, Field(ge=0)], int] | None = None
    """The steps that are trained at all, from the first up to but without the second, counted from the noisiest, 0; null trains
    all. `[0, steps - 1]` leaves out the last, nearly deterministic step, as DanceGRPO and Flow-GRPO do."""
    max_kl: float | None = Field(None, gt=0)
    """Trust region: an update is scaled back, at most to a hundredth, until the mean KL per transition from the policy before it
    is so many nats. Measured on 8 trajectories of each process, at two forward passes and one more for each time that the update
    is shortened by 30 %; null does not bound it."""
    learning_rate: float = Field(3e-4, gt=0)
    """AdamW learning rate of the policy."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """`linear` lowers the policy's learning rate in equal steps, update by update, from `learning_rate` to zero after the last one.
    Flow and critic keep theirs."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's beta1 and beta2, for policy, flow and critic."""
    weight_decay: float = Field(1e-4, ge=0)
    """AdamW's weight decay, for policy, flow and critic."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient, for policy, flow and critic separately; larger ones are scaled down to it."""
    optimizer: OptimizerKind = "adamw"
    """The policy's optimizer."""


class Memory(Section):
    """Levers on memory and speed. Apart from rounding, only `base` changes what is computed."""

    budget_gib: float | None = Field(None, gt=0)
    """Refuse a run that is predicted to need more than this many GiB, before anything is loaded; on a GPU this is also the
    limit of PyTorch's allocator."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute the denoiser's activations in the backward pass: those of all blocks (`full`, about 1.4 times the time), or of some
    (`selective`): of a UNet's finest resolution, which holds most of them, or of every other block of a transformer."""
    base: Literal["compute", "int8", "nf4"] = "compute"
    """How the frozen linear layers under LoRA are stored: in `model.dtype`, or quantised by bitsandbytes to 8 or 4 bits, which
    is a slightly different base model."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """`auto` and `sdpa` are PyTorch's own attention (flash or memory-efficient kernels); `xformers` needs a GPU."""
    compile: Literal[False, True, "unet"] = False
    """torch.compile of the UNet's transformer blocks (true), or of the complete UNet at fixed shapes (`unet`). `unet` takes
    minutes more to compile for each number of rows, with and without gradients, with and without the adapter; run.json counts
    the graphs. CUDA graphs are not used: in one pass a step is back-propagated after the forward pass of the next, and
    replaying a CUDA graph overwrites what the backward pass of its last replay still needs."""
    channels_last: bool = True
    """Store the weights and activations of convolutions in the channels-last memory layout."""
    chains: Literal["device", "cpu"] = "device"
    """Where stored chains are kept until they are trained on; `cpu` copies them to pinned memory while the next tile is
    sampled."""
    offload_vae: bool = False
    """Keep the VAE in CPU memory while the UNet trains; costs two transfers of the VAE an epoch."""
    decode_batch: int | None = Field(None, ge=1)
    """Pictures per VAE call; null takes `sampler.tile`."""
    gradient_batch: int | None = Field(None, ge=1)
    """Pictures per backward pass through decoder and reward, where the reward's gradient is taken; null takes
    `train.micro_batch`. Memory grows with it, the gradient does not depend on it."""


class Evaluation(Section):
    every: int = Field(10, ge=1)
    """Epochs between evaluations; there is always one before and one after training."""
    prompts: int = Field(8, ge=1)
    """Number of prompts that evaluations use, counted from the first."""
    held_out: bool = False
    """Evaluate on the held-out prompts of the set (drawbench, hpdv2) instead of on those trained on."""
    images_per_prompt: int = Field(4, ge=2)
    """Pictures per prompt, the same noise in every evaluation."""
    diversity: str | None = None
    """CLIP model whose image features measure the diversity within a prompt: `embedded`, a folder, a file or a hub id; null
    skips it."""
    fidelity: bool = False
    """Measure noun_top1, the share of pictures in which the judge sees the prompt's noun; for the embedded model's prompts
    only."""


class Checkpoint(Section):
    every: int = Field(10, ge=1)
    """Epochs between checkpoints; there is always one at the end."""
    minutes: float | None = Field(30.0, gt=0)
    """Minutes after the last checkpoint until one is also taken inside an epoch, between two micro-batches; null takes none
    there. It also holds the epoch's trajectories and, in the middle of an update, its gradients."""
    keep: int = Field(2, ge=1)
    """How many checkpoints are kept, the newest ones."""


ObjectiveTerm = Annotated[
    DetailedBalance
    | KLDivergence
    | NablaBalance
    | TrajectoryBalance
    | SubTrajectoryBalance
    | PolicyGradient
    | DirectPreference
    | Regression
    | Backpropagation
    | RewardFeedback
    | AdjointMatching,
    Field(discriminator="name"),
]


class Recipe(Section):
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the noise, of the prompt order and of every initialisation."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """How transitions are computed: by fused Triton kernels, or in plain PyTorch. `auto` takes the kernels on a GPU on which they
    launch."""
    deterministic: bool = False
    """Compute the same bits every time, also on a GPU (a CPU always does): a resumed run then equals an undisturbed one, and
    one pass equals training on the stored rollout, bit for bit. Slower, and attention's backward pass needs more memory."""
    model: Model
    adapter: Adapter = Adapter()
    sampler: Sampler = Sampler()
    prompts: Prompts
    reward: tuple[RewardTerm, ...]
    """One reward, or a list of rewards that are added with their weights."""
    objective: ObjectiveTerm
    flow: Flow = Flow()
    reward_critic: RewardCritic = RewardCritic()
    regulariser: Regulariser = Regulariser()
    data: Data = Data()
    train: Train = Train()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that also get the metrics; metrics.jsonl is always written."""

    @property
    def target(self) -> Target | None:
        """The objective's section if it has a target distribution; None for one that only maximises the reward."""
        return self.objective if isinstance(self.objective, Target) else None

    @property
    def balance(self) -> Balance | None:
        """The objective's section if it balances a state flow; None for an objective without one."""
        return self.objective if isinstance(self.objective, Balance) else None

    @property
    def forward_looking(self) -> ForwardLooking | None:
        """The section that says how the x0_hat of intermediate states are scored; None if none is."""
        section = None if self.balance is None else self.balance.forward_looking
        return None if section is None or section.source == "none" else section

    @property
    def has_prior(self) -> bool:
        """Whether log P_F is compared with the pretrained model's log P_F instead of log P_B."""
        return self.objective.has_prior

    @property
    def takes_noising(self) -> bool:
        """Whether log P_F is balanced against log P_B, that of the noising kernel."""
        return isinstance(self.objective, Balance | TrajectoryBalance) and not self.has_prior

    @property
    def samples_prior(self) -> bool:
        """Whether the pretrained model's log P_F is computed while sampling, for residuals of log-probs."""
        objective = self.objective
        is_table = isinstance(objective, TrajectoryBalance | DirectPreference) and objective.num_draws == 0
        return self.has_prior and (objective.fits_flow or is_table)

    @property
    def warmup_epochs(self) -> int:
        """Epochs at the start that do not train the policy: flow, critic or scales learn first, if one of them must."""
        objective = self.objective
        is_first = self.train.rollout == "one_pass" or self.has_critic
        learns_first = objective.fits_flow or (is_first if self.balance is not None else objective.takes_values)
        return self.flow.warmup_epochs if learns_first else 0

    @property
    def learnt_rewards(self) -> tuple[bool, ...]:
        """For each reward, whether the critic learns it because its gradient is needed and cannot be computed, or shall not."""
        if not self.objective.takes_gradient:
            return tuple(False for _ in self.reward)
        return tuple(self.objective.learns_gradient or not term.has_gradient for term in self.reward)

    @property
    def exact_rewards(self) -> tuple[bool, ...]:
        """For each reward, whether its exact gradient is taken."""
        return tuple(self.objective.takes_gradient and not is_learnt for is_learnt in self.learnt_rewards)

    @property
    def differentiates_rewards(self) -> bool:
        """Whether training back-propagates through the decoder and at least one reward, for the policy or to check the critic."""
        return self.objective.takes_gradient and any(term.has_gradient for term in self.reward)

    @property
    def scores_in_training(self) -> bool:
        """Whether training on stored chains decodes and scores pictures: with the current policy's x0_hat, or for gradients."""
        section = self.forward_looking
        return self.differentiates_rewards or (section is not None and section.source == "current")

    @property
    def has_critic(self) -> bool:
        """Whether a critic learns the gradient of at least one reward, or the value of every state."""
        return self.objective.takes_values or any(self.learnt_rewards)

    @property
    def fits_critic_afterwards(self) -> bool:
        """Whether the critic is trained on a rollout after the policy's updates. As a control variate or a baseline it must be: a
        critic that has seen the rollout's own rewards explains part of their noise, and the estimate would be biased."""
        objective = self.objective
        is_corrected = isinstance(objective, ScalarBalance) and objective.policy_gradient == "control_variate"
        return is_corrected or objective.takes_values

    @field_validator("reward", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value
