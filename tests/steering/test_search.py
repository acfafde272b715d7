"""`python -m dag.search`: identities with plain sampling, folders, interruptions, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dag import search
from dag.chain.rollout import generate
from dag.chain.sample_ids import COMPARISON
from dag.evaluation.searched import side_by_side
from dag.recipe.captions import load_captions
from dag.recipe.load import load_search
from dag.steering import noise
from dag.steering.particles import Particles
from dag.steering.runner import Searching

CPU = torch.device("cpu")


def written(tmp_path: Path, model: Path, **changes: Any) -> Path:
    data = {
        "model": {"path": str(model)},
        "sampler": {"steps": 4, "guidance_scale": 3.0, "tile": 3},
        "prompts": {"texts": ["a cat", "a dog"]},
        "reward": {"name": "colourfulness"},
        "images": 2,
        "search": {"name": "best_of_n", "particles": 3},
        **changes,
    }
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def searching(file: Path, folder: Path, *overrides: str) -> Searching:
    return Searching(load_search(file, None, overrides), folder, CPU, warn=lambda line: None)


def results(folder: Path) -> list[dict[str, Any]]:
    """What was found for each prompt, without times."""
    prompts = json.loads((folder / "results.json").read_text())["prompts"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in prompts]


# -- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["best_of_n, particles: 1", "fk, particles: 1", "svdd, proposals: 1", "reno, iterations: 1"]
)
def test_a_search_without_a_choice_draws_the_plain_picture(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    made = searching(written(tmp_path, tiny_model), tmp_path / "out", f"search={{name: {kind}}}")
    ids = [COMPARISON, COMPARISON + 1]
    plain = generate(made.policy, made.text[:1].expand(2, -1, -1), ids, 0, made.recipe.sampler)
    row = made.search(0)
    assert row["reward"] == row["reward_plain"]
    for name in ("pictures", "plain"):
        found = side_by_side(tmp_path / "out" / name / "0000.png", 2)
        torch.testing.assert_close(found, plain, rtol=0, atol=0.51 / 255)
    assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize(
    ("kind", "passes", "scored"),
    [
        ("best_of_n, particles: 5", 5 * 4, 5),
        ("fk, particles: 5", 5 * 4, 5 * 5),
        ("fk, particles: 5, every: 3, window: [1, 4]", 5 * 4, 2 * 5 - 5 + 5),
        ("svdd, proposals: 3", 1 + 3 * 3, 4 * 3),
        ("svdd, proposals: 3, window: [0, 1]", 1 + 3 + 2, 3 + 1),
        ("reno, iterations: 3", 3 * 4 + 2 * 4 * 2.2, 3),
    ],
)
def test_work_is_counted(tiny_model: Path, tmp_path: Path, kind: str, passes: float, scored: int) -> None:
    row = searching(written(tmp_path, tiny_model), tmp_path / "out", f"search={{name: {kind}}}").search(0)
    assert row["passes"] == pytest.approx(passes)
    assert row["scored"] == scored


def test_the_noises_gradient_is_autograds_along_the_whole_chain(tiny_model: Path, tmp_path: Path) -> None:
    made = searching(written(tmp_path, tiny_model), tmp_path / "out")
    policy, schedule, sampler = made.policy, made.policy.schedule, made.recipe.sampler
    particles = Particles(policy, made.reward, sampler, 0, made.text[:1], "a cat", 3)
    ids = torch.tensor([7])
    chain = list(particles.walk(particles.start(ids).float(), ids))
    found = noise._reward_gradient(particles, chain)
    x = z = chain[0].clone().requires_grad_(True)
    for k in range(schedule.num_transitions):
        with torch.no_grad():
            output = policy.predict(chain[k], schedule.timesteps[k].expand(1), made.text[:1]).guided
            noise_of_step = chain[k + 1] - schedule.mean_x[k] * chain[k] - schedule.mean_output[k] * output
        output = policy.predict(x, schedule.timesteps[k].expand(1), made.text[:1]).guided
        x = schedule.mean_x[k] * x + schedule.mean_output[k] * output + noise_of_step
    _, of_end = made.reward.gradient(chain[-1], ["a cat"], policy.decode, 1)
    (expected,) = torch.autograd.grad(x, z, of_end)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_penalty_is_stationary_on_the_shell() -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    on_shell = z * ((z.numel() - 1) / z.square().sum()).sqrt()
    assert float(noise._norm_gradient(on_shell).abs().max()) < 1e-5
    assert float((noise._norm_gradient(2 * on_shell) * on_shell).sum()) > 0


def test_ascent_raises_the_reward(tiny_model: Path, tmp_path: Path) -> None:
    row = searching(written(tmp_path, tiny_model), tmp_path / "out", "search={name: reno, iterations: 6}").search(0)
    assert all(found > plain for found, plain in zip(row["reward"], row["reward_plain"], strict=True))


# -- folders ------------------------------------------------------------------------------------------------------

REWARD = """
from pathlib import Path
def score(images, prompts):
    if prompts[0] == "a dog" and not Path(__file__).with_name("mended").exists():
        raise ValueError("no answer")
    return images.mean((1, 2, 3))
"""


def test_a_search_goes_on_where_a_reward_failed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    reward = {"name": "custom", "path": f"{tmp_path / 'mine.py'}:score"}
    file = written(tmp_path, tiny_model, reward=reward, search={"name": "fk", "particles": 3, "choose": "weighted"})
    words = ["--recipe", str(file), "--out", str(tmp_path / "out")]
    assert search.main(words) == 1
    said = capsys.readouterr()
    assert "no answer" in said.err and "Traceback" not in said.err
    kept = (tmp_path / "out/pictures/0000.json").stat().st_mtime_ns
    assert not (tmp_path / "out/pictures/0001.json").exists()
    (tmp_path / "mended").touch()
    assert search.main(words) == 0
    assert "1 of 2 prompts are done already" in capsys.readouterr().out
    assert (tmp_path / "out/pictures/0000.json").stat().st_mtime_ns == kept
    assert search.main([*words[:3], str(tmp_path / "whole")]) == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert (tmp_path / "out/before_after.png").read_bytes() == (tmp_path / "whole/before_after.png").read_bytes()
    given = load_captions(tmp_path / "out")
    assert [picture.text for picture in given] == ["a cat", "a cat", "a dog", "a dog"]
    for number, picture in enumerate(given):
        pair = side_by_side(tmp_path / f"out/pictures/{number // 2:04d}.png", 2)
        assert torch.equal(side_by_side(picture.file, 1)[0], pair[number % 2])
    assert search.main(words) == 0, "nothing is missing"
    assert search.main([*words, "--set", "images=1"]) == 2
    assert "holds another search" in capsys.readouterr().err


def test_a_training_recipe_gives_model_prompts_and_reward(tiny_model: Path, tmp_path: Path) -> None:
    training = {
        "model": {"path": str(tiny_model)},
        "sampler": {"steps": 3},
        "prompts": {"texts": ["a cat"]},
        "reward": {"name": "compressibility"},
        "objective": {"name": "ddpo"},
        "train": {"epochs": 7},
    }
    file = tmp_path / "training.yaml"
    file.write_text(yaml.safe_dump(training))
    found = load_search(file, "svdd", ["search.proposals=3"])
    assert (found.sampler.steps, found.reward[0].name, found.search.name) == (3, "compressibility", "svdd")
    assert found.as_training().model.path == str(tiny_model)


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("--set", "search.particle=3"), "search.particle: unknown key; did you mean 'particles'?"),
    (("--set", "search.particles=0"), "search.particles: input should be greater than or equal to 1 (found 0)"),
    (("--set", "search={name: fkk}"), "search.name: unknown name 'fkk'; did you mean 'fk'?"),
    (
        ("--method", "fk", "--set", "search.window=[2, 9]"),
        "search.window=[2, 9]: give states within 0 and sampler.steps=4",
    ),
    (
        ("--method", "reno", "--set", "reward={name: compressibility}"),
        "search.name=reno: compressibility has no gradient",
    ),
    (("--set", "train.epochs=3"), "train: unknown key"),
    (("--set", "sampler.eta=0"), "sampler.eta"),
    (("--lora", "nowhere"), "nowhere: no run there"),
    (("--set", "memory.budget_gib=0.0001"), "memory.budget_gib=0.0001: a tile of 3 particles is predicted to need"),
    (("--out", "/proc/nowhere"), "--out /proc/nowhere: cannot be used"),
    (("--set", "reward=[]"), "reward"),
    (("--prompt", " "), "prompts: texts must hold at least one prompt and no empty one"),
    (("--set", "search=fk"), "search: input should be"),
    (("--recipe", "nowhere.yaml"), "nowhere.yaml: cannot read the recipe"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    file = written(tmp_path, tiny_model)
    assert search.main(["--recipe", str(file), "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_training_recipe_needs_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    assert search.main(["--recipe", str(root / "recipes/tiny_cpu.yaml")]) == 2
    assert "say how to search: --method best_of_n, fk, svdd, reno" in capsys.readouterr().err


def test_a_trained_model_is_steered(make_recipe: Any, tiny_model: Path, tmp_path: Path) -> None:
    import train_dag

    recipe = make_recipe(train={"epochs": 1, "learning_rate": 0.1})
    trained = tmp_path / "trained.yaml"
    trained.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert train_dag.main(["--recipe", str(trained), "--out", str(tmp_path / "run")]) == 0
    file = written(tmp_path, tiny_model)
    words = ["--recipe", str(file), "--prompt", "a cat"]
    for name, more in (("base", []), ("steered", ["--lora", str(tmp_path / "run")])):
        assert search.main([*words, *more, "--out", str(tmp_path / name)]) == 0
    plain, steered = (side_by_side(tmp_path / name / "plain/0000.png", 2) for name in ("base", "steered"))
    assert float((plain - steered).abs().max()) > 0.02
    assert search.main([*words, "--out", str(tmp_path / "steered")]) == 2, (
        "the base model's pictures are not mixed with these"
    )
