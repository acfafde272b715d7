"""Trials that take too long for the tests: runs that are killed again and again, an hour's run, many random inputs.

    python tests/by_hand/endurance.py kill --kills 100 --folder DIR
    python tests/by_hand/endurance.py soak --minutes 60 --folder DIR
    python tests/by_hand/endurance.py fuzz --examples 5000 --folder DIR

`kill` trains small runs on the embedded model, ends them by SIGKILL at random moments, resumes them, and compares every
metric and weight with an undisturbed run. `soak` watches memory, open files and the run folder of one long run. `fuzz` gives
random input to all code that reads from outside. Each prints a table.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.building import rows
from helpers.forked import forked

from dag.run import checkpoint

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.resolution=32",
    *("train.trajectories=4", "train.micro_batch=2", "sampler.tile=2", "sampler.steps=4"),
    *("evaluation.prompts=1", "evaluation.images_per_prompt=2", "evaluation.every=2"),
    *("checkpoint.every=2", "checkpoint.minutes=0.005", "checkpoint.keep=2"),
)
KINDS = {
    "dag_db": ("tiny_cpu_db.yaml", ()),
    "one_pass": ("tiny_cpu_db.yaml", ("train.rollout=one_pass",)),
    "dag_kl, 8 bit": ("tiny_cpu_kl.yaml", ("train.optimizer=adamw8bit",)),
    "ddpo": ("tiny_cpu_ddpo.yaml", ()),
}


def arguments(kind: str, *place: str, overrides: Sequence[str]) -> list[str]:
    """The arguments of `train_dag.py` for one of `KINDS`; `place` is `--out` or `--resume` with the folder."""
    recipe, own = KINDS[kind]
    chosen = [word for override in (*overrides, *own) for word in ("--set", override)]
    return ["--recipe", str(ROOT / "recipes" / recipe), *chosen, *place]


def start(kind: str, epochs: int, log: Path, *place: str) -> int:
    """Start a run in a forked process; what it imports is imported here, once."""
    from matplotlib import pyplot  # noqa: F401

    import dag.training.launch  # noqa: F401
    import train_dag

    return forked(train_dag.main, arguments(kind, *place, overrides=(*SMALL, f"train.epochs={epochs}")), log)


def ended(process: int, seconds: float) -> int | None:
    """The exit code of a process if it ends within so many seconds, else None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


# -- kill ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of what happened to the runs that were killed."""

    kills: int = 0
    runs: int = 0
    while_writing: int = 0
    inside_epochs: int = 0
    before_checkpoint: int = 0
    resumed: int = 0
    unequal: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def kill_until_done(kind: str, run: Path, epochs: int, chance: random.Random, longest: float, tally: Tally) -> None:
    """Start, kill and resume a run until it ends by itself."""
    log = run.with_suffix(".log")
    while True:
        place = ("--resume" if (run / "run.json").exists() else "--out", str(run))
        process = start(kind, epochs, log, *place)
        code = ended(process, chance.uniform(0, longest))
        if code == 0:
            return
        if code is not None:
            raise SystemExit(f"{run} ended with {code}; see {log}")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        tally.kills += 1
        look_at(run, tally)


def look_at(run: Path, tally: Tally) -> None:
    """Count what a kill has left; a folder named like a checkpoint must be a complete one."""
    folder = run / "checkpoints"
    found = checkpoint.candidates(folder)
    tally.while_writing += any(folder.glob(".tmp-*"))
    tally.before_checkpoint += not found
    tally.inside_epochs += bool(found) and "_" in found[0].name.removeprefix("epoch_")
    tally.unreadable += [f"{path}: {reason}" for path in found if (reason := checkpoint.flaw(path))]


def kill(folder: Path, kills: int, epochs: int, longest: float | None, seed: int, kinds: Sequence[str]) -> int:
    """Kill runs so many times; returns 0 if every one of them ended equal to the undisturbed run."""
    chance, tally = random.Random(seed), Tally()
    began = time.monotonic()
    for kind in kinds:
        if code := ended(start(kind, epochs, folder / "whole.log", "--out", str(folder / f"{kind}-whole")), 3600):
            raise SystemExit(f"the undisturbed run ended with {code}; see {folder / 'whole.log'}")
    longest = longest or (time.monotonic() - began) / len(kinds)
    while tally.kills < kills:
        kind = kinds[tally.runs % len(kinds)]
        whole, run = folder / f"{kind}-whole", folder / f"{kind}-{tally.runs}"
        kill_until_done(kind, run, epochs, chance, longest, tally)
        tally.runs += 1
        file = "lora/pytorch_lora_weights.safetensors"
        if rows(run) != rows(whole) or tensors(run / file) != tensors(whole / file):
            tally.unequal.append(str(run))
        tally.unreadable += [str(path) for path in run.rglob(".tmp-*")]
        tally.resumed += run.with_suffix(".log").read_text().count("resumed after")
        print(f"{run.name}: the same, {tally.kills} kills so far" if not tally.unequal else f"{run.name}: NOT the same")
        shutil.rmtree(run) if not tally.unequal else None
    for name, value in vars(tally).items():
        print(f"| {name.replace('_', ' ')} | {value if not isinstance(value, list) else len(value)} |")
    for line in (*tally.unequal, *tally.unreadable):
        print(line)
    return int(bool(tally.unequal or tally.unreadable))


# -- soak ---------------------------------------------------------------------------------------------------------


def soak(folder: Path, minutes: float) -> int:
    """Watch a run of the main recipe from outside, with a checkpoint every minute, and end it by SIGTERM."""
    overrides = (
        *("train.epochs=100000", "train.trajectories=32", "evaluation.every=4", "evaluation.prompts=4"),
        *("train.learning_rate=1e-4", "checkpoint.every=2", "checkpoint.minutes=1"),
    )
    run, began = folder / "soak", time.monotonic()
    with (folder / "soak.log").open("wb") as log:
        words = arguments("dag_db", "--out", str(run), overrides=overrides)
        child = subprocess.Popen([sys.executable, str(ROOT / "train_dag.py"), *words], stdout=log, stderr=log)
    print("| minute | epoch | resident MiB | open files | threads | run folder MiB | checkpoints |")
    print("|---|---|---|---|---|---|---|")
    every = max(0.05, minutes / 12)
    while (now := (time.monotonic() - began) / 60) < minutes:
        if child.poll() is not None:
            raise SystemExit(f"the run ended with {child.returncode}; see {folder / 'soak.log'}")
        time.sleep(60 * min(every, minutes - now))
        print(watched(child.pid, run, (time.monotonic() - began) / 60), flush=True)
    child.send_signal(signal.SIGTERM)
    code = child.wait(timeout=120)
    print(f"SIGTERM: exit code {code}")
    return int(code != 128 + signal.SIGTERM)


def watched(process: int, run: Path, minute: float) -> str:
    place = Path("/proc") / str(process)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    metrics = run / "metrics.jsonl"
    epochs = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
    cells = (
        f"{minute:.0f}",
        epochs,
        int(status["VmRSS"].split()[0]) // 1024,
        len(os.listdir(place / "fd")),
        status["Threads"].strip(),
        f"{size / 2**20:.1f}",
        len(checkpoint.candidates(run / "checkpoints")),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


# -- fuzz ---------------------------------------------------------------------------------------------------------


def fuzz(folder: Path, examples: int) -> int:
    """Run the property tests of test_fuzz.py with so many examples each; a failure prints its example."""
    from helpers import fuzz as targets
    from helpers.tiny_rewards import reward_of
    from hypothesis import HealthCheck, given, settings

    from dag.rewards.serve import RewardServer

    many = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    many(
        given(targets.RECIPE_BYTES, targets.OVERRIDES)(
            lambda content, chosen: targets.try_recipe(content, chosen, folder)
        )
    )()
    many(given(targets.DAMAGE)(lambda damaged: targets.try_checkpoint(damaged, folder / "checkpoints")))()
    with RewardServer(("127.0.0.1", 0), "colourfulness", reward_of("colourfulness")) as server:
        many(given(targets.REQUESTS)(lambda body: targets.try_request(body, server)))()
    for name, count in sorted(targets.SEEN.items()):
        print(f"| {name} | {count} |")
    print("| tracebacks | 0 |")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kill")
    killing.add_argument("--kills", type=int, default=100)
    killing.add_argument(
        "--longest", type=float, help="seconds that a start may live at most; default: of a complete run"
    )
    killing.add_argument("--epochs", type=int, default=5, help="of each run")
    killing.add_argument("--seed", type=int, default=0)
    killing.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    soaking = commands.add_parser("soak")
    soaking.add_argument("--minutes", type=float, default=60.0)
    fuzzing = commands.add_parser("fuzz")
    fuzzing.add_argument("--examples", type=int, default=5000, help="of each kind")
    for one in (killing, soaking, fuzzing):
        one.add_argument("--folder", type=Path, required=True, help="where the runs go")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.command == "kill":
        return kill(given.folder, given.kills, given.epochs, given.longest, given.seed, given.kinds)
    if given.command == "fuzz":
        return fuzz(given.folder, given.examples)
    return soak(given.folder, given.minutes)


if __name__ == "__main__":
    sys.exit(main())
