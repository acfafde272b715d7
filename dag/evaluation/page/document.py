"""The page of a run: one HTML file that needs nothing else, with the pictures and numbers in it."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from dag.evaluation.page.charts import panels
from dag.evaluation.page.concerns import concerns
from dag.evaluation.page.facts import RUNNING, Facts, read
from dag.evaluation.page.fragments import escaped, fragments
from dag.evaluation.page.pictures import Sheet, layout, read_sheets
from dag.run import durable
from dag.run.folder import RunFolder

_HERE = Path(__file__).parent


def write_page(run: RunFolder) -> Path:
    """Write report.html into the run's folder, completely or not at all. Raises RunError if run.json cannot be read."""
    text = document(run)
    with durable.replacing(run.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return run.page


def document(run: RunFolder, is_live: bool = False) -> str:
    """The page as HTML.

    Args:
        is_live: the page is served, and asks the server for pictures and news; else everything is in it.
    """
    facts = read(run)
    sheets, complaints = read_sheets(run)
    parts = fragments(facts, [*concerns(facts), *complaints])
    values = {
        "title": escaped(run.path.resolve().name),
        "live": "yes" if is_live else "no",
        "style": _file("page.css"),
        "script": _file("chart.js") + _file("page.js"),
        "state": in_script(_state(facts, sheets, is_live)),
        **parts,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda marker: values[marker[1]], _file("page.html"))


def news(run: RunFolder) -> dict[str, Any]:
    """What a served page polls: all that changes while the run goes on."""
    facts = read(run)
    sheets, complaints = read_sheets(run)
    parts = fragments(facts, [*concerns(facts), *complaints])
    return _state(facts, sheets, is_live=True) | {"fragments": parts}


def in_script(data: Any) -> str:
    """JSON for a <script> element, which no text inside can close."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _state(facts: Facts, sheets: list[Sheet], is_live: bool) -> dict[str, Any]:
    rewards = dict(facts.values("eval_reward_mean"))
    pictures = [
        {
            "epoch": sheet.epoch,
            "src": address(sheet) if is_live else _inside(sheet),
            "reward": rewards.get(sheet.epoch),
        }
        for sheet in sheets
    ]
    return {
        "running": facts.status == RUNNING,
        "panels": panels(facts),
        "sheets": layout(facts, sheets) | {"pictures": pictures},
    }


def address(sheet: Sheet) -> str:
    """Where the server has a sheet; another one when the file has changed."""
    return f"pictures/{sheet.epoch}.jpg?v={sheet.stamp}"


def _inside(sheet: Sheet) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(sheet.jpeg).decode()}"


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
