"""The model card of a published LoRA: README.md with the front matter that the Hugging Face hub reads.

`card` only writes text; `dag.evaluation.publish` gathers what it is about.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import yaml

from dag.evaluation import plain_diffusers
from dag.evaluation.figures import markdown
from dag.evaluation.plain_diffusers import FLUX, SD3, XL, Family, Place
from dag.evaluation.prices import DIVERSITY, Judgement, Price, prices
from dag.models import lora_file
from dag.models.source import SHIPPED
from dag.recipe import Recipe, RewardTerm, Sampler

BEFORE_AFTER = "before_after.png"
_SHOWN_PROMPTS = 12
_PAPER = "[Diffusion Alignment with GFlowNets](https://arxiv.org/abs/2406.00633)"
# The tag of a family; others are plain Stable Diffusion.
_TAGS = {XL: "stable-diffusion-xl", SD3: "stable-diffusion-3", FLUX: "flux"}
# Identifiers of the hub's list that base models have; a licence that is not on that list is `other` with a name.
_LISTED = {
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unknown", "other"),
}


@dataclass(frozen=True)
class Base:
    """The model under the LoRA."""

    name: str
    """A hub id, which has a slash, or the name of a local folder."""
    licence: str | None
    """An identifier of the hub's list; None if it is not known."""
    family: Family

    @property
    def is_at_hub(self) -> bool:
        return "/" in self.name


@dataclass(frozen=True)
class Judged:
    """What `dag.evaluate` said of the published weights."""

    table: str
    """Markdown."""
    rows: Judgement


@dataclass(frozen=True)
class Story:
    """What a card tells of a run."""

    title: str
    repo: str | None
    """The hub id under which the LoRA is published; None for a folder."""
    recipe: Recipe
    """Without local paths."""
    base: Base
    beta_eff: float | None
    """Effective inverse temperature in nats per unit of the recipe's beta; None for an objective without one."""
    prompts: Sequence[str] | None
    """The prompts that were trained on; None if they are no longer at hand."""
    first: Mapping[str, Any]
    """Metrics of the evaluation before training."""
    last: Mapping[str, Any]
    """Metrics of the evaluation after training."""
    judged: Judged | None
    pictures: Sequence[tuple[str, str]]
    """(prompt, file) of pictures by the trained model."""
    has_before_after: bool


def card(story: Story) -> str:
    """The text of README.md."""
    reward = " + ".join(term.name for term in story.recipe.reward)
    picture = (
        f"![Before and after training]({BEFORE_AFTER})\n\n*Left the base model, right with the LoRA: the same prompts and "
        "seeds. Above each picture are its prompt and reward.*"
    )
    parts = [
        _front_matter(story),
        f"# {story.title}",
        f"A LoRA for {_link(story.base)}, trained to make pictures with a higher reward `{reward}`. It was trained by the "
        f"objective `{story.recipe.objective.name}` with the code of {_PAPER}.",
        *([picture] if story.has_before_after else []),
        "## Use it in diffusers",
        fenced(code(story), "python"),
        *filter(None, [plain_diffusers.deviation(story.base.family)]),
        "## Use it in ComfyUI",
        plain_diffusers.other_programs(story.base.family, lora_file.KOHYA),
        "## Training",
        markdown(_training(story)),
        _prompts(story),
        "## Numbers",
        _numbers(story),
        *(["Judged again, with other seeds than in training:", story.judged.table] if story.judged else []),
        "## Limits",
        "\n".join(f"- {line}" for line in (*warnings(story), *_limits(story.recipe))),
        "## Files",
        f"`{lora_file.DIFFUSERS}` is the LoRA for diffusers, `{lora_file.KOHYA}` the same for other programs; `recipe.yaml` is the "
        "complete recipe (`train_dag.py --recipe recipe.yaml` trains it again where model and rewards are at hand), "
        "`run.json` says with which versions, on what, it ran.",
    ]
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    """The text as a Markdown code block, in a fence that is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def code(story: Story) -> str:
    """A Python program that draws with the LoRA: see `plain_diffusers.program`."""
    is_known = story.base.is_at_hub or story.base.name in SHIPPED
    base = Place(story.base.name, "" if is_known else "the folder of the base model")
    lora = Place(story.repo) if story.repo else Place(".", "this folder, or the hub id under which it is published")
    prompt = story.pictures[0][0] if story.pictures else "a cat"
    return plain_diffusers.program(_asked(story), story.base.family, base, lora, prompt)


def _asked(story: Story) -> plain_diffusers.Asked:
    return lambda key: attrgetter(key)(story.recipe)


def warnings(story: Story) -> list[str]:
    """One line for each price of the reward: see `dag.evaluation.prices`."""
    found = prices(story.first, story.last, None if story.judged is None else story.judged.rows)
    return [
        f"**Warning:** {price.measure} fell from {price.before:.3g} to {price.after:.3g}{_why(price)}"
        for price in found
    ]


def _why(price: Price) -> str:
    if price.measure == DIVERSITY:
        return ": pictures of one prompt are more alike than the base model's."
    return " while the reward rose: prompts are kept less well."


def _front_matter(story: Story) -> str:
    family = _TAGS.get(story.base.family.pipeline, "stable-diffusion")
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora", family, "gflownet", "dag"]
    data: dict[str, Any] = {}
    if story.base.licence is not None:
        is_listed = story.base.licence in _LISTED
        data |= (
            {"license": story.base.licence} if is_listed else {"license": "other", "license_name": story.base.licence}
        )
    if story.base.is_at_hub:
        data |= {"base_model": story.base.name, "base_model_relation": "adapter"}
    data |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if story.pictures:
        data["widget"] = [{"text": prompt, "output": {"url": file}} for prompt, file in story.pictures]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)}---"


def _link(base: Base) -> str:
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.is_at_hub else f"`{base.name}`"


def _training(story: Story) -> list[dict[str, Any]]:
    recipe, base = story.recipe, story.base
    train = recipe.train
    stored = "" if recipe.memory.base == "compute" else f", its frozen layers stored as {recipe.memory.base}"
    count = "unknown" if story.prompts is None else str(len(story.prompts))
    rows = {
        "base model": f"{_link(base)}{stored}",
        "its licence": base.licence or "not known to this card: look it up",
        "reward": " + ".join(map(_reward, recipe.reward)),
        "objective": recipe.objective.name,
        "beta": _beta(story),
        "prompts": count,
        "size": f"{train.epochs} epochs of {train.trajectories} trajectories",
        "LoRA": recipe.adapter.factors,
        "sampler": _sampler(recipe.sampler, base.family),
    }
    return [{"what": name, "value": value} for name, value in rows.items()]


def _sampler(sampler: Sampler, family: Family) -> str:
    """How training sampled."""
    kind = "flow matching" if family.is_flow else "DDIM"
    kind += ", Flow-GRPO's SDE" if sampler.sde == "flow_grpo" else ""
    embedding = sampler.guidance_embedding
    if embedding is None and family.takes_guidance:
        embedding = plain_diffusers.FLUX_GUIDANCE
    told = {"shift": sampler.shift, "guidance embedding": embedding}
    rest = "".join(f", {name} {value:g}" for name, value in told.items() if value is not None)
    return f"{kind}, {sampler.steps} steps, eta {sampler.eta:g}, guidance {sampler.guidance_scale:g}{rest}"


def _reward(term: RewardTerm) -> str:
    path = getattr(term, "path", None)
    return f"{term.weight:g} x {term.name}" + ("" if path is None else f" ({path})")


def _beta(story: Story) -> str:
    target = story.recipe.target
    if target is None:
        return "none: the objective has no temperature"
    unit = "sd of the first rollout's reward" if target.beta.unit == "reward_sd" else "unit of reward"
    effective = "" if story.beta_eff is None else f"; effective inverse temperature {story.beta_eff:g} nats per {unit}"
    return f"{target.beta.value:g}{effective}"


def _prompts(story: Story) -> str:
    if story.prompts is None:
        return "The prompts are not listed: they lay in a file that has been moved or changed since."
    rest = len(story.prompts) - _SHOWN_PROMPTS
    more = f"\n... and {rest} more" if rest > 0 else ""
    return "It was trained on these prompts:\n\n" + fenced("\n".join(story.prompts[:_SHOWN_PROMPTS]) + more, "text")


def _numbers(story: Story) -> str:
    """The evaluations before and after training, as a table with its legend."""
    rewards = [name for name in story.last if name.startswith("eval_reward_")]
    measures = [name for name in ("diversity", "noun_top1") if name in story.last]
    rows = [
        {"measure": name.removeprefix("eval_"), "before": story.first.get(name), "after": story.last[name]}
        for name in (*rewards, *measures)
    ]
    config = story.recipe.evaluation
    legend = [
        f"At most {config.prompts} prompts, {config.images_per_prompt} pictures of each, with the same seeds before and "
        "after."
    ]
    if "diversity" in measures:
        legend.append("diversity is 1 - the mean cosine between the features of a prompt's pictures.")
    if "noun_top1" in measures:
        legend.append("noun_top1 is the share of pictures in which a classifier sees the prompt's noun.")
    return f"{markdown(rows)}\n\n{' '.join(legend)}"


def _limits(recipe: Recipe) -> list[str]:
    lines = [
        "A reward can be gamed: a higher number need not be a better picture. Look at the pictures, and judge by other rewards.",
        "It was trained on the prompts above alone; on others it may do less, or harm.",
        "It inherits the limits, the biases and the licence of the base model.",
    ]
    if recipe.sampler.uncond == "frozen" and recipe.sampler.guidance_scale > 1:
        lines.append(
            "In training the unconditional branch of guidance was the base model's; diffusers applies the LoRA to both branches: "
            "its pictures differ from those of the training."
        )
    return lines
