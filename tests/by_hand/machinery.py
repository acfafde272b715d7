"""Every recipe in recipes/tiny/ through the whole machinery: resume, two processes, and its LoRA in plain diffusers.

    python tests/by_hand/machinery.py [NAME ...]

For each it trains two short epochs of the embedded model four times: undisturbed; stopped after every seventh safe point and
resumed; as two processes; and as one with smaller tiles. Prints whether the resumed run is the undisturbed one, bit for bit; the
largest difference of a LoRA weight between two processes and one, in learning rates, the size of one of Adam's steps; and the
largest difference of a pixel drawn by plain diffusers, in grey levels.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from by_hand.plain_diffusers import pictures
from helpers.building import parts_of, rows, trained, trained_in_pieces

from dag.chain.rollout import generate
from dag.recipe.load import load
from dag.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
FILE = "lora/pytorch_lora_weights.safetensors"
SMALL = (
    *("train.epochs=2", "train.trajectories=8", "train.updates=2", "train.micro_batch=4", "sampler.tile=4"),
    *("evaluation.prompts=1", "evaluation.images_per_prompt=2", "evaluation.every=2", "checkpoint.every=100"),
    *("evaluation.diversity=null", "evaluation.fidelity=false"),
)
PROMPTS = ["a cat", "a red fox"]


def started(count: int, file: Path, overrides: Sequence[str], out: Path) -> Path:
    """Train with so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", "29811"]
    words = [word for override in overrides for word in ("--set", override)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command += [str(ROOT / "train_dag.py"), "--recipe", str(file), *words, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return out


def row(file: Path, folder: Path) -> str:
    """What the machinery made of one recipe, as a row of a table."""
    recipe = load(file, SMALL)
    whole, parted = (RunFolder.create(folder / name) for name in ("whole", "parted"))
    with contextlib.redirect_stdout(io.StringIO()):
        trained(recipe, whole)
        pieces = len(trained_in_pieces(recipe, parted, 7)) + 1
    ours, theirs = (load_file(run.path / FILE) for run in (whole, parted))
    is_equal = rows(whole.path) == rows(parted.path) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Tiles of one row where groups allow it; each process needs a complete group of an update.
    group = recipe.prompts.per_group
    updates = recipe.train.trajectories // max(4, 2 * group)
    split = (*SMALL, f"train.updates={updates}", f"train.micro_batch={group}", f"sampler.tile={group}")
    two, one = (load_file(started(count, file, split, folder / str(count)) / FILE) for count in (2, 1))
    apart = max(float((two[name] - one[name]).abs().max()) for name in one) / recipe.train.learning_rate
    parts = parts_of(recipe)
    text = parts.policy.encode(PROMPTS)
    parts.policy.load_state_dict(load_policy(whole))
    drawn = generate(parts.policy, text, [0, 1], recipe.seed, recipe.sampler)
    plain = pictures(recipe, whole.weights, "pytorch_lora_weights.safetensors", PROMPTS, [0, 1])
    grey = 255 * float((drawn - plain).abs().max())
    return f"| `{file.stem}` | {'yes' if is_equal else 'NO'}, {pieces} pieces | {apart:.1e} | {grey:.4f} |"


def load_policy(run: RunFolder) -> dict[str, torch.Tensor]:
    from dag.run import checkpoint

    return checkpoint.load_tensors(checkpoint.chosen(run.checkpoints), "policy")


def main(names: Sequence[str]) -> None:
    files = sorted((ROOT / "recipes/tiny").glob("*.yaml"))
    print(
        "| recipe | resumed run is the undisturbed one | two processes against one | plain diffusers |\n|---|---|---|---|"
    )
    for file in files:
        if not names or file.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                print(row(file, Path(folder)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
