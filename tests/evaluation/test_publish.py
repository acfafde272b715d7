"""Publishing a run: the folder, its model card, whose own code is run, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.building import trained
from helpers.stand_in_hub import StandInHub, stand_in_hub
from PIL import Image, ImageChops

from dag.errors import RunError
from dag.evaluation import card, publish
from dag.evaluation.plain_diffusers import Family
from dag.evaluation.prices import Judgement
from dag.models import lora_file
from dag.models.source import licence
from dag.publish import main
from dag.recipe import Recipe
from dag.recipe.load import load, parse
from dag.run import durable
from dag.run.folder import RunFolder

PROMPTS = ["a cat", "a dog", 'a "red" dog on a ```cat```']
FILES = {
    "README.md", "before_after.png", "images/1.png", "images/2.png", "lora_kohya.safetensors", "prompts.jsonl",
    "pytorch_lora_weights.safetensors", "recipe.yaml", "run.json",
}  # fmt: skip
Refused = Callable[..., str]


def recipe_of(folder: Path, model: Path, **sections: Any) -> Recipe:
    prompts = folder / "my_prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    data = {
        "model": {"path": str(model)},
        "sampler": {"steps": 4, "guidance_scale": 3.0, "tile": 4},
        "prompts": {"file": str(prompts)},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "dag_db", "beta": {"value": 20.0}},
        "flow": {"channels": [8, 8], "warmup_epochs": 0},
        # Fast enough that 8-bit pictures show it.
        "train": {"epochs": 1, "trajectories": 8, "updates": 2, "micro_batch": 4, "learning_rate": 0.1},
        "evaluation": {"every": 1, "prompts": 2, "images_per_prompt": 2},
    }
    return parse({**data, **sections}, "test recipe")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a local model whose card states a licence; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("private")
    shutil.copytree(tiny_model, folder / "my_base")
    (folder / "my_base/README.md").write_text("---\nlicense: openrail++\ntags: [x]\n---\n# Base\n")
    recipe = recipe_of(folder, folder / "my_base")
    run = RunFolder.create(folder / "run")
    trained(recipe, run)
    describe(run, recipe)
    return run.path


def describe(run: RunFolder, recipe: Recipe) -> None:
    """Write run.json; a trainer without a launcher does not."""
    run.write_description(
        {
            "recipe": recipe.model_dump(mode="json"),
            "model": {"path": recipe.model.path, "pipeline": "StableDiffusionPipeline"},
            "plan": {"counted_as": recipe.model.path},
            "beta_eff": 5120.0,
            "kernels": {"name": "torch", "reason": f"no compiler at {run.path}/bin/cc"},
        }
    )


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def shared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published folder."""
    target = tmp_path_factory.mktemp("out") / "deep/My-LoRA"
    assert main([str(finished), "--to", str(target)]) == 0
    return target


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that publishes what is refused; returns the line on stderr, without `error: `."""

    def run(*arguments: object, code: int = 2) -> str:
        assert main(list(map(str, arguments))) == code
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line.removeprefix("error: ").rstrip("\n")

    return run


def code_of(folder: Path, base: Path) -> str:
    """The Python block of the card, with the base model's folder in the place of its name."""
    (block,) = re.findall(r"^(`{3,})python\n(.*?)\n\1$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    code, count = re.subn(r'^base = ".*?"', f"base = {str(base)!r}", block[1], flags=re.MULTILINE)
    assert count == 1
    return code


def front_matter(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    found = metadata_load(folder / "README.md")
    assert found is not None
    return found


# -- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_holds_all_and_no_private_path(shared: Path, finished: Path) -> None:
    files = {str(file.relative_to(shared)): file for file in shared.rglob("*") if file.is_file()}
    assert set(files) == FILES
    assert [path.name for path in shared.parent.iterdir()] == ["My-LoRA"], "nothing temporary is left"
    private = str(finished.parent).encode()
    assert [name for name, file in files.items() if private in file.read_bytes()] == []
    described = json.loads(files["run.json"].read_text())
    assert described["model"]["path"] == described["plan"]["counted_as"] == "my_base"
    assert described["kernels"]["reason"] == "no compiler at cc"
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in shared.rglob("*")), "others may read what is published"


def test_the_recipe_is_complete(shared: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared)
    recipe, original = load("recipe.yaml"), RunFolder(finished).read_recipe()
    assert (recipe.model.path, recipe.prompts.file) == ("my_base", "prompts.jsonl")
    same = {"model": original.model, "prompts": original.prompts}
    assert recipe.model_copy(update=same) == original
    assert [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()] == PROMPTS


def test_widgets_are_pictures_of_their_prompts(shared: Path, finished: Path) -> None:
    widgets = front_matter(shared)["widget"]
    assert [widget["text"] for widget in widgets] == PROMPTS[:2]
    sheet = Image.open(RunFolder(finished).sheet(1))
    for row, widget in enumerate(widgets):
        top = row * 110 + 12
        expected = sheet.crop((0, top, 96, top + 96))
        assert ImageChops.difference(Image.open(shared / widget["output"]["url"]), expected).getbbox() is None


def test_a_sheet_that_pillow_refuses_is_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert main([str(finished), "--to", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "epoch_0001.png: cannot be read: Image size" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- the card -----------------------------------------------------------------------------------------------------


def test_the_card_names_base_reward_and_numbers(shared: Path, finished: Path) -> None:
    text, data = (shared / "README.md").read_text(), front_matter(shared)
    assert data["license"] == "openrail++"
    assert "base_model" not in data, "a local folder's name could be another model's on the hub"
    assert {"lora", "text-to-image", "diffusers", "stable-diffusion"} <= set(data["tags"])
    assert (data["pipeline_tag"], data["library_name"]) == ("text-to-image", "diffusers")
    first, last = RunFolder(finished).metrics.read()
    assert f"| reward_mean | {first['eval_reward_mean']:.4g} | {last['eval_reward_mean']:.4g} |" in text
    assert "| reward | 1 x colourfulness |" in text
    assert "| beta | 20; effective inverse temperature 5120 nats per unit of reward |" in text
    assert "# My-LoRA" in text
    assert "\n".join(PROMPTS) in text


def test_the_cards_code_draws_with_the_lora(
    shared: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = shutil.copytree(shared, tmp_path / "work")
    monkeypatch.chdir(work)
    code = code_of(work, finished.parent / "my_base")
    without = re.sub(r"^pipe.load_lora_weights.*$", "", code, flags=re.MULTILINE)
    drawn = []
    for program in (code, code.replace(lora_file.DIFFUSERS, lora_file.KOHYA), without):
        torch.manual_seed(5)
        exec(program, {})
        drawn.append(Image.open("picture.png").copy())
    assert drawn[0].size == (16, 16)
    assert ImageChops.difference(drawn[0], drawn[2]).getbbox() is not None, "the LoRA must change the picture"
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(drawn[1], int)).max() <= 1


def test_a_hub_base_is_linked(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main([str(run), "--to", str(target), "--base", "runwayml/stable-diffusion-v1-5"]) == 0
    data = front_matter(target)
    assert (data["base_model"], data["base_model_relation"]) == ("runwayml/stable-diffusion-v1-5", "adapter")
    assert data["license"] == "creativeml-openrail-m"
    assert 'base = "runwayml/stable-diffusion-v1-5"\n' in (target / "README.md").read_text()
    assert lora_file.notes(target / lora_file.KOHYA)[lora_file.NAME] == "runwayml/stable-diffusion-v1-5"
    assert load(target / "recipe.yaml").model.path == "runwayml/stable-diffusion-v1-5"


def test_training_notes_base_and_licence_in_both_files(finished: Path) -> None:
    for name in (lora_file.DIFFUSERS, lora_file.KOHYA):
        noted = lora_file.notes(finished / "lora" / name)
        assert (noted["base_model"], noted["base_model_license"]) == ("my_base", "openrail++")
    assert "lora_adapter_metadata" in lora_file.notes(finished / "lora" / lora_file.DIFFUSERS), (
        "diffusers needs its own"
    )


def test_a_lora_of_an_older_version_is_published_too(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in (lora_file.DIFFUSERS, lora_file.KOHYA):
        save_file(load_file(run / "lora" / name), run / "lora" / name, {"format": "pt"})
    description = json.loads((run / "run.json").read_text())
    del description["model"]["pipeline"]
    (run / "run.json").write_text(json.dumps(description))
    assert main([str(run), "--to", str(tmp_path / "out")]) == 0
    assert "from diffusers import DDIMScheduler, StableDiffusionPipeline\n" in (tmp_path / "out/README.md").read_text()
    assert lora_file.notes(tmp_path / "out" / lora_file.KOHYA)["base_model"] == "my_base"


def test_a_licence_with_a_name_of_its_own_is_other(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--to", str(tmp_path / "out"), "--base", "black-forest-labs/FLUX.1-dev"]) == 0
    data = front_matter(tmp_path / "out")
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: its-own\n---\n")
    assert licence("someone/unknown", tmp_path) == "its-own"


def test_known_licences(tmp_path: Path) -> None:
    assert licence("stabilityai/stable-diffusion-xl-base-1.0") == "openrail++"
    assert licence("embedded", tmp_path) == "apache-2.0"
    assert licence("someone/unknown", tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence("someone/unknown", tmp_path) is None


def test_prompts_that_have_changed_are_not_listed(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a cat\na bird")
    description = json.loads((run / "run.json").read_text())
    description["recipe"]["prompts"]["file"] = str(other)
    (run / "run.json").write_text(json.dumps(description))
    assert main([str(run), "--to", str(tmp_path / "out")]) == 0
    assert "bird" not in (text := (tmp_path / "out/README.md").read_text())
    assert "The prompts are not listed" in text
    assert not (tmp_path / "out/prompts.jsonl").exists()
    assert load(tmp_path / "out/recipe.yaml").prompts.file == "other.txt"


def judge(run: Path, name: str, digest: str, alignment: float) -> None:
    """Write an evaluation folder of the run, whose weights have this digest."""
    rows = [
        {"model": model, "alignment": value, "diversity": 0.2} for model, value in (("base", 30.0), ("run", alignment))
    ]
    (run / name).mkdir()
    features = str(run / "clip")
    data = {"features": features, "weights": {"run": digest}, "models": rows}
    (run / name / "evaluation.json").write_text(json.dumps(data))
    (run / name / "evaluation.md").write_text(f"| table of {name} |\n\nfeatures of {features}.\n")


def test_the_newest_judgement_of_these_weights_is_shown(run: Path, tmp_path: Path) -> None:
    digest = durable.sha256(run / "checkpoints/epoch_0001/policy.safetensors")
    judge(run, "evaluation", digest, 31.0)
    judge(run, "evaluation_001", digest, 12.0)
    judge(run, "evaluation_002", "0" * 64, 33.0)
    judge(run, "evaluation_old", digest, 34.0)
    assert main([str(run), "--to", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "| table of evaluation_001 |\n\nfeatures of clip.\n" in text


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"diversity": 0.3}, {"diversity": 0.19}, ["diversity fell from 0.3 to 0.19"]),
        ({"diversity": 0.3}, {"diversity": 0.21}, []),
        ({"noun_top1": 0.9}, {"noun_top1": 0.8}, ["noun_top1 fell from 0.9 to 0.8 while the reward rose"]),
        ({"noun_top1": 0.8}, {"noun_top1": 0.9}, []),
        ({"noun_top1": 0.9}, {"noun_top1": 0.87}, []),
        ({"noun_top1": 0.9}, {"noun_top1": 0.8, "eval_reward_mean": 0.5}, []),
    ],
)
def test_what_fell_is_a_warning(
    finished: Path, before: dict[str, float], after: dict[str, float], expected: list[str]
) -> None:
    lines = card.warnings(told(finished, before, after))
    assert len(lines) == len(expected)
    assert all(line.startswith(f"**Warning:** {text}") for line, text in zip(lines, expected, strict=True))


def test_a_judgement_warns_of_prompts_that_are_kept_less_well(finished: Path) -> None:
    judged = card.Judged("", Judgement({"alignment": 30.0, "diversity": None}, {"alignment": 29.0, "diversity": 0.1}))
    (line,) = card.warnings(told(finished, {}, {}, judged))
    assert line.startswith("**Warning:** alignment fell from 30 to 29 while the reward rose")


@pytest.mark.parametrize(("own", "is_told"), [(50.0, True), (58.1, False)])
def test_alignment_is_held_against_the_noise_of_other_seeds(finished: Path, own: float, is_told: bool) -> None:
    judged = card.Judged("", Judgement({"alignment": 60.0}, {"alignment": own}, {"alignment": 59.0}))
    assert bool(card.warnings(told(finished, {}, {}, judged))) is is_told


def told(
    run: Path, before: dict[str, float], after: dict[str, float], judged: card.Judged | None = None, **recipe: Any
) -> card.Story:
    first, last = {"eval_reward_mean": 1.0, **before}, {"eval_reward_mean": 2.0, **after}
    base = card.Base("owner/xl", None, Family("StableDiffusionXLPipeline"))
    known = RunFolder(run).read_recipe().model_copy(update=recipe)
    return card.Story("A", "me/a", known, base, None, ["a"], first, last, judged, [], False)


def test_the_code_takes_family_precision_and_size(finished: Path) -> None:
    original = RunFolder(finished).read_recipe()
    model = original.model.model_copy(
        update={"dtype": "fp16", "resolution": 768, "variant": "fp16", "revision": "main"}
    )
    code = card.code(told(finished, {}, {}, None, model=model))
    compile(code, "card", "exec")
    assert "import DDIMScheduler, StableDiffusionXLPipeline\n" in code
    assert 'base = "owner/xl"\nlora = "me/a"\n' in code
    assert 'dtype = torch.float16 if device == "cuda" else torch.float32\n' in code
    assert '(base, revision="main", variant="fp16", torch_dtype=dtype).to(device)' in code
    assert "num_inference_steps=4, guidance_scale=3.0, eta=1.0, height=768, width=768)" in code


def test_a_frozen_unconditional_branch_is_told(finished: Path) -> None:
    sampler = RunFolder(finished).read_recipe().sampler
    frozen = told(finished, {}, {}, None, sampler=sampler.model_copy(update={"uncond": "frozen"}))
    assert "its pictures differ" in card.card(frozen)
    assert "its pictures differ" not in card.card(told(finished, {}, {}))


# -- what is private ----------------------------------------------------------------------------------------------


# -- what is refused ----------------------------------------------------------------------------------------------


def test_a_target_that_is_taken(run: Path, tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    assert main([str(run), "--to", str(target)]) == 0, "an empty folder is free"
    before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}
    taken = f"--to {target}: exists and is no empty folder; nothing is overwritten, choose another"
    assert refused(run, "--to", target) == taken
    assert {file: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before
    assert refused(run, "--to", target / "README.md").endswith("nothing is overwritten, choose another")


def test_what_cannot_be_published(run: Path, tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "out/x"
    assert refused(tmp_path, "--to", target) == f"{tmp_path}: no run there (run.json is missing)"
    metrics, text = run / "metrics.jsonl", (run / "metrics.jsonl").read_text()
    last = json.loads(text.splitlines()[-1])
    metrics.write_text(text.splitlines()[0] + "\n")
    assert refused(run, "--to", target, code=1).startswith(f"{metrics}: the evaluation after epoch 1 is missing;")
    metrics.write_text(text.replace(str(last["eval_reward_mean"]), "null"))
    assert "eval_reward_mean after epoch 1 is None" in refused(run, "--to", target, code=1)
    metrics.write_text(text + "{\n")
    assert refused(run, "--to", target, code=1).startswith(f"{metrics}: cannot be read")
    metrics.write_text(text)
    (run / "lora" / lora_file.KOHYA).write_bytes(b"damaged")
    assert refused(run, "--to", target, code=1).startswith(f"{run / 'lora' / lora_file.KOHYA}: cannot be read")
    (run / "lora" / lora_file.KOHYA).unlink()
    assert refused(run, "--to", target).startswith(
        f"{run / 'lora' / lora_file.KOHYA}: is missing; a run writes it at its end"
    )
    description = json.loads((run / "run.json").read_text())
    description["recipe"]["adapter"]["kind"] = "full"
    (run / "run.json").write_text(json.dumps(description))
    assert refused(run, "--to", target).startswith(f"{run}: adapter.kind is full, and only a LoRA")
    description["model"]["pipeline"] = "FluxPipeline"
    (run / "run.json").write_text(json.dumps(description))
    opened = f"{run / 'lora/transformer'}, a folder that diffusers' FluxTransformer2DModel.from_pretrained opens"
    assert refused(run, "--to", target).endswith(opened)
    assert not target.exists()
    assert list(target.parent.iterdir()) == [], "nothing half written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "hub:name"), "--to hub:name: 'name' is no name of a repository; write OWNER/NAME"),
        (("--to", "hub:a/b/c"), "--to hub:a/b/c: 'a/b/c' is no name of a repository"),
        (("--to", "hub:a/b--c"), "--to hub:a/b--c: 'a/b--c' is no name of a repository"),
        (("--to", "hub:me/" + "n" * 97), "is no name of a repository"),
        (("--to", "out", "--base", "/my/folder"), "--base: '/my/folder' is no name of a repository"),
        (("--to", "out", "--public"), "--public: belongs to --to hub:OWNER/NAME; out is a folder"),
    ],
)
def test_wrong_options(options: tuple[str, ...], message: str, finished: Path, refused: Refused) -> None:
    assert message in refused(finished, *options)


def test_a_failure_leaves_nothing(run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise RunError("the pen is dry")

    monkeypatch.setattr(publish, "card", fails)
    assert refused(run, "--to", tmp_path / "out/x", code=1) == "the pen is dry"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").touch()
    assert refused(run, "--to", tmp_path / "file/x").startswith(f"--to {tmp_path / 'file/x'}: cannot be written: ")


# -- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the hub, with someone logged in."""
    with stand_in_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield server


@pytest.mark.parametrize(("options", "visibility"), [((), "private"), (("--public",), "public")])
def test_a_push_uploads_all_files(
    finished: Path, hub: StandInHub, options: tuple[str, ...], visibility: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished), "--to", "hub:someone/name", *options]) == 0
    assert capsys.readouterr().out == f"{hub.url}/someone/name\n"
    (asked,) = hub.created
    assert (asked["organization"], asked["name"], asked["visibility"]) == ("someone", "name", visibility)
    assert hub.tokens == {"Bearer hf_token"}, "creating and committing need it"
    assert set(hub.files) == FILES
    text = hub.files["README.md"].decode()
    assert 'lora = "someone/name"\n' in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "openrail++"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (403, "the hub answered 403; log in with a token that may write there: `hf auth login`"),
        (400, "the hub answered 400; try again later"),
    ],
)
def test_a_hub_that_refuses(status: int, reason: str, finished: Path, hub: StandInHub, refused: Refused) -> None:
    hub.status = status
    assert refused(finished, "--to", "hub:me/x", code=1) == f"--to hub:me/x: not published: {reason}"


def test_a_hub_that_is_not_there(
    finished: Path, hub: StandInHub, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refused(finished, "--to", "hub:me/x", code=1)
    assert line == "--to hub:me/x: not published: the hub cannot be reached (ConnectError); try again"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(finished, "--to", "hub:me/x", code=1).endswith("the hub is switched off by HF_HUB_OFFLINE; unset it")


def test_a_push_without_a_token(finished: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    line = refused(finished, "--to", "hub:me/x")
    assert line == "--to hub:me/x: there is no token of the hub; log in with `hf auth login`, then run this again"


def test_the_command_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(finished), "--to", "out"]) == 0
    assert capfd.readouterr() == ("out\n", "")
    assert (tmp_path / "out/README.md").is_file()
