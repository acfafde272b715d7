"""Rewards: the contract that all registered rewards keep, and the definition of each."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_rewards import options_of, reward_of
from PIL import Image

from dag.errors import RunError, UsageError
from dag.recipe.load import parse_reward
from dag.rewards import REWARDS, RewardSum, checked, reward_sum

PROMPTS = ["a cat", "a dog", "a red star"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


# Rewards over HTTP are in test_http.py.
@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"http"}))
def test_every_reward_keeps_the_contract(name: str, images: torch.Tensor, tmp_path: Path) -> None:
    """Values are (B,) finite float32, equal when repeated and for single images, and the images are not changed."""
    options = options_of(name, tmp_path)
    if name == "custom":
        (tmp_path / "brightness.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
        options = {"path": f"{tmp_path / 'brightness.py'}:score"}
    reward, before = reward_of(name, **options), images.clone()
    values = checked(name, reward, images, PROMPTS)
    assert values.shape == (3,)
    assert values.dtype == torch.float32
    assert torch.equal(images, before)
    assert torch.equal(values, checked(name, reward, images, PROMPTS))
    alone = torch.cat([checked(name, reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(values, alone, rtol=1e-5, atol=1e-5)


def test_unknown_rewards_list_the_known() -> None:
    with pytest.raises(ValueError, match="known: aesthetic"):
        REWARDS["beauty"]


def test_jpeg_size_is_pillows_at_quality_95(images: torch.Tensor) -> None:
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert reward_of("incompressibility")(images, PROMPTS).tolist() == pytest.approx(sizes)
    assert reward_of("compressibility")(images, PROMPTS).tolist() == pytest.approx([-size for size in sizes])


def test_flat_pictures_compress_better_than_noise(images: torch.Tensor) -> None:
    flat = torch.full_like(images, 0.5)
    reward = reward_of("compressibility")
    assert bool((reward(flat, PROMPTS) > reward(images, PROMPTS)).all())


def test_colourfulness_by_its_definition(images: torch.Tensor) -> None:
    pixels = images.numpy().astype(np.float64) * 255
    red, green, blue = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread = np.sqrt(rg.var((1, 2)) + yb.var((1, 2)))
    offset = np.sqrt(rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2)
    found = reward_of("colourfulness")(images, PROMPTS)
    torch.testing.assert_close(found.double(), torch.from_numpy((spread + 0.3 * offset) / 10), rtol=1e-5, atol=1e-5)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert float(reward_of("colourfulness")(grey, PROMPTS).abs().max()) < 1e-4


def test_image_text_is_the_clip_models_own_cosine(images: torch.Tensor) -> None:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip import CLIPImageProcessorPil

    from dag.rewards.clip import EMBEDDED

    model = CLIPModel.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(EMBEDDED)(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(EMBEDDED)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    expected = 100 * output.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(reward_of("image_text")(images, PROMPTS), expected.detach(), rtol=1e-4, atol=1e-3)


def test_image_text_names_a_missing_folder() -> None:
    with pytest.raises(UsageError, match=r"there is no file or folder \./nope"):
        reward_of("image_text", path="./nope")


@pytest.mark.parametrize(
    ("source", "message"),
    [("def other(): pass", "has no function 'score'; it has: other"), ("import nonexistent_thing", "cannot import")],
)
def test_custom_reward_errors(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UsageError, match=message):
        reward_of("custom", path=f"{tmp_path / 'mine.py'}:score")


def test_broken_results_name_reward_sample_and_prompt(images: torch.Tensor) -> None:
    def broken(pictures: torch.Tensor, prompts: object) -> torch.Tensor:
        return torch.tensor([0.0, float("inf"), 0.0])

    with pytest.raises(RunError, match=r"reward mine returned inf for sample 8, prompt 'a dog'"):
        checked("mine", broken, images, PROMPTS, [7, 8, 9])  # type: ignore[arg-type]


def test_repeated_rewards_are_summed_apart(tmp_path: Path, images: torch.Tensor) -> None:
    from dag.recipe.reward_sections import Colourfulness, Compressibility

    terms: list[Any] = [
        Colourfulness(name="colourfulness", weight=2.0),
        Compressibility(name="compressibility"),
        Colourfulness(name="colourfulness", weight=-1.5),
    ]
    total, parts = RewardSum(terms, torch.device("cpu")).detailed(images, PROMPTS)
    assert list(parts) == ["colourfulness", "compressibility", "colourfulness#2"]
    torch.testing.assert_close(total, 0.5 * parts["colourfulness"] + parts["compressibility"])


def answer(*values: float) -> Any:
    return reward_sum._Answer("mine", torch.tensor(values), ["a cat"] * len(values), list(range(7, 7 + len(values))))


def test_what_waited_on_the_device_is_checked_with_the_final_picture() -> None:
    reward = RewardSum([parse_reward("colourfulness", [])], torch.device("cpu"))
    images = torch.rand(1, 3, 16, 16)
    reward._unchecked = [answer(1.0, 2.0), answer(3.0, float("nan")), answer(float("inf"))]
    reward.total(images, ["a cat"], [1], is_preview=True)
    with pytest.raises(RunError, match="reward mine returned nan for sample 8, prompt 'a cat'"):
        reward.total(images, ["a cat"], [1])
    assert reward._unchecked == []
    reward.total(images, ["a cat"], [1])


def test_previews_that_nobody_ends_are_checked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_sum, "_MOST_UNCHECKED", 2)
    reward = RewardSum([parse_reward("colourfulness", [])], torch.device("cpu"))
    reward._unchecked = [answer(1.0), answer(float("nan"))]
    with pytest.raises(RunError, match="returned nan"):
        reward.total(torch.rand(1, 3, 16, 16), ["a cat"], is_preview=True)


def test_previews_are_read_on_their_device_and_final_pictures_exactly() -> None:
    reward = RewardSum([parse_reward("image_text", [])], torch.device("cpu"))
    # The values are between two grey levels, which those of a saved picture never are.
    images = (torch.rand(2, 3, 64, 64) * 255).floor() / 255 + 0.4 / 255
    preview, final, rounded = (
        reward.total(pixels, ["a cat"] * 2, is_preview=is_preview)
        for pixels, is_preview in ((images, True), (images, False), ((images * 255).round() / 255, False))
    )
    assert torch.equal(final, rounded)
    assert not torch.equal(preview, final)
    torch.testing.assert_close(preview, final, rtol=0.05, atol=0.5)


def test_tf32_is_set_for_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []
    for dtype, is_preview in (("fp32", False), ("fp32", True), ("tf32", False)):
        reward = reward_of("image_text", dtype=dtype)
        original = reward.score

        def score(*given: Any, original: Any = original, **options: Any) -> Any:
            seen.append(torch.get_float32_matmul_precision())
            return original(*given, **options)

        monkeypatch.setattr(reward, "score", score)
        reward(torch.rand(1, 3, 64, 64), ["a cat"], is_preview=is_preview)
        seen.append(torch.get_float32_matmul_precision())
    assert seen == ["highest", "highest", "high", "highest", "high", "highest"]
