"""`python -m dag.score --check`: each broken part of a reward's contract is found and named; rewards that keep it pass."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig

from dag import score

README = Path(__file__).parents[2] / "dag/rewards/README.md"
REDNESS = "images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))"
BODIES = {
    "redness": (f"return {REDNESS}", None, None),
    "scalar": (f"return ({REDNESS}).mean()", "shape", "it returned shape (); (6,) is asked"),
    "column": (f"return ({REDNESS})[:, None]", "shape", "it returned shape (6, 1)"),
    "listed": (f"return ({REDNESS}).tolist()", "shape", "it returned list"),
    "raises": ("return images.nope", "shape", "it raised AttributeError: 'Tensor' object has no attribute 'nope'"),
    "double": (f"return ({REDNESS}).double()", "dtype", "it returned torch.float64"),
    "normed": ("x = images - 0.5; return x.mean((1, 2, 3)) / x.flatten(1).std(1)", "finite", "picture that is black"),
    "in_place": ("images.mul_(0.5); return images.mean((1, 2, 3))", "input", "it changed the pictures"),
    "renames": ("prompts[0] = 'x'; return images.mean((1, 2, 3))", "input", "it changed the pictures or the prompts"),
    "constant": ("return torch.ones(len(images))", "differs", "all pictures score 1: nothing can be learnt"),
    "random": (f"return ({REDNESS}) + torch.rand(len(images))", "same twice", "asked again, the same pictures score"),
    "centred": (f"x = {REDNESS}; return x - x.mean()", "one by one", "asked one by one, they score differently"),
    "ranked": (
        "x = images.mean((1, 2, 3)); return x.flip(0) if x[0] > x[-1] else x",
        "any order",
        "in another order, they score differently",
    ),
    "worded": (
        "return images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])",
        None,
        "prompts     used: ",
    ),
    "detached": (f"return ({REDNESS}).detach()", None, "gradient    none reaches the pictures"),
    "stepped": (
        "x = images.mean((1, 2, 3)); return x.round() + 0 * x",
        "gradient",
        "it has one, and that is zero for every picture",
    ),
    "wrong": (
        "x = images.mean((1, 2, 3)); return x.detach() + 3 * (x - x.detach())",
        "gradient",
        "by 0.33 of what it says",
    ),
    "steep": (
        "x = images[:, 0, 0, 0]; return (x - x).sqrt() + images.mean((1, 2, 3))",
        "gradient",
        "that is not finite",
    ),
}

Check = Callable[[str], tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the command on a function of my_reward.py; returns (exit code, lines of stdout)."""
    monkeypatch.chdir(tmp_path)
    functions = [f"def {name}(images, prompts):\n    {body}\n" for name, (body, _, _) in BODIES.items()]
    Path("my_reward.py").write_text("import torch\n\n" + "\n".join(functions))
    monkeypatch.setattr("dag.rewards.contract.SIDE", 32)

    def run(name: str) -> tuple[int, list[str]]:
        code = score.main(["--check", name, "--device", "cpu"])
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("name", BODIES)
def test_what_a_reward_breaks_is_named(check: Check, name: str) -> None:
    _, broken, message = BODIES[name]
    code, lines = check(f"my_reward.py:{name}")
    failed = [line for line in lines if line.startswith("FAILED")]
    assert code == (1 if broken else 0)
    assert [line[8:20].strip() for line in failed][:1] == ([broken] if broken else [])
    assert message is None or any(message in line for line in (failed or lines)), lines
    assert len(lines) == (2 if broken == "shape" else 4 if broken == "finite" else 11)


def test_shipped_rewards_keep_the_contract(check: Check) -> None:
    for name in ("colourfulness", "compressibility", "image_text"):
        code, lines = check(name)
        has_gradient = any(line.startswith("ok      gradient    it has one") for line in lines)
        assert code == 0 and has_gradient == (name != "compressibility"), lines
    assert "gradient    it has one, and a step along it" in "\n".join(check("my_reward.py:redness")[1])


def test_the_worked_example_runs_with_a_small_network(check: Check, tmp_path: Path) -> None:
    """The code in README.md, with the hub id replaced by a folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=1000)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "vit")
    code = re.findall(r"```python\n(# my_reward.py\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert code.count('"google/vit-base-patch16-224"') == 1
    Path("example.py").write_text(code.replace("google/vit-base-patch16-224", str(tmp_path / "vit")))
    exit_code, lines = check("example.py:golden_retriever")
    assert exit_code == 0, lines
    assert any(line.startswith("ok      prompts     not used") for line in lines)


@pytest.mark.parametrize(
    "arguments", [["--check", "colourfulness", "a.png"], ["--check", "x.py:f", "--reward", "jpeg"], ["a.png"], []]
)
def test_a_check_makes_its_own_pictures(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        score.main(arguments)
    assert "--check" in capsys.readouterr().err.splitlines()[-1]
