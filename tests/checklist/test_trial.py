"""The trial run of `train_dag.py`: with a program in its place that has a fault, each fault is named."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dag.checklist import trial_run
from dag.errors import RunError

ROOT = Path(__file__).parents[2]
# A program in place of `train_dag.py` that trains nothing: it leaves the files of a run, with one fault.
TRAINED = """
import json, signal, sys, time
from pathlib import Path
fault, option = sys.argv[1], sys.argv[-2]
run = Path(sys.argv[-1])
def write(name, text=""):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(text)
def stop(number, frame):
    if fault != "no checkpoint":
        write("checkpoints/epoch_0000_000001/state.json")
    sys.exit(0 if fault == "ignored" else 143)
signal.signal(signal.SIGTERM, stop)
rows = [{"epoch": n, "reward_mean": 1.0 + n, "loss": 0.5, "eval_reward_mean": 2.0, "peak_memory_gib": 1} for n in range(3)]
write("run.json", json.dumps({"recipe": {"train": {"epochs": 2}}}))
if option == "--out" and run.name == "parted":
    write("metrics.jsonl", json.dumps(rows[0]) + "\\n")
    time.sleep(30)
if fault == "other" and option == "--resume":
    rows[2]["loss"] = 0.6
if fault == "not finite":
    rows[2]["loss"] = None
if fault == "twice":
    rows = [rows[0], *rows]
write("metrics.jsonl", "".join(json.dumps(row) + "\\n" for row in rows))
for name in ("curves.png", "samples/epoch_0000.png", "samples/before_after.png", "checkpoints/epoch_0002/state.json",
             "lora/pytorch_lora_weights.safetensors", "lora/lora_kohya.safetensors"):
    if fault != "no lora" or not name.startswith("lora"):
        write(name)
sys.exit(1 if fault == "exits 1" else 0)
"""


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[trial_run.Row]]:
    """A function that makes the trial with a program in place of `train_dag.py` that has a fault."""
    (tmp_path / "trained.py").write_text(TRAINED)

    def run(fault: str, device: str = "cpu", *overrides: str) -> list[trial_run.Row]:
        def start(command: list[str]) -> "subprocess.Popen[bytes]":
            return subprocess.Popen([sys.executable, str(tmp_path / "trained.py"), fault, *command[-2:]])

        monkeypatch.setattr(trial_run, "_start", start)
        return list(trial_run.rows(str(ROOT / "recipes/tiny_cpu_db.yaml"), overrides, device))

    return run


def test_a_trial_without_a_fault(trial: Callable[..., list[trial_run.Row]]) -> None:
    rows = trial("")
    assert [(row["label"], row.get("epoch")) for row in rows] == [
        *(("in one go", epoch) for epoch in range(3)),
        *(("stopped and resumed", epoch) for epoch in range(3)),
        ("resumed against in one go", None),
    ]
    assert rows[-1]["largest_difference"] == 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("exits 1", "a run in one go ended with exit code 1, expected 0"),
        ("ignored", "a run that got SIGTERM in its first epoch ended with exit code 0, expected 143"),
        ("no checkpoint", "a run that got SIGTERM in its first epoch left no checkpoint"),
        ("no lora", "the whole run left no lora/pytorch_lora_weights.safetensors, lora/lora_kohya.safetensors"),
        ("not finite", "the whole run's last loss is None"),
        ("twice", "the whole run has rows of the epochs [0, 0, 1, 2]"),
        ("other", "the resumed run is another one: loss of epoch 2 differs by 0.167"),
    ],
)
def test_a_trial_names_the_fault(trial: Callable[..., list[trial_run.Row]], fault: str, said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)):
        trial(fault)


def test_on_a_gpu_the_difference_is_told(trial: Callable[..., list[trial_run.Row]]) -> None:
    last = trial("other", "cuda")[-1]
    assert last["of"] == "loss of epoch 2"
    assert last["largest_difference"] == pytest.approx(0.1 / 0.6)


def test_on_a_gpu_a_deterministic_run_must_be_the_same(trial: Callable[..., list[trial_run.Row]]) -> None:
    assert trial("", "cuda", "deterministic=true")[-1]["largest_difference"] == 0
    with pytest.raises(RunError, match=r"the resumed run is another one: loss of epoch 2 differs by 0\.167"):
        trial("other", "cuda", "deterministic=true")
