"""The recipe's sections for objectives whose gradient is an advantage for each transition. Imports no torch."""

from typing import Literal

from pydantic import Field

from dag.recipe.objective_sections import Around, Objective, Target, ValueBalance


class PolicyGradient(Objective):
    name: Literal["ddpo"]
    log_prob_reduction: Literal["sum", "mean"] = "mean"
    """How log-probs are reduced over the latent; `mean` is that of ddpo-pytorch, and the default clip range assumes it."""
    clip_range: float = Field(1e-4, gt=0)
    """PPO's clip of the ratio."""
    advantage_clip: float = Field(5.0, gt=0)
    """Clip of the normalised advantage."""
    std: Literal["all", "group", "none"] = "all"
    """What a reward minus its group's mean is divided by: the sd of the epoch's rewards, that of its group (which gives prompts
    on which all pictures score alike as much weight as others), or nothing (unbiased). Without groups the epoch is the group."""
    std_floor: float = Field(1e-6, gt=0)
    """Added to the sd, so that equal rewards are not divided by their rounding."""
    baseline: Literal["group", "value"] = "group"
    """What a reward is compared with: the mean of its group, or at every state the final reward that the reward critic expects from
    x0_hat and the prompt (DPOK). The critic learns after the updates, so `flow.warmup_epochs` must be 1 or more."""
    per_prompt: int | None = Field(None, ge=2)
    """Normalise each reward by its prompt's last rewards, this many, once half as many are known; null takes those of the
    epoch."""

    @property
    def takes_values(self) -> bool:
        return self.baseline == "value"

    def problems(self, around: Around) -> list[str]:
        problems = []
        if self.takes_values and (self.per_prompt is not None or self.std == "group"):
            problems.append("objective.baseline=value compares with no group: per_prompt and std=group have no effect")
        if self.std == "group" and around.per_group == 1:
            problems.append("objective.std=group: there are no groups; set prompts.per_group to 2 or more")
        if self.per_prompt is not None and around.per_group > 1:
            problems.append(
                "objective.per_prompt and prompts.per_group both say what a reward is compared with; use one"
            )
        return problems


class TrajectoryBalance(Target):
    name: Literal["tb"]
    log_prob_reduction: Literal["sum", "mean"] = "sum"
    """How log-probs are reduced over the latent; `mean` makes the effective beta as many times larger as it has elements."""
    clip_range: float = Field(0.2, gt=0)
    """PPO's clip of the ratio; it acts from the second update of a rollout on."""
    advantage_clip: float | None = Field(None, gt=0)
    """Clip of a trajectory's residual, minus that of the others with `log_z: batch`, in nats; null does not clip."""
    log_z: Literal["batch", "flow"] = "batch"
    """log Z: minus the mean residual of the others in the group (`batch`, VarGrad), or a state flow of the first noise and the
    prompt (`flow`), which needs no groups. With a prior log Z does depend on the first noise, the more so with few steps or a small
    eta; off-policy the optimum depends on the data unless log Z may. Without a prior set `flow.slopes: true` with `flow`: the log
    density of the first noise is then part of log Z."""

    @property
    def fits_flow(self) -> bool:
        return self.flow_is_log_z

    @property
    def flow_is_log_z(self) -> bool:
        return self.log_z == "flow"

    @property
    def needs_own_rollouts(self) -> str:
        return ""

    @property
    def weighs_by_log_pf(self) -> bool:
        return True

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if around.per_update < 2 and self.log_z == "batch":
            problems.append(
                "train.updates: tb's log Z needs at least 2 trajectories per update, or objective.log_z=flow"
            )
        return problems


class SubTrajectoryBalance(ValueBalance):
    name: Literal["subtb"]
    decay: float = Field(0.9, gt=0)
    """lambda: a piece of n steps has weight lambda^n. Towards 0 it is detailed balance, towards infinity trajectory balance."""
    clip_range: float = Field(0.2, gt=0)
    """PPO's clip of the ratio; it acts from the second update of a rollout on."""

    @property
    def weighs_by_log_pf(self) -> bool:
        return True

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if around.is_one_pass:
            problems.append("train.rollout=one_pass: subtb needs whole trajectories; use stored")
        return problems


class OnPictures(Objective):
    """An objective that can train on the sampled chain, or on its last picture noised anew."""

    form: Literal["chain", "denoise"] = "chain"
    """`chain` takes log P_F of the chain that was sampled; `denoise` the error of predicting fresh noise on its last picture, of
    the conditional branch alone."""
    draws: int = Field(4, ge=1)
    """With `denoise`: how often an update noises each picture."""
    log_prob_reduction: Literal["sum", "mean"] = "mean"
    """How log-probs of a chain are reduced over the latent."""
    clip_range: float = Field(0.2, gt=0)
    """With `chain`: PPO's clip of the ratio; it acts from the second update of a rollout on."""

    @property
    def needs_own_rollouts(self) -> str:
        return ""

    @property
    def num_draws(self) -> int:
        return self.draws if self.form == "denoise" else 0

    def problems(self, around: Around) -> list[str]:
        keys = ("draws",) if self.form == "chain" else ("clip_range", "log_prob_reduction", "step_weight")
        problems = [f"objective.{key} has no effect with form={self.form}" for key in self.changed(*keys)]
        if self.form == "denoise" and around.chooses_steps:
            problems.append("objective.form=denoise has no steps: train.step_fraction and step_window have no effect")
        return problems


class DirectPreference(OnPictures):
    name: Literal["dpo"]
    strength: float = Field(0.1, gt=0)
    """DPO's beta: the weight of log P_F - log p_pretrained against a preference, in the recipe's reduction (D3PO: 0.1 with means),
    or of the squared errors of noise prediction (published: 100 to 5000)."""
    reference: Literal["pretrained", "past"] = "pretrained"
    """What the policy is compared with: the pretrained model, or with `denoise` one of its own earlier states, drawn for each
    update (SePPO)."""
    past: int = Field(4, ge=1)
    """With `reference: past`: the policies at the starts of the last n epochs are kept, in CPU memory and in checkpoints."""
    flip: Literal["none", "anchor"] = "none"
    """With `denoise`: `anchor` imitates the worse picture too where the policy denoises the better one worse than the reference
    does, since a reference that is ahead is no bad example (SePPO)."""

    @property
    def has_prior(self) -> bool:
        return True

    @property
    def weighs_by_log_pf(self) -> bool:
        return self.form == "chain"

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if self.form == "chain":
            problems += [f"objective.{key} needs form=denoise" for key in self.changed("reference", "flip")]
        if self.reference == "pretrained":
            problems += [f"objective.{key} belongs to reference=past" for key in self.changed("past")]
        if self.form == "denoise" and around.micro_batch % around.per_group:
            problems.append(
                f"train.micro_batch={around.micro_batch} must be a multiple of prompts.per_group={around.per_group}: a group's "
                "pictures are compared"
            )
        if around.per_group < 2:
            problems.append("objective.name=dpo compares pictures of a prompt; set prompts.per_group to 2 or more")
        if not around.keeps_pretrained:
            problems.append("objective.name=dpo needs adapter.kind=lora: a full fine-tune keeps no pretrained copy")
        return problems


class Regression(OnPictures):
    name: Literal["regression"]
    weights: Literal["top", "softmax"] = "softmax"
    """`top` imitates the best pictures of each group (RAFT), `softmax` all, with weights softmax(beta r) in the group (RWR)."""
    keep: int = Field(1, ge=1)
    """With `top`: how many pictures of a group are imitated."""
    beta: float = Field(1.0, gt=0)
    """With `softmax`: in 1 per sd of the update's rewards."""

    def problems(self, around: Around) -> list[str]:
        size = around.per_group if around.per_group > 1 else around.per_update
        problems = super().problems(around)
        problems += [f"objective.{key} has no effect with weights={self.weights}" for key in self._unused()]
        if self.weights == "top" and self.keep >= size:
            problems.append(f"objective.keep={self.keep} of {size} pictures of a group: keep fewer")
        return problems

    def _unused(self) -> list[str]:
        return self.changed("beta") if self.weights == "top" else self.changed("keep")
