"""A GPU that PyTorch does not use, or has no code for, is one sentence with the next step. Every machine here is made up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_dag
from dag.run import missing_gpu as module
from dag.run.missing_gpu import missing_gpu, no_card, unfit_gpu

GPU = torch.device("cuda", 0)
OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update\nyour GPU driver"

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A function that makes this a machine with a driver, a display device and a build of PyTorch."""

    def make(driver: str | None = None, vendor: str | None = None, cuda: str | None = None, says: str = "") -> None:
        def init() -> None:
            raise RuntimeError(says)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(module, "driver", lambda: driver)
        monkeypatch.setattr(module, "_PCI", tmp_path)
        if vendor is not None:
            (tmp_path / "0000:01:00.0").mkdir()
            (tmp_path / "0000:01:00.0/vendor").write_text(f"{vendor}\n")
            (tmp_path / "0000:01:00.0/class").write_text("0x030000\n")

    return make


NO_CUDA = "(driver 570.86), and PyTorch VERSION is a build without CUDA: install one with CUDA"
TOO_OLD = "driver 470.1 is too old for this PyTorch, which is built for CUDA 12.8: update the driver"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"driver": "570.86"}, NO_CUDA),
        ({"driver": "470.1", "cuda": "12.8", "says": OLD}, TOO_OLD),
        ({"driver": "570.86", "cuda": "12.8", "says": "unknown error\nmore"}, "(unknown error): look whether"),
        ({"vendor": "0x10de", "cuda": "12.8"}, "without its driver: install NVIDIA's driver"),
        ({"vendor": "0x1002", "cuda": "12.8"}, None),
        ({"cuda": "12.8"}, None),
        ({}, None),
    ],
    ids=["build without CUDA", "old driver", "other error", "no driver", "another vendor", "no GPU", "nothing"],
)
def test_why_a_gpu_is_not_used(machine: Machine, made: dict[str, Any], expected: str | None) -> None:
    machine(**made)
    found = missing_gpu()
    if expected is None:
        assert found is None
    else:
        assert found is not None and expected.replace("VERSION", torch.__version__) in found and "\n" not in found


def test_a_hidden_gpu_is_not_missed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("570.86")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert missing_gpu() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert missing_gpu() is not None


def test_a_pytorch_with_cuda_but_no_gpu_is_a_remark(machine: Machine) -> None:
    machine(cuda="12.8")
    assert no_card() == "PyTorch is built for CUDA 12.8, and finds no NVIDIA GPU"
    machine()
    assert no_card() is None


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((8, 6), ["sm_80", "sm_90"], None),
        ((9, 0), ["sm_80", "sm_90a"], None),
        ((12, 0), ["sm_80", "sm_90"], "(sm_120; it has sm_80, sm_90): install a build for newer GPUs"),
        ((12, 0), ["sm_80", "compute_90"], None),
        ((6, 1), ["sm_75", "sm_80", "compute_80"], "install a build for older GPUs"),
        ((8, 0), ["sm_86"], "install a build for older GPUs"),
        ((8, 6), [], None),
    ],
)
def test_a_gpu_that_the_build_has_no_code_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    found = unfit_gpu(GPU)
    assert found is None if expected is None else found is not None and expected in found
    assert unfit_gpu(torch.device("cpu")) is None


def test_training_stops_before_anything_is_loaded(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("570.86")
    monkeypatch.chdir(tmp_path)
    recipe = str(Path(__file__).parents[2] / "recipes/aesthetic_24gb.yaml")
    assert train_dag.main(["--recipe", recipe, "--set", "memory.budget_gib=null"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: there is an NVIDIA GPU (driver 570.86), and PyTorch ")
    assert said.endswith("to train on the CPU all the same, set CUDA_VISIBLE_DEVICES=-1\n") and said.count("\n") == 1
