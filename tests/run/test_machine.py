"""What run.json says about the machine and its versions, and how a resumed run compares them."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import parts_of

from dag.recipe import Recipe
from dag.run import machine
from dag.training.build import describe_run
from dag.training.launch import _changes

CPU = torch.device("cpu")
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.3.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)\n"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretends a GPU whose driver cannot be found; the path is where the driver's own file may be written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(machine, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "version"


def test_run_json_and_the_bench_record_the_versions(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    described = describe_run(recipe, parts_of(recipe), CPU)
    assert described["versions"]["torch"] == torch.__version__
    names = {"triton", "bitsandbytes", "xformers", "cuda", "cudnn", "driver"}
    assert names <= described["versions"].keys()
    assert names <= machine.environment(CPU).keys()
    assert machine.environment(CPU)["device"] == described["device"]
    json.dumps(described)


def test_what_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "a package that nobody has"))
    found = machine.versions()
    assert (found["a package that nobody has"], found["cudnn"], found["driver"]) == (None, None, None)


@pytest.mark.parametrize(("text", "release"), [(CLOSED, "535.104.05"), (OPEN, "570.86.15")], ids=["closed", "open"])
def test_the_drivers_file_has_its_release(gpu: Path, text: str, release: str) -> None:
    gpu.write_text(text)
    found = machine.versions()
    assert (found["cuda"], found["cudnn"], found["driver"]) == ("12.8", "91002", release)


@pytest.mark.parametrize(("script", "release"), [("echo 551.23; echo 551.23", "551.23"), ("exit 9", None), ("", None)])
def test_without_its_file_the_tool_tells(gpu: Path, script: str, release: str | None) -> None:
    tool = gpu.parent / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert machine.versions()["driver"] == release


def test_without_file_and_tool_nothing_is_told(gpu: Path) -> None:
    assert machine.versions()["driver"] is None


# -- a resumed run ------------------------------------------------------------------------------------------------

HERE: dict[str, Any] = {
    "device": "A", "threads": 2, "processes": 1, "python": "3.11", "jpeg": "3", "versions": {"torch": "2", "xformers": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({}, []),
        ({"threads": 4}, ["threads 2 then, 4 now"]),
        ({"versions": {"torch": "3", "xformers": None}}, ["torch 2 then, 3 now"]),
        ({"versions": {"torch": "2", "xformers": "0.0.35"}}, ["xformers none then, 0.0.35 now"]),
        ({"versions": {"torch": None, "xformers": None}}, ["torch 2 then, none now"]),
        ({"versions": {"torch": "2", "xformers": None, "driver": "570"}}, []),
    ],
    ids=["same", "threads", "version", "came", "went", "older run.json"],
)
def test_a_resumed_run_tells_what_is_different(now: dict[str, Any], expected: list[str]) -> None:
    assert _changes(HERE, {**HERE, **now}) == expected


def test_a_run_json_of_long_ago_is_readable() -> None:
    assert _changes({"device": "A"}, HERE) == []
