"""What `dag.evaluate` writes: the report in Markdown and JSON, and a sheet of pictures from every model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dag.evaluation import equal_cost, sheets
from dag.evaluation.figures import markdown
from dag.evaluation.measure import BASE, BASE_AGAIN
from dag.run import durable

_SHOWN_PROMPTS, _SHOWN_IMAGES = 8, 4


def table(data: dict[str, Any]) -> str:
    """The report in Markdown."""
    rewards = list(data["models"][0]["rewards"])
    others = ["diversity", "vendi", *data["distances"], "frechet", "kernel", "path_kl", "alignment", "passes"]
    if all("noun_top1" in row for row in data["models"]):
        others.append("noun_top1")
    if any(row["training_passes"] is not None for row in data["models"]):
        others.append("training_passes")
    rows = []
    for row in data["models"]:
        cells = {"model": row["model"]}
        for name in rewards:
            value = row["rewards"][name]
            error = "" if value["gain_error"] is None else f" ± {value['gain_error']:.2g}"
            gain = "" if row["model"] in (BASE, BASE_AGAIN) else f" ({value['gain']:+.3g}{error})"
            cells[name] = f"{value['mean']:.4g}{gain}"
        cells |= {name: "" if row[name] is None else _number(row[name]) for name in others}
        rows.append(cells)
    count = len(data["prompts"]) * data["images_per_prompt"]
    legend = (
        f"{len(data['prompts'])} prompts, {data['images_per_prompt']} pictures each ({count} a model), seed {data['seed']}, "
        f"features of {data['features']}. Gains are over the base model with the same seeds, ± their standard error over "
        "prompts; vendi is the effective number of different pictures of a prompt; frechet and kernel are distances from "
        "the base model's pictures of other seeds, to be read against those of the base model itself; path_kl is the KL of the "
        "trajectories to the base model's, in nats a picture; passes are guided forward passes of the denoiser for a picture, "
        "training aside; training_passes those of the complete training, a backward pass counted as 1.2. Judged: "
        + ", ".join(f"{name} at {place}" for name, place in data["checkpoints"].items())
        + "."
    )
    pays = "".join(f" {line}." for line in equal_cost.break_even(data["models"]))
    return f"{markdown(rows)}\n\n{legend}{pays}"


def _number(value: float) -> str:
    """A number of a table as text: three digits, and all those of whole numbers."""
    return format(value, ",.0f" if value >= 1000 else ".3g")


def sheet(drawn: dict[str, Tensor], task_prompts: Sequence[str], images_per_prompt: int) -> Any:
    """Pictures of every model side by side, drawn from the same prompts and seeds.

    Args:
        drawn: pictures (P * n, 3, H, W) by model.
    """
    columns = min(images_per_prompt, _SHOWN_IMAGES)
    rows = [
        prompt * images_per_prompt + column
        for prompt in range(min(len(task_prompts), _SHOWN_PROMPTS))
        for column in range(columns)
    ]
    captions = [task_prompts[row // images_per_prompt] for row in rows]
    shown = {name: images for name, images in drawn.items() if name != BASE_AGAIN}
    return sheets.beside(
        [sheets.with_title(sheets.grid(images[rows], captions, columns), name) for name, images in shown.items()]
    )


def write(folder: Path, data: dict[str, Any], drawn: dict[str, Tensor]) -> None:
    """Write evaluation.md, pictures.png and evaluation.json into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.md").write_text(table(data) + "\n", encoding="utf-8")
    if any("search by" in what for what in data["checkpoints"].values()):
        equal_cost.draw(data["models"], folder / "equal_cost.png")
    sheet(drawn, data["prompts"], data["images_per_prompt"]).save(folder / "pictures.png")
    # Written last: where this file exists, the others do too.
    durable.write_json(folder / "evaluation.json", data)
