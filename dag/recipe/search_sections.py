"""The schema of a search: which pictures to look for at sampling time, without training. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dag.recipe.model_sections import Adapter, Model, Sampler
from dag.recipe.reward_sections import RewardTerm
from dag.recipe.schema import Memory, Prompts, Recipe
from dag.recipe.section import Section
from dag.recipe.table_sections import PolicyGradient

Step = Annotated[int, Field(ge=0)]


SHARED = ("seed", "model", "adapter", "sampler", "prompts", "reward", "memory")
"""The keys that a search takes from a training recipe."""


class BestOfN(Section):
    name: Literal["best_of_n"]
    particles: int = Field(4, ge=1)
    """Pictures that are drawn for each one that is kept."""


class Steering(Section):
    """Feynman-Kac steering: particles of one prompt are weighted by the rewards of their x0_hat, and resampled."""

    name: Literal["fk"]
    particles: int = Field(4, ge=1)
    """Particles for each picture that is kept."""
    strength: float = Field(1.0, gt=0)
    """lambda: the particles' law is p exp(lambda r), in 1 per unit of the reward (published: 10, for ImageReward)."""
    potential: Literal["difference", "max", "sum"] = "difference"
    """What multiplies a particle's weight at a scored state: exp(lambda times the gain since the last scored state), times the gain
    of its highest reward so far, or times the reward itself. At the end all are corrected to exp(lambda r(x_0))."""
    every: int = Field(1, ge=1)
    """Score and resample at every n-th state of `window`."""
    window: tuple[Step, int] | None = None
    """The states that are scored, from the first up to but without the second, counted from the noisiest, 0; null takes all."""
    resample: Literal["adaptive", "always"] = "adaptive"
    """`adaptive` resamples when the weights' effective sample size is below half of the particles; weights are carried on until
    then. `always` does so at every scored state."""
    choose: Literal["best", "weighted"] = "best"
    """The picture that is kept: the one of the highest reward, or one drawn by its weight, whose law is p exp(lambda r)."""


class Stepwise(Section):
    """In each step several next states are proposed, and one is chosen by the reward of its x0_hat (SVDD; Li et al. 2024)."""

    name: Literal["svdd"]
    proposals: int = Field(20, ge=1)
    """Next states that are proposed in each step of `window`."""
    alpha: float = Field(0.0, ge=0)
    """A proposal is chosen with probability softmax(reward / alpha); 0 takes the best one (published)."""
    window: tuple[Step, int] | None = None
    """The steps that are searched, from the first up to but without the second; null takes all. [0, 6] with ten proposals is
    Free2Guide."""
    beams: int = Field(1, ge=1)
    """Chains that are searched side by side; the worst are dropped on the way, exponentially down to one (DSearch)."""
    fewer: int | None = Field(None, ge=1)
    """Proposals in a step that is not drawn for the full number: step k of T is drawn with probability 1 - exp(-3 k / T) (DSearch:
    5, beside 25); null proposes the full number in every step."""


class NoiseOptimisation(Section):
    """Gradient ascent on the first noise, with the noise of all steps held fixed (ReNO; Eyring et al. 2024)."""

    name: Literal["reno"]
    iterations: int = Field(20, ge=1)
    """Chains that are sampled and back-propagated for each picture, one graph of the denoiser at a time."""
    rate: float = Field(5.0, gt=0)
    """Step of SGD with Nesterov momentum 0.9."""
    clip_norm: float = Field(0.1, gt=0)
    """Largest norm of the gradient."""
    penalty: float = Field(0.01, ge=0)
    """Weight of minus the log-density of the noise's norm, which keeps it on its shell."""


SearchTerm = Annotated[BestOfN | Steering | Stepwise | NoiseOptimisation, Field(discriminator="name")]


class SearchRecipe(Section):
    """Everything that decides the pictures of a search. The sections that it shares with a training recipe mean the same."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the noise and of every choice."""
    images: int = Field(1, ge=1)
    """Pictures for each prompt; each is searched by itself."""
    preview_decoder: Literal["full", "half", "tiny"] = "full"
    """What decodes x0_hat for the reward, as `forward_looking.decoder` in training."""
    model: Model
    adapter: Adapter = Adapter()
    """Of a trained model that is steered (`--lora`)."""
    sampler: Sampler = Sampler()
    prompts: Prompts
    reward: tuple[RewardTerm, ...] = Field(min_length=1)
    search: SearchTerm
    memory: Memory = Memory()

    @field_validator("reward", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> "SearchRecipe":
        first, end = getattr(self.search, "window", None) or (0, self.sampler.steps)
        if not first < end <= self.sampler.steps:
            raise ValueError(
                f"search.window=[{first}, {end}]: give states within 0 and sampler.steps={self.sampler.steps}"
            )
        black_boxes = [term.name for term in self.reward if not term.has_gradient]
        if isinstance(self.search, NoiseOptimisation) and black_boxes:
            raise ValueError(f"search.name=reno: {', '.join(black_boxes)} has no gradient")
        return self

    def as_training(self) -> Recipe:
        """A training recipe with the same model, adapter, sampler, rewards and memory, for code that takes one."""
        return Recipe(objective=PolicyGradient(name="ddpo"), **{name: getattr(self, name) for name in SHARED})


SEARCHES = ("best_of_n", "fk", "svdd", "reno")
"""The names of `search.name`."""
