"""Stable Diffusion XL: its conditions, and that plain diffusers draws the same pictures with it and with its LoRA."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dag_kernels import standard_normal
from helpers.building import disturb, one_pass, parts_of, rolled_out, trained, trainer_of, updated
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import Tensor

from dag.chain.rollout import generate
from dag.chain.schedule import INITIAL_NOISE
from dag.costs.forecast import forecast
from dag.costs.weightless import Weightless
from dag.errors import RunError
from dag.evaluation.publish import to_folder
from dag.models import families
from dag.models.sdxl import StableDiffusionXL
from dag.recipe import Recipe
from dag.recipe.load import load, parse
from dag.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
PROMPTS = ["a cat", "a dog on a red background"]


@pytest.fixture(scope="module")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline folder: 8x8x4 latents, 16-pixel pictures, random weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from dag.assets.build.tokenizer import build

    folder = tmp_path_factory.mktemp("tiny_xl")
    tokenizer = build(["a cat and a dog on a red background"], folder / "tokenizer")
    torch.manual_seed(1)
    first, second = (
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, projection_dim=12,
        )
        for width in (16, 24)
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, transformer_layers_per_block=(1, 2), use_linear_projection=True, mid_block_type=None,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.13025,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(first), text_encoder_2=CLIPTextModelWithProjection(second), unet=unet,
        tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def make_xl(make_recipe: MakeRecipe, tiny_xl: Path) -> MakeRecipe:
    def make(**sections: Any) -> Recipe:
        return make_recipe(**{**sections, "model": {"path": str(tiny_xl), **sections.get("model", {})}})

    return make


@torch.no_grad()
def plain_pictures(folder: Path, recipe: Recipe, ids: list[int], weights: Path | None = None, name: str = "") -> Tensor:
    """Pictures of the prompts by diffusers' own pipeline, text encoders, UNet, scheduler and VAE; only the noise is ours."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    if weights is not None:
        pipeline.load_lora_weights(weights, weight_name=name)
    scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    scheduler.set_timesteps(recipe.sampler.steps)
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    size = (16, 16)
    sizes = pipeline._get_add_time_ids(size, (0, 0), size, text.dtype, 12).expand(2, -1)
    x_t = standard_normal(recipe.seed, torch.tensor(ids), INITIAL_NOISE, (4, 8, 8))
    for k, t in enumerate(scheduler.timesteps):
        with_text, without = (
            pipeline.unet(
                x_t, t, encoder_hidden_states=rows, added_cond_kwargs={"text_embeds": one, "time_ids": sizes}
            ).sample
            for rows, one in ((text, pooled), (empty, empty_pooled))
        )
        output = without + recipe.sampler.guidance_scale * (with_text - without)
        noise = standard_normal(recipe.seed, torch.tensor(ids), k, (4, 8, 8))
        x_t = scheduler.step(output, t, x_t, eta=recipe.sampler.eta, variance_noise=noise).prev_sample
    images = pipeline.vae.decode(x_t / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("eta", "adapter"), [(1.0, {}), (1e-6, {"text_encoder": {"rank": 2, "alpha": 3.0}})])
def test_plain_diffusers_draws_the_same_pictures_with_and_without_the_lora(
    make_xl: MakeRecipe, tiny_xl: Path, tmp_path: Path, eta: float, adapter: dict[str, Any]
) -> None:
    recipe = make_xl(sampler={"steps": 4, "guidance_scale": 3.0, "eta": eta}, adapter=adapter)
    parts = parts_of(recipe)
    assert isinstance(parts.policy, StableDiffusionXL)
    text = parts.policy.encode(PROMPTS)
    before = generate(parts.policy, text, [0, 1], recipe.seed, recipe.sampler)
    torch.testing.assert_close(before, plain_pictures(tiny_xl, recipe, [0, 1]), rtol=0, atol=2e-4)
    disturb(parts)
    after = generate(parts.policy, text, [0, 1], recipe.seed, recipe.sampler)
    assert float((after - before).abs().max()) > 0.01
    parts.policy.export(tmp_path)
    for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        plain = plain_pictures(tiny_xl, recipe, [0, 1], tmp_path, name)
        torch.testing.assert_close(after, plain, rtol=0, atol=2e-4)
    # ComfyUI tells the encoders apart by their numbers; diffusers takes the first one's name without a number too.
    components = {"_".join(name.split("_")[:2]) for name in load_file(tmp_path / "lora_kohya.safetensors")}
    assert components == {"lora_unet", *(("lora_te1", "lora_te2") if adapter else ())}


def test_a_published_lora_draws_by_the_code_of_its_card(
    make_xl: MakeRecipe, tiny_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_xl(train={"epochs": 1, "learning_rate": 0.1})
    run = trained(recipe, RunFolder.create(tmp_path / "run"))
    run.write_description({"recipe": recipe.model_dump(mode="json")})
    to_folder(run, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    text = Path("README.md").read_text()
    assert "- stable-diffusion-xl\n" in text
    code = (
        text.partition("```python\n")[2]
        .partition("\n```")[0]
        .replace(f'base = "{tiny_xl.name}"', f"base = {str(tiny_xl)!r}")
    )
    assert "import DDIMScheduler, StableDiffusionXLPipeline\n" in code
    drawn = []
    for program in (code, code.replace("\npipe.load_lora_weights", "\n# pipe.load_lora_weights")):
        torch.manual_seed(5)
        exec(program, {})
        drawn.append(Image.open("picture.png").copy())
    assert ImageChops.difference(*drawn).getbbox() is not None, "the LoRA must change the picture"


def test_every_condition_reaches_the_prediction(make_xl: MakeRecipe) -> None:
    policy = parts_of(make_xl()).policy
    text = policy.encode(["a cat"])
    x = torch.randn(1, *policy.latent_shape)

    def predicted(text: Tensor) -> Tensor:
        with torch.no_grad():
            return policy.predict(x, torch.tensor([500]), text).conditional

    plain, (tokens, width) = predicted(text), policy.text_shape
    assert text.shape == (1, tokens, width) == (1, 25, 40)
    assert text[0, -1, 12:].abs().max() == 0
    for row, column in ((0, 0), (23, 39), (24, 0), (24, 11)):
        changed = text.clone()
        changed[0, row, column] += 1
        assert not torch.equal(predicted(changed), plain)
    unused = text.clone()
    unused[0, 24, 12:] = 5.0
    assert torch.equal(predicted(unused), plain)


def test_the_empty_prompt_is_zeros_where_the_model_says_so(tiny_xl: Path, make_xl: MakeRecipe, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_xl, tmp_path / "model"))
    index = copy / "model_index.json"
    for says_so, is_zero in ((True, True), (False, False)):
        index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": says_so}))
        policy: Any = parts_of(make_xl(model={"path": str(copy)})).policy
        policy.encode(["a cat"])
        assert bool((policy.text.empty == 0).all()) is is_zero


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_trains_stored_and_in_one_pass(make_xl: MakeRecipe, tmp_path: Path, dtype: str) -> None:
    trainer, trajectories = rolled_out(make_xl(model={"dtype": dtype}), RunFolder.create(tmp_path / "stored"))
    before = [weight.clone() for weight in trainer.components.policy.trainable()]
    assert updated(trainer, trajectories)["ratio_max_dev"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.components.policy.trainable(), strict=True))
    recipe = make_xl(model={"dtype": dtype}, train={"rollout": "one_pass", "updates": 1})
    in_one = trainer_of(recipe, RunFolder.create(tmp_path / "one"))
    found, _ = one_pass(in_one)
    assert torch.equal(found.log_pf, trajectories.log_pf)
    assert torch.equal(found.reward, trajectories.reward)


def test_both_encoders_are_freed_and_fingerprinted(make_xl: MakeRecipe) -> None:
    parts = parts_of(make_xl())
    assert {"unet", "vae", "text encoder", "second text encoder"} <= parts.fingerprint.keys()
    assert parts.policy.base_weights().keys() == {"unet", "vae"}


def test_a_refiner_and_a_mislabelled_folder_are_refused(tiny_xl: Path, make_xl: MakeRecipe, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_xl, tmp_path / "model"))
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(RunError, match="has no text_encoder: an SDXL base model is needed, not a refiner"):
        parts_of(make_xl(model={"path": str(copy)}))
    copy = Path(shutil.copytree(tiny_xl, tmp_path / "other"))
    (copy / "model_index.json").unlink()
    with pytest.raises(RunError, match="has a second text encoder but model_index"):
        parts_of(make_xl(model={"path": str(copy)}))


def test_the_published_architecture_is_planned_without_weights() -> None:
    """2,567,463,684 is the parameter count of the published UNet."""
    recipe = load(ROOT / "recipes/sdxl_24gb.yaml")
    made = Weightless(recipe)
    assert made.counted_as == "random-sdxl"
    assert sum(p.numel() for name, p in made.policy.denoiser.named_parameters() if "lora_" not in name) == 2_567_463_684
    assert made.policy.text_shape == (78, 2048)
    assert forecast(recipe).peak < 21 * 2**30


def test_in_half_precision_the_vae_is_in_bfloat16() -> None:
    data = {
        "model": {"path": "random-sdxl", "dtype": "fp16"},
        "prompts": {"texts": ["a cat"]},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "ddpo"},
    }
    policy = families.load(parse(data, "test"), torch.device("meta"))
    assert {weight.dtype for weight in policy.decoder.vae.parameters()} == {torch.bfloat16}
