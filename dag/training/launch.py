"""Starts training in a process: connects the processes, chooses device and threads, writes run.json, opens trackers."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from dag.errors import RunError, UsageError
from dag.models.levers import compilations
from dag.models.source import SHIPPED
from dag.recipe import Recipe
from dag.recipe.load import flat
from dag.run.determinism import deterministic
from dag.run.folder import RunFolder
from dag.run.gpu import indexed, limit_memory, out_of_memory_ends, this_device
from dag.run.machine import num_cores
from dag.run.missing_gpu import missing_gpu, no_card, unfit_gpu
from dag.run.processes import Processes
from dag.run.signals import Interrupt
from dag.training.build import build, describe_run
from dag.training.trainer import Trainer

# accelerate's launcher sets this variable in the processes that it starts; torchrun does not.
_IS_LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ
_PR_SET_PDEATHSIG = 1
_LOADING = (
    "out of GPU memory while loading; model.dtype=bf16, memory.base=nf4, memory.offload_vae=true and reward.device=cpu "
    "need less, and another program may hold the GPU"
)
_OUTSIDE = "out of GPU memory outside sampling and gradients"
_NO_MAC_GPU = "not the GPU of this Mac, which has no float64: a run's noise is drawn in it"


def train(config: Recipe, opener: Callable[[], tuple[RunFolder, bool]]) -> None:
    """Train a recipe in each process of the launch.

    Args:
        opener: returns (run folder, whether the run is resumed). Only the main process calls it; all must be able to read the
            folder.

    Raises:
        UsageError: the way of launching, or the recipe, asks for what cannot be done.
        RunError, StoppedError: see `Trainer.fit`.
    """
    _end_with_launcher()
    _check_gpu(config)
    with deterministic(config.deterministic), ExitStack() as stack:
        # Without a GPU accelerate connects the processes that torchrun started only if it is explicitly given the CPU.
        state = PartialState(cpu=_takes_cpu())
        _check_launch(state.num_processes)
        found: list[Any] = [None, None]
        if state.is_main_process:
            run, is_resumed = opener()
            stack.enter_context(run.held())
            several = f", {state.num_processes} processes" if state.num_processes > 1 else ""
            print(f"run folder {run.path}{several}", flush=True)
            if remark := _why_cpu():
                print(f"device: cpu ({remark})", flush=True)
            found = [str(run.path), is_resumed]
        if state.num_processes > 1:
            broadcast_object_list(found, from_process=0)
        _train(config, RunFolder(Path(found[0])), found[1])


def _check_gpu(config: Recipe) -> None:
    """Raises RunError if this machine has an NVIDIA GPU that cannot be used. The embedded models then take the CPU."""
    if (reason := missing_gpu()) and config.model.path not in SHIPPED:
        raise RunError(f"{reason}; to train on the CPU all the same, set CUDA_VISIBLE_DEVICES=-1")
    if torch.cuda.is_available() and (reason := unfit_gpu(this_device())):
        raise RunError(reason)


def _why_cpu() -> str | None:
    """Why the CPU is taken, where a GPU could be expected."""
    return _NO_MAC_GPU if _has_mac_gpu() else missing_gpu() or no_card()


def _end_with_launcher() -> None:
    """Have Linux send this process a SIGTERM when accelerate's launcher ends. The launcher does not forward signals: a
    SIGTERM would end it and leave this process running."""
    if _IS_LAUNCHED and sys.platform == "linux" and "accelerate" in _command_of(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _command_of(process: int) -> str:
    try:
        return (Path("/proc") / str(process) / "cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _takes_cpu() -> bool:
    """Whether accelerate has to be given the CPU explicitly."""
    return _are_cpu_processes() or _has_mac_gpu()


def _has_mac_gpu() -> bool:
    """Whether there is a Mac's GPU, which accelerate would take although a rollout's noise cannot be drawn on it."""
    return torch.backends.mps.is_available()


def _are_cpu_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def _check_launch(num_processes: int) -> None:
    """Raises UsageError unless as many processes are connected as were asked for.

    Without a GPU accelerate's launcher silently starts a single process, whatever it was asked for.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes != started:
        raise UsageError(f"{started} processes were started, and {num_processes} found each other")
    was_asked = _IS_LAUNCHED and "MASTER_PORT" in os.environ
    if num_processes == 1 and was_asked and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate launch was asked for several processes and started one, as it does without a GPU; "
            "start them with: torchrun --nproc_per_node N train_dag.py ..."
        )


def _train(config: Recipe, run: RunFolder, is_resumed: bool) -> None:
    trackers = list(config.trackers) or None
    accelerator = Accelerator(cpu=_takes_cpu(), mixed_precision="no", log_with=trackers, project_dir=str(run.path))
    processes, device = Processes(accelerator), indexed(accelerator.device)
    processes.check_shares(config.train.trajectories, config.train.updates)
    if processes.size == 1:
        _use_all_threads(device.type)
    if config.memory.budget_gib is not None:
        limit_memory(device, config.memory.budget_gib)
    say = print if processes.is_main else _nothing
    # The main process builds first: the others then find what it has downloaded or converted.
    with out_of_memory_ends(_LOADING), accelerator.main_process_first():
        components = build(config, device, say, processes=processes)
    say(f"kernels: {components.kernels.name} ({components.kernels.reason})")
    say(f"attention: {components.policy.describe()['attention']}", flush=True)
    description = {**describe_run(config, components, device), "processes": processes.size}
    if is_resumed:
        before = run.read_description()
        if changed := _changes(before, description):
            say(f"not where this run began ({'; '.join(changed)}): it goes on, but not bit for bit", flush=True)
        elif device.type == "cuda" and not config.deterministic:
            say("on a GPU and without deterministic: true it goes on, but not bit for bit", flush=True)
        # run.json goes on describing the start of the run; only the recipe may have changed, in its epochs and reports.
        description = {**before, "recipe": description["recipe"]}
    tracker = None
    if trackers is not None:
        accelerator.init_trackers(
            "dag", config={key: str(value) for key, value in flat(config.model_dump(mode="json")).items()}
        )
        tracker = accelerator.log
    try:
        with out_of_memory_ends(_OUTSIDE), Interrupt().listening() as interrupt:
            trainer = Trainer(config, run, components, tracker, processes, interrupt)
            trainer.fit(is_resumed, on_start=lambda: run.write_description(description) if processes.is_main else None)
    except OSError as error:
        raise RunError(f"{error.filename or run.path}: {error.strerror or error}") from None
    finally:
        if processes.is_main and config.memory.compile:
            _describe_compilations(run, compilations())
        accelerator.end_training()


def _nothing(*texts: object, **options: object) -> None:
    """Takes the place of print in all processes but the main one."""


def _describe_compilations(run: RunFolder, counts: dict[str, int]) -> None:
    """Add the counts of `dag.models.levers.compilations` to run.json, if anything was compiled."""
    if counts["graphs"]:
        with suppress(RunError, OSError):  # a full disk is reported elsewhere
            run.write_description(run.read_description() | {"compiled": counts})


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed in machine and versions since a resumed run began, one entry for each change."""
    places = ("device", "threads", "processes", "python", "jpeg")
    pairs = [(key, before[key], now[key]) for key in places if key in before]
    # A package that has been installed since is a change; one that an older run.json does not list is not.
    then = before.get("versions", {})
    pairs += [(name, then[name], version) for name, version in now["versions"].items() if name in then]
    return [f"{key} {old or 'none'} then, {new or 'none'} now" for key, old, new in pairs if old != new]


def _use_all_threads(device_type: str) -> None:
    """Undo the OMP_NUM_THREADS=1 that accelerate's launcher sets for CPU processes, even for a single one."""
    if device_type == "cpu" and _IS_LAUNCHED and torch.get_num_threads() == 1:
        threads = num_cores()
        torch.set_num_threads(threads)
        print(
            f"{threads} threads (accelerate's launcher had set 1; start with python train_dag.py to choose)", flush=True
        )
