"""The recipe's sections for objectives that follow the reward's gradient without balancing a flow. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from dag.recipe.objective_sections import Around, Objective, Target

_Positive = Annotated[int, Field(ge=1)]


class _FirstOrder(Objective):
    """What the objectives here have in common: the exact gradient of every reward."""

    @property
    def takes_gradient(self) -> bool:
        return True

    @property
    def log_prob_reduction(self) -> Literal["sum"]:
        """Log-probs are only reported."""
        return "sum"

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        name = self.name  # type: ignore[attr-defined]
        if around.black_boxes:
            problems.append(f"objective.name={name}: {', '.join(around.black_boxes)} has no gradient")
        if self.step_weight == "balanced" and not isinstance(self, Target):
            problems.append(f"objective.step_weight=balanced changes the gradient of {name}; use one")
        return problems


class Backpropagation(_FirstOrder):
    name: Literal["backprop"]
    last: _Positive | tuple[_Positive, _Positive] = 1
    """The last steps through which the reward's gradient is back-propagated (DRaFT-K). A pair draws their number anew for each
    update, between both ends (as AlignProp draws it)."""
    copies: int = Field(1, ge=1)
    """Draws of the last step over which its gradient is averaged (DRaFT-LV): the sampled one, and others that begin at the picture,
    noised back by P_B. Less noise at the memory of one; each further draw costs a forward pass more than training it, and the
    reward's gradient. With `last: 1` alone."""
    goal: float | None = None
    """null maximises the reward; a number minimises the distance to it (AlignProp: 10 for the aesthetic score)."""

    @property
    def most_steps(self) -> int:
        """The largest number of steps that an update trains."""
        return self.last if isinstance(self.last, int) else self.last[1]

    @property
    def most_passes(self) -> int:
        """The largest number of times that an update back-propagates through the policy for a trajectory."""
        return self.most_steps * self.copies

    def problems(self, around: Around) -> list[str]:
        problems = super().problems(around)
        if isinstance(self.last, tuple) and self.last[0] > self.last[1]:
            problems.append(f"objective.last=[{self.last[0]}, {self.last[1]}]: the first must not be larger")
        if self.copies > 1 and self.last != 1:
            problems.append(f"objective.copies={self.copies} draws the last step anew: use last=1")
        if self.most_steps > around.steps:
            problems.append(f"objective.last={self.most_steps} is more than sampler.steps={around.steps}")
        if around.chooses_steps:
            problems.append(
                "objective.name=backprop trains its last steps; train.step_fraction and step_window have no effect"
            )
        return problems


class RewardFeedback(_FirstOrder):
    name: Literal["refl"]
    margin: float | None = None
    """The loss is max(0, margin - r): pictures whose reward is above the margin have no gradient (published: 2, for ImageReward);
    null maximises the reward of all."""


class AdjointMatching(_FirstOrder, Target):
    name: Literal["adjoint"]
    prior: Literal["pretrained"] = "pretrained"
    """The target is p_pretrained exp(beta r); there is no other."""
