"""Faults of long runs: signals, full disks, numbers that are not finite, a second process. What is kept must be complete."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import endurance
from helpers.building import parts_of, poisoned, rows, sampled, updated, write
from safetensors.torch import load_file

import train_dag
from dag import evaluate, sample, score
from dag.errors import DivergedError, RunError, UsageError, exit_code
from dag.objectives import ObjectiveOutput
from dag.recipe import Recipe
from dag.rewards.serve import RewardServer
from dag.rewards.wire import encode_request
from dag.run import checkpoint
from dag.run.checkpoint import Position
from dag.run.folder import RunFolder
from dag.run.gpu import is_out_of_memory, out_of_memory_ends
from dag.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]

# -- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_exits(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    calls_per_tile = make_recipe().sampler.steps + 1  # x0_hat at every state, and the final picture
    signalling_call = 1 + calls_per_tile + 2  # after the first evaluation and the first tile, in the second tile
    (tmp_path / "mine.py").write_text(
        "import os\ncalls = 0\ndef score(images, prompts):\n    global calls\n    calls += 1\n"
        f"    if calls == {signalling_call} and not os.path.exists({str(tmp_path / 'sent')!r}):\n"
        f"        open({str(tmp_path / 'sent')!r}, 'w').close()\n        os.kill(os.getpid(), {int(number)})\n"
        "    return images.mean((1, 2, 3))\n"
    )
    recipe = make_recipe(reward={"name": "custom", "path": f"{tmp_path / 'mine.py'}:score"}, checkpoint={"every": 9})
    file, run, undisturbed = write(recipe, tmp_path / "r.yaml"), tmp_path / "run", tmp_path / "undisturbed"
    before = signal.getsignal(number)
    assert train_dag.main(["--recipe", file, "--out", str(run)]) == code
    assert signal.getsignal(number) is before, "handlers are put back"
    said = capsys.readouterr().err
    (saved,) = checkpoint.candidates(run / "checkpoints")
    assert f"stopped by {number.name}: saved {saved.name}; --resume goes on from there" in said
    assert "Traceback" not in said
    assert saved.name.startswith("epoch_0000_")
    assert train_dag.main(["--recipe", file, "--resume", str(run)]) == 0
    assert train_dag.main(["--recipe", file, "--out", str(undisturbed)]) == 0
    assert rows(run) == rows(undisturbed)


def listening(tmp_path: Path) -> "subprocess.Popen[str]":
    program = (
        "import sys, time\nfrom dag.run.signals import Interrupt\n"
        "with Interrupt().listening() as interrupt:\n    print('ready', flush=True)\n"
        "    until = time.monotonic() + 30\n    while time.monotonic() < until: time.sleep(0.01)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    child = listening(tmp_path)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)  # a launcher passes the same Ctrl-C on
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)  # and then sends SIGTERM
    time.sleep(0.8)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=5)
    assert child.returncode == -signal.SIGINT
    assert said.split("\n") == ["", "SIGINT: saving after this step; Ctrl-C again ends at once", ""]


def test_a_signal_counts_although_its_message_cannot_be_printed(tmp_path: Path) -> None:
    """Ctrl-C may end the `tee` that reads stderr before the run has printed its message."""
    child = listening(tmp_path)
    assert child.stderr is not None
    child.stderr.close()
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short form of `tests/by_hand/endurance.py kill` on a smaller model, with SIGKILL at random moments."""
    smaller = (f"model.path={tiny_model}", "model.resolution=null", "flow.channels=[8,8]")
    unjudged = ("evaluation.diversity=null", "evaluation.fidelity=false")
    monkeypatch.setattr(endurance, "SMALL", (*endurance.SMALL, *smaller, *unjudged))
    assert endurance.kill(tmp_path, kills=1, epochs=2, longest=None, seed=0, kinds=["dag_db"]) == 0
    said = capsys.readouterr().out
    assert "| unequal | 0 |" in said
    assert "| unreadable | 0 |" in said


# -- disks --------------------------------------------------------------------------------------------------------


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"a": torch.full((10,), value)}}


def saved(folder: Path, epoch: int, keep: int = 3) -> Path:
    return checkpoint.save(folder, Position(epoch), groups(epoch), {"epoch": epoch}, keep, {})


FILES_OF_A_CHECKPOINT = 5


class Disk:
    """A disk that is full after so many files."""

    def __init__(self, files: int) -> None:
        self.left, self.save = files, checkpoint.save_file

    def save_file(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.save(*arguments)


def test_a_full_disk_drops_old_checkpoints_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2, 3):
        saved(tmp_path, epoch)
    save, calls = checkpoint.save_file, []

    def save_file(*arguments: Any) -> None:
        calls.append(arguments)
        if len(checkpoint.candidates(tmp_path)) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    saved(tmp_path, 4)
    assert len(calls) == 2
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["epoch_0004", "epoch_0003"]


def test_a_disk_that_stays_full_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2):
        saved(tmp_path, epoch)
    monkeypatch.setattr(checkpoint, "save_file", Disk(0).save_file)
    with pytest.raises(
        RunError, match=r"epoch_0003: cannot be written: No space left on device; epoch_0002 is complete"
    ):
        saved(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0002"]
    assert checkpoint.flaw(tmp_path / "epoch_0002") is None


def flipped(checkpoint_folder: Path) -> None:
    """Change one bit of a checkpoint's weights, not their size."""
    path = checkpoint_folder / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_a_resume_skipped_does_not_push_out_what_it_took(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        saved(tmp_path, epoch)
    flipped(tmp_path / "epoch_0003")
    checkpoint.save(tmp_path, Position(2, 5), groups(2.5), {"epoch": 2}, 1, {})
    assert checkpoint.chosen(tmp_path).name == "epoch_0002_000005"
    saved(tmp_path, 3, keep=1)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["epoch_0003"]
    assert checkpoint.flaw(tmp_path / "epoch_0003") is None, "written anew"


def test_room_is_made_without_the_last_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2, 3):
        saved(tmp_path, epoch)
    flipped(tmp_path / "epoch_0003")
    monkeypatch.setattr(checkpoint, "save_file", Disk(0).save_file)
    with pytest.raises(RunError, match="epoch_0002 is complete"):
        saved(tmp_path, 4)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["epoch_0002"]


def test_a_run_on_a_full_disk_ends_in_one_line(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = write(make_recipe(train={"epochs": 3}), tmp_path / "r.yaml"), tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save_file", Disk(FILES_OF_A_CHECKPOINT + 3).save_file)  # the second one fails
    assert train_dag.main(["--recipe", file, "--out", str(run)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "epoch_0002: cannot be written: No space left on device; epoch_0001 is complete, --resume goes on" in line
    monkeypatch.undo()
    (first,) = checkpoint.candidates(run / "checkpoints")
    assert len(list(first.glob("*.safetensors"))) == FILES_OF_A_CHECKPOINT
    assert train_dag.main(["--recipe", file, "--resume", str(run)]) == 0
    assert [row["epoch"] for row in rows(run)] == [0, 1, 2, 3]


def test_a_metrics_file_that_cannot_be_written_ends_in_one_line(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("dag.run.metrics.MetricsFile.write", full)
    file = write(make_recipe(), tmp_path / "r.yaml")
    assert train_dag.main(["--recipe", file, "--out", str(tmp_path / "run")]) == 1
    assert "error: metrics.jsonl: No space left on device" in capsys.readouterr().err


# -- numbers that are not finite ----------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_skipped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(train={"epochs": 1, "updates": 1}), RunFolder.create(tmp_path / "run")
    trainer = Trainer(recipe, run, parts_of(recipe))
    poisoned(trainer, sample=3, k=1, times=1)
    trainer.fit()
    state = trainer.components.policy.state_dict()
    assert all(bool((value == 0).all()) for name, value in state.items() if "lora_B" in name), "no update was made"
    assert rows(run.path)[-1]["loss"] is None


def test_one_too_many_ends_the_run_with_the_transition(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"epochs": 2, "updates": 1, "inner_epochs": 6}, checkpoint={"every": 1})
    run = RunFolder.create(tmp_path / "run")
    trainer = Trainer(recipe, run, parts_of(recipe))
    poisoned(trainer, sample=8 + 3, k=1, times=6)
    with pytest.raises(DivergedError, match="gradient was not finite 6 times in a row") as caught:
        trainer.fit()
    assert "the last checkpoint is epoch_0001" in str(caught.value)
    assert exit_code(caught.value) == 3, "a study tells a run that broke from one that was stopped"
    file = run.faults / "update_000011.json"
    assert f"the transitions are in {file}" in str(caught.value)
    (found,) = json.loads(file.read_text())["transitions"]
    assert (found["sample_id"], found["k"], found["loss"]) == (11, 1, "inf")
    states = load_file(file.with_suffix(".safetensors"))
    assert {name: tuple(value.shape) for name, value in states.items()} == {
        "sample_11_step_1_x_t": (4, 8, 8),
        "sample_11_step_1_x_next": (4, 8, 8),
    }
    assert [path.name for path in checkpoint.candidates(run.checkpoints)] == ["epoch_0001"], "nothing spoilt is saved"


def test_a_rollout_that_is_not_finite_teaches_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(), RunFolder.create(tmp_path / "run")
    trainer = Trainer(recipe, run, parts_of(recipe))
    trajectories = sampled(trainer, 0)
    log_pf = trajectories.log_pf.clone()
    log_pf[5, 2] = torch.nan
    flow = {name: value.clone() for name, value in trainer.components.flow.state_dict().items()}  # type: ignore[union-attr]
    with pytest.raises(DivergedError, match="log P_F of sample 5 at step 2 is nan"):
        updated(trainer, replace(trajectories, log_pf=log_pf), 0)
    after = trainer.components.flow.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(flow[name], after[name]) for name in flow)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(RunError, match="epoch_0002: not saved, policy a is not finite; the checkpoint before it stays"):
        checkpoint.save(tmp_path, Position(2), groups(float("nan")), {"epoch": 2}, 1, {})
    assert checkpoint.chosen(tmp_path).name == "epoch_0001"


def test_where_no_loss_is_to_blame_the_largest_are_told() -> None:
    from dag.training.faults import Suspects

    suspects = Suspects()
    for k in range(3):
        loss = torch.arange(4.0) * (k + 1)
        suspects.add(k, torch.arange(4), ObjectiveOutput(loss=loss, ratio=torch.ones(4)))
    assert [(row["sample_id"], row["k"]) for row in suspects.worst()[:3]] == [(3, 2), (3, 1), (2, 2)]


# -- other processes ----------------------------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with run.held(), pytest.raises(UsageError, match="another process is training in this folder"), run.held():
        pass
    with run.held():
        pass
    assert RunFolder.create(tmp_path / "run").path == run.path, "a lock is no content"


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_a_file_that_the_manifest_does_not_know_is_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    (path / "flow.safetensors").symlink_to("/etc/hostname")
    assert checkpoint.flaw(path) == "holds 'flow.safetensors', which manifest.json does not know"


@pytest.mark.parametrize("name", ["../policy.safetensors", "/etc/hostname", "link.safetensors", "sub/x"])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 1)
    (tmp_path / "policy.safetensors").write_bytes(b"x")
    (path / "link.safetensors").symlink_to(path / "policy.safetensors")
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["policy.safetensors"]
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.flaw(path) == f"manifest.json names {name!r}, which is no file of it"


def test_a_checkpoint_of_another_version_says_how_to_go_on(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(
        RunError, match="has format 1, and this version reads 2: go on with the version that wrote it, whose"
    ):
        checkpoint.newest(path.parent, lambda state: None)


def test_what_a_killed_start_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    (run.path / ".tmp-17-run.json").write_text("{")
    (run.path / ".writable").touch()
    RunFolder.create(run.path)
    with run.held():
        (run.samples / ".tmp-17-epoch_0000.png").touch()
    with run.held():
        assert not list(run.path.rglob(".tmp-*"))


def test_a_refused_resume_changes_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = write(make_recipe(train={"epochs": 2}), tmp_path / "r.yaml"), tmp_path / "run"
    assert train_dag.main(["--recipe", file, "--out", str(run)]) == 0
    before = (run / "run.json").read_bytes()
    assert train_dag.main(["--recipe", file, "--resume", str(run), "--set", "train.epochs=1"]) == 2
    assert "epoch_0002 is beyond train.epochs=1; give as many epochs or more" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before


def test_a_checkpoint_chosen_by_name_is_one_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 1)
    assert checkpoint.chosen(tmp_path / "checkpoints", "epoch_0001").name == "epoch_0001"
    for name in ("../checkpoints/epoch_0001", "epoch_0002", "last"):
        with pytest.raises(RunError, match=r"no checkpoint .*; there are: epoch_0001"):
            checkpoint.chosen(tmp_path / "checkpoints", name)


def test_positions_are_ordered_as_the_run_went() -> None:
    order = [Position(0, 3), Position(1), Position(1, 2), Position(1, 1_000_000), Position(2), Position(10_000)]
    assert sorted([order[i] for i in (3, 0, 5, 2, 4, 1)]) == order
    assert [Position.of(Path(position.name)) for position in order] == order
    assert Position.of(Path("epoch_1")) is None
    assert Position.of(Path("epoch_0001.bak")) is None


# -- memory of a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 must have the same dtype, but got Half and Float"), False),
        (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"), False),
        (RunError("reward http: the server is out of memory"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_full_gpu_has_many_names(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory
    with pytest.raises(RunError if is_memory else type(error)) as raised, out_of_memory_ends("too small"):
        raise error
    assert str(raised.value) == (f"too small: {error}" if is_memory else str(error))


def test_memory_that_runs_out_outside_sampling_ends_in_one_line(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*anything: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nsecond line")

    monkeypatch.setattr("dag.training.optimizer.ClippedOptimizer.step", full)
    assert train_dag.main(["--recipe", write(make_recipe(), tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == (
        "error: out of GPU memory outside sampling and gradients: "
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    )


@pytest.mark.parametrize(
    ("module", "works", "arguments"),
    [
        (evaluate, "evaluate", ["--run", "run"]),
        (sample, "draw", ["--run", "run"]),
        (score, "score_files", ["--reward", "colourfulness", "a.png"]),
    ],
    ids=["evaluate", "sample", "score"],
)
def test_commands_end_in_one_line_where_a_gpu_is_full(
    module: Any,
    works: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").touch()
    monkeypatch.chdir(tmp_path)
    for name in (works, "build_reward"):
        monkeypatch.setattr(
            module, name, raising(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), raising=False
        )
    assert module.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of GPU memory while" in line
    assert line.endswith(": cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    assert not list((tmp_path / "run").glob("evaluation*"))


def raising(error: Exception) -> Callable[..., Any]:
    def call(*anything: Any, **options: Any) -> Any:
        raise error

    return call


def test_a_reward_server_asks_for_fewer_pictures_by_whatever_name() -> None:
    full = raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    server = RewardServer(("127.0.0.1", 0), "mine", full)
    status, answer = server.answer(encode_request(torch.zeros(1, 3, 8, 8), ["a cat"]))
    server.server_close()
    assert (status, answer) == (503, {"error": "out of memory; send fewer images at a time"})
