"""Writes a first recipe for a person's model, GPU, reward and prompts: a shipped one, changed until it is predicted to fit."""

import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dag.costs.forecast import LEVERS, Forecast, Lever, forecast, lowered, named
from dag.errors import RunError, UsageError
from dag.models.families import pipeline_of
from dag.models.source import counted_as, local_folder, read_config
from dag.recipe import Recipe, edit, prompt_sets, shipped
from dag.recipe.load import load, parse, parse_reward
from dag.recipe.prompts import load_prompts
from dag.run.gpu import GIB

# The share of a GPU's memory that PyTorch may use. The rest is for the GPU's own context, the screen, and gaps between blocks.
SHARE = 7 / 8
# A card sold with 24 GB reports a little less than 24 GiB.
_NEARLY = 0.9
_EMBEDDED = {"embedded": "tiny_cpu.yaml", "embedded_flow": "tiny_flow_cpu.yaml"}
# The beginnings of the names of the recipes for an architecture, of which there is one for each size of GPU.
_RECIPES = {
    "random-sd15": "aesthetic",
    "random-sdxl": "sdxl",
    "random-sd35m": "sd35m",
    "random-sd35l": "sd35l",
    "random-flux": "flux*",
}
# Lines in the header of a shipped recipe that are true of that very recipe, or of its model, alone.
_OF_THE_BASE = ("# yaml-language-server", "# Purpose:", "# Command:", "# Hardware:", "# Weights", "# Licence")
_WIDTH = 120
_BITSANDBYTES = ("adamw8bit", "int8", "nf4")


@dataclass(frozen=True)
class Wish:
    """What a person has and wants."""

    model: str
    """As `model.path` in a recipe."""
    gpu_gib: float
    """Memory of the GPU; 0 for a CPU."""
    reward: str
    """A reward's name, `file.py:function` or `module:function`, or the address of a server."""
    prompts: str
    """A prompt set's name, or a file."""


@dataclass
class Fit:
    """A recipe, the levers that were pulled so that it fits, and its forecast."""

    recipe: Recipe
    now: Forecast
    pulled: list[tuple[Lever, int, int]] = field(default_factory=list)
    """(lever, peak before it, peak with it), in bytes."""


@dataclass(frozen=True)
class Start:
    """A recipe to begin with."""

    base: Path
    """The shipped recipe that it was made from."""
    text: str
    fit: Fit | None
    """None for a CPU, where nothing was predicted."""


def fitted(recipe: Recipe, budget: float) -> Fit:
    """Pull levers, the cheapest first, until the predicted peak is within `budget` bytes or none lowers it any more."""
    fit = Fit(recipe, forecast(recipe))
    while fit.now.peak > budget:
        step = next(lowered(fit.recipe, fit.now, _next_levers(fit.recipe)), None)
        if step is None:
            break
        lever, fit.recipe, found = step
        # A stronger value takes the place of a weaker one.
        before = next((old for known, old, _ in fit.pulled if known[:2] == lever[:2]), fit.now.peak)
        fit.pulled = [item for item in fit.pulled if item[0][:2] != lever[:2]]
        fit.pulled.append((lever, before, found.peak))
        fit.now = found
    return fit


def _next_levers(recipe: Recipe) -> Iterator[Lever]:
    """The levers of `LEVERS`, but that numbers of rows are halved and not at once 1, and nothing gets weaker."""
    for section, key, value in LEVERS:
        current = getattr(getattr(recipe, section), key)
        if (key, value, current) == ("checkpointing", "selective", "full"):
            continue
        is_number = isinstance(current, int) and not isinstance(current, bool)
        yield section, key, max(1, current // 2) if is_number else value


def start(wish: Wish, out: Path) -> Start:
    """The recipe for a wish, to be written to `out`.

    Raises:
        UsageError: the wish names something that is not there, or nothing fits.
    """
    base = _base(wish)
    header, text = edit.without_header(base.read_text(encoding="utf-8"))
    for section, value in _answers(wish, base).items():
        text = edit.with_section(text, section, value)
    recipe = _parsed(text, out)
    is_known = recipe.prompts == load(base).prompts
    if recipe.evaluation.fidelity and not is_known:
        # The judge knows the nouns of the recipe's own prompts.
        text = edit.with_value(text, "evaluation", "fidelity", False)
    fit = None
    if wish.gpu_gib > 0:
        budget = math.floor(10 * SHARE * wish.gpu_gib) / 10
        text = edit.with_value(text, "memory", "budget_gib", budget)
        fit = fitted(_parsed(text, out), budget * GIB)
        if fit.now.peak > budget * GIB:
            raise UsageError(_too_small(wish, fit))
        for (section, key, value), _, _ in fit.pulled:
            text = edit.with_value(text, section, key, value)
        assert _parsed(text, out) == fit.recipe, "the text must say what was predicted"
    kept = [line for line in header if not line.startswith(_OF_THE_BASE)]
    lines = [*_header(wish, base, out, fit), *kept]
    return Start(base, "\n".join(lines) + "\n" + text, fit)


def _parsed(text: str, out: Path) -> Recipe:
    return parse(yaml.safe_load(text), str(out))


def _base(wish: Wish) -> Path:
    """The shipped recipe for the model's architecture and the largest GPU that is not larger than the person's."""
    recipes = shipped.folder()
    if wish.model in _EMBEDDED:
        return recipes / _EMBEDDED[wish.model]
    if wish.gpu_gib <= 0:
        raise UsageError(
            f"--gpu-memory {wish.gpu_gib:g}: without a GPU only --model {' or '.join(_EMBEDDED)} can be trained"
        )
    name = _RECIPES[_architecture(wish.model)]
    sizes = {int(path.stem.rpartition("_")[2][:-2]): path for path in recipes.glob(f"{name}_[0-9]*gb.yaml")}
    fitting = [gib for gib in sizes if _NEARLY * gib <= wish.gpu_gib]
    return sizes[max(fitting, default=min(sizes))]


def _architecture(path: str) -> str:
    """The key of `_RECIPES` for a model: by a hub id's name, or by the pipeline and the depth of a local folder."""
    counted = counted_as(path)
    if counted in _RECIPES:
        return counted
    alike = [name for name in _RECIPES if pipeline_of(name) == pipeline_of(path)]
    return min(alike, key=lambda name: abs(_depth(name) - _depth(path)))


def _depth(path: str) -> int:
    """The number of layers of a transformer; 0 for a UNet, or if the folder does not tell."""
    folder = local_folder(path)
    try:
        return int(read_config(folder, "transformer")["num_layers"]) if folder is not None else 0
    except (RunError, KeyError, TypeError, ValueError):
        return 0


def _answers(wish: Wish, base: Path) -> dict[str, Any]:
    """The sections that a wish decides and that differ from those of the base recipe."""
    given = yaml.safe_load(base.read_text(encoding="utf-8"))
    answers = {
        "model": _model(wish.model, given["model"]),
        "prompts": _prompts(wish.prompts),
        "reward": _reward(wish.reward),
    }
    return {section: value for section, value in answers.items() if value != given[section]}


def _model(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """The section of a model: the base recipe's, with the variant of the weight files only where they are known to exist."""
    variant, folder = given.get("variant"), local_folder(path)
    if folder is None and path != given["path"]:
        variant = None
    if folder is not None and not (folder / f"unet/diffusion_pytorch_model.{variant}.safetensors").is_file():
        variant = None
    return {key: value for key, value in (given | {"path": path, "variant": variant}).items() if value is not None}


def _prompts(given: str) -> dict[str, str]:
    if given in prompt_sets.SHIPPED:
        return {"set": given}
    section = Recipe.model_fields["prompts"].annotation
    assert section is not None
    try:
        load_prompts(section(file=given))
    except UsageError as error:
        reason = str(error).removeprefix("prompts.file: ")
        raise UsageError(f"--prompts: {reason}; give a file, or one of {', '.join(prompt_sets.SHIPPED)}") from None
    return {"file": given}


def _reward(given: str) -> dict[str, Any]:
    """The section of a reward, as a shipped recipe has it if one has."""
    if given.startswith(("http://", "https://")):
        return {"name": "http", "url": given}
    if ":" in given:
        file = given.rpartition(":")[0]
        if file.endswith(".py") and not Path(file).expanduser().is_file():
            raise UsageError(f"--reward {given}: there is no file {file}")
        return {"name": "custom", "path": given}
    for path in sorted(shipped.folder().glob("*_24gb.yaml")):
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["reward"]
        if section["name"] == given:
            return section
    try:
        return {"name": parse_reward(given, ()).name}
    except UsageError as error:
        reason = str(error).removeprefix("--set: ").removeprefix("reward.0.name: ").splitlines()[0]
        raise UsageError(f"--reward {given}: {reason}; one of your own is file.py:function") from None


def _too_small(wish: Wish, fit: Fit) -> str:
    pulled = ", ".join(named(lever) for lever, _, _ in fit.pulled)
    return (
        f"--gpu-memory {wish.gpu_gib:g}: nothing fits: {wish.model} with {wish.reward} is predicted to need "
        f"{fit.now.peak / GIB:.1f} GiB{f' with {pulled}' if pulled else ''}, so a GPU of at least "
        f"{fit.now.peak / GIB / SHARE:.1f} GiB"
    )


def _header(wish: Wish, base: Path, out: Path, fit: Fit | None) -> Iterator[str]:
    """Comment lines: the schema for editors, where the recipe comes from, how it is started, and why it fits."""
    yield f"# yaml-language-server: $schema={_reference(out)}"
    place = f"a GPU of {wish.gpu_gib:g} GiB" if fit else "a CPU"
    yield f"# Purpose: reward {wish.reward} on {wish.model}, for {place}. Written by python -m dag.new from {base.name}."
    yield f"# Command: {train_command(out)}"
    if fit is None:
        return
    taken = "" if fit.now.counted_as == wish.model else f", taken for {fit.now.counted_as}"
    yield (
        f"# Hardware: predicted peak {fit.now.peak / GIB:.1f} GiB{taken}, without the GPU's own context of some hundred MiB; "
        "Time: not measured."
    )
    if fit.pulled:
        yield "# So that it fits, with the predicted peak before and after:"
    for lever, before, after in fit.pulled:
        yield from _wrapped(
            f"{named(lever)} ({before / GIB:.1f} -> {after / GIB:.1f} GiB). {_explained(fit.recipe, lever)}"
        )


def _explained(recipe: Recipe, lever: Lever) -> str:
    section, key, value = lever
    told = type(getattr(recipe, section)).model_fields[key].description or ""
    needs = ' Needs bitsandbytes: pip install -e ".[gpu]".' if value in _BITSANDBYTES else ""
    return " ".join(told.split()) + needs


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False)


def _reference(out: Path) -> str:
    """The path of the schema from the folder of `out`, as an editor wants it."""
    schema = shipped.folder() / shipped.SCHEMA
    try:
        return Path(os.path.relpath(schema.resolve(), out.resolve().parent)).as_posix()
    except ValueError:  # on another drive of Windows
        return schema.resolve().as_posix()


def train_command(out: Path) -> str:
    """The command that trains the recipe."""
    program = "train_dag.py" if Path("train_dag.py").is_file() else "-m train_dag"
    return f"python {program} --recipe {out}"


def told(made: Start, out: Path) -> Iterator[str]:
    """What is printed of a new recipe: its peak, what was chosen so that it fits, and the next commands."""
    if made.fit is not None:
        budget = made.fit.recipe.memory.budget_gib
        yield f"peak    {made.fit.now.peak / GIB:.2f} GiB predicted, within memory.budget_gib={budget:g}"
        levers = ", ".join(named(lever) for lever, _, _ in made.fit.pulled)
        yield f"levers  {levers or 'none needed'}"
    yield f"plan    {train_command(out)} --plan"
    yield f"train   {train_command(out)}"
