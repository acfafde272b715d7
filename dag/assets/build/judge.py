"""Training of the judge: a classifier that never sees a generated picture, nor a reward."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dag.assets.build.clock import Clock
from dag.assets.build.data import Dataset
from dag.assets.build.truth import Targets, targets
from dag.assets.build.vae import to_tensor
from dag.evaluation.judge import Judge, Verdict


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is trained."""

    minutes: float = 3.0
    batch: int = 96
    learning_rate: float = 3e-3
    seed: int = 2


def judge_loss(verdict: Verdict, truth: Targets, rows: Tensor) -> Tensor:
    """Multi-label cross-entropy of the names plus the cross-entropies of colour, background and count.

    Args:
        rows: (B,) the rows of `truth` that the verdict is about.
    """
    loss = 8 * functional.binary_cross_entropy_with_logits(verdict.name, truth.names[rows])
    for logits, target in (
        (verdict.colour, truth.colour),
        (verdict.background, truth.background),
        (verdict.count, truth.count),
    ):
        # If no row of the batch has an answer, cross_entropy is NaN.
        loss = loss + 0.5 * torch.nan_to_num(functional.cross_entropy(logits, target[rows]))
    return loss


def blurred(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Add noise to a batch of images, and blur a third of the batches: generated pictures look like that."""
    images = images + 0.03 * float(rng.random()) * torch.randn_like(images)
    if rng.random() < 0.33:
        soft = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        images = 0.6 * soft + 0.4 * images
    return images


def mixed_batch(dataset: Dataset, reconstructions: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Images (B, 3, 64, 64) in [0, 1] of these rows; half of those that have a reconstruction are replaced by it."""
    use = (rows < len(reconstructions)) & (rng.random(len(rows)) < 0.5)
    pictures = np.array(dataset.pictures[rows])
    pictures[use] = reconstructions[rows[use]]
    return to_tensor(pictures) / 2 + 0.5


def train(
    work: Path,
    out: Path,
    dataset: Dataset,
    reconstructions: np.ndarray,
    clock: Clock,
    settings: JudgeSettings = JudgeSettings(),
) -> None:
    """Train for a fixed time and save to `out`/judge in half precision."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    truth, judge = targets(dataset.scenes), Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    for step, progress in enumerate(clock.ticks(settings.minutes), start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
        rows = rng.integers(0, dataset.training, settings.batch)
        images = blurred(mixed_batch(dataset, reconstructions, rows, rng), rng)
        loss = judge_loss(judge(images), truth, torch.from_numpy(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 300 == 0:
            print(f"judge {step} loss {float(loss.detach()):.3f} {100 * progress:.0f} %", flush=True)
    folder = out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    save_file(half, folder / "judge.safetensors")
    (folder / "config.json").write_text(f'{{"channels": {list(judge.channels)}}}\n', encoding="utf-8")


def accuracy(judge: Judge, images: Tensor, truth: Targets, rows: Tensor) -> dict[str, float]:
    """The share of right answers to each question, on the scenes where it has an answer; names on scenes of one thing."""
    with torch.no_grad():
        verdict = judge(images)
    single = truth.names[rows].sum(1) == 1
    single &= truth.count[rows] >= 0
    right = {"name": verdict.name.argmax(1) == truth.names[rows].argmax(1)}
    questions = {"colour": truth.colour, "background": truth.background, "count": truth.count}
    shares = {"name": float(right["name"][single].float().mean())}
    for question, target in questions.items():
        asked = target[rows] >= 0
        shares[question] = float((getattr(verdict, question).argmax(1) == target[rows])[asked].float().mean())
    return shares
