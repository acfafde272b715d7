"""The command line of train_dag.py: its flags are frozen, and a mistake ends in one line and an exit code, no traceback."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import train_dag
from dag.costs.forecast import LEVERS
from dag.recipe import Recipe, is_scored
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.training.plan import make_plan

MINIMAL = """
model: {path: embedded}
sampler: {steps: 10, guidance_scale: 3}
prompts: {texts: [a cat, a dog, a fox]}
reward: {name: colourfulness}
objective: {name: dag_db, beta: {value: 10}}
train: {epochs: 5, trajectories: 8, updates: 2}
flow: {warmup_epochs: 1}
"""

Refused = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def refused(file: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that runs a command which is refused; returns the line on stderr, without `error: `."""

    def run(*arguments: str, code: int = 2) -> str:
        assert train_dag.main(["--recipe", str(file), *arguments]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, captured.err
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run


def stop(*_: object) -> None:
    raise AssertionError("training started although the command line is wrong")


# -- flags --------------------------------------------------------------------------------------------------------


def test_the_flags_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else belongs into the recipe, not on the command line."""
    parsers: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_args

    def spy(self: argparse.ArgumentParser, *arguments: object) -> argparse.Namespace:
        parsers.append(self)
        return original(self, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", spy)
    defaults = vars(train_dag.parse_arguments(["--recipe", "x.yaml"]))
    flags = [flag for action in parsers[0]._actions for flag in action.option_strings or [action.dest]]
    assert flags == ["-h", "--help", "--recipe", "--set", "--out", "--resume", "--plan"]
    assert defaults == {"recipe": "x.yaml", "set": [], "out": None, "resume": None, "plan": False}


def test_what_the_flags_take() -> None:
    arguments = train_dag.parse_arguments(
        ["--recipe", "x.yaml", "--set", "a=1", "--set", "b.c=2", "--out", "o", "--resume", "--plan"]
    )
    assert vars(arguments) == {
        "recipe": "x.yaml",
        "set": ["a=1", "b.c=2"],
        "out": "o",
        "resume": "",
        "plan": True,
    }
    assert train_dag.parse_arguments(["--recipe", "x.yaml", "--resume", "dir"]).resume == "dir"


@pytest.mark.parametrize(
    "arguments", [[], ["--recipe"], ["--recipe", "x.yaml", "--epochs", "3"], ["--recipe", "x", "y"]]
)
def test_other_flags_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_dag.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


# -- --plan -------------------------------------------------------------------------------------------------------


def test_plan_prints_counts_and_writes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each lever takes seconds to count; one is enough here.
    monkeypatch.setattr("dag.costs.forecast.LEVERS", LEVERS[1:2])
    assert train_dag.main(["--recipe", str(file), "--plan", "--set", "train.epochs=7"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = {line[:14].strip(): line[14:] for line in captured.out.splitlines()}
    assert lines["prompts"] == "3"
    assert lines["objective"].startswith("dag_db towards exp(beta r), ")
    assert lines["sampling"].startswith("10 steps, eta 1, guidance 3")
    # Images: x0_hat at 10 states and the final picture, of 8 chains. UNet rows: 8 x 10 transitions, in sampling and in
    # training, each with two branches of guidance.
    assert lines["per epoch"] == "8 trajectories, 88 images decoded and scored, 320 UNet rows"
    assert lines["updates"].startswith("2 per epoch over 40 transitions each")
    # Ten steps are sampled and trained, there and back.
    passes = f"{56 * (10 + 10 * 2.2):,.0f} guided passes of the denoiser (a backward pass counted as 1.2)"
    assert lines["run"] == f"7 epochs, 56 trajectories, 12 policy updates, {passes}"
    assert lines["beta"].startswith("10, effective inverse temperature 10 nats per unit of reward")
    assert list(Path.cwd().iterdir()) == [Path.cwd() / file]


def test_plan_counts_what_a_recipe_asks_for(file: Path) -> None:
    def plan_of(*overrides: str) -> dict[str, float]:
        return vars(make_plan(load(file, overrides)))

    base, trajectories, steps = plan_of(), 8, 10
    assert plan_of("sampler.guidance_scale=1")["unet_rows_per_epoch"] == base["unet_rows_per_epoch"] / 2
    assert plan_of("train.inner_epochs=2")["updates"] == 2 * base["updates"]
    assert plan_of("train.step_fraction=0.25")["transitions_per_update"] == trajectories // 2 * math.ceil(0.25 * steps)
    assert plan_of("objective.forward_looking.source=none")["rewards_per_epoch"] == trajectories
    # In one pass the same UNet calls sample and train.
    one_pass = plan_of("train.rollout=one_pass", "objective.forward_looking.stride=4")
    assert one_pass["unet_rows_per_epoch"] == base["unet_rows_per_epoch"] / 2
    scored = [k for k in range(steps) if is_scored(k, steps, 4)]
    assert scored == [0, 4, 7, 8, 9]
    assert one_pass["rewards_per_epoch"] == trajectories * (len(scored) + 1)
    # The pretrained model predicts at every sampled state too.
    assert plan_of("objective.prior=pretrained")["unet_rows_per_epoch"] == base["unet_rows_per_epoch"] * 3 / 2
    mean = plan_of("objective.log_prob_reduction=mean", "model.path=owner/name", "model.resolution=512")
    assert mean["beta_eff"] == 10 * 4 * 64 * 64
    ddpo = plan_of("objective={name: ddpo}")
    assert (ddpo["beta_eff"], ddpo["updates"], ddpo["rewards_per_epoch"]) == (None, 10, trajectories)


def test_plan_reads_the_latent_from_the_models_configs(file: Path) -> None:
    for part, config in {
        "unet": {"in_channels": 16, "sample_size": 8},
        "vae": {"block_out_channels": [8, 8, 8]},
    }.items():
        (Path("model") / part).mkdir(parents=True)
        (Path("model") / part / "config.json").write_text(json.dumps(config))
    plan = make_plan(load(file, ["model.path=model"]))
    assert (plan.latent_elements, plan.counted_as) == (16 * 8 * 8, "model")
    assert make_plan(load(file, ["model.path=model", "model.resolution=16"])).latent_elements == 16 * 4 * 4


# -- mistakes that cost nothing -----------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ("train.epoch=3", "--set train.epoch: unknown key; did you mean 'epochs'?"),
    "wrong type": ("train.epochs=1.5", "--set train.epochs: input should be a valid integer"),
    "eta 0": ("sampler.eta=0", "--set sampler.eta: input should be greater than 0 (found 0)"),
    "too many steps": (
        "sampler.steps=1001",
        "--set sampler.steps: input should be less than or equal to 1000",
    ),
    "no prompt file": ("prompts={file: no.txt}", "prompts.file: no.txt does not exist"),
    "empty prompt file": ("prompts={file: empty.txt}", "prompts.file: empty.txt holds no prompt"),
    "prompt file is a folder": ("prompts={file: .}", "prompts.file: cannot read .: Is a directory"),
    "--set without value": ("train.epochs", "--set train.epochs: write key.sub=value"),
    "--set of a non-section": ("model.path.x=3", "--set model.path.x=3: model.path is not a section"),
}


@pytest.mark.parametrize("use_plan", [False, True], ids=["run", "plan"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, use_plan: bool, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dag.training.launch.train", stop)
    Path("empty.txt").write_text("\n  \n")
    override, message = MISTAKES[name]
    assert refused("--set", override, "--out", "out", *["--plan"] * use_plan).startswith(message)
    assert not Path("out").exists(), "a mistake must not leave a folder behind"


def test_several_mistakes_are_one_line_each(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_dag.main(["--recipe", str(file), "--set", "train.epochs=x", "--set", "sampler.eta=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_missing_recipe(refused: Refused, file: Path) -> None:
    file.unlink()
    assert refused() == "mine.yaml: cannot read the recipe: No such file or directory"


def test_a_recipe_that_is_not_yaml(refused: Refused, file: Path) -> None:
    file.write_text("model: {path: [\n")
    assert refused().startswith("mine.yaml: not a YAML file (line 2): ")


# -- run folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dag.training.launch.train", stop)


@pytest.mark.usefixtures("no_training")
def test_an_output_folder_that_cannot_be_written(refused: Refused) -> None:
    Path("occupied").write_text("mine")
    assert refused("--out", "occupied/run").startswith("--out occupied/run: cannot write there: ")
    assert refused("--out", "occupied").startswith("--out occupied: cannot write there: ")
    assert Path("occupied").read_text() == "mine"


@pytest.mark.usefixtures("no_training")
def test_nothing_in_an_output_folder_is_overwritten(refused: Refused) -> None:
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("mine")
    assert refused("--out", "out").startswith("--out out: the folder is not empty")
    assert [path.name for path in Path("out").iterdir()] == ["metrics.jsonl"]
    assert Path("out/metrics.jsonl").read_text() == "mine"


@pytest.mark.usefixtures("no_training")
def test_resuming_what_is_no_run(refused: Refused) -> None:
    Path("empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert refused("--resume", folder) == f"{folder}: no run there (run.json is missing)"
        assert refused("--resume", "--out", folder) == f"{folder}: no run there (run.json is missing)"
    assert "no run of mine with a checkpoint under runs/" in refused("--resume")


def started_run(file: Path, folder: str, *, has_checkpoint: bool) -> Path:
    """A run folder with the files that --resume looks at."""
    path = Path(folder)
    path.mkdir(parents=True)
    dump = load(file).model_dump(mode="json")
    (path / "run.json").write_text(json.dumps({"recipe": dump}))
    if has_checkpoint:
        (path / "checkpoints/epoch_0003").mkdir(parents=True)
    return path


@pytest.mark.usefixtures("no_training")
def test_resuming_with_another_recipe(refused: Refused, file: Path) -> None:
    started_run(file, "out", has_checkpoint=True)
    message = refused("--resume", "out", "--set", "sampler.steps=20", "--set", "seed=1", "--set", "train.epochs=9")
    assert (
        message == "--resume: out was started with another recipe: sampler.steps: 10 then, 20 now; seed: 0 then, 1 now"
    )


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("key", ["objective.beta.anneal", "train.learning_rate_schedule"])
def test_a_run_whose_schedule_follows_its_epochs_cannot_have_more(refused: Refused, file: Path, key: str) -> None:
    dump = load(file, [f"{key}=linear"]).model_dump(mode="json")
    started_run(file, "out", has_checkpoint=True)
    Path("out/run.json").write_text(json.dumps({"recipe": dump}))
    message = refused("--resume", "out", "--set", f"{key}=linear", "--set", "train.epochs=9")
    changed = r"--resume: out was started with another recipe: train.epochs: \d+ then, 9 now"
    assert re.fullmatch(rf"{changed} \({re.escape(key)} would follow them\)", message)


@pytest.mark.usefixtures("no_training")
def test_resuming_a_run_whose_description_is_broken(refused: Refused, file: Path) -> None:
    (started_run(file, "out", has_checkpoint=True) / "run.json").write_text("{")
    assert refused("--resume", "out", code=1).startswith("out/run.json: cannot be read: ")


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("description", ["[]", "{}", '{"recipe": null}'])
def test_resuming_a_run_without_recipe(refused: Refused, file: Path, description: str) -> None:
    (started_run(file, "out", has_checkpoint=True) / "run.json").write_text(description)
    assert refused("--resume", "out").startswith("out/run.json: ")


@pytest.mark.usefixtures("no_training")
def test_resuming_a_run_of_another_version(refused: Refused, file: Path) -> None:
    path = started_run(file, "out", has_checkpoint=True) / "run.json"
    path.write_text(path.read_text().replace('"eta"', '"etta"'))
    assert refused("--resume", "out") == "out/run.json: sampler.etta: unknown key; did you mean 'eta'?"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, RunFolder, bool]]:
    """The arguments of each call of training, which is replaced: (recipe, run, whether it is resumed)."""
    made: list[tuple[Recipe, RunFolder, bool]] = []
    monkeypatch.setattr("dag.training.launch.train", lambda config, opener: made.append((config, *opener())))
    return made


def test_what_a_resumed_run_gets(file: Path, calls: list[tuple[Recipe, RunFolder, bool]]) -> None:
    older = started_run(file, "runs/mine-20240101-000000", has_checkpoint=True)
    newer = started_run(file, "runs/mine-20240102-000000", has_checkpoint=True)
    begun = started_run(file, "runs/mine-20240103-000000", has_checkpoint=False)
    overrides = ["--set", "train.epochs=9", "--set", "evaluation.every=2", "--set", "checkpoint.keep=1"]
    assert train_dag.main(["--recipe", str(file), "--resume", *overrides]) == 0
    for run in (older, begun):
        assert train_dag.main(["--recipe", str(file), "--resume", str(run)]) == 0
    assert [run.path for _, run, _ in calls] == [newer, older, begun]
    assert calls[0][0].train.epochs == 9
    assert all(is_resumed for _, _, is_resumed in calls)


def test_a_new_run_gets_a_fresh_folder(file: Path, calls: list[tuple[Recipe, RunFolder, bool]]) -> None:
    assert train_dag.main(["--recipe", str(file)]) == 0
    assert train_dag.main(["--recipe", str(file), "--out", "deep/er"]) == 0
    (_, default, _), (_, named, is_resumed) = calls
    assert default.path.is_dir()
    assert default.path.match("runs/mine-????????-??????")
    assert (named.path, is_resumed) == (Path("deep/er"), False)


def test_an_interrupt_before_training_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dag.training.launch.train", interrupt)
    assert train_dag.main(["--recipe", str(file)]) == 130
    assert "before training began" in capsys.readouterr().err


# -- mistakes found while building --------------------------------------------------------------------------------

BUILD_MISTAKES = {
    "no model folder": ("model.path=./nope", "model.path: there is no folder ./nope"),
    "model is a file": (
        "model.path=mine.yaml",
        "model.path: mine.yaml is a file; a diffusers folder is needed",
    ),
    "no reward file": ("reward={name: custom, path: 'no.py:f'}", "reward.path: there is no file no.py"),
    "broken reward file": (
        "reward={name: custom, path: 'broken.py:f'}",
        "reward.path: cannot import broken.py: NameError: ",
    ),
    "no reward function": (
        "reward={name: custom, path: 'good.py:f'}",
        "reward.path: good.py has no function 'f'; it has: g",
    ),
    "no reward module": (
        "reward={name: custom, path: 'no_module:f'}",
        "reward.path: cannot import no_module: ",
    ),
    "no CLIP folder": (
        "reward={name: image_text, path: ./nope}",
        "image_text.path: there is no file or folder ./nope",
    ),
}


@pytest.fixture(scope="module")
def imported() -> None:
    """Import libraries beforehand: what they print to stderr is not the message under test."""
    import dag.training.trainer  # noqa: F401


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("name", BUILD_MISTAKES)
def test_a_mistake_in_a_part_is_one_line_and_the_folder_stays_usable(name: str, refused: Refused) -> None:
    Path("broken.py").write_text("undefined_name\n")
    Path("good.py").write_text("def g(images, prompts): ...\n")
    override, message = BUILD_MISTAKES[name]
    for _ in range(2):
        assert refused("--set", override, "--out", "out").startswith(message)
