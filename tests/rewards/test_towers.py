"""Reward networks: equal to the published models (`original_rewards`), their gradients, and what they refuse."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.original_rewards import (
    State,
    clip_image,
    clip_text,
    image_reward,
    linear_head,
    quick_gelu,
    random_head,
    random_image_reward,
)
from helpers.tiny_rewards import clip_state, head_state, image_reward_state, options_of, reward_of, saved
from torch import Tensor
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode

from dag.errors import RunError, UsageError
from dag.rewards import REWARDS
from dag.rewards.pixels import to_bytes

PROMPTS = [
    "a photo of a cat",
    "two dogs",
    "",
    "a cat a cat a cat a cat a cat a cat a cat a cat a cat a cat",
    "cats & dogs",
]
# Float32 against the reference's float64, on scores of about one; the smallest planted mistake moves them 20 times more.
TOLERANCE = 2e-5


@pytest.fixture
def images() -> Tensor:
    """Five smooth pictures with hard edges, wider than high, (5, 3, 40, 52)."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(5, 3, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (40, 52), mode="bilinear")
    smooth[:, :, 10:20, 12:30] = torch.rand(5, 3, 1, 1, generator=generator)
    return smooth


# Each case makes a reward from a file in the original layout, and the reference's score of the same pixels and tokens.
Case = tuple[Any, Callable[[Tensor], Tensor]]


def clip_ids(reward: Any, texts: list[str]) -> Tensor:
    return reward.tower.tokenizer(
        texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    ).input_ids


def aesthetic(folder: Path, **options: Any) -> Case:
    reward = reward_of("aesthetic", **options_of("aesthetic", folder) | options)
    return reward, lambda pixels: linear_head(head_state(), clip_image(clip_state(), pixels, 4, quick_gelu))


def clip_case(name: str, activation: Callable[[Tensor], Tensor], factor: float, folder: Path, **options: Any) -> Case:
    reward = reward_of(name, **options_of(name, folder) | options)
    state = clip_state()
    texts = clip_text(state, clip_ids(reward, PROMPTS), 2, activation)
    return reward, lambda pixels: factor * (clip_image(state, pixels, 4, activation) * texts).sum(-1)


clip_score = partial(clip_case, "clip_score", quick_gelu, 1.0)
pickscore = partial(clip_case, "pickscore", gelu, math.exp(float(clip_state()["logit_scale"])))
hpsv2 = partial(clip_case, "hpsv2", gelu, 1.0)


def blip(folder: Path, **options: Any) -> Case:
    reward = reward_of("image_reward", **options_of("image_reward", folder) | options)
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    inputs = (tokens.input_ids, tokens.attention_mask)
    return reward, lambda pixels: image_reward(image_reward_state(), pixels, *inputs, vision_heads=3, text_heads=2)


CASES: dict[str, Callable[..., Any]] = {
    "aesthetic": aesthetic,
    "clip_score": clip_score,
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "image_reward": blip,
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def preprocessing_of(reward: Any) -> Any:
    return reward.preprocessing if hasattr(reward, "preprocessing") else reward.tower.preprocessing


# -- scores -------------------------------------------------------------------------------------------------------


@every_case
def test_scores_are_the_originals(make: Callable[..., Case], tmp_path: Path, images: Tensor) -> None:
    reward, oracle = make(tmp_path)
    found = reward(images, PROMPTS)
    expected = oracle(preprocessing_of(reward).exact(images))
    assert found.dtype == torch.float32 and found.shape == (5,)
    assert float(expected.std()) > 0.03, "the pictures must differ in score"
    assert float((found - expected).abs().max()) < TOLERANCE * max(1.0, float(expected.abs().max()))


@every_case
def test_a_batch_may_be_cut_anywhere(make: Callable[..., Case], tmp_path: Path, images: Tensor) -> None:
    at_once, _ = make(tmp_path)
    (tmp_path / "other").mkdir()
    cut, _ = make(tmp_path / "other", max_batch=2)
    torch.testing.assert_close(at_once(images, PROMPTS), cut(images, PROMPTS), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="5 images but 2 prompts"):
        at_once(images, PROMPTS[:2])


@every_case
def test_eight_bits_are_scored_without_gradient(make: Callable[..., Case], tmp_path: Path, images: Tensor) -> None:
    reward, _ = make(tmp_path)
    images.requires_grad_()
    plain = reward(images, PROMPTS)
    assert not plain.requires_grad
    rounded = torch.from_numpy(to_bytes(images.detach())).permute(0, 3, 1, 2) / 255
    assert torch.equal(plain, reward(rounded, PROMPTS))


@every_case
def test_gradients_are_those_of_finite_differences(make: Callable[..., Case], tmp_path: Path, images: Tensor) -> None:
    """For the differentiable path in float64, along a random direction; the network itself gets no gradient."""
    reward, _ = make(tmp_path)
    part = reward.tower if hasattr(reward, "tower") else reward
    networks = [part.model] if hasattr(part, "model") else [part.vision, part.text]
    for network in [*networks, *([reward.head] if hasattr(reward, "head") else [])]:
        network.double()
        assert not any(parameter.requires_grad for parameter in network.parameters())
    part.dtype = torch.float64
    x, direction = images.double().clamp(0.02, 0.98), torch.randn(images.shape, dtype=torch.float64)
    score = reward(x.requires_grad_(), PROMPTS, grad=True)
    assert score.dtype == torch.float64
    (gradient,) = torch.autograd.grad(score.sum(), x)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (reward(x + sign * step * direction, PROMPTS, grad=True) for sign in (1, -1))
    expected = float((ahead - behind).sum()) / (2 * step)
    assert abs(expected) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5)


@every_case
def test_both_paths_agree_within_a_grey_level(make: Callable[..., Case], tmp_path: Path, images: Tensor) -> None:
    """Pillow's resize and the tensors' resize give nearly the same score, and the latter has gradients."""
    reward, _ = make(tmp_path)
    exact = reward(images, PROMPTS)
    smooth = reward(images.requires_grad_(), PROMPTS, grad=True)
    smooth.sum().backward()
    assert images.grad is not None and float(images.grad.abs().max()) > 0
    assert float((smooth.detach() - exact).abs().max()) < 0.1 * float(exact.std())


@pytest.mark.parametrize(
    ("name", "fit", "crop_rounding"),
    [
        ("aesthetic", "shortest", "half_even"),
        ("clip_score", "shortest", "half_even"),
        ("image_reward", "shortest", "half_even"),
        ("pickscore", "shortest", "down"),
        ("hpsv2", "longest", None),
    ],
)
def test_pictures_are_cut_as_the_original_cuts_them(
    tmp_path: Path, name: str, fit: str, crop_rounding: str | None
) -> None:
    reward, _ = CASES[name](tmp_path)
    preprocessing = preprocessing_of(reward)
    assert preprocessing.fit == fit
    assert crop_rounding in (None, preprocessing.crop_rounding)


def test_clip_score_variants(tmp_path: Path, images: Tensor) -> None:
    plain, _ = clip_score(tmp_path)
    other, _ = clip_score(tmp_path, scale=2.5, clamp=True)
    cosine = plain(images, PROMPTS)
    assert float(cosine.min()) < 0 < float(cosine.max()), "the clamp must have something to do"
    torch.testing.assert_close(other(images, PROMPTS), 2.5 * cosine.clamp(min=0))
    prefixed, _ = clip_score(tmp_path, prefix="a photo of ")
    bare = [prompt.removeprefix("a photo of ") for prompt in PROMPTS[:1]]
    torch.testing.assert_close(prefixed(images[:1], bare), cosine[:1])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_moves_scores_a_little(tmp_path: Path, images: Tensor, dtype: str) -> None:
    exact, _ = aesthetic(tmp_path)
    rough, _ = aesthetic(tmp_path, dtype=dtype)
    found, expected = rough(images, PROMPTS), exact(images, PROMPTS)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().max()) < 0.2 * float(expected.std())


# -- weights ------------------------------------------------------------------------------------------------------


def test_rewards_that_name_the_same_weights_share_them(tmp_path: Path) -> None:
    first, _ = aesthetic(tmp_path)
    options = options_of("clip_score", tmp_path)
    second, third = reward_of("clip_score", **options), reward_of("clip_score", **options, dtype="bf16")
    assert first.tower is second.tower
    assert first.tower is not third.tower


def test_a_conversion_is_kept_beside_the_file_and_made_anew_when_that_changes(tmp_path: Path, images: Tensor) -> None:
    reward, _ = clip_score(tmp_path)
    folder = tmp_path / "clip.pt.transformers"
    weights = folder / "model/model.safetensors"
    before, made = reward(images, PROMPTS), weights.stat().st_mtime_ns
    del reward
    again, _ = clip_score(tmp_path)
    assert torch.equal(again(images, PROMPTS), before)
    del again
    options = options_of("clip_score", tmp_path)
    saved(clip_state(seed=2), tmp_path / "clip.pt")
    reread = reward_of("clip_score", **options)
    assert not torch.equal(reread(images, PROMPTS), before)
    assert weights.stat().st_mtime_ns > made
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_transformers_folder_and_the_original_file_score_alike(tmp_path: Path, images: Tensor) -> None:
    from_file, _ = hpsv2(tmp_path)
    folder = tmp_path / "hps.pt.transformers/model"
    from_folder = reward_of("hpsv2", path=str(folder), tokenizer="embedded")
    assert torch.equal(from_file(images, PROMPTS), from_folder(images, PROMPTS))


def test_texts_are_encoded_once(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, _ = clip_score(tmp_path)
    calls = []
    encode = reward.tower.model.get_text_features

    def counted(**inputs: Tensor) -> Any:
        calls.append(len(inputs["input_ids"]))
        return encode(**inputs)

    monkeypatch.setattr(reward.tower.model, "get_text_features", counted)
    for _ in range(3):
        reward(images, ["a cat", "a dog", "a cat", "a cat", "a dog"])
    assert calls == [2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("visual.ln_pre.bias"), "missing keys"),
        (lambda state: state.update({"visual.extra": torch.zeros(1)}), "visual.extra is not a key"),
        (lambda state: state.update({"visual.proj": torch.zeros(32, 19)}), "does not fit|cannot load"),
        (lambda state: state.pop("text_projection"), "lacks what becomes text_projection.weight"),
        (lambda state: state.clear(), "holds no dictionary of tensors"),
    ],
)
def test_a_file_with_other_keys_is_refused(tmp_path: Path, spoil: Callable[[State], object], message: str) -> None:
    state = clip_state()
    spoil(state)
    options = options_of("clip_score", tmp_path)
    saved(state, tmp_path / "clip.pt")
    with pytest.raises(RunError, match=message):
        reward_of("clip_score", **options)


def test_an_unknown_key_of_image_reward_is_refused(tmp_path: Path) -> None:
    state = random_image_reward(3, 20) | {"blip.visual_encoder.blocks.0.odd.weight": torch.zeros(1)}
    with pytest.raises(RunError, match=r"blocks\.0\.odd\.weight is not a key of ImageReward\.pt"):
        reward_of("image_reward", path=saved(state, tmp_path / "ImageReward.pt"))


class Payload:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", Payload()], ids=["empty", "text", "code"])
def test_a_file_that_is_no_data_is_refused_unread(
    tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(RunError, match=r"clip_score\.path: .*weights\.pt"):
        reward_of("clip_score", path=str(path))
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "state", [{}, {"layers.0.weight": torch.zeros(3, 20)}, random_head(7, 19), random_head(7, 20, "x.")]
)
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, state: State) -> None:
    options = options_of("aesthetic", tmp_path)
    saved(state, tmp_path / "head.pth")
    with pytest.raises(RunError, match=r"aesthetic\.head"):
        reward_of("aesthetic", **options)


@pytest.mark.parametrize("name", CASES)
def test_published_weights_out_of_reach_say_how_to_give_a_local_path(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RunError, match=rf"^{name}\.path: .* or give a local file or folder as {name}\.path$"):
        reward_of(name)
    with pytest.raises(UsageError, match=rf"^{name}\.path: there is no file or folder \./nope"):
        reward_of(name, path="./nope")


def test_the_cases_are_all_the_towers() -> None:
    from dag.rewards.tower import TowerReward

    towers = {name for name, entry in REWARDS.items() if isinstance(entry, type) and issubclass(entry, TowerReward)}
    assert towers == {*CASES, "image_text"}


@every_case
def test_previews_are_scored_without_a_look_at_the_device(
    make: Callable[..., Case], tmp_path: Path, images: Tensor
) -> None:
    """After the first call, which reads the prompts, nothing is copied from the device: a copy would wait for a GPU."""
    reward = make(tmp_path)[0]
    looks = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                looks.append(func)
            return func(*args, **(kwargs or {}))

    reward(images, PROMPTS, is_preview=True)
    with Looks():
        reward(images, PROMPTS, is_preview=True)
    assert looks == []
