"""Loading models: every failure is one clear sentence, and adapters reach the layers that they name."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from helpers.building import CPU, parts_of
from huggingface_hub import errors

from dag.chain.policy import Policy
from dag.errors import RunError, UsageError
from dag.models import families
from dag.models.sd import StableDiffusion
from dag.recipe import Recipe
from dag.recipe.load import parse

MakeRecipe = Callable[..., Recipe]
REST: dict[str, object] = {
    "prompts": {"texts": ["a cat"]},
    "reward": {"name": "colourfulness"},
    "objective": {"name": "ddpo"},
}


def load(path: Path | str, model: dict[str, object] | None = None, **adapter: object) -> Policy:
    """Load the policy of a recipe with this model folder, by `families.load`."""
    sections = {"model": {"path": str(path), **(model or {})}, "adapter": adapter, "sampler": {"steps": 4}}
    return families.load(parse({**sections, **REST}, "test"), CPU)


@pytest.fixture
def copy_of_model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folder() -> None:
    with pytest.raises(UsageError, match=r"model\.path: there is no folder \./nowhere"):
        load("./nowhere")


def test_single_file_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(UsageError, match="is a file"):
        load(tmp_path / "model.ckpt")


def test_hub_out_of_reach_says_how_to_give_a_local_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"cannot be reached.*--set model\.path=") as caught:
        load("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def answered(status: int) -> Exception:
    """The error of the hub's library for an answer that it has no class for."""
    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    return error


def wrapped(error: Exception) -> Exception:
    """As the library reports an error where it finds nothing in its cache."""
    outer = errors.LocalEntryNotFoundError("not found")
    outer.__cause__ = error
    return outer


def bare(name: str) -> Exception:
    kind = getattr(errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (bare("GatedRepoError"), "owner/name is gated: accept its terms on its page and log in"),
        (bare("RepositoryNotFoundError"), "does not exist"),
        (bare("RevisionNotFoundError"), "no revision"),
        (bare("LocalEntryNotFoundError"), "the hub cannot be reached: connect once"),
        (wrapped(bare("GatedRepoError")), "is gated"),
        (answered(401), r"is refused by the hub \(401\): accept its terms"),
        (wrapped(answered(403)), r"is refused by the hub \(403\).*hf auth login"),
        (answered(503), "the hub answered 503: try again later"),
        (OSError(errno.ENOSPC, "No space left on device"), "does not fit on the disk of the cache, .*set HF_HOME"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "does not fit on the disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written to the cache, .*permissions"),
        (ConnectionError("refused"), "the hub cannot be reached"),
        (ValueError("what"), r"could not be downloaded \(ValueError\): try again"),
    ],
    ids=str,
)
def test_what_the_hub_or_its_cache_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(RunError, match=expected) as caught:
        load("owner/name")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("--set model.path=/path/to/model")


@pytest.mark.parametrize("component", ["unet", "vae", "scheduler"])
def test_missing_component(copy_of_model: Path, component: str) -> None:
    shutil.rmtree(copy_of_model / component)
    with pytest.raises(RunError, match=f"has no {component}/"):
        load(copy_of_model)


@pytest.mark.parametrize("component", ["text_encoder", "tokenizer"])
def test_missing_text_component(copy_of_model: Path, component: str) -> None:
    shutil.rmtree(copy_of_model / component)
    with pytest.raises(RunError, match=f"has no {component}"):
        load(copy_of_model).encode(["a cat"])


def test_transformer_models_are_named(copy_of_model: Path) -> None:
    (copy_of_model / "unet").rename(copy_of_model / "transformer")
    with pytest.raises(RunError, match="names no pipeline with a transformer that is known"):
        load(copy_of_model)


def test_inpainting_models_are_refused(copy_of_model: Path) -> None:
    edit(copy_of_model / "unet/config.json", in_channels=9)
    with pytest.raises(RunError, match="inpainting"):
        load(copy_of_model)


def test_corrupt_weights_are_named(copy_of_model: Path) -> None:
    (copy_of_model / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(RunError, match="cannot load unet") as caught:
        load(copy_of_model)
    assert "\n" not in str(caught.value)


def test_unknown_prediction_type(copy_of_model: Path) -> None:
    edit(copy_of_model / "scheduler/scheduler_config.json", prediction_type="flow")
    with pytest.raises(RunError, match="known: epsilon, v_prediction, sample"):
        load(copy_of_model)


def test_the_pipeline_that_a_folder_names_decides_the_family(
    copy_of_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(StableDiffusion):
        pass

    monkeypatch.setitem(families.FAMILIES, "MinePipeline", Mine)
    assert type(load(copy_of_model)) is StableDiffusion
    edit(copy_of_model / "model_index.json", _class_name="MinePipeline")
    assert type(load(copy_of_model)) is Mine
    (copy_of_model / "model_index.json").unlink()
    assert type(load(copy_of_model)) is StableDiffusion


def test_each_lora_target_must_match(tiny_model: Path) -> None:
    """peft ignores a misspelt target if another one matches, and would silently train less than the recipe says."""
    with pytest.raises(UsageError, match=r"adapter\.targets: 'to_kk' matches no layer.*to_k"):
        load(tiny_model, targets=("to_q", "to_kk"))


def test_lora_freezes_the_rest_and_full_trains_everything(tiny_model: Path) -> None:
    lora, full = load(tiny_model), load(tiny_model, kind="full")
    assert all("lora" in name for name, p in lora.denoiser.named_parameters() if p.requires_grad)
    assert all(p.requires_grad for p in full.denoiser.parameters())
    assert not any(p.requires_grad for p in lora.decoder.vae.parameters())


def test_trainable_weights_stay_fp32_under_mixed_precision(tiny_model: Path) -> None:
    lora = load(tiny_model, {"dtype": "bf16"})
    assert {p.dtype for p in lora.trainable()} == {torch.float32}
    assert {p.dtype for p in lora.denoiser.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_fp16_on_a_cpu_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        load(tiny_model, {"dtype": "fp16"})


def test_prompts_that_do_not_fit_are_reported(tiny_model: Path) -> None:
    warnings = load(tiny_model).prompt_warnings(["a cat", "a zyzzyva", " ".join(["cat"] * 40)])
    assert len(warnings) == 2
    assert "'zyzzyva'" in warnings[0]
    assert "22 tokens" in warnings[1]


def test_embeddings_match_the_pipeline(tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    expected, empty = pipeline.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
    policy = cast(StableDiffusion, load(tiny_model))
    torch.testing.assert_close(policy.encode(["a cat", "a dog"]), expected)
    assert policy.text.empty is not None
    torch.testing.assert_close(policy.text.empty, empty[:1])


def test_the_same_seed_gives_the_same_adapter(make_recipe: MakeRecipe) -> None:
    one, two = parts_of(make_recipe()), parts_of(make_recipe())
    assert all(torch.equal(a, b) for a, b in zip(one.policy.trainable(), two.policy.trainable(), strict=True))


def test_weights_of_another_adapter_are_refused(tiny_model: Path) -> None:
    with pytest.raises(RunError, match="do not fit"):
        load(tiny_model, rank=4).load_state_dict(load(tiny_model, rank=2).state_dict())


def test_resolution_must_suit_the_vae(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 2"):
        load(tiny_model, {"resolution": 15})
