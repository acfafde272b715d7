"""Studies: the runs behind a figure, and running those of them that are missing.

A study is a folder with a run folder for each (method, setting, seed). What is complete is never run again, what was
interrupted is resumed, and a folder that holds another recipe's run is refused.
"""

import fcntl
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dag.errors import RunError, UsageError
from dag.evaluation.curves import ends, evaluated
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.run.machine import num_cores

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    learning_rate: float
    pretrained_kl: float | None = None
    """Strength of the regulariser; None keeps the recipe's."""

    @property
    def name(self) -> str:
        return f"lr{self.learning_rate}" + ("" if self.pretrained_kl is None else f"-kl{self.pretrained_kl}")

    @property
    def overrides(self) -> dict[str, float]:
        """Values of recipe keys."""
        strength = {} if self.pretrained_kl is None else {"regulariser.pretrained_kl": self.pretrained_kl}
        return {"train.learning_rate": self.learning_rate, **strength}


@dataclass(frozen=True)
class Method:
    """One line of a figure."""

    name: str
    recipe: str
    """File, relative to recipes/."""
    overrides: tuple[str, ...] = ()
    tried: tuple[Setting, ...] = ()
    """On the first seed, before the others run with the best; none keeps the recipe's own."""


@dataclass(frozen=True)
class Study:
    """What is compared with what."""

    title: str
    question: str
    methods: tuple[Method, ...]
    overrides: tuple[str, ...] = ()
    """For every method; with the methods' own what the study is about."""
    sizes: tuple[str, ...] = ()
    """For every method; the user may set other ones."""
    given: tuple[str, ...] = ()
    """The user's own, which come last."""
    seeds: int = 3
    prompts: int = 16
    """How many of them the finished runs are judged on."""
    images_per_prompt: int = 8
    distances: tuple[str, ...] = ()
    """Perceptual ones, names of `dag.evaluation.perceptual.DISTANCES`."""


@dataclass(frozen=True)
class Case:
    """One run of a study."""

    method: Method
    seed: int
    setting: Setting | None
    study: Study
    folder: Path

    @property
    def overrides(self) -> list[str]:
        tuned = {} if self.setting is None else self.setting.overrides
        chosen = [f"{key}={value}" for key, value in tuned.items()]
        return [
            *self.study.sizes,
            *self.study.overrides,
            *self.method.overrides,
            *chosen,
            f"seed={self.seed}",
            *self.study.given,
        ]

    @property
    def file(self) -> Path:
        return ROOT / "recipes" / self.method.recipe

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def recipe(self) -> Recipe:
        return load(self.file, self.overrides)

    def rows(self) -> list[dict[str, Any]]:
        return RunFolder(self.folder).metrics.read()

    def commit(self) -> str | None:
        """Of the code that trained it."""
        return RunFolder(self.folder).read_description().get("commit")

    def is_complete(self) -> bool:
        """Raises UsageError if the folder holds a run of another recipe."""
        if not (self.folder / "run.json").is_file():
            return False
        recipe = self.recipe()
        if RunFolder(self.folder).read_recipe() != recipe:
            raise UsageError(f"{self.folder}: holds a run of another recipe; choose another --out")
        rows = self.rows()
        return bool(rows) and rows[-1]["epoch"] == recipe.train.epochs and (self.folder / "lora").is_dir()


def cases_of(study: Study, folder: Path, seeds: int, settings: Mapping[str, Setting | None]) -> list[Case]:
    """Every seed of every method, as tuned."""
    return [
        case(study, method, folder, seed, settings.get(method.name))
        for method in study.methods
        for seed in range(seeds)
    ]


def tuning_cases(study: Study, folder: Path) -> list[Case]:
    """The first seed of every method with each setting that is tried."""
    return [case(study, method, folder, 0, setting) for method in study.methods for setting in method.tried]


def case(study: Study, method: Method, folder: Path, seed: int, setting: Setting | None) -> Case:
    name = method.name + ("" if setting is None else f"-{setting.name}") + f"-s{seed}"
    return Case(method, seed, setting, study, folder / name)


# -- results of a run ---------------------------------------------------------------------------------------------

_FIDELITY_KEPT = 0.7


def best_settings(tuned: Sequence[Case]) -> dict[str, Setting | None]:
    """The setting of every tuned method: the highest reward of those that keep the judged noun in 70 % of pictures.

    Where none does, the one that keeps it best; where nothing judges, the highest reward. One that is not complete is no
    choice.

    Raises:
        RunError: every setting of a method broke.
    """
    chosen: dict[str, Setting | None] = {}
    for name in dict.fromkeys(case.method.name for case in tuned):
        tried = [case for case in tuned if case.method.name == name]
        mine = [case for case in tried if case.is_complete()]
        if not mine:
            raise RunError(f"no setting of {name} was trained to the end; see {tried[0].log}")

        def worth(case: Case) -> tuple[float, float]:
            rows = case.rows()
            kept = evaluated(rows)[-1].get("noun_top1")
            return (min(_FIDELITY_KEPT, 1.0 if kept is None else kept), ends(rows)[1])

        chosen[name] = max(mine, key=worth).setting
    return chosen


# -- running ------------------------------------------------------------------------------------------------------


def run_missing(cases: Sequence[Case], jobs: int, gpus: Sequence[str] = ()) -> dict[Case, int]:
    """Train every case that is not complete, `jobs` at a time, each in a process of its own with its share of the cores.

    Args:
        gpus: GPUs as CUDA_VISIBLE_DEVICES names them, dealt to the jobs in turn; empty leaves the environment alone.

    Raises:
        UsageError: a folder holds another recipe's run.
        RunError: another process is training one of them.

    Returns:
        exit code of the runs that failed; the others are complete.
    """
    missing = [case for case in dict.fromkeys(cases) if not case.is_complete()]
    done = len(cases) - len(missing)
    if done:
        print(f"{done} of {len(cases)} runs are complete already", flush=True)
    threads = max(1, num_cores() // jobs)
    children: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()
    failed: dict[Case, int] = {}
    free = _dealt(gpus, jobs)

    def work(case: Case) -> None:
        if stopping.is_set():
            return
        with _locked(case.folder) as lock:
            if case.is_complete():  # by another process, since it was looked for
                return
            train(case, lock)

    def train(case: Case, lock: int) -> None:
        _say(case, "resumed" if _has_begun(case) else "started")
        with case.log.open("ab") as log, _taken(free) as gpu:
            child = subprocess.Popen(
                _command(case),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **gpu},
                # The lock lives as long as the child, should this process be killed.
                pass_fds=[lock],
            )
            children.add(child)
            if stopping.is_set():  # since this job was taken up
                child.terminate()
            code = child.wait()
            children.discard(child)
        if code == 0:
            _say(case, f"reward {ends(case.rows())[1]:.3f}")
        elif not stopping.is_set():
            failed[case] = code
            _say(case, f"failed, see {case.log}")

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, case) for case in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stopping.set()
            for child in set(children):
                child.terminate()
            raise
    return failed


def _say(case: Case, text: str) -> None:
    """A line in one write: other jobs say theirs at the same time."""
    print(f"{case.folder.name}: {text}\n", end="", flush=True)


def _dealt(gpus: Sequence[str], jobs: int) -> "queue.SimpleQueue[dict[str, str]]":
    """What each job adds to its environment."""
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for job in range(jobs):
        free.put({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {})
    return free


@contextmanager
def _taken(free: "queue.SimpleQueue[dict[str, str]]") -> Iterator[dict[str, str]]:
    """One of them, for as long as a job runs, however it ends."""
    gpu = free.get()
    try:
        yield gpu
    finally:
        free.put(gpu)


def _has_begun(case: Case) -> bool:
    """It can be resumed, if only from its beginning."""
    return (case.folder / "run.json").is_file()


def _command(case: Case) -> list[str]:
    chosen = [word for override in case.overrides for word in ("--set", override)]
    place = ["--resume" if _has_begun(case) else "--out", str(case.folder)]
    return [sys.executable, str(ROOT / "train_dag.py"), "--recipe", str(case.file), *chosen, *place]


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """A file descriptor whose lock says that this run is being trained. Raises RunError if another process holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: another process is training it") from None
        yield file.fileno()
