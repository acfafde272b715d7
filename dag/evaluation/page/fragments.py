"""The parts of a run's page that are text, as HTML. Everything that comes from the run is escaped."""

import html
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from dag.evaluation import plain_diffusers
from dag.evaluation.page.facts import DONE, RUNNING, STOPPED, Facts, Judged
from dag.evaluation.plain_diffusers import Family, Place

_STATUS = {
    DONE: "done",
    RUNNING: "running",
    STOPPED: "stopped before its last epoch; <code>--resume</code> goes on",
}
_TILES = (
    ("eval_reward_mean", "evaluated reward", ".4g"),
    ("diversity", "diversity", ".3f"),
    ("noun_top1", "noun_top1", ".2f"),
)


def escaped(value: Any) -> str:
    return html.escape(str(value))


def _block(text: str) -> str:
    """Lines of code or of a recipe, which the keyboard can scroll."""
    return f'<pre tabindex="0"><code>{escaped(text)}</code></pre>'


def fragments(facts: Facts, concerns: Sequence[str]) -> dict[str, str]:
    """HTML by the id of the element that it fills."""
    return {
        "summary": _summary(facts),
        "concerns": _concerns(facts, concerns),
        "judged": _judged(facts),
        "asked": _asked(facts),
        "use": _use(facts),
    }


# -- the head -----------------------------------------------------------------------------------------------------


def _summary(facts: Facts) -> str:
    epochs, each = facts.asked("train.epochs"), facts.asked("train.trajectories")
    last = facts.rows[-1] if facts.rows else {}
    total = epochs * each if isinstance(epochs, int) and isinstance(each, int) else "?"
    what = (
        f"{_objective(facts)} trains {_base(facts)} for {escaped(_reward(facts))}: "
        f"{escaped(last.get('trajectories', 0))} of {total} trajectories, "
        f"epoch {escaped(last.get('epoch', 0))} of {escaped(epochs)}."
    )
    tiles = "".join(_tile(facts, *tile) for tile in _TILES)
    status = f'<span class="status {facts.status}">{_STATUS[facts.status]}</span>'
    return f"<p>{what} {status}</p>" + (f"<dl>{tiles}</dl>" if tiles else "")


def _objective(facts: Facts) -> str:
    return escaped(str(facts.asked("objective.name")).replace("_", "-").upper())


def _base(facts: Facts) -> str:
    path = facts.asked("model.path")
    return "the embedded model" if path == "embedded" else escaped(path)


def _reward(facts: Facts) -> str:
    terms = facts.asked("reward")
    names = [str(term.get("name")) for term in terms if isinstance(term, dict)] if isinstance(terms, list) else []
    return " + ".join(names) or "an unknown reward"


def _tile(facts: Facts, key: str, label: str, form: str) -> str:
    """A number before training and now; "" if it was not measured."""
    values = [value for _, value in facts.values(key)]
    if not values:
        return ""
    first, last = format(values[0], form), format(values[-1], form)
    arrow = f'{first} <span aria-hidden="true">→</span><span class="unseen"> before, now </span> ' if values[1:] else ""
    return f"<div><dt>{label}</dt><dd>{arrow}<b>{last}</b></dd></div>"


def _concerns(facts: Facts, concerns: Sequence[str]) -> str:
    if concerns:
        return f"<ul>{''.join(f'<li>{escaped(concern)}</li>' for concern in concerns)}</ul>"
    if not facts.rows:
        return "<p>Nothing is measured yet.</p>"
    return (
        "<p>No number stands out. A reward can still be gamed in ways that no number shows: look at the pictures.</p>"
    )


# -- dag.evaluate -------------------------------------------------------------------------------------------------


def _judged(facts: Facts) -> str:
    if facts.judged is None:
        command = f"python -m dag.evaluate --run {facts.run.path}"
        return f"<p>Not yet. This draws and measures other pictures:</p>{_block(command)}"
    return _table(facts.judged)


def _table(judged: Judged) -> str:
    """The Markdown table that `dag.evaluate` wrote, and its legend."""
    lines = [line for line in judged.text.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    legend = " ".join(line for line in lines if not line.startswith("|"))
    if not rows:
        return f"<p>{escaped(legend)}</p>"
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in rows[0])
    body = "".join(_row(cells) for cells in rows[1:])
    caption = f"<caption>{escaped(judged.folder)}</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="Table">{table}</div><p>{escaped(legend)}</p>'


def _row(cells: Sequence[str]) -> str:
    values = "".join(f"<td>{escaped(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escaped(cells[0])}</th>{values}</tr>'


# -- what was asked -----------------------------------------------------------------------------------------------


def _asked(facts: Facts) -> str:
    recipe = yaml.safe_dump(facts.description.get("recipe"), sort_keys=False, allow_unicode=True)
    details = f"<details><summary>The whole recipe</summary>{_block(recipe)}</details>"
    lines = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in _machine(facts))
    return f'{details}<dl class="list">{lines}</dl>'


def _machine(facts: Facts) -> Iterator[tuple[str, Any]]:
    """(name, value) of what ran and where, as far as run.json tells it."""
    told = facts.description
    for key in ("device", "processes", "threads", "python", "commit", "beta_eff", "seed"):
        if told.get(key) is not None:
            yield key, told[key]
    for key, what in (("model", "trainable_parameters"), ("model", "attention"), ("kernels", "name")):
        section = told.get(key)
        if isinstance(section, dict) and section.get(what) is not None:
            yield f"{key}, {what.replace('_', ' ')}", section[what]
    versions = told.get("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


# -- how to use it ------------------------------------------------------------------------------------------------


def _use(facts: Facts) -> str:
    lora, path = facts.run.weights.as_posix(), str(facts.asked("model.path"))
    family = Family.of(facts.description.get("model"), path)
    wait = "" if facts.run.weights.is_dir() else "<p>The weights come with the last epoch.</p>"
    program = plain_diffusers.program(facts.asked, family, Place(path), Place(lora))
    note = plain_diffusers.deviation(family)
    code = f"<p>In diffusers:</p>{_block(program)}" + (f"<p>{escaped(note)}</p>" if note else "")
    prompt = f'python -m dag.sample --run {facts.run.path.as_posix()} --prompt "a cat"'
    both = f"<p>Before and after training, side by side:</p>{_block(prompt)}"
    if facts.asked("adapter.kind") == "full":
        return wait + code + both
    others = escaped(plain_diffusers.other_programs(family, f"{lora}/lora_kohya.safetensors"))
    marked = re.sub("`(.*?)`", r"<code>\1</code>", others)
    return f"{wait}{code}<p>{marked}</p>{both}"
