"""The recipe's sections for networks that are trained beside the policy: state flow, reward critic. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from dag.recipe.section import Section

OptimizerKind = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
"""bitsandbytes' `adamw8bit` stores its states in 8 bits, 2 bytes a weight instead of 8; `paged_adamw8bit` also lets them
move to CPU memory when a GPU is full. Tensors of fewer than 4096 weights keep 32 bits."""


class Flow(Section):
    channels: tuple[Annotated[int, Field(ge=1)], ...] = (64, 128, 256, 256)
    """Widths of the state-flow network: one stage per entry, each of which halves the side."""
    learning_rate: float = Field(3e-3, gt=0)
    """Learning rate of the flow; the default is ten times the policy's, since detailed balance needs a flow that keeps up."""
    optimizer: OptimizerKind = "adamw"
    """The flow's optimizer."""
    warmup_epochs: int = Field(1, ge=0)
    """Number of epochs at the start that train the flow alone."""
    calibration: float = Field(0.5, ge=0, le=1)
    """How far each rollout moves the flow's per-step constants towards those with a mean residual of zero: 1 all the way, 0
    not at all (published). Unless it is 0, the first rollout moves them all the way."""
    slopes: bool = False
    """Give log F~ one slope in |x|^2 / D per step too, moved by `calibration` towards those that narrow the residuals. They take
    most of the noise out of the early steps' residuals, which `objective.prior: pretrained` does not have to begin with."""
    passes: int = Field(0, ge=0)
    """Times that the flow alone is also trained on all transitions of a rollout, before the policy's updates; in one pass on
    those of an update, after it, for which its chains are kept. Cheap beside the UNet."""


class RewardCritic(Section):
    """The network that learns rewards whose gradient an objective takes and cannot or shall not compute (`reward_gradient`). It
    reads x0_hat and the prompt."""

    width: int = Field(48, ge=1)
    """Channels of the network."""
    learning_rate: float = Field(2e-3, gt=0)
    """Learning rate of the network."""
    rollouts: int = Field(6, ge=1)
    """It is trained on the previews of so many rollouts, the newest ones; in one pass, of so many updates. At most 12 previews of
    a trajectory are kept."""
    passes: int = Field(6, ge=1)
    """Most passes over the previews after a rollout, and twice as many after the first; training stops before that when the
    error on the previews that are held out has not fallen for two passes."""
    held_out: float = Field(0.125, gt=0, le=0.5)
    """Share of the trajectories that are held out."""
