"""What takes too long for the tests: runs that are killed again and again, and a run that goes on for an hour.

    python tests/endurance.py kill --kills 100 --folder DIR
    python tests/endurance.py soak --minutes 60 --folder DIR

`kill` trains small runs on the embedded model, ends them by SIGKILL at random moments, resumes them, and compares every
metric and weight with an undisturbed run. `soak` watches memory, open files and the run folder. Each prints a table.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dag import checkpoint
from dag.ledger import PHASES

ROOT = Path(__file__).parent.parent
# What no two runs share.
MEASURED = {*(f"{kind}_{name}" for kind in ("seconds", "memory_gib") for name in PHASES), "peak_memory_gib"}
SMALL = (
    *("train.epochs=5", "train.trajectories=8", "train.micro_batch=2", "sampler.tile=2", "sampler.steps=4"),
    *("evaluation.prompts=1", "evaluation.images_per_prompt=2", "evaluation.every=2"),
    *("checkpoint.every=2", "checkpoint.minutes=0.005", "checkpoint.keep=2"),
)
KINDS = {
    "dag_db": ("tiny_cpu.yaml", ()),
    "one_pass": ("tiny_cpu.yaml", ("train.rollout=one_pass",)),
    "dag_kl, 8 bit": ("tiny_cpu_kl.yaml", ("train.optimizer=adamw8bit",)),
    "ddpo": ("tiny_cpu_ddpo.yaml", ()),
}


def command(kind: str, *place: str, overrides: tuple[str, ...] = SMALL) -> list[str]:
    """`train_dag.py` on one of `KINDS`."""
    recipe, own = KINDS[kind]
    chosen = [word for override in (*overrides, *own) for word in ("--set", override)]
    return [sys.executable, str(ROOT / "train_dag.py"), "--recipe", str(ROOT / "recipes" / recipe), *chosen, *place]


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


# -- kill ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened to the runs that were killed."""

    kills: int = 0
    runs: int = 0
    while_writing: int = 0
    inside_epochs: int = 0
    before_checkpoint: int = 0
    resumed: int = 0
    unequal: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def kill_until_done(kind: str, run: Path, chance: random.Random, longest: float, tally: Tally) -> None:
    """Start, kill and resume a run until one start comes to its end."""
    while True:
        place = ("--resume" if (run / "run.json").exists() else "--out", str(run))
        with run.with_suffix(".log").open("ab") as log:
            child = subprocess.Popen(command(kind, *place), stdout=log, stderr=log)
            try:
                code = child.wait(timeout=chance.uniform(0, longest))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
            else:
                if code != 0:
                    raise SystemExit(f"{run} ended with {code}; see {log.name}")
                return
        tally.kills += 1
        look_at(run, tally)


def look_at(run: Path, tally: Tally) -> None:
    """What a kill has left: nothing that looks like a checkpoint may be less than one."""
    folder = run / "checkpoints"
    found = checkpoint.candidates(folder)
    tally.while_writing += any(folder.glob(".tmp-*"))
    tally.before_checkpoint += not found
    tally.inside_epochs += bool(found) and "_" in found[0].name.removeprefix("epoch_")
    tally.unreadable += [f"{path}: {reason}" for path in found if (reason := checkpoint.flaw(path))]


def kill(folder: Path, kills: int, longest: float, seed: int) -> int:
    """Returns 0 if every run that was killed ended as the undisturbed one."""
    chance, tally = random.Random(seed), Tally()
    for kind in KINDS:
        subprocess.run(command(kind, "--out", str(folder / f"{kind}-whole")), check=True, stdout=subprocess.DEVNULL)
    while tally.kills < kills:
        kind = list(KINDS)[tally.runs % len(KINDS)]
        whole, run = folder / f"{kind}-whole", folder / f"{kind}-{tally.runs}"
        kill_until_done(kind, run, chance, longest, tally)
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
    """A run of the main recipe with a checkpoint every minute, watched from outside, ended by SIGTERM."""
    overrides = (
        *("train.epochs=100000", "train.trajectories=32", "evaluation.every=4", "evaluation.prompts=4"),
        *("train.learning_rate=1e-4", "checkpoint.every=2", "checkpoint.minutes=1"),
    )
    run, began = folder / "soak", time.monotonic()
    with (folder / "soak.log").open("wb") as log:
        child = subprocess.Popen(command("dag_db", "--out", str(run), overrides=overrides), stdout=log, stderr=log)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kill")
    killing.add_argument("--kills", type=int, default=100)
    killing.add_argument("--longest", type=float, default=20.0, help="seconds that a start may live at most")
    killing.add_argument("--seed", type=int, default=0)
    soaking = commands.add_parser("soak")
    soaking.add_argument("--minutes", type=float, default=60.0)
    for one in (killing, soaking):
        one.add_argument("--folder", type=Path, required=True, help="where the runs go")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.command == "kill":
        return kill(given.folder, given.kills, given.longest, given.seed)
    return soak(given.folder, given.minutes)


if __name__ == "__main__":
    sys.exit(main())
