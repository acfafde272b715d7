"""What a newcomer meets first: the installation, and the first command, which prints only this project's lines."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import train_dag

ROOT = Path(__file__).parents[2]
SMALL = {
    "train.epochs": 1, "train.trajectories": 4, "train.updates": 1, "train.micro_batch": 4, "sampler.steps": 2,
    "flow.warmup_epochs": 0, "evaluation.prompts": 1, "evaluation.images_per_prompt": 2,
}  # fmt: skip
OURS = ("run folder ", "kernels: ", "attention: ", "device: ", "epoch ", "weights in ", "all on one page: ")


def start(*command: str, **changed: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a newcomer would: in the project's folder, without variables that silence libraries."""
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **changed}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def first_command() -> list[str]:
    """The words of the README's first command after the installation."""
    block = re.search(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return shlex.split(block[1].rpartition("&&")[2])


def small(run: Path, optimizer: str) -> list[str]:
    """Overrides with which the first command takes seconds."""
    overrides = {**SMALL, "train.optimizer": optimizer}
    return ["--out", str(run), *(word for key, value in overrides.items() for word in ("--set", f"{key}={value}"))]


# -- what is printed ----------------------------------------------------------------------------------------------


def test_the_first_command_prints_our_lines_alone(tmp_path: Path) -> None:
    """Where bitsandbytes is installed, the run has 8-bit optimizer states: diffusers and this project then both import it."""
    optimizer = "adamw" if importlib.util.find_spec("bitsandbytes") is None else "adamw8bit"
    python, *words = first_command()
    assert (python, words) == (".venv/bin/python", ["train_dag.py", "--recipe", "recipes/tiny_cpu.yaml"])
    done = start(*words, *small(tmp_path / "run", optimizer))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if not line.startswith(OURS)] == []


# The only folders that import these libraries (see tests/test_layering.py), and code that imports them.
HOMES = {
    "dag.models": "import dag.models.sd",
    "dag.rewards": "import dag.score; from transformers import CLIPModel",
    "dag.training.optimizer": """
from dag.training import optimizer
from dag import recipe
train = recipe.Train(epochs=1, trajectories=2, updates=1)
optimizer.build_optimizer([torch.nn.Parameter(torch.ones(1))], 1.0, train, "adamw8bit")
""",
}
# What bitsandbytes logs on some CPUs, where it looks for PyPI's package `kernels`, and xformers where it was built for another
# torch; the test makes both appear on any machine.
COMPLAINT = """
logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load')
logging.getLogger('xformers').warning('built for another torch')
"""


@pytest.mark.parametrize("home", HOMES)
def test_what_libraries_say_when_they_are_imported_is_not_heard(home: str) -> None:
    if home == "dag.training.optimizer":
        pytest.importorskip("bitsandbytes")
    done = start("-c", f"import logging\nimport torch\n{HOMES[home]}\n{COMPLAINT}")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_a_mac_takes_its_cpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch and the system report a Mac here, under accelerate's launcher, which leaves one thread."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr("dag.training.launch._IS_LAUNCHED", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)
    assert train_dag.main([*first_command()[2:], *small(tmp_path / "run", "adamw")]) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if not line.startswith(OURS)] == []
    lines = said.out.splitlines()
    assert lines[1] == "device: cpu (not the GPU of this Mac, which has no float64: a run's noise is drawn in it)"
    assert lines[2].startswith("1 threads")
    assert json.loads((tmp_path / "run/run.json").read_text())["kernels"]["reason"].endswith("the run is on cpu")


def test_the_launcher_is_quiet_when_it_is_told_everything() -> None:
    """With the options in dag/run/README.md; without them it lists the defaults that it took."""
    options = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    assert options in (ROOT / "dag/run/README.md").read_text(encoding="utf-8")
    quiet = start("-m", "accelerate.commands.launch", *options.split(), "train_dag.py", "--help")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert quiet.stdout.startswith("usage: ")


# -- what is installed --------------------------------------------------------------------------------------------


def test_extras_install_what_they_are_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[<>=;\[ ]", wish)[0] for wish in wishes} for extra, wishes in extras.items()}
    assert {"bitsandbytes", "triton", "pytest"} <= names["gpu"], "the checklist runs the kernels' tests"
    # Many releases of xformers require one exact torch, and would replace the one that fits the GPU.
    assert [extra for extra in names if "xformers" in names[extra]] == ["xformers"]
    triton = [wish for wishes in extras.values() for wish in wishes if wish.startswith("triton")]
    assert triton
    assert all(wish.endswith("; platform_system == 'Linux'") for wish in triton), "there are no wheels elsewhere"
