"""The recipe's sections for objectives: every objective's name and options. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from dag.recipe.section import Section


class Beta(Section):
    value: float = Field(gt=0)
    """Inverse temperature: log R = beta * reward, in nats per `unit`."""
    unit: Literal["reward", "reward_sd"] = "reward"
    """`reward_sd` standardises the reward by the mean and sd of the first rollout, so that one beta suits many rewards."""
    anneal: Literal["none", "linear", "linear_from_zero"] = "none"
    """`linear` raises beta in equal steps from value / n to value over the first n epochs, half of all. `linear_from_zero`
    (published) starts at 0, so that epoch 0 has no reward."""


class ForwardLooking(Section):
    source: Literal["rollout", "current", "none"] = "rollout"
    """Whose x0_hat is scored: the rollout's (once per state); the current policy's (published; two more decoded and scored
    pictures and one more UNet pass per trained transition); or `none`."""
    weight: Literal["alpha_bar", "one"] = "alpha_bar"
    """w_k in log F = log F~ + beta w_k r(x0_hat). `one` is published, although x0_hat says little at high noise levels."""
    prediction: Literal["guided", "conditional"] = "guided"
    """Network output from which x0_hat is computed. `conditional` (published) leaves guidance out, although the policy has it."""
    coefficients: Literal["fp32", "bf16"] = "fp32"
    """Precision of alpha_bar in x0_hat. `bf16` is published: alpha_bar rounds to 1 at the last step, where x0_hat is then the
    noisy state itself."""
    stride: int = Field(1, ge=1)
    """Score every n-th state and the last three; the others take the newest score before them. About 1/n of the decoding."""
    decoder: Literal["full", "half", "tiny"] = "full"
    """What decodes x0_hat for the reward: the VAE; the VAE at half the side, enlarged again (a quarter of the work); or an
    AutoencoderTiny. The final picture is always decoded by the VAE in full."""
    decoder_path: str | None = None
    """Folder or hub id of the AutoencoderTiny; null takes the embedded model's, or TAESD for any other model."""


def is_scored(k: int, num_transitions: int, stride: int) -> bool:
    """Whether the x0_hat of state k is scored: every `stride`-th and the last three. The others take an earlier score."""
    return k % stride == 0 or k >= num_transitions - 3


class _Objective(Section):
    """What the sections of all objectives have in common."""

    step_weight: Literal["one", "balanced"] = "one"
    """Weight of a step's policy gradient; `balanced` reduces it in the last, nearly deterministic steps."""

    def problems(self, *, is_one_pass: bool, keeps_pretrained: bool, group: int) -> list[str]:
        """Mistakes that involve this section and others of its recipe, in words; empty if there are none.

        Args:
            is_one_pass:      `train.rollout: one_pass`.
            keeps_pretrained: the pretrained weights are still there (`adapter.kind: lora`).
            group:            trajectories per update.
        """
        return []


class Balance(_Objective):
    """An objective that learns a state flow and balances log F + log P_F against log P_B + log F'."""

    beta: Beta
    prior: Literal["none", "pretrained"] = "none"
    """The distribution to sample from: exp(beta r) (`none`, published), or p_pretrained exp(beta r). With `pretrained` the
    pretrained model's log P_F takes the place of log P_B, at one more UNet forward pass per sampled transition."""
    log_prob_reduction: Literal["sum", "mean"] = "sum"
    """How log-probs are reduced over the D elements of the latent: `sum` is the log-density; `mean` is published, and makes
    the effective beta D times as large."""
    forward_looking: ForwardLooking = ForwardLooking()
    detach_next: bool = True
    """Stop the gradient through log F of the next state. False is published; its gradient is biased."""
    huber: float | None = Field(None, gt=0)
    """Residuals beyond this many nats (after `residual_scale`) count linearly; null squares them all (published)."""
    residual_scale: Literal["none", "running"] = "none"
    """`running` divides each step's residuals by their running sd, so that no step dominates the others."""

    def problems(self, *, is_one_pass: bool, keeps_pretrained: bool, group: int) -> list[str]:
        problems, section = [], self.forward_looking
        if section.stride > 1 and section.source != "rollout":
            problems.append(f"objective.forward_looking.stride={section.stride} needs source=rollout")
        if section.decoder_path is not None and section.decoder != "tiny":
            problems.append("objective.forward_looking.decoder_path belongs to decoder=tiny")
        if self.prior == "pretrained" and not keeps_pretrained:
            problems.append(
                "objective.prior=pretrained needs adapter.kind=lora: a full fine-tune keeps no pretrained copy"
            )
        return problems


class DetailedBalance(Balance):
    name: Literal["dag_db"]


class KLDivergence(Balance):
    name: Literal["dag_kl"]
    weight: float = Field(1.0, gt=0)
    """Weight of the policy's loss relative to the flow's (`klpf` in the published code)."""
    baseline: Literal["per_step", "mixed", "running"] = "per_step"
    """What is subtracted from a residual to form its advantage: `per_step` is the mean of the other trajectories at the same
    step, `mixed` (published) that of all other transitions of the update, `running` each step's running mean over earlier
    rollouts, the only one that `train.rollout: one_pass` can compute."""
    normalise_advantage: bool = False
    """Divide the advantage by the leave-one-out sd (published). Updates then do not become smaller as the residuals do."""
    advantage_clip: float | None = Field(None, gt=0)
    """Clip of the advantage, after scaling and normalising; 5 is published, null does not clip."""
    clip_range: float = Field(0.2, gt=0)
    """PPO's clip of the ratio; it acts from the second update of a rollout on. 1e-4, with mean log-probs, is published."""

    def problems(self, *, is_one_pass: bool, keeps_pretrained: bool, group: int) -> list[str]:
        problems = super().problems(is_one_pass=is_one_pass, keeps_pretrained=keeps_pretrained, group=group)
        if self.baseline == "running":
            if self.normalise_advantage:
                problems.append(
                    "objective.normalise_advantage divides by a leave-one-out sd: not with baseline=running"
                )
            return problems
        if is_one_pass:
            problems.append(
                f"train.rollout=one_pass: objective.baseline={self.baseline} needs the whole update; use running"
            )
        if group < 2:
            problems.append("train.updates: DAG-KL's leave-one-out baseline needs at least 2 trajectories per update")
        return problems


class PolicyGradient(_Objective):
    name: Literal["ddpo"]
    log_prob_reduction: Literal["sum", "mean"] = "mean"
    """How log-probs are reduced over the latent; `mean` is that of ddpo-pytorch, and the default clip range assumes it."""
    clip_range: float = Field(1e-4, gt=0)
    """PPO's clip of the ratio."""
    advantage_clip: float = Field(5.0, gt=0)
    """Clip of the normalised advantage."""
    per_prompt: int | None = Field(None, ge=2)
    """Normalise each reward by its prompt's last rewards, this many, once half as many are known; null takes those of the
    epoch."""


ObjectiveTerm = Annotated[DetailedBalance | KLDivergence | PolicyGradient, Field(discriminator="name")]
