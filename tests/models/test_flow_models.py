"""Flow-matching models (SD 3.x, FLUX.1, the embedded one): plain diffusers draws the same pictures with them and their LoRAs."""

import json
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dag_kernels import standard_normal
from helpers.building import (
    disturb,
    one_pass,
    parts_of,
    rolled_out,
    rows,
    trained,
    trained_in_pieces,
    trainer_of,
    updated,
)
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dag.chain.rollout import generate
from dag.chain.schedule import INITIAL_NOISE
from dag.costs.flops import of_recipe
from dag.costs.memory import Simulation
from dag.errors import RunError, UsageError
from dag.evaluation.plain_diffusers import Family, Place, program
from dag.evaluation.publish import to_folder
from dag.models import families
from dag.models.families import FAMILIES
from dag.models.flux import Flux
from dag.models.levers import compile_network
from dag.models.sd3 import StableDiffusion3
from dag.models.source import counted_as, licence
from dag.recipe import Recipe
from dag.recipe.load import load, parse
from dag.run.folder import RunFolder
from dag.training.plan import irreversible

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
PROMPTS = ["a cat", "a dog on a red background"]
ODE = 1e-6  # as eta: a plain pipeline takes Euler's steps


def _encoders(tokenizer: Any) -> tuple[Any, Any, Any]:
    """Two CLIP encoders of widths 16 and 24, and a T5 of width 40, all with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, projection_dim=projected,
            )
        )
        for width, projected in ((16, 12), (24, 20))
    ]  # fmt: skip
    t5 = T5Config(vocab_size=40, d_model=40, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return clips[0], clips[1], T5EncoderModel(t5)


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def _vae(scaling: float, shift: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=scaling, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny_flows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an SD3, a FLUX.1-dev and a FLUX.1-schnell: 8x8x4 latents, 16-pixel pictures, random weights."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModel

    from dag.assets.build.tokenizer import build

    folder = tmp_path_factory.mktemp("flows")
    tokenizer, pieces = build(["a cat and a dog on a red background"], folder / "tokenizer"), _t5_tokenizer()
    torch.manual_seed(1)
    first, second, t5 = _encoders(tokenizer)
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=sd3, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(1.5, 0.06),
        text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=pieces,
    ).save_pretrained(folder / "sd3")  # fmt: skip
    for name, has_guidance in (("dev", True), ("schnell", False)):
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=40, pooled_projection_dim=16, guidance_embeds=has_guidance, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        with torch.no_grad():
            # diffusers initialises it to zero, and with it all velocities.
            transformer.proj_out.weight.normal_(std=0.1)
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=has_guidance, base_shift=0.5, max_shift=1.15, shift=1.0
        )
        FluxPipeline(
            scheduler=scheduler, vae=_vae(0.36, 0.11), text_encoder=CLIPTextModel(first.config), tokenizer=tokenizer,
            text_encoder_2=t5, tokenizer_2=pieces, transformer=transformer,
        ).save_pretrained(folder / name)  # fmt: skip
    return {name: folder / name for name in ("sd3", "dev", "schnell")}


@pytest.fixture
def make_flow(make_recipe: MakeRecipe, tiny_flows: dict[str, Path]) -> Callable[..., Recipe]:
    """A small recipe on one of the folders; Stable Diffusion 3 with guidance, FLUX without."""

    def make(name: str, **sections: Any) -> Recipe:
        model = {"path": str(tiny_flows[name]), "resolution": 16, "max_tokens": 12, **sections.pop("model", {})}
        sampler = {"guidance_scale": 3.0 if name == "sd3" else 1.0, **sections.pop("sampler", {})}
        return make_recipe(model=model, sampler=sampler, **sections)

    return make


@torch.no_grad()
def plain_pictures(
    recipe: Recipe, ids: list[int], weights: Path | None = None, name: str = "", **parts: None
) -> Tensor:
    """Pictures of the prompts by the model's own pipeline of diffusers, from our first noise, without noise in its steps."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(recipe.model.path, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if weights is not None:
        pipeline.load_lora_weights(weights, weight_name=name)
    noise, steps = standard_normal(recipe.seed, torch.tensor(ids), INITIAL_NOISE, (4, 8, 8)), recipe.sampler.steps
    if type(pipeline).__name__ == "FluxPipeline":
        noise = functional.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)
        guidance = recipe.sampler.guidance_embedding or 3.5
    else:
        guidance = recipe.sampler.guidance_scale
    return pipeline(
        PROMPTS, height=16, width=16, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="pt",
        sigmas=list(np.linspace(1, 1 / steps, steps)), max_sequence_length=12,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["sd3", "dev", "schnell"])
def test_plain_diffusers_draws_the_same_pictures_with_and_without_the_lora(
    make_flow: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    sampler = {"eta": ODE} | ({"guidance_embedding": 2.0} if name == "dev" else {})
    recipe = make_flow(name, sampler=sampler, adapter={"rank": 2, "alpha": 4.0})
    parts = parts_of(recipe)
    assert isinstance(parts.policy, StableDiffusion3 if name == "sd3" else Flux)
    text = parts.policy.encode(PROMPTS)
    before = generate(parts.policy, text, [0, 1], recipe.seed, recipe.sampler)
    torch.testing.assert_close(before, plain_pictures(recipe, [0, 1]), rtol=0, atol=2e-4)
    disturb(parts, 0.3)
    after = generate(parts.policy, text, [0, 1], recipe.seed, recipe.sampler)
    assert float((after - before).abs().max()) > 0.01
    parts.policy.export(tmp_path)
    for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        plain = plain_pictures(recipe, [0, 1], tmp_path, file)
        torch.testing.assert_close(after, plain, rtol=0, atol=2e-4, msg=file)


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("sd3", {"model": {"max_tokens": 12}}),
        ("sd3", {"adapter": {"kind": "full"}}),
        ("dev", {"sampler": {"shift": 2.0}}),
        ("schnell", {"sampler": {"guidance_scale": 2.0}}),
        ("embedded_flow", {}),
    ],
)
def test_the_program_of_card_and_page_draws_as_the_run_without_noise(
    make_flow: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    sections: dict[str, Any],
) -> None:
    given = {"steps": 4, "eta": ODE, **sections.get("sampler", {})}
    if name == "embedded_flow":
        recipe = parse_flow(sampler={"guidance_scale": 1.0, **given})
    else:
        recipe = make_flow(name, **{"model": {"max_tokens": None}, **sections, "sampler": given})
    parts = parts_of(recipe)
    text = parts.policy.encode(PROMPTS[:1])
    disturb(parts, 0.1)
    (expected,) = generate(parts.policy, text, [0], recipe.seed, recipe.sampler)
    parts.policy.export(tmp_path / "lora")
    noise = standard_normal(recipe.seed, torch.tensor([0]), INITIAL_NOISE, parts.policy.latent_shape)
    if name in ("dev", "schnell"):
        noise = functional.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)
    family = Family.of(parts.policy.describe(), recipe.model.path)
    places = Place(recipe.model.path), Place(str(tmp_path / "lora"))
    code = program(lambda key: attrgetter(key)(recipe), family, *places, prompt=PROMPTS[0])
    assert "eta" not in code and "DDIM" not in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("sigmas=", "latents=noise, sigmas="), {"noise": noise})
    found = torch.from_numpy(np.array(Image.open("picture.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51 / 255 + 2e-4)


def test_a_published_lora_draws_by_the_code_of_its_card(
    make_flow: Callable[..., Recipe], tiny_flows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_flow("sd3", sampler={"shift": 2.0}, train={"epochs": 1, "learning_rate": 0.1})
    run = trained(recipe, RunFolder.create(tmp_path / "run"))
    run.write_description({"recipe": recipe.model_dump(mode="json")})
    to_folder(run, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    text = Path("README.md").read_text()
    assert "- stable-diffusion-3\n" in text
    assert f"| sampler | flow matching, {recipe.sampler.steps} steps, eta 1, guidance 3, shift 2 |" in text
    assert "the steps of the ODE, without noise" in text and "alpha multiplied into the factors" in text
    code = text.partition("```python\n")[2].partition("\n```")[0]
    code = code.replace('base = "sd3"', f"base = {str(tiny_flows['sd3'])!r}")
    drawn = []
    for variant in (code, code.replace("\npipe.load_lora_weights", "\n# pipe.load_lora_weights")):
        torch.manual_seed(5)
        exec(variant, {})
        drawn.append(Image.open("picture.png").copy())
    assert ImageChops.difference(*drawn).getbbox() is not None, "the LoRA must change the picture"


def test_a_program_names_the_denoiser_of_its_family() -> None:
    for name, kind in FAMILIES.items():
        family = Family.of({"pipeline": name}, "some/model")
        assert (family.pipeline, family.component, family.network) == (name, kind.component, kind.network.__name__)


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_every_condition_reaches_the_prediction(make_flow: Callable[..., Recipe], name: str) -> None:
    policy = parts_of(make_flow(name)).policy
    text = policy.encode(["a cat"])
    x = torch.randn(1, *policy.latent_shape)

    def predicted(text: Tensor) -> Tensor:
        with torch.no_grad():
            return policy.predict(x, torch.tensor([500.0]), text).conditional

    plain = predicted(text)
    clip_rows, pooled = (24, 32) if name == "sd3" else (0, 16)
    assert text.shape == (1, *policy.text_shape) == (1, clip_rows + 12 + 1, 40)
    assert bool((text[0, -1, pooled:] == 0).all())
    for row, column in ((0, 0), (clip_rows, 0), (-2, 39), (-1, 0), (-1, pooled - 1)):
        changed = text.clone()
        changed[0, row, column] += 1
        assert not torch.equal(predicted(changed), plain)
    unused = text.clone()
    unused[0, -1, pooled:] = 5.0
    assert torch.equal(predicted(unused), plain)


def test_without_a_t5_its_rows_are_zeros(
    make_flow: Callable[..., Recipe], tiny_flows: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_flows["sd3"], tmp_path / "model"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(copy / part)
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (copy / "model_index.json").write_text(json.dumps(index))
    recipe = make_flow("sd3", model={"path": str(copy)}, sampler={"eta": ODE})
    policy = parts_of(recipe).policy
    text = policy.encode(PROMPTS)
    assert bool((text[:, 24:-1] == 0).all())
    ours = generate(policy, text, [0, 1], recipe.seed, recipe.sampler)
    plain = plain_pictures(recipe, [0, 1], text_encoder_3=None, tokenizer_3=None)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("name", "dtype"), [("sd3", "fp32"), ("dev", "bf16")])
def test_they_train_stored_and_in_one_pass(
    make_flow: Callable[..., Recipe], tmp_path: Path, name: str, dtype: str
) -> None:
    memory = {"checkpointing": "selective"}
    recipe = make_flow(name, model={"dtype": dtype}, memory=memory)
    trainer, trajectories = rolled_out(recipe, RunFolder.create(tmp_path / "stored"))
    before = [weight.clone() for weight in trainer.components.policy.trainable()]
    assert updated(trainer, trajectories)["ratio_max_dev"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.components.policy.trainable(), strict=True))
    in_one = make_flow(name, model={"dtype": dtype}, memory=memory, train={"rollout": "one_pass", "updates": 1})
    found, _ = one_pass(trainer_of(in_one, RunFolder.create(tmp_path / "one")))
    assert torch.equal(found.log_pf, trajectories.log_pf)
    assert torch.equal(found.reward, trajectories.reward)


def test_a_resumed_run_is_the_undisturbed_one(make_flow: Callable[..., Recipe], tmp_path: Path) -> None:
    """With a state flow that has slopes, to which timesteps are no integers."""
    recipe = make_flow(
        "schnell",
        flow={"channels": [8, 8], "warmup_epochs": 1, "slopes": True},
        train={"epochs": 2, "trajectories": 4, "updates": 1, "micro_batch": 2},
        evaluation={"every": 1, "prompts": 1, "images_per_prompt": 2},
    )
    undisturbed, parted = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "parted"))
    trained(recipe, undisturbed)
    assert len(trained_in_pieces(recipe, parted, 3)) > 1
    assert rows(undisturbed.path) == rows(parted.path)
    ours, theirs = (load_file(run.weights / "pytorch_lora_weights.safetensors") for run in (undisturbed, parted))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["sd3", "schnell"])
def test_a_full_fine_tune_is_exported_whole(make_flow: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    policy: Any = parts_of(make_flow(name, adapter={"kind": "full"})).policy
    policy.export(tmp_path)
    saved = type(policy).network.from_pretrained(tmp_path / "transformer")
    ours = policy.denoiser.state_dict()
    assert saved.state_dict().keys() == ours.keys()
    assert all(torch.equal(weight, ours[key]) for key, weight in saved.state_dict().items())


def test_a_hub_id_is_planned_by_its_architecture() -> None:
    """Schnell has other levels and another number of tokens than dev."""
    found = {
        name: counted_as(name)
        for name in (
            "black-forest-labs/FLUX.1-dev",
            "black-forest-labs/FLUX.1-schnell",
            "stabilityai/stable-diffusion-3.5-large",
            "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "someone/model",
        )
    }
    expected = ("flux", "flux-schnell", "sd35l", "sd35m", "sdxl", "sd15")
    assert list(found.values()) == [f"random-{name}" for name in expected]
    assert licence("black-forest-labs/FLUX.1-dev") == "flux-1-dev-non-commercial-license"


def test_steps_that_no_noise_reverses_are_warned_of(make_recipe: MakeRecipe) -> None:
    half = {"sampler": {"eta": 0.5}}
    assert "only with eta 1" in (irreversible(make_recipe(**half)) or "")
    assert irreversible(make_recipe()) is None
    assert irreversible(make_recipe(**half, objective={"name": "dag_db", "prior": "pretrained"})) is None
    assert irreversible(make_recipe(**half, objective={"name": "ddpo"})) is None
    for name in ("dag_db", "tb"):
        with pytest.raises(UsageError, match="no noising kernel reverses its steps"):
            make_recipe(
                sampler={"sde": "flow_grpo"}, objective={"name": name}, prompts={"texts": PROMPTS, "per_group": 2}
            )


def test_levers_know_the_blocks_of_a_transformer(make_flow: Callable[..., Recipe]) -> None:
    """`selective` recomputes every other block; `compile` takes each block, also where diffusers does not name them."""
    policy = parts_of(make_flow("sd3", memory={"checkpointing": "selective"})).policy
    network: Any = policy.denoiser
    calls = [0, 0]

    def count(block: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[block] += 1

        return hook

    for number, block in enumerate(network.transformer_blocks):
        block.register_forward_pre_hook(count(number))
    text = policy.encode(["a cat"])
    x = torch.randn(1, *policy.latent_shape)
    policy.predict(x, torch.tensor([500.0]), text, unguided=True).conditional.sum().backward()
    assert calls == [2, 1]
    compile_network(network, True)
    assert [block._compiled_call_impl is not None for block in network.transformer_blocks] == [True, True]


def test_what_they_cannot_do_is_refused(
    make_flow: Callable[..., Recipe], make_recipe: MakeRecipe, tiny_flows: dict[str, Path], tmp_path: Path
) -> None:
    wrong: list[tuple[Recipe, str]] = [
        (make_flow("dev", sampler={"guidance_scale": 2.0}), "has guidance built in; set it to 1"),
        (make_flow("schnell", sampler={"guidance_embedding": 2.0}), "sampler.guidance_embedding is for models that"),
        (make_flow("sd3", model={"resolution": 18}), "must be a multiple of 4"),
        (
            make_flow("sd3", objective={"forward_looking": {"coefficients": "bf16"}}),
            "coefficients=bf16 is the published code's rounding for diffusion models",
        ),
        (make_recipe(sampler={"shift": 2.0}), "sampler.shift is for flow-matching"),
        (make_recipe(model={"max_tokens": 12}), "model.max_tokens is for models with a T5"),
        (
            make_recipe(sampler={"sde": "flow_grpo"}, objective={"name": "ddpo"}),
            "sde=flow_grpo is the sampler of a flow",
        ),
    ]
    for recipe, message in wrong:
        with pytest.raises(UsageError, match=message):
            parts_of(recipe)
    copy = Path(shutil.copytree(tiny_flows["dev"], tmp_path / "model"))
    index = copy / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(RunError, match="holds a FluxTransformer2DModel"):
        parts_of(make_flow("dev", model={"path": str(copy)}))


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd35m", 2_243_171_520), ("sd35l", 8_056_627_520), ("flux", 11_901_408_320)]
)
def test_published_architectures_have_their_parameters(name: str, parameters: int) -> None:
    policy = families.load(parse_flow(model={"path": f"random-{name}"}), torch.device("meta"))
    assert sum(p.numel() for key, p in policy.denoiser.named_parameters() if "lora_" not in key) == parameters


def test_a_plan_of_flux_fits_its_budget() -> None:
    recipe = load(ROOT / "recipes/flux_nf4_24gb.yaml")
    simulation = Simulation(recipe)
    assert simulation.made.policy.text_shape == (129, 4096)
    # Its other phases, of which each takes seconds to count, need less.
    assert simulation.peak("update") < 21 * 2**30


def test_flop_of_a_state_flow_are_counted() -> None:
    """It takes the transition's index, which is not the timestep."""
    beta = {"value": 10.0}
    assert of_recipe(parse_flow(objective={"name": "dag_db", "beta": beta}))["flow"] > 0


def test_the_embedded_flow_model_draws_what_it_was_asked_for() -> None:
    """Judged: 12 of 16 animals at least (it draws 94 %; chance is 1 in 69)."""
    from dag.evaluation.judge import load_judge, noun_accuracy

    animals = load(ROOT / "recipes/tiny_flow_cpu.yaml").prompts.texts
    assert animals is not None
    recipe = parse_flow()
    policy = parts_of(recipe).policy
    pictures = generate(policy, policy.encode(animals), list(range(len(animals))), 0, recipe.sampler)
    top1, _ = noun_accuracy(load_judge(ROOT / "dag/assets/judge"), pictures, animals)
    assert top1 >= 0.75


def parse_flow(**sections: Any) -> Recipe:
    data = {
        "model": {"path": "embedded_flow"},
        "sampler": {"steps": 10, "guidance_scale": 1.0},
        "prompts": {"texts": PROMPTS},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "ddpo"},
    }
    return parse({**data, **sections}, "test")
