"""Gathers a finished run into a folder for others: the LoRA in both layouts, a model card, pictures, the recipe, run.json."""

import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors import SafetensorError

from dag.errors import RunError, UsageError
from dag.evaluation import sheets
from dag.evaluation.card import BEFORE_AFTER, Base, Judged, Story, card
from dag.evaluation.measure import BASE, BASE_AGAIN
from dag.evaluation.plain_diffusers import Family
from dag.evaluation.prices import Judgement
from dag.evaluation.privacy import public
from dag.models import families, lora_file
from dag.models.source import licence, public_name
from dag.recipe import Recipe
from dag.recipe.load import parse
from dag.recipe.prompt_sets import PromptSet
from dag.recipe.prompts import load_prompts
from dag.run import checkpoint, durable
from dag.run.fingerprint import of_texts
from dag.run.folder import RunFolder

_PROMPT_FILE = "prompts.jsonl"
_WIDGETS = 4
_EVALUATION = "evaluation.json"


def refuse_taken(target: Path) -> None:
    """Raises UsageError if `target` exists and is anything but an empty folder."""
    try:
        is_free = not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise UsageError(f"--to {target}: cannot be read: {error.strerror}") from None
    if not is_free:
        raise UsageError(f"--to {target}: exists and is no empty folder; nothing is overwritten, choose another")


def to_folder(run: RunFolder, target: Path, base: str | None = None) -> None:
    """Publish a run as the folder `target`, which appears with all its files or not at all.

    Args:
        base: the hub id of the base model, where the run took it from a local folder; None takes the run's own name of it.

    Raises:
        UsageError: `target` is taken or cannot be written, or there is nothing to publish yet.
        RunError:   a file of the run cannot be read, or its last evaluation is missing or not finite.
    """
    refuse_taken(target)
    stage = target.parent / f"{durable.TEMPORARY}{os.getpid()}-{target.name}"
    try:
        stage.mkdir(parents=True)
        fill(stage, run, target.resolve().name, base=base)
        for file in stage.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors makes files that only their owner reads
            durable.sync(file)
        os.rename(stage, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--to {target}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def fill(folder: Path, run: RunFolder, title: str, repo: str | None = None, base: str | None = None) -> None:
    """Write what is published of a run into the empty folder `folder`.

    Args:
        title: the headline of the card.
        repo:  the hub id under which it will be found; None for a folder.
        base:  as for `to_folder`.

    Raises:
        UsageError, RunError: as `to_folder`.
        OSError, SafetensorError: a file cannot be written.
    """
    recipe, description = run.read_recipe(), run.read_description()
    weights = _weights(run, recipe, description)
    first, last = _evaluations(run, recipe)
    model = _base(recipe, description, weights[0], base)
    found = _prompts(run, recipe)
    shared = _shared(recipe, model, found)
    for file in weights:
        lora_file.label(file, model.name, model.licence, to=folder / file.name)
    if found is not None and recipe.prompts.file is not None:
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in found.training]
        (folder / _PROMPT_FILE).write_text("".join(lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(shared, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8"
    )
    durable.write_json(folder / "run.json", _described(description, model.name, shared))
    pictures = _pictures(run, recipe, found, folder)
    joined = run.samples / BEFORE_AFTER
    if joined.is_file():
        shutil.copyfile(joined, folder / BEFORE_AFTER)
    story = Story(
        title,
        repo,
        parse(shared, str(run.path / "run.json")),
        model,
        description.get("beta_eff"),
        None if found is None else found.training,
        first,
        last,
        _judged(run),
        pictures,
        joined.is_file(),
    )
    (folder / "README.md").write_text(card(story), encoding="utf-8")


def _weights(run: RunFolder, recipe: Recipe, description: dict[str, Any]) -> list[Path]:
    """The files of the LoRA. Raises UsageError if there is none."""
    if recipe.adapter.kind == "full":
        family = Family.of(description.get("model"), recipe.model.path)
        raise UsageError(
            f"{run.path}: adapter.kind is full, and only a LoRA (adapter.kind=lora) is published; the trained weights are "
            f"{run.weights / family.component}, a folder that diffusers' {family.network}.from_pretrained opens"
        )
    files = [run.weights / name for name in (lora_file.DIFFUSERS, lora_file.KOHYA)]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: is missing; a run writes it at its end: train_dag.py --resume {run.path}")
    return files


def _evaluations(run: RunFolder, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the metrics of the evaluation before training, of the one after it). Raises RunError if one is missing or not finite."""
    source, epochs = run.metrics.path, recipe.train.epochs
    try:
        rows = {row["epoch"]: row for row in run.metrics.read()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{source}: cannot be read: {error}") from None
    for epoch in (0, epochs):
        if "eval_reward_mean" not in rows.get(epoch, {}):
            raise RunError(
                f"{source}: the evaluation after epoch {epoch} is missing; a run of {epochs} epochs has it at its end"
            )
        for key, value in rows[epoch].items():
            if (key.startswith("eval_") or key in ("diversity", "noun_top1", "noun_top5")) and not _is_finite(value):
                raise RunError(
                    f"{source}: {key} after epoch {epoch} is {value}, and a number is needed; nothing is published"
                )
    return rows[0], rows[epochs]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _base(recipe: Recipe, description: dict[str, Any], weights: Path, given: str | None) -> Base:
    """The base model, as the LoRA's metadata names it; older runs did not write it there."""
    noted, path = lora_file.notes(weights), recipe.model.path
    name = noted.get(lora_file.NAME) or public_name(path)
    licensed = noted.get(lora_file.LICENCE) or licence(path)
    if given is not None and given != name:
        name, licensed = given, licence(given) or licensed
    return Base(name, licensed, Family.of(description.get("model"), path, families.pipeline_of(path)))


def _prompts(run: RunFolder, recipe: Recipe) -> PromptSet | None:
    """The prompts of the run; None if they lay in a file that is gone, or are not those of its checkpoint."""
    newest = checkpoint.newest_complete(run.checkpoints)
    try:
        found = load_prompts(recipe.prompts)
    except UsageError:
        return None
    known = None if newest is None else checkpoint.load_state(newest).get("fingerprint", {}).get("prompts")
    return found if known in (None, of_texts((*found.training, *found.held_out))) else None


def _shared(recipe: Recipe, model: Base, found: PromptSet | None) -> dict[str, Any]:
    """The recipe's data for other machines."""
    shared = public(recipe.model_dump(mode="json"))
    shared["model"]["path"] = model.name
    if found is not None and recipe.prompts.file is not None:
        shared["prompts"]["file"] = _PROMPT_FILE
    return shared


def _described(description: dict[str, Any], name: str, shared: dict[str, Any]) -> dict[str, Any]:
    """run.json for other machines. It tells of the model by the same name as the card, also where that was a relative path."""
    found = public(description)
    for section, key in (("model", "path"), ("plan", "counted_as")):
        if isinstance(found.get(section), dict) and key in found[section]:
            is_counted = key == "counted_as" and str(found[section][key]).startswith("random-")
            found[section][key] = found[section][key] if is_counted else name
    return found | {"recipe": shared}


def _pictures(run: RunFolder, recipe: Recipe, found: PromptSet | None, folder: Path) -> list[tuple[str, str]]:
    """[(prompt, file)]: a picture of each of the first prompts, cut from the sheet of the last evaluation."""
    sheet, config = run.sheet(recipe.train.epochs), recipe.evaluation
    if found is None or not sheet.is_file():
        return []
    prompts = (found.held_out if config.held_out else found.training)[: config.prompts]
    columns = config.images_per_prompt
    with _readable(sheet) as picture:
        cells = sheets.cells(picture, len(prompts) * columns, columns)
    if not cells:
        return []
    (folder / "images").mkdir()
    shown = []
    for number, (prompt, cell) in enumerate(zip(prompts[:_WIDGETS], cells[::columns], strict=False), 1):
        cell.save(folder / f"images/{number}.png")
        shown.append((prompt, f"images/{number}.png"))
    return shown


def _readable(file: Path) -> Image.Image:
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(f"{file}: cannot be read: {error}") from None
    return picture


def _judged(run: RunFolder) -> Judged | None:
    """The newest judgement of the published weights by `dag.evaluate` in the run's folder; None if there is none."""
    newest = checkpoint.newest_complete(run.checkpoints)
    if newest is None:
        return None
    weights = durable.sha256(newest / "policy.safetensors")
    for folder in run.evaluations():
        with suppress(OSError, ValueError, LookupError, TypeError, StopIteration):
            return _read_judgement(folder / _EVALUATION, weights)
    return None


def _read_judgement(file: Path, weights: str) -> Judged:
    """Raises an error of Python's own if the file is damaged or judged other weights."""
    data = json.loads(file.read_text(encoding="utf-8"))
    name = next(name for name, digest in data["weights"].items() if digest == weights)
    rows = {row["model"]: row for row in data["models"]}
    table = file.with_name("evaluation.md").read_text(encoding="utf-8").rstrip()
    features = str(data["features"])
    judgement = Judgement(rows[BASE], rows[name], rows.get(BASE_AGAIN))
    return Judged(table.replace(features, public(features, "features")), judgement)
