"""Judging runs: `python -m dag.evaluate` on real, short runs of the embedded model."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_dag
from dag import evaluate, search
from dag.evaluation import compare, perceptual
from dag.run.checkpoint import MANIFEST, chosen
from dag.run.durable import sha256

ROOT = Path(__file__).parents[2]
LACKS_LPIPS = importlib.util.find_spec("torchmetrics") is None
FEW = ("--prompts", "2", "--images", "2")


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that trains the embedded model for two epochs and returns the run."""

    def make(*overrides: str) -> Path:
        chosen = [
            *("train.epochs=2", "train.trajectories=4", "train.micro_batch=4", "sampler.steps=4", "flow.passes=0"),
            *("evaluation.prompts=1", "evaluation.images_per_prompt=2", "regulariser.pretrained_kl=0"),
            *overrides,
        ]
        run = tmp_path_factory.mktemp("runs") / "run"
        words = [word for override in chosen for word in ("--set", override)]
        assert train_dag.main(["--recipe", str(ROOT / "recipes/tiny_cpu_db.yaml"), "--out", str(run), *words]) == 0
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


def untrained(run: Path, folder: Path) -> Path:
    """A copy of a run whose adapter is zero."""
    shutil.copytree(run, folder, symlinks=False)
    checkpoint = chosen(folder / "checkpoints")
    weights = checkpoint / "policy.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][weights.name]["sha256"] = sha256(weights)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_a_run_is_judged_beside_its_base_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still, out = untrained(run, tmp_path / "still"), tmp_path / "out"
    assert evaluate.main(["--run", str(run), "--against", str(still), "--out", str(out), *FEW]) == 0
    data = report_of(out)
    base, again, trained, zero = data["models"]
    assert [row["model"] for row in data["models"]] == ["base", "base, other seeds", "run", "still"]
    assert list(base["rewards"]) == ["colourfulness", "compressibility"]
    assert data["trained_on"] == [["colourfulness"], ["colourfulness"]]
    # A model whose adapter is zero draws the base model's pictures.
    assert {**zero, "model": "base", "training_passes": None} == base
    assert base["path_kl"] == again["path_kl"] == 0.0 != trained["path_kl"]
    assert again["frechet"] is again["kernel"] is None, "distances are from these pictures"
    assert trained["frechet"] != base["frechet"] > 1e-4
    for row in (again, trained):
        gain = row["rewards"]["colourfulness"]["gain"]
        assert gain == pytest.approx(
            row["rewards"]["colourfulness"]["mean"] - base["rewards"]["colourfulness"]["mean"], abs=1e-5
        )
        assert gain != 0
    assert all(1 <= row["vendi"] <= 2 and 0 < row["diversity"] < 1 and "noun_top1" in row for row in data["models"])
    shown = capsys.readouterr().out
    assert shown.startswith((out / "evaluation.md").read_text())
    with Image.open(out / "pictures.png") as picture:
        assert picture.width > 3 * 2 * 96


def test_a_search_is_judged_beside_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", str(ROOT / "recipes/search/best_of_n.yaml"), "--out", str(tmp_path / "found")]
    words += ["--set", "sampler.steps=4", "--set", "images=2", "--prompt", "a cat", "a dog"]
    assert search.main(words) == 0
    command = ["--run", str(run), "--against", str(tmp_path / "found"), "--out"]
    assert evaluate.main([*command, str(tmp_path / "out"), *FEW]) == 0
    base, _, trained, found = report_of(tmp_path / "out")["models"]
    results = json.loads((tmp_path / "found/results.json").read_text())
    assert base["rewards"]["colourfulness"]["mean"] == pytest.approx(results["reward_plain"], abs=0.1)
    assert found["rewards"]["colourfulness"]["mean"] == pytest.approx(results["reward"], abs=0.1), "but for 8 bits"
    assert found["rewards"]["colourfulness"]["gain"] > 0
    assert (base["passes"], trained["passes"], found["passes"]) == (4, 4, 16)
    # Two epochs of 4 trajectories: 4 steps are sampled, and 2 of them trained, forward and backward.
    assert (base["training_passes"], found["training_passes"]) == (None, None)
    assert trained["training_passes"] == pytest.approx(2 * 4 * (4 + 2 * 2.2))
    assert "run takes fewer passes than found from the 6th picture on" in (tmp_path / "out/evaluation.md").read_text()
    assert Image.open(tmp_path / "out/equal_cost.png").width > 500
    assert report_of(tmp_path / "out")["checkpoints"]["found"] == "search by best_of_n"
    capsys.readouterr()
    for more, message in (
        (["--images", "3"], "has 2 pictures a prompt; use --images 2"),
        (["--prompts", "3"], "has no pictures of"),
    ):
        assert evaluate.main([*command, str(tmp_path / "other"), *FEW, *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "found/results.json").unlink()
    assert evaluate.main([*command, str(tmp_path / "other"), *FEW]) == 2
    assert "the search has not ended" in capsys.readouterr().err


def test_the_same_command_gives_the_same_figures_and_overwrites_nothing(run: Path) -> None:
    for _ in range(2):
        assert evaluate.main(["--run", str(run), *FEW]) == 0
    assert report_of(run / "evaluation") == report_of(run / "evaluation_001")
    assert evaluate.main(["--run", str(run), *FEW, "--out", str(run / "evaluation")]) == 2


def test_a_run_is_not_taken_for_the_base_model(run: Path, tmp_path: Path) -> None:
    named = tmp_path / "base"
    shutil.copytree(run, named)
    assert evaluate.main(["--run", str(named), *FEW, "--out", str(tmp_path / "o")]) == 0
    assert [row["model"] for row in report_of(tmp_path / "o")["models"]][2:] == [f"{tmp_path.name}/base"]


def test_own_prompts_rewards_and_features(run: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a fox\na green fish on a red background\nsomething else\n")
    more = ["--reward", "clip_score,path=embedded,scale=2.5", "--features", "embedded", "--prompt-file", str(file)]
    assert evaluate.main(["--run", str(run), "--images", "2", "--out", str(out), *more]) == 0
    data = report_of(out)
    assert data["prompts"] == ["a fox", "a green fish on a red background", "something else"]
    row = data["models"][0]
    assert row["rewards"]["clip_score"]["mean"] == pytest.approx(row["alignment"] / 100 * 2.5, rel=1e-4)
    assert "noun_top1" not in row, "the judge knows no thing in the last prompt"


def absolute(first: Tensor, second: Tensor) -> Tensor:
    """A perceptual distance for tests: the mean absolute difference of pixels."""
    return (first - second).abs().mean()


def test_a_perceptual_distance_is_the_mean_over_pairs_of_a_prompt() -> None:
    grey = torch.tensor([0.0, 0.2, 0.6, 0.5, 0.5, 0.8]).reshape(6, 1, 1, 1).expand(6, 3, 4, 4)
    # The pairs of the first prompt: |0 - .2|, |0 - .6|, |.2 - .6|; of the second: 0, .3, .3.
    assert perceptual.within_prompt_distance(absolute, grey, 3) == pytest.approx((0.4 + 0.2) / 2, abs=1e-6)


def test_a_perceptual_distance_is_reported_beside_diversity(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(perceptual.DISTANCES, "absolute", lambda device: absolute)
    out = tmp_path / "out"
    assert evaluate.main(["--run", str(run), *FEW, "--out", str(out), "--distance", "absolute"]) == 0
    assert all(0 < row["absolute"] < 1 for row in report_of(out)["models"])
    assert "| vendi | absolute | frechet |" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_refused(
    run: Path, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run("sampler.guidance_scale=1.0")
    assert evaluate.main(["--run", str(run), "--against", str(other), "--out", str(tmp_path / "o")]) == 2
    assert "sampler.guidance_scale is 1.0, but 3.0 in" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "1"], "--images must be at least 2"),
        (["--reward", "beauty"], "beauty"),
        (["--features", "/nowhere"], "--features"),
        (["--prompt-file", "/nowhere.txt"], "--prompt-file: /nowhere.txt does not exist"),
        pytest.param(
            ["--distance", "lpips"],
            'pip install -e ".[perceptual]"',
            marks=pytest.mark.skipif(not LACKS_LPIPS, reason="torchmetrics is installed"),
        ),
    ],
)
def test_wrong_options_end_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert evaluate.main(["--run", str(run), "--out", str(tmp_path / "o"), *options]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--run", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err


def test_a_reward_with_other_options_is_another_reward(run: Path, tmp_path: Path) -> None:
    more = ["--reward", "clip_score,path=embedded,scale=2.0", "--reward", "clip_score,path=embedded"]
    assert evaluate.main(["--run", str(run), *FEW, "--out", str(tmp_path / "o"), *more]) == 0
    rewards = report_of(tmp_path / "o")["models"][0]["rewards"]
    assert list(rewards) == ["colourfulness", "clip_score", "clip_score#2", "compressibility"]
    assert rewards["clip_score"]["mean"] == pytest.approx(2 * rewards["clip_score#2"]["mean"], rel=1e-5)


def test_a_run_without_weights_is_noticed_before_anything_is_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(run / "run.json", tmp_path / "run.json")
    monkeypatch.setattr(compare, "generate", lambda *given: pytest.fail("drawn"))
    assert evaluate.main(["--run", str(tmp_path), *FEW, "--out", str(tmp_path / "o")]) == 1
    assert "checkpoints: no checkpoint there yet" in capsys.readouterr().err


def test_out_that_is_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert evaluate.main(["--run", str(run), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write there" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_prompts_that_the_judge_cannot_judge_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", str(ROOT / "recipes/tiny_cpu_db.yaml"), "--set", "prompts={texts: [a spaceship]}"]
    assert train_dag.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "evaluation.fidelity: the judge knows no single thing in the prompt 'a spaceship'" in capsys.readouterr().err
