"""The training set: pictures and captions of scenes, generated once and stored on the disk."""

import json
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dag.assets.build.scenes import Scene, SceneMaker, Thing, load_sprites


@dataclass(frozen=True)
class DataSettings:
    """How many scenes are drawn, and from which seed on: scene i has the seed `seed` + i."""

    training: int = 60_000
    held_out: int = 2_000
    seed: int = 1_000_000
    chunk: int = 500
    """Scenes that a process draws at a time."""


@dataclass(frozen=True)
class Dataset:
    """Pictures (N, 64, 64, 3) uint8, memory-mapped, and the scenes that they show; the last `held_out` are never trained on."""

    pictures: np.ndarray
    scenes: list[Scene]
    held_out: int

    @property
    def training(self) -> int:
        """The number of scenes that are trained on, which come first."""
        return len(self.scenes) - self.held_out


def _render(job: tuple[Path, int, int]) -> tuple[np.ndarray, list[Scene]]:
    work, first_seed, count = job
    make = SceneMaker(load_sprites(work / "npm/node_modules", work / "sprites.npz"))
    pairs = [make(first_seed + i) for i in range(count)]
    return np.stack([picture for picture, _ in pairs]), [scene for _, scene in pairs]


def build(work: Path, settings: DataSettings = DataSettings()) -> None:
    """Render every scene into `work`/pictures.npy and scenes.jsonl."""
    load_sprites(work / "npm/node_modules", work / "sprites.npz")
    total = settings.training + settings.held_out
    jobs = [(work, settings.seed + start, settings.chunk) for start in range(0, total, settings.chunk)]
    with get_context("spawn").Pool() as pool:
        parts = pool.map(_render, jobs)
    np.save(work / "pictures.npy", np.concatenate([pictures for pictures, _ in parts]))
    lines = (json.dumps(asdict(scene)) for _, scenes in parts for scene in scenes)
    (work / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(work: Path, settings: DataSettings = DataSettings()) -> Dataset:
    """Read what `build` wrote to `work`."""
    scenes = []
    for line in (work / "scenes.jsonl").read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        things = tuple(Thing(**thing) for thing in fields.pop("things"))
        scenes.append(Scene(things=things, **fields))
    return Dataset(np.load(work / "pictures.npy", mmap_mode="r"), scenes, settings.held_out)
