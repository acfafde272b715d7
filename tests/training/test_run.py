"""Complete runs on the tiny model: the contents of the run folder, exact resume, exports that other programs load."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.building import disturb, parts_of, rows, tiles, write
from helpers.finished_run import finished_run
from safetensors.torch import load_file

import train_dag
from dag.chain.rollout import generate
from dag.errors import RunError
from dag.recipe import Recipe
from dag.run.checkpoint import chosen
from dag.run.folder import RunFolder
from dag.sample import main as sample_main
from dag.training import launch, outputs

MakeRecipe = Callable[..., Recipe]


@pytest.mark.usefixtures("draws_curves")
def test_a_run_keeps_its_contract(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train_dag.main(["--recipe", write(make_recipe(), tmp_path / "r.yaml"), "--out", str(run)]) == 0
    for name in (
        "run.json", "curves.png", "samples/epoch_0000.png", "samples/epoch_0002.png", "samples/before_after.png",
        "checkpoints/epoch_0002/state.json", "lora/pytorch_lora_weights.safetensors", "lora/lora_kohya.safetensors",
        "report.html",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    description = json.loads((run / "run.json").read_text())
    assert description["beta_eff"] == 20.0
    assert description["versions"]["torch"] == torch.__version__
    found = rows(run)
    assert [row["epoch"] for row in found] == [0, 1, 2]
    assert [row["trajectories"] for row in found] == [0, 8, 16]
    assert [row["optimizer_step"] for row in found] == [0, 2, 4]
    for name in ("reward_mean", "reward_std", "loss", "residual_rms", "ratio_max_dev", "eval_reward_mean"):
        assert isinstance(found[-1][name], float), name
    assert "Traceback" not in capsys.readouterr().err


def test_a_page_that_fails_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: RunFolder) -> Path:
        raise ValueError("the page is broken")

    monkeypatch.setattr(outputs, "write_page", broken)
    run = finished_run(tmp_path / "run", ["a cat"])
    components: Any = SimpleNamespace(policy=SimpleNamespace(export=lambda folder: folder.mkdir()))
    outputs.Outputs(run.read_recipe(), run, components, None).finish()
    assert run.weights.is_dir() and (run.samples / "before_after.png").is_file()
    assert "report.html: not written (the page is broken); try again: python -m dag.report" in capsys.readouterr().out


def test_resume_is_exact(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A run of three epochs equals a run of two that is continued, bit for bit in metrics and weights.

    This is the command; test_resume.py stops runs of every objective anywhere.
    """
    pytest.importorskip("bitsandbytes")

    def recipe(epochs: int) -> str:
        config = make_recipe(
            objective={"residual_scale": "running", "beta": {"value": 20.0, "unit": "reward_sd"}},
            train={"epochs": epochs, "optimizer": "adamw8bit", "step_fraction": 0.75},
            flow={"passes": 1, "warmup_epochs": 1},
            adapter={"rank": 80},
            evaluation={"every": 2, "images_per_prompt": 2, "prompts": 1},
        )
        return write(config, tmp_path / f"r{epochs}.yaml")

    undisturbed, parted = tmp_path / "undisturbed", tmp_path / "parted"
    assert train_dag.main(["--recipe", recipe(3), "--out", str(undisturbed)]) == 0
    assert train_dag.main(["--recipe", recipe(2), "--out", str(parted)]) == 0
    assert train_dag.main(["--recipe", recipe(3), "--resume", str(parted)]) == 0
    assert rows(undisturbed) == rows(parted)
    assert RunFolder.open(parted).read_recipe().train.epochs == 3, "run.json tells what runs now"
    ours, theirs = (load_file(run / "lora/pytorch_lora_weights.safetensors") for run in (undisturbed, parted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resume_under_another_recipe_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = tmp_path / "run", write(make_recipe(train={"epochs": 1}), tmp_path / "r.yaml")
    assert train_dag.main(["--recipe", path, "--out", str(run)]) == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert train_dag.main(["--recipe", path, "--set", "train.learning_rate=7", "--resume", str(run)]) == 2
    assert "train.learning_rate: 0.001 then, 7.0 now" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_is_never_overwritten(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = tmp_path / "run", write(make_recipe(train={"epochs": 1}), tmp_path / "r.yaml")
    run.mkdir()
    (run / "precious.txt").write_text("mine")
    assert train_dag.main(["--recipe", path, "--out", str(run)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in run.iterdir()] == ["precious.txt"]


BROKEN_REWARDS = {
    "raises": ("raise KeyError('no such thing')", "raised KeyError"),
    "nan": ("return torch.full((len(prompts),), float('nan'))", "returned nan for sample 8, prompt"),
    "shape": ("return torch.zeros(len(prompts), 1)", "returned shape (4, 1)"),
    "dtype": ("return torch.zeros(len(prompts), dtype=torch.float64)", "returned dtype torch.float64"),
    "list": ("return [0.0] * len(prompts)", "returned list"),
}


@pytest.mark.parametrize("kind", BROKEN_REWARDS)
def test_a_broken_reward_stops_with_one_line_and_a_checkpoint(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The reward works for the first evaluation and epoch, then breaks: the first epoch's state is kept."""
    body, message = BROKEN_REWARDS[kind]
    calls_per_tile = make_recipe().sampler.steps + 1  # x0_hat at every state, and the final picture
    good_calls = (
        1 + tiles(make_recipe()) * calls_per_tile + 1
    )  # the first evaluation, an epoch, the next epoch's first state
    (tmp_path / "mine.py").write_text(
        "import torch\ncalls = 0\ndef score(images, prompts):\n    global calls\n    calls += 1\n"
        f"    if calls > {good_calls}:\n        {body}\n    return images.mean((1, 2, 3))\n"
    )
    recipe = make_recipe(
        reward={"name": "custom", "path": f"{tmp_path / 'mine.py'}:score"},
        checkpoint={"every": 100},
        evaluation={"every": 100},
    )
    run = tmp_path / "run"
    assert train_dag.main(["--recipe", write(recipe, tmp_path / "r.yaml"), "--out", str(run)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "reward custom" in line
    assert message in line
    assert chosen(run / "checkpoints").name.startswith("epoch_0001_"), "what was sampled is kept too"


def test_custom_reward_and_weighted_sum(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward_module.py").write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    terms = [
        {"name": "custom", "path": "my_reward_module:brightness", "weight": 2.0},
        {"name": "compressibility", "weight": 0.5},
    ]
    parts = parts_of(Recipe.model_validate({**json.loads(make_recipe().model_dump_json()), "reward": terms}))
    images = torch.rand(3, 3, 16, 16)
    total, each = parts.reward.detailed(images, ["a"] * 3)
    torch.testing.assert_close(total, 2.0 * each["custom"] + 0.5 * each["compressibility"])


def test_plain_diffusers_reproduces_the_pictures(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Both exported LoRA layouts, loaded by StableDiffusionPipeline and stepped with our noise, give our pictures."""
    from by_hand.plain_diffusers import pictures

    targets, text = ["to_q", "to_v", "conv1", "ff.net.0.proj"], {"rank": 2, "alpha": 3}
    recipe = make_recipe(adapter={"rank": 3, "alpha": 6, "targets": targets, "text_encoder": text})
    parts = parts_of(recipe)
    disturb(parts, 0.1)
    base = generate(parts_of(recipe).policy, parts.text, [4, 5], recipe.seed, recipe.sampler)
    ours = generate(parts.policy, parts.text, [4, 5], recipe.seed, recipe.sampler)
    parts.policy.export(tmp_path / "lora")
    for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        theirs = pictures(recipe, tmp_path / "lora", name, list(parts.prompts), [4, 5])
        assert float((theirs - ours).abs().max()) < 1e-4, name
        assert float((theirs - base).abs().max()) > 1e-2, name


def test_full_fine_tune_exports_a_unet_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    run = tmp_path / "run"
    recipe = make_recipe(adapter={"kind": "full"}, train={"epochs": 1, "learning_rate": 1e-5})
    assert train_dag.main(["--recipe", write(recipe, tmp_path / "r.yaml"), "--out", str(run)]) == 0
    assert UNet2DConditionModel.from_pretrained(run / "lora/unet") is not None


def test_sample_command(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert (
        train_dag.main(["--recipe", write(make_recipe(train={"epochs": 1}), tmp_path / "r.yaml"), "--out", str(run)])
        == 0
    )
    out = tmp_path / "grid.png"
    arguments = ["--run", str(run), "--prompt", "a cat", "a dog", "--images", "2", "--out", str(out)]
    assert sample_main(arguments) == 0
    assert out.is_file()
    first = out.read_bytes()
    assert sample_main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == first
    assert sample_main(["--run", str(tmp_path)]) == 2


class OneGpu:
    """accelerate in a single process on a GPU: its device has no number."""

    device, process_index, num_processes = torch.device("cuda"), 0, 1

    def __init__(self, **options: object) -> None:
        """Takes the same options as accelerate's."""

    def main_process_first(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_budget_caps_a_gpu_that_has_no_number(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the call into CUDA is replaced. The model that is loaded next does not fit, which ends in one line."""
    fractions, devices = [], []

    def full(config: Recipe, device: torch.device, *rest: object, **options: object) -> None:
        devices.append(device)
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=48 << 30))
    monkeypatch.setattr(
        torch._C,
        "_cuda_setMemoryFraction",
        lambda fraction, number: fractions.append((fraction, number)),
        raising=False,
    )
    monkeypatch.setattr(launch, "Accelerator", OneGpu)
    monkeypatch.setattr(launch, "build", full)
    recipe = make_recipe(memory={"budget_gib": 24})
    with pytest.raises(RunError) as found:
        launch.train(recipe, lambda: (RunFolder.create(tmp_path / "run"), False))
    assert fractions == [(0.5, 1)]
    assert devices == [torch.device("cuda", 1)]
    assert str(found.value).startswith("out of GPU memory while loading; model.dtype=bf16, ")
    assert str(found.value).endswith(": CUDA error: out of memory")
