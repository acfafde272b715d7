"""The model, scorer and judge that ship with the package."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import disturb, parts_of
from helpers.tiny_rewards import reward_of
from safetensors.torch import load_file
from torch import Tensor

from dag.chain.rollout import generate
from dag.evaluation import judge
from dag.models.weights import load_text_encoder
from dag.recipe import Recipe
from dag.recipe.load import parse
from dag.recipe.prompt_sets import with_article

ASSETS = Path(judge.__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def embedded() -> Recipe:
    data = {
        "model": {"path": "embedded"},
        "sampler": {"steps": 10, "guidance_scale": 3.0, "tile": 45},
        "prompts": {"set": "simple_animals"},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "ddpo"},
    }
    return parse(data, "embedded")


def test_everything_shipped_fits_twenty_megabytes() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6


def test_plain_diffusers_draws_with_it_and_a_lora_as_the_readme_says(embedded: Recipe, tmp_path: Path) -> None:
    """The README passes no dtype: the files are fp16, and all parts must load in one dtype that a CPU can compute in."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "embedded")
    plain = _drawn(pipe)
    parts = parts_of(embedded)
    disturb(parts)
    parts.policy.export(tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert plain.shape == (1, 64, 64, 3)
    assert abs(_drawn(pipe) - plain).max() > 0.01


def _drawn(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, output_type="np", generator=generator).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_loader_reads_the_files_as_they_are(dtype: torch.dtype) -> None:
    """The dtype that the shipped configs name does not matter to this project's loader."""
    stored = load_file(ASSETS / "embedded/text_encoder/model.safetensors")
    read = load_text_encoder(ASSETS / "embedded", dtype, torch.device("cpu")).state_dict()
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {value.dtype for value in read.values()} == {dtype}
    names = {name: name if name in read else name.removeprefix("text_model.") for name in stored}
    assert all(torch.equal(read[names[name]], value.to(dtype)) for name, value in stored.items())


def test_the_build_writes_what_ships(tmp_path: Path) -> None:
    """`save` of `dag.assets.build` writes the shipped weights and configs again from the loaded modules."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from dag.assets.build import denoiser

    shipped, built = ASSETS / "embedded", tmp_path / "out/embedded"
    for part in ("vae", "tokenizer"):
        shutil.copytree(shipped / part, tmp_path / "work" / part)
    unet = UNet2DConditionModel.from_pretrained(shipped, subfolder="unet")
    text = CLIPTextModel.from_pretrained(shipped / "text_encoder", dtype=torch.float32)
    denoiser.save(tmp_path / "work", tmp_path / "out", unet, text)
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (shipped / part).glob("*.safetensors")
        assert weights.read_bytes() == (built / part / weights.name).read_bytes()
        old, new = (json.loads((folder / part / "config.json").read_text()) for folder in (shipped, built))
        assert {key: old[key] for key in old if "version" not in key} == {
            key: new[key] for key in new if "version" not in key
        }


def test_old_and_new_tokenizer_files_agree() -> None:
    from transformers import CLIPTokenizer

    folder = ASSETS / "embedded/tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert (folder / "vocab.json").is_file()
    assert (folder / "merges.txt").is_file()
    caption = "three red hearts to the left of a glossy hedgehog on a checkered blue background"
    assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


@pytest.fixture(scope="module")
def pictures(embedded: Recipe) -> tuple[Tensor, tuple[str, ...]]:
    """(a picture of each of the recipe's prompts, the prompts)."""
    parts = parts_of(embedded)
    return generate(parts.policy, parts.text, list(range(45)), 0, embedded.sampler), parts.prompts


@pytest.mark.slow
def test_pictures_show_what_was_asked_for(pictures: tuple[Tensor, tuple[str, ...]]) -> None:
    """By chance 1 in 69 would be right; the model card has the measured shares."""
    top1, top5 = judge.noun_accuracy(judge.load_judge(), *pictures)
    assert top1 > 0.3
    assert top5 > 0.5


@pytest.mark.slow
def test_the_scorer_prefers_the_right_prompt(pictures: tuple[Tensor, tuple[str, ...]]) -> None:
    """Pictures of the embedded model mostly score higher with their own prompt than with another animal's."""
    images, prompts = pictures[0], list(pictures[1])
    reward = reward_of("image_text")
    right, wrong = reward(images, prompts), reward(images, prompts[7:] + prompts[:7])
    assert float((right > wrong).float().mean()) > 0.75


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", ("cat", None, 1, None)),
        ("an ant", ("ant", None, 1, None)),
        ("three red hearts on a striped blue background", ("heart", "red", 3, "blue")),
        ("two geese", ("goose", None, 2, None)),
        ("a glossy mouse on a plain background", ("mouse", None, 1, None)),
        ("a cat and a dog", None),
        ("a xylophone", None),
    ],
)
def test_the_caption_language_is_understood(prompt: str, expected: tuple[object, ...] | None) -> None:
    found = judge.expected(prompt)
    assert (None if found is None else (found.name, found.colour, found.count, found.background)) == expected


def test_the_judge_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="a xylophone"):
        judge.noun_accuracy(judge.load_judge(), torch.zeros(1, 3, 64, 64), ["a xylophone"])


def test_every_noun_has_an_unambiguous_plural() -> None:
    names = (*judge.NOUNS, *judge.SHAPES)
    for name in names:
        for count, number in judge.COUNTS.items():
            found = judge.expected(f"{number} {judge.plural(name)}")
            assert found is not None
            assert (found.name, found.count) == (name, count)
        alone = judge.expected(with_article(name))
        assert alone is not None
        assert alone.name == name
