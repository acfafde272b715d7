"""Studies: the runs behind a figure, and a pool of processes that runs those that are missing.

A study's folder holds a run folder for each (method, setting, seed). A complete run is never run again, an interrupted one is
resumed, and a folder that holds another recipe's run is refused.
"""

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
from dag.recipe import Recipe, shipped
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.run.locks import lock
from dag.run.machine import num_cores

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Setting:
    """Values of the tuned recipe keys: one candidate of the tuning stage."""

    learning_rate: float | None = None
    """None keeps the recipe's value, as it does below."""
    pretrained_kl: float | None = None
    """Strength of the regulariser."""
    beta: float | None = None
    """Of objectives with a target distribution, how sharp that is."""

    @property
    def name(self) -> str:
        """The setting's part of a run folder's name."""
        parts = (("lr", self.learning_rate), ("kl", self.pretrained_kl), ("beta", self.beta))
        return "-".join(f"{name}{value}" for name, value in parts if value is not None)

    @property
    def overrides(self) -> dict[str, float]:
        """The setting's values by recipe key."""
        given = {
            "train.learning_rate": self.learning_rate,
            "regulariser.pretrained_kl": self.pretrained_kl,
            "objective.beta.value": self.beta,
        }
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class Method:
    """A recipe that a study compares: one line of a figure."""

    name: str
    recipe: str
    """The recipe's file, relative to recipes/."""
    overrides: tuple[str, ...] = ()
    """`key=value` overrides of the recipe."""
    tried: tuple[Setting, ...] = ()
    """Settings to try with the first seed; all seeds then run with the best. If empty, the recipe's values are kept."""


@dataclass(frozen=True)
class Study:
    """Methods that are compared, and what they have in common."""

    title: str
    question: str
    methods: tuple[Method, ...]
    overrides: tuple[str, ...] = ()
    """Overrides for every method. They define the study, so the user may not set their keys."""
    sizes: tuple[str, ...] = ()
    """Overrides for every method that the user may replace."""
    given: tuple[str, ...] = ()
    """The user's overrides (`--set`), which come last."""
    seeds: int = 3
    """Runs of each method."""
    prompts: int = 16
    """Number of prompts that the finished runs are judged on."""
    images_per_prompt: int = 8
    distances: tuple[str, ...] = ()
    """Perceptual distances to judge with: names in `dag.evaluation.perceptual.DISTANCES`."""


@dataclass(frozen=True)
class Case:
    """One run of a study."""

    method: Method
    seed: int
    setting: Setting | None
    """The tuned setting that it runs with; None for the recipe's own values."""
    study: Study
    folder: Path

    @property
    def overrides(self) -> list[str]:
        """All overrides of the run's recipe, in order: a later one replaces an earlier one."""
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
        """The recipe's file."""
        return shipped.folder() / self.method.recipe

    @property
    def log(self) -> Path:
        """The file with what the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def recipe(self) -> Recipe:
        """The run's recipe, with all overrides."""
        return load(self.file, self.overrides)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the run's metrics.jsonl."""
        return RunFolder(self.folder).metrics.read()

    def commit(self) -> str | None:
        """The git commit of the code that trained it; None if unknown."""
        return RunFolder(self.folder).read_description().get("commit")

    def is_complete(self) -> bool:
        """Whether the run has ended with its last epoch. Raises UsageError if the folder holds another recipe's run."""
        if not (self.folder / "run.json").is_file():
            return False
        recipe = self.recipe()
        if RunFolder(self.folder).read_recipe() != recipe:
            raise UsageError(f"{self.folder}: holds a run of another recipe; choose another --out")
        rows = self.metrics()
        return bool(rows) and rows[-1]["epoch"] == recipe.train.epochs and (self.folder / "lora").is_dir()


def cases_of(study: Study, folder: Path, seeds: int, settings: Mapping[str, Setting | None]) -> list[Case]:
    """A run for every method and seed, with the method's setting in `settings`; a method without one is not tuned."""
    return [
        case(study, method, folder, seed, settings.get(method.name))
        for method in study.methods
        for seed in range(seeds)
    ]


def tuning_cases(study: Study, folder: Path) -> list[Case]:
    """A run with the first seed for every method and each setting that it tries."""
    return [case(study, method, folder, 0, setting) for method in study.methods for setting in method.tried]


def case(study: Study, method: Method, folder: Path, seed: int, setting: Setting | None) -> Case:
    """Make a run whose folder, inside `folder`, is named after method, setting and seed."""
    name = method.name + ("" if setting is None else f"-{setting.name}") + f"-s{seed}"
    return Case(method, seed, setting, study, folder / name)


# -- results of a run ---------------------------------------------------------------------------------------------

# A policy may lose prompts for reward only down to this noun_top1.
_NOUN_TOP1_KEPT = 0.7


def best_settings(tuned: Sequence[Case]) -> dict[str, Setting | None]:
    """The best setting of every tuned method, by the method's name.

    The best setting has the highest reward among those with a noun_top1 of at least 0.7. Where none reaches that, it is the
    one with the highest noun_top1; where noun_top1 is not measured, the one with the highest reward. Only complete runs count.

    Raises:
        RunError: no setting of a method was trained to the end.
    """
    chosen: dict[str, Setting | None] = {}
    for name in dict.fromkeys(case.method.name for case in tuned):
        tried = [case for case in tuned if case.method.name == name]
        mine = [case for case in tried if case.is_complete()]
        if not mine:
            raise RunError(f"no setting of {name} was trained to the end; see {tried[0].log}")

        def worth(case: Case) -> tuple[float, float]:
            rows = case.metrics()
            noun_top1 = evaluated(rows)[-1].get("noun_top1")
            return (min(_NOUN_TOP1_KEPT, 1.0 if noun_top1 is None else noun_top1), ends(rows)[1])

        chosen[name] = max(mine, key=worth).setting
    return chosen


# -- running ------------------------------------------------------------------------------------------------------


def run_missing(cases: Sequence[Case], jobs: int, gpus: Sequence[str] = ()) -> dict[Case, int]:
    """Train every case that is not complete, `jobs` at a time, each in its own process with an equal share of the cores.

    Args:
        gpus: GPUs as CUDA_VISIBLE_DEVICES names them, given to the jobs in turn. If empty, CUDA_VISIBLE_DEVICES is not set.

    Returns:
        {case: exit code} of the runs that failed; the others are complete.

    Raises:
        UsageError: a folder holds another recipe's run.
        RunError: another process is training one of them.
    """
    missing = [case for case in dict.fromkeys(cases) if not case.is_complete()]
    done = len(cases) - len(missing)
    if done:
        print(f"{done} of {len(cases)} runs are complete already", flush=True)
    trainings = _Trainings(jobs, gpus)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(trainings.run, case) for case in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            trainings.stop()
            raise
    return trainings.failed


class _Trainings:
    """Runs that are trained at the same time, each in a process that a thread of ours waits for.

    Attributes:
        failed: exit codes of the runs that failed.
    """

    def __init__(self, jobs: int, gpus: Sequence[str]) -> None:
        self.failed: dict[Case, int] = {}
        self._threads = max(1, num_cores() // jobs)
        self._free = _dealt(gpus, jobs)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()

    def run(self, case: Case) -> None:
        """Train a case until its process ends, unless it is complete or all are being stopped."""
        if self._stopping.is_set():
            return
        with _locked(case.folder) as held:
            if case.is_complete():  # another process has completed it since it was found missing
                return
            self._train(case, held)

    def stop(self) -> None:
        """Ask all processes to end, and start no further ones."""
        self._stopping.set()
        for child in set(self._children):
            child.terminate()

    def _train(self, case: Case, held: int) -> None:
        _say(case, "resumed" if _has_begun(case) else "started")
        with case.log.open("ab") as log, _taken(self._free) as gpu:
            child = subprocess.Popen(
                _command(case),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads), **gpu},
                # The child inherits the lock, so that the run stays locked if this process is killed. Windows cannot do that.
                pass_fds=() if sys.platform == "win32" else [held],
            )
            self._children.add(child)
            if self._stopping.is_set():  # it was set after the check in `run`, before the child was in `_children`
                child.terminate()
            code = child.wait()
            self._children.discard(child)
        if code == 0:
            _say(case, f"reward {ends(case.metrics())[1]:.3f}")
        elif not self._stopping.is_set():
            self.failed[case] = code
            _say(case, f"failed, see {case.log}")


def _say(case: Case, text: str) -> None:
    """Print a line in one write, since other jobs print theirs at the same time."""
    print(f"{case.folder.name}: {text}\n", end="", flush=True)


def _dealt(gpus: Sequence[str], jobs: int) -> "queue.SimpleQueue[dict[str, str]]":
    """A queue with one entry for each job: what that job's runs add to their environment."""
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for job in range(jobs):
        free.put({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {})
    return free


@contextmanager
def _taken(free: "queue.SimpleQueue[dict[str, str]]") -> Iterator[dict[str, str]]:
    """An entry of the queue; it is put back at the end, also after an exception."""
    gpu = free.get()
    try:
        yield gpu
    finally:
        free.put(gpu)


def _has_begun(case: Case) -> bool:
    """Whether the run can be resumed, even if only from its beginning."""
    return (case.folder / "run.json").is_file()


def _command(case: Case) -> list[str]:
    chosen = [word for override in case.overrides for word in ("--set", override)]
    place = ["--resume" if _has_begun(case) else "--out", str(case.folder)]
    return [sys.executable, str(ROOT / "train_dag.py"), "--recipe", str(case.file), *chosen, *place]


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the lock that says that this run is being trained; yields its file descriptor.

    Raises RunError if another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        if not lock(file):
            raise RunError(f"{folder}: another process is training it")
        yield file.fileno()
