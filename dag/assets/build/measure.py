"""Measures the embedded model for its model card: prompt fidelity by the judge, the accuracies behind it, a sample picture."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from dag.assets.build.data import Dataset
from dag.assets.build.judge import accuracy
from dag.assets.build.truth import NAMES, targets
from dag.assets.build.vae import psnr, reconstruct, to_tensor
from dag.evaluation.judge import COLOURS, COUNTS, NOUNS, SHAPES, Judge, expected, load_judge, noun_accuracy, plural
from dag.recipe.prompt_sets import with_article

SAMPLE_PROMPTS = (
    *(
        "a cat",
        "a dog",
        "a lion",
        "a butterfly",
        "a shark on a red background",
        "a glossy bear",
        "a frog on a yellow background",
    ),
    *(
        "a fox on a plain black background",
        "a red circle on a blue background",
        "a green star",
        "three red hearts on a white background",
    ),
    *(
        "four cats",
        "two dogs on a purple background",
        "a cat and a dog",
        "a red circle to the left of a blue square",
    ),
    *(
        "a yellow star above a green triangle",
        "a pizza on a striped background",
        "a rocket on a checkered green background",
    ),
    *("a drawn car on a plain yellow background", "three mushrooms on a pink background"),
)


@dataclass(frozen=True)
class MeasureSettings:
    """How pictures are sampled for measuring."""

    prompts: int = 128
    """Pictures for each kind of prompt."""
    steps: int = 20
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    seed: int = 5


def _sample(
    pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float, settings: MeasureSettings
) -> Tensor:
    """Pictures (N, 3, 64, 64) float32 in [0, 1] of the prompts."""
    parts = []
    for start in range(0, len(prompts), 64):
        generator = torch.Generator().manual_seed(settings.seed + start)
        images = pipeline(
            prompts[start : start + 64],
            num_inference_steps=settings.steps,
            guidance_scale=guidance,
            eta=1.0,
            generator=generator,
            output_type="pt",
        ).images
        parts.append(images.float())
    return torch.cat(parts)


def fidelity(
    pipeline: StableDiffusionPipeline, judge: Judge, guidance: float, settings: MeasureSettings
) -> dict[str, float]:
    """For each attribute, the share of pictures in which the judge finds what the prompt asked for."""
    rng = random.Random(settings.seed)
    nouns = [with_article(rng.choice(NOUNS)) for _ in range(settings.prompts)]
    top1, top5 = noun_accuracy(judge, _sample(pipeline, nouns, guidance, settings), nouns)
    shapes = []
    for _ in range(settings.prompts):
        colour, background = rng.sample(COLOURS, 2)
        shapes.append(f"{with_article(f'{colour} {rng.choice(SHAPES)}')} on {with_article(background)} background")
    counts = []
    for _ in range(settings.prompts):
        name = rng.choice(SHAPES) if rng.random() < 0.5 else rng.choice(NOUNS)
        words = f"{rng.choice(COLOURS)} {plural(name)}" if name in SHAPES else plural(name)
        counts.append(f"{COUNTS[rng.choice(tuple(COUNTS))]} {words}")
    return {
        "noun top-1": top1,
        "noun top-5": top5,
        **_attributes(judge, _sample(pipeline, shapes, guidance, settings), shapes, ("shape", "colour", "background")),
        **_attributes(judge, _sample(pipeline, counts, guidance, settings), counts, ("count",)),
    }


@torch.no_grad()
def _attributes(judge: Judge, images: Tensor, prompts: list[str], asked: tuple[str, ...]) -> dict[str, float]:
    """For each attribute in `asked`, the share of images where the judge's best guess is what the prompt asked for."""
    verdict, wanted = judge(images), [expected(prompt) for prompt in prompts]
    hits: dict[str, list[bool]] = {name: [] for name in asked}
    for row, want in enumerate(wanted):
        assert want is not None
        found = {
            "shape": NAMES[int(verdict.name[row].argmax())] == want.name,
            "colour": COLOURS[int(verdict.colour[row].argmax())] == want.colour,
            "background": COLOURS[int(verdict.background[row].argmax())] == want.background,
            "count": int(verdict.count[row].argmax()) + 1 == want.count,
        }
        for name in asked:
            hits[name].append(found[name])
    return {name: sum(values) / len(values) for name, values in hits.items()}


def report(work: Path, out: Path, dataset: Dataset, settings: MeasureSettings = MeasureSettings()) -> None:
    """Print and save all figures of the model card; draw samples.png."""
    judge, vae = load_judge(out / "judge"), AutoencoderKL.from_pretrained(work / "vae").eval()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "embedded", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    held_out = dataset.pictures[dataset.training :]
    rows, truth = torch.arange(dataset.training, len(dataset.scenes)), targets(dataset.scenes)
    figures: dict[str, object] = {
        "vae_psnr_db": psnr(vae, held_out),
        "judge_accuracy_on_pictures": accuracy(judge, to_tensor(held_out) / 2 + 0.5, truth, rows),
        "judge_accuracy_on_reconstructions": accuracy(judge, reconstruct(vae, held_out), truth, rows),
        "scorer_noun_accuracy": _scorer_accuracy(out, to_tensor(held_out) / 2 + 0.5, dataset),
        "fidelity": {f"guidance {g:g}": fidelity(pipeline, judge, g, settings) for g in settings.guidance_scales},
    }
    (work / "measured.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2), flush=True)
    # With a palette of 256 colours the file has a third of the size.
    _picture(pipeline, settings).quantize(256).save(out / "samples.png", optimize=True)


def _scorer_accuracy(out: Path, images: Tensor, dataset: Dataset) -> float:
    """Of the pictures of a single noun, the share for which the scorer prefers "a NOUN" with the right noun."""
    from dag.rewards.clip import feature_tower

    tower = feature_tower("scorer", str(out / "scorer"))
    scenes = dataset.scenes[dataset.training :]
    rows = [
        row for row, scene in enumerate(scenes) if scene.count == 1 and len(scene.things) == 1 and scene.things[0].style
    ]
    texts = tower.embed_texts([with_article(noun) for noun in NOUNS])
    best = (tower.embed_images(images[rows]) @ texts.T).argmax(1).tolist()
    return sum(NOUNS[found] == scenes[row].things[0].name for found, row in zip(best, rows, strict=True)) / len(rows)


def _picture(pipeline: StableDiffusionPipeline, settings: MeasureSettings, per_prompt: int = 3) -> Image.Image:
    """A captioned grid, three prompts wide, with `per_prompt` pictures of each prompt."""
    prompts = [prompt for prompt in SAMPLE_PROMPTS for _ in range(per_prompt)]
    images = (_sample(pipeline, prompts, 3.0, settings) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    side, caption, columns = 80, 14, 3
    rows = -(-len(SAMPLE_PROMPTS) // columns)
    width = per_prompt * side + 8
    grid = Image.new("RGB", (columns * width, rows * (side + caption)), "white")
    draw = ImageDraw.Draw(grid)
    for index, prompt in enumerate(SAMPLE_PROMPTS):
        left, top = index % columns * width, index // columns * (side + caption)
        draw.text((left + 2, top), prompt, fill="black", font_size=11)
        for number in range(per_prompt):
            picture = Image.fromarray(images[index * per_prompt + number]).resize(
                (side, side), Image.Resampling.BICUBIC
            )
            grid.paste(picture, (left + number * side, top + caption))
    return grid
