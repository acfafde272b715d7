"""The recipe's sections for objectives that balance a flow, and what all sections of objectives share. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from dag.recipe.section import Section

_GRADIENT_KEYS = ("reward_gradient", "jacobian", "learnt_flow")


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
    weight: Literal["alpha_bar", "one", "fitted"] = "alpha_bar"
    """w_k in log F = log F~ + beta w_k r(x0_hat). `one` is published, although x0_hat says little at high noise levels.
    `fitted` is the slope of the least-squares line from r(x0_hat) to the final reward, over the rollouts so far."""
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
    """Folder or hub id of the AutoencoderTiny; null takes the one that is published for the model's latents."""


def is_scored(k: int, num_transitions: int, stride: int) -> bool:
    """Whether the x0_hat of state k is scored: every `stride`-th and the last three. The others take an earlier score."""
    return k % stride == 0 or k >= num_transitions - 3


@dataclass(frozen=True)
class Around:
    """What an objective's section must know of the rest of its recipe, to find contradictions."""

    is_one_pass: bool
    """`train.rollout: one_pass`."""
    keeps_pretrained: bool
    """The pretrained weights are still there (`adapter.kind: lora`)."""
    per_update: int
    """Trajectories per update."""
    per_group: int
    """`prompts.per_group`."""
    micro_batch: int
    """`train.micro_batch`."""
    black_boxes: tuple[str, ...]
    """Names of the rewards that have no gradient."""
    steps: int
    """`sampler.steps`."""
    chooses_steps: bool
    """An update trains some of the steps: `train.step_fraction` below 1, or a `step_window`."""


class Objective(Section):
    """What the sections of all objectives have in common."""

    step_weight: Literal["one", "balanced"] = "one"
    """Weight of a step's policy gradient; `balanced` reduces it in the last, nearly deterministic steps."""

    @property
    def takes_gradient(self) -> bool:
        """Whether the policy is trained with the gradient of the reward."""
        return False

    @property
    def num_draws(self) -> int:
        """How often an update noises each picture anew to train on it; 0 if it trains on the chain that was sampled."""
        return 0

    @property
    def has_prior(self) -> bool:
        """Whether log P_F is compared with the pretrained model's log P_F instead of log P_B."""
        return False

    @property
    def fits_flow(self) -> bool:
        """Whether a state flow is trained by residuals of log-probs."""
        return False

    @property
    def flow_is_log_z(self) -> bool:
        """Whether the state flow is that of the first noise alone, log Z of the balance of a whole trajectory."""
        return False

    @property
    def learns_gradient(self) -> bool:
        """Whether gradients of rewards are learnt that could be computed."""
        return False

    @property
    def takes_values(self) -> bool:
        """Whether the reward critic predicts the final reward at every state, to compare it with."""
        return False

    @property
    def needs_own_rollouts(self) -> str:
        """Why the objective cannot train on trajectories of another policy, in words; "" if it can."""
        return "its gradient is an expectation over trajectories of the present policy"

    @property
    def weighs_by_log_pf(self) -> bool:
        """Whether the weight of a trajectory's gradient depends on the present policy's log P_F of it."""
        return False

    def problems(self, around: Around) -> list[str]:
        """Mistakes that involve this section and others of its recipe, in words; empty if there are none."""
        return []


class Target(Objective):
    """An objective with a target distribution."""

    beta: Beta
    prior: Literal["none", "pretrained"] = "none"
    """The distribution to sample from: exp(beta r) (`none`, published), or p_pretrained exp(beta r). With `pretrained` the
    pretrained model's log P_F takes the place of log P_B, at one more UNet forward pass per sampled transition."""

    @property
    def has_prior(self) -> bool:
        return self.prior == "pretrained"

    def problems(self, around: Around) -> list[str]:
        if self.prior == "pretrained" and not around.keeps_pretrained:
            return ["objective.prior=pretrained needs adapter.kind=lora: a full fine-tune keeps no pretrained copy"]
        return []


class Balance(Target):
    """An objective whose flow log F balances log F + log P_F against log P_B + log F'."""

    forward_looking: ForwardLooking = ForwardLooking()
    reward_gradient: Literal["auto", "exact", "learnt"] = "auto"
    """Where d r / d x0_hat comes from, if the objective takes it: back-propagated through decoder and reward (`exact`), or
    through a small network that learns the reward from the rollouts (`learnt`, see `reward_critic`). `auto` is exact for
    every reward that has a gradient, and learnt for the others."""
    jacobian: Literal["policy", "pretrained", "none"] = "policy"
    """Whose x0_hat, and d x0_hat / d x through its denoiser, the reward's gradient is taken at. `policy`: a forward and a backward
    pass more for each trained transition that is stored, a backward pass more in one pass. `pretrained`, with `prior:
    pretrained`: E[r | x] of the model that is tilted, hence closer to its flow where none is learnt; both passes more. `none`
    takes a / (a^2 + s^2) in the Jacobian's place, sqrt(alpha_bar) for a diffusion model, which saves the backward pass and
    learns more slowly."""
    learnt_flow: bool = True
    """Learn log F~, and add its gradient to that of the forward-looking reward. False takes the forward-looking reward for the
    whole flow: no flow is trained, and with `prior: pretrained` the pretrained model is run for trained transitions alone."""

    @property
    def learns_gradient(self) -> bool:
        return self.reward_gradient == "learnt"

    @property
    def needs_own_rollouts(self) -> str:
        if self.forward_looking.source == "none":
            return ""
        return "the forward-looking rewards are the sampling policy's; use forward_looking.source=none"

    @property
    def has_flow(self) -> bool:
        """Whether a state flow is trained."""
        return self.learnt_flow or not self.takes_gradient

    def problems(self, around: Around) -> list[str]:
        problems, section = super().problems(around) + self._gradient_problems(around), self.forward_looking
        if section.stride > 1 and section.source != "rollout":
            problems.append(f"objective.forward_looking.stride={section.stride} needs source=rollout")
        if section.decoder_path is not None and section.decoder != "tiny":
            problems.append("objective.forward_looking.decoder_path belongs to decoder=tiny")
        return problems

    def _gradient_problems(self, around: Around) -> list[str]:
        """Mistakes about d log F / d x_next: what it needs if the objective takes it, what has no effect if not."""
        section = self.forward_looking
        if not self.takes_gradient:
            return [
                f"objective.{key} has no effect with policy_gradient=score" for key in self.changed(*_GRADIENT_KEYS)
            ]
        problems = []
        if section.source != "rollout" or section.prediction != "guided" or section.coefficients != "fp32":
            problems.append(
                f"{self._asks} differentiates the policy's own x0_hat: use forward_looking.source=rollout, "
                "prediction=guided and coefficients=fp32"
            )
        if self.jacobian == "pretrained" and (self.prior == "none" or self.learnt_flow):
            problems.append("objective.jacobian=pretrained needs prior=pretrained and learnt_flow=false")
        if self.reward_gradient == "exact" and around.black_boxes:
            names = ", ".join(around.black_boxes)
            problems.append(f"objective.reward_gradient=exact: {names} has no gradient; use auto or learnt")
        return problems

    @property
    def _asks(self) -> str:
        """The key that asks for the gradient, for error messages."""
        return f"objective.name={self.name}"  # type: ignore[attr-defined]


class ValueBalance(Balance):
    """An objective that learns the values of a state flow, from residuals of log-probs."""

    log_prob_reduction: Literal["sum", "mean"] = "sum"
    """How log-probs are reduced over the D elements of the latent: `sum` is the log-density; `mean` is published, and makes
    the effective beta D times as large."""
    detach_next: bool = True
    """Stop the gradient through log F of the next state. False is published; its gradient is biased."""

    @property
    def fits_flow(self) -> bool:
        return self.has_flow


class ScalarBalance(ValueBalance):
    """An objective that learns a state flow from the squared residual of detailed balance."""

    huber: float | None = Field(None, gt=0)
    """Residuals beyond this many nats (after `residual_scale`) count linearly; null squares them all (published)."""
    residual_scale: Literal["none", "running"] = "none"
    """`running` divides each step's residuals by their running sd, so that no step dominates the others."""
    policy_gradient: Literal["score", "pathwise", "control_variate"] = "score"
    """How the policy's gradient is estimated. `score` (published) is the residual times grad log P_F, whose noise grows with
    the latent's size. `pathwise` is d log F / d x_next, and closed forms of the Gaussian terms. `control_variate` adds to it
    the score function of what a learnt reward gradient does not explain, which makes the estimate unbiased."""
    correction: float = Field(1.0, gt=0, le=1)
    """Weight of the term that `control_variate` adds; 1 is unbiased, less has less noise."""

    @property
    def takes_gradient(self) -> bool:
        return self.policy_gradient != "score"

    @property
    def needs_own_rollouts(self) -> str:
        if self.takes_gradient:
            return "the gradient of the flow is taken at the present policy's previews; use policy_gradient=score"
        return super().needs_own_rollouts

    @property
    def _asks(self) -> str:
        return f"objective.policy_gradient={self.policy_gradient}"

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if self.policy_gradient != "control_variate":
            problems += [
                f"objective.{key} belongs to policy_gradient=control_variate" for key in self.changed("correction")
            ]
        elif self.jacobian != "policy":
            problems.append(
                "objective.policy_gradient=control_variate corrects the policy's own x0_hat: use jacobian=policy"
            )
        elif self.reward_gradient != "learnt" and not around.black_boxes:
            problems.append(
                "objective.policy_gradient=control_variate corrects a learnt gradient, and these rewards have an exact one: "
                "use pathwise, or reward_gradient=learnt"
            )
        return problems


class DetailedBalance(ScalarBalance):
    name: Literal["dag_db"]


class KLDivergence(ScalarBalance):
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

    @property
    def needs_own_rollouts(self) -> str:
        return "the KL whose gradient its policy follows is an expectation over the present policy"

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if self.policy_gradient != "score":
            ratio = ("clip_range",) if self.policy_gradient == "pathwise" else ()
            unused = self.changed("baseline", "normalise_advantage", "advantage_clip", *ratio)
            return problems + [
                f"{key} has no effect with {self._asks}" for key in (f"objective.{key}" for key in unused)
            ]
        if self.baseline == "running":
            if self.normalise_advantage:
                problems.append(
                    "objective.normalise_advantage divides by a leave-one-out sd: not with baseline=running"
                )
            return problems
        if around.is_one_pass:
            problems.append(
                f"train.rollout=one_pass: objective.baseline={self.baseline} needs the whole update; use running"
            )
        if around.per_update < 2:
            problems.append("train.updates: DAG-KL's leave-one-out baseline needs at least 2 trajectories per update")
        return problems


class NablaBalance(Balance):
    name: Literal["nabla_db"]
    weight: Literal["variance", "one"] = "variance"
    """Weight of the squared residual of a step: its variance, which makes it the step's KL in nats, or `one`, the mean over the
    latent (published), which counts late steps far more."""
    reverse: float = Field(1.0, gt=0)
    """Weight of the reverse residual, which trains the state flow if there is one."""

    @property
    def needs_own_rollouts(self) -> str:
        return "the gradient of the flow is taken at the present policy's previews"

    @property
    def takes_gradient(self) -> bool:
        return True

    @property
    def log_prob_reduction(self) -> Literal["sum"]:
        """Scores are gradients of log-densities; they have no reduction."""
        return "sum"

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if not self.learnt_flow:
            problems += [f"objective.{key} has no effect with learnt_flow=false" for key in self.changed("reverse")]
        return problems
