"""`python -m dag.new`: the recipe that it writes fits, says why, and overwrites nothing. Peaks are a formula here."""

import builtins
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dag import new
from dag.costs.memory import Forecast
from dag.recipe import Recipe, edit
from dag.recipe.load import load
from dag.run.gpu import GIB

SD15 = "runwayml/stable-diffusion-v1-5"
_SHARES = {"none": 1.0, "selective": 0.6, "full": 0.4}


class Formula:
    """A forecast by arithmetic: 4 GiB, and what a tile and a micro-batch need."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def peak(self, phase: str) -> int:
        recipe = self.recipe
        rows, share = recipe.train.micro_batch, _SHARES[recipe.memory.checkpointing]
        sizes = {"rollout": 4 + 0.5 * recipe.sampler.tile, "update": 4 + 2 * rows * share}
        return int(GIB * (sizes[phase] - (0.5 if recipe.memory.base == "nf4" else 0)))

    def forecast(self) -> Forecast:
        return Forecast("random-sd15", {}, {phase: self.peak(phase) for phase in ("rollout", "update")})


@pytest.fixture(autouse=True)
def _by_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dag.costs.forecast.Simulation", Formula)
    Path("mine.txt").write_text("a cat\na dog\n")
    Path("my_reward.py").write_text("raise RuntimeError('a reward is not called')\n")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with SD 1.5, the aesthetic reward and 24 GiB unless told otherwise: (exit code, stdout, stderr)."""

    def call(**given: str) -> tuple[int, str, str]:
        answers = {"model": SD15, "gpu-memory": "24", "reward": "aesthetic", "prompts": "simple_animals"} | given
        code = new.main([word for key, value in answers.items() for word in (f"--{key}", value)])
        return (code, *capsys.readouterr())

    return call


def test_a_recipe_that_fits_is_the_shipped_one_with_the_answers(run: Run) -> None:
    code, out, _ = run(prompts="mine.txt", out="a.yaml")
    assert code == 0 and "levers  none needed" in out and "--recipe a.yaml --plan" in out
    made, base = load("a.yaml"), load(Path(__file__).parents[2] / "recipes/aesthetic_24gb.yaml")
    assert made.prompts.file == "mine.txt" and made.model.path == SD15
    # Nobody knows whether this repository has files in half precision.
    assert base.model.variant == "fp16" and made.model.variant is None
    same = {"model": base.model, "prompts": base.prompts}
    assert made.model_copy(update=same) == base


@pytest.mark.parametrize(
    ("gib", "base", "pulled"),
    [
        ("48", "aesthetic_48gb.yaml", {}),
        ("23.5", "aesthetic_24gb.yaml", {}),
        ("16", "aesthetic_12gb.yaml", {}),
        ("8", "aesthetic_12gb.yaml", {"memory.checkpointing": "selective"}),
        ("7", "aesthetic_12gb.yaml", {"memory.checkpointing": "full"}),
        ("6", "aesthetic_12gb.yaml", {"memory.checkpointing": "full", "train.micro_batch": 1, "sampler.tile": 2}),
    ],
)
def test_levers_are_pulled_one_by_one_until_it_fits_and_explained(
    run: Run, gib: str, base: str, pulled: dict[str, Any]
) -> None:
    code, out, _ = run(**{"gpu-memory": gib, "out": "a.yaml"})
    assert code == 0 and f"written from {base}" in out
    recipe, text = load("a.yaml"), Path("a.yaml").read_text()
    budget = recipe.memory.budget_gib
    assert budget is not None and 0.8 * float(gib) < budget <= 0.875 * float(gib)
    assert Formula(recipe).forecast().peak <= budget * GIB
    for key, value in pulled.items():
        section, name = key.split(".")
        assert getattr(getattr(recipe, section), name) == value
        assert f"#   {key}={value} (" in text
    levers = out.partition("levers  ")[2].splitlines()[0]
    assert {lever.partition("=")[0] for lever in levers.split(", ")} - {"none needed"} == set(pulled)


def test_nothing_fits(run: Run) -> None:
    code, _, error = run(**{"gpu-memory": "4.5", "out": "a.yaml"})
    # 4 GiB and half a GiB for a tile of one, less what nf4 saves; seven eighths of the GPU.
    assert code == 2 and "with memory.checkpointing=full" in error
    assert error.count("\n") == 1 and "need 4.3 GiB" in error and "at least 4.9 GiB" in error
    assert not Path("a.yaml").exists()


def test_a_reward_is_taken_as_the_shipped_recipe_has_it(run: Run) -> None:
    assert run(reward="pickscore", out="a.yaml")[0] == 0
    assert load("a.yaml").reward[0].dtype == "fp16"  # type: ignore[union-attr]
    assert run(reward="my_reward.py:score", out="b.yaml")[0] == 0
    assert load("b.yaml").reward[0].path == "my_reward.py:score"  # type: ignore[union-attr]
    assert run(reward="http://127.0.0.1:8500", out="c.yaml")[0] == 0
    assert load("c.yaml").reward[0].name == "http"


def test_the_family_and_the_device_choose_the_recipe(run: Run) -> None:
    code, out, _ = run(model="someone/my-sdxl", reward="compressibility")
    assert code == 0 and out.startswith("compressibility_24gb.yaml: written from sdxl_24gb.yaml")
    # A reward without gradient: the critic learns it.
    assert load("compressibility_24gb.yaml").learnt_rewards == (True,)
    code, out, _ = run(model="embedded", reward="colourfulness", prompts="mine.txt", **{"gpu-memory": "0"})
    made = load("colourfulness_cpu.yaml")
    assert code == 0 and out.startswith("colourfulness_cpu.yaml: written from tiny_cpu.yaml")
    assert made.memory.budget_gib is None and "peak" not in out
    assert not made.evaluation.fidelity, "the judge knows the nouns of the recipe's own prompts alone"


@pytest.mark.parametrize(
    ("model", "gib", "base"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", "24", "sd35m_24gb.yaml"),
        ("stabilityai/stable-diffusion-3.5-large", "24", "sd35l_24gb.yaml"),
        ("black-forest-labs/FLUX.1-dev", "24", "flux_nf4_24gb.yaml"),
        ("black-forest-labs/FLUX.1-dev", "48", "flux_48gb.yaml"),
        ("sd35l", "24", "sd35l_24gb.yaml"),
        ("sdxl", "24", "sdxl_24gb.yaml"),
        ("sd15", "24", "aesthetic_24gb.yaml"),
    ],
)
def test_every_family_begins_with_its_own_recipe(run: Run, model: str, gib: str, base: str) -> None:
    if "/" not in model:
        # A local folder is told by its configs.
        Path("mine").symlink_to(Path(__file__).parents[2] / "dag/assets/architectures" / model)
        model = "./mine"
    code, out, error = run(model=model, out="a.yaml", **{"gpu-memory": gib})
    assert code == 0 and f"written from {base}" in out, error
    assert load("a.yaml").model.path == model
    assert "# Licence" not in Path("a.yaml").read_text(), "of the base recipe's model"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "./nope"}, "model.path: there is no folder ./nope"),
        ({"reward": "estetic"}, "--reward estetic: unknown name 'estetic'; did you mean 'aesthetic'?"),
        ({"reward": "nope.py:score"}, "--reward nope.py:score: there is no file nope.py"),
        ({"prompts": "nope"}, "--prompts: nope does not exist; give a file, or one of simple_animals"),
        ({"gpu-memory": "-1"}, "--gpu-memory -1: a number of GiB is needed"),
        ({"gpu-memory": "nan"}, "--gpu-memory nan: a number of GiB is needed"),
        ({"gpu-memory": "0"}, "--gpu-memory 0: without a GPU only --model embedded or embedded_flow can be trained"),
        ({"out": "mine.txt"}, "--out mine.txt: exists already"),
        ({"out": "no/such/folder.yaml"}, "--out no/such/folder.yaml: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(run: Run, given: dict[str, str], message: str) -> None:
    code, out, error = run(**given)
    assert code == 2 and not out
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert Path("mine.txt").read_text() == "a cat\na dog\n"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes this a terminal on which a person answers."""

    def give(*lines: str) -> None:
        left: Iterator[str] = iter(lines)

        def answer(question: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr(builtins, "input", answer)

    return give


def test_on_a_terminal_four_questions_are_asked(
    answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers("", "0", "", "mine.txt")
    assert new.main([]) == 0
    recipe = load("colourfulness_cpu.yaml")
    assert recipe.model.path == "embedded" and recipe.prompts.file == "mine.txt"
    answers("embedded", "lots")
    assert new.main(["--reward", "colourfulness", "--prompts", "mine.txt"]) == 2
    assert "--gpu-memory lots" in capsys.readouterr().err
    answers("embedded")
    assert new.main([]) == 130


def test_without_a_terminal_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        new.main(["--model", "embedded", "--reward", "aesthetic"])
    assert "missing: --gpu-memory, --prompts" in capsys.readouterr().err


def test_a_key_is_changed_where_it_stands_and_comments_stay() -> None:
    text = "# top\na: {yx: 2, x: 1}   # about a\nb:\n  x: 3   # about x\n  y: 4\n\n# end\nc: 5\n"
    assert edit.with_value(text, "a", "x", 9) == text.replace(" x: 1", " x: 9")
    assert edit.with_value(text, "b", "x", True) == text.replace("x: 3", "x: true")
    assert edit.with_value(text, "a", "z", "s") == text.replace("x: 1}", "x: 1, z: s}")
    assert edit.with_value(text, "b", "z", 6) == text.replace("  y: 4\n", "  y: 4\n  z: 6\n")
    assert edit.with_value(text, "d", "z", 6) == f"{text}d: {{z: 6}}\n"
    assert edit.with_section(text, "b", [1]) == text.replace("b:\n  x: 3   # about x\n  y: 4\n", "b: [1]\n")
    assert edit.without_header(text) == (["# top"], text.removeprefix("# top\n"))
