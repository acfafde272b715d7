"""The trained weights of a model in half precision: float32 masters, fused LoRA layers, frozen convolutions."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from dag_kernels.verify import assert_as_good_as
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dag.models import adapter, families
from dag.models.adapter import FusedLoraLinear, _LoraProduct
from dag.models.frozen import FrozenConv2d, freeze_convolutions
from dag.models.sd import StableDiffusion
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.training.optimizer import ClippedOptimizer, build_optimizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MakeRecipe = Callable[..., Recipe]
CONVOLUTIONS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut"]


def policy_of(recipe: Recipe) -> tuple[StableDiffusion, Tensor]:
    """A policy whose adapter is not zero, and the embeddings of three prompts."""
    policy = cast(StableDiffusion, families.load(recipe.model_copy(update={"seed": 0}), CPU))
    text = policy.encode(["a cat", "a dog", "a bird"])
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for master in policy.trainable():
            master.add_(0.05 * torch.randn(master.shape, generator=generator))
    policy.weights.refresh()
    return policy, text


# -- precision ----------------------------------------------------------------------------------------------------


class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast on a CPU: unlike the CPU's autocast, it computes norms and upsampling in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("group_norm", "layer_norm", "upsample_nearest2d"):
            return func(*args, **kwargs)
        in_float = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        named = {n: a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*in_float, **named)


def autocast_form(policy: StableDiffusion) -> Any:
    """The policy's network with peft's own layers and float32 LoRA factors, as one would use it under autocast."""
    network = copy.deepcopy(policy.denoiser)
    masters = dict(zip(policy.weights.names, policy.weights.masters, strict=True))
    for name, weight in network.named_parameters():
        weight._post_accumulate_grad_hooks = None
        if name in masters:
            weight.data = masters[name].detach().clone()
    for layer in network.modules():
        if type(layer) is FusedLoraLinear:
            layer.__class__ = LoraLinear
    return network


def test_loss_and_gradient_err_at_most_twice_as_far_as_autocasts() -> None:
    """The truth is float64 with the same half-precision frozen weights; on the embedded model, at four steps of the chain.

    Over 12 samples the largest errors of both forms are equal within a fifth; over three samples they are a matter of luck.
    """
    recipe = load(ROOT / "recipes/tiny_cpu_db.yaml", ["model.dtype=bf16", "model.resolution=32"])
    policy, text = policy_of(recipe)
    plain = autocast_form(policy)
    exact = copy.deepcopy(plain).double()
    schedule, scale = policy.schedule, recipe.sampler.guidance_scale
    assert policy.text.empty is not None
    both = torch.cat([policy.text.empty.expand(12, -1, -1), text.repeat(4, 1, 1)])
    generator = torch.Generator().manual_seed(3)
    x_t, noise = (torch.randn(12, *policy.latent_shape, generator=generator) for _ in range(2))
    k = torch.tensor([0, 3, 6, 9]).repeat_interleave(3)
    t = schedule.timesteps[k].repeat(2)
    # An error of the network enters log P_F divided by this; multiplied by it, the errors of all steps have one size.
    unit = schedule.sigma[k] / schedule.mean_output[k].abs()

    def guided(network: Any, dtype: torch.dtype) -> Tensor:
        output = network(torch.cat([x_t, x_t]).to(dtype), t, encoder_hidden_states=both.to(dtype), return_dict=False)[0]
        uncond, cond = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        return uncond + scale * (cond - uncond)

    with torch.no_grad():
        x_next = schedule.sample_next(x_t.double(), guided(exact, torch.float64), noise.double(), k).float()

    names = policy.weights.names

    def measured(network: Any, dtype: torch.dtype, weights: list[Any]) -> tuple[Tensor, ...]:
        output = guided(network, dtype)
        loss = unit * schedule.log_pf(x_t.to(output.dtype), x_next.to(output.dtype), output, k)
        loss.sum().backward()
        policy.weights.gather()
        down, up = (
            [w.grad.flatten() for w, n in zip(weights, names, strict=True) if part in n]
            for part in ("lora_A", "lora_B")
        )
        return loss.detach(), torch.cat(down), torch.cat(up)

    trained = [[w for w in network.parameters() if w.requires_grad] for network in (exact, plain)]
    truth = measured(exact, torch.float64, trained[0])
    with CudaAutocast(), torch.autocast("cpu", torch.bfloat16):
        plainly = measured(plain, torch.bfloat16, trained[1])
    ours = measured(policy.denoiser, torch.bfloat16, policy.trainable())
    for name, found, autocast, true in zip(
        ("log P_F", "gradient of A", "gradient of B"), ours, plainly, truth, strict=True
    ):
        assert_as_good_as(name, found, autocast, true)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_fused_product_is_pefts(scale: float, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 5, 6), (7, 6), (3, 6), (7, 3))
    )
    bias = torch.randn(7, dtype=torch.float64, generator=generator) if has_bias else None
    for leaf in (x, a, b):
        leaf.requires_grad_()

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _LoraProduct.apply(x, weight, bias, a, b, scale)

    expected = functional.linear(x, weight, bias) + scale * functional.linear(functional.linear(x, a), b)
    torch.testing.assert_close(fused(x, a, b), expected)
    assert torch.autograd.gradcheck(fused, (x, a, b))


# -- masters and copies -------------------------------------------------------------------------------------------


def half(make_recipe: MakeRecipe, **changes: Any) -> tuple[StableDiffusion, Tensor]:
    recipe = make_recipe(adapter={"targets": CONVOLUTIONS, **changes})
    return policy_of(recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bf16"})}))


def backward(policy: StableDiffusion, text: Tensor, seed: int) -> None:
    x_t = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))
    policy.predict(x_t, policy.schedule.timesteps[1].expand(3), text).branches.float().square().sum().backward()


@pytest.mark.parametrize("large", [1, 1 << 16], ids=["each at once", "together"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_are_summed_in_float32(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, kind: str, large: int
) -> None:
    monkeypatch.setattr(adapter, "_LARGE", large)
    policy, text = half(make_recipe, kind=kind)
    apart = []
    for seed in (1, 2):
        backward(policy, text, seed)
        policy.weights.gather()
        apart.append([master.grad for master in policy.trainable()])
        for master in policy.trainable():
            master.grad = None
    for seed in (1, 2):
        backward(policy, text, seed)
        policy.weights.gather()
    assert all(weight.grad is None for weight in policy.weights.copies)
    for master, first, second in zip(policy.trainable(), *apart, strict=True):
        assert master.grad is not None and first is not None and second is not None
        assert master.grad.dtype == torch.float32
        assert torch.equal(master.grad, first + second)


def test_a_backward_pass_that_breaks_off_leaves_nothing(make_recipe: MakeRecipe) -> None:
    """A backward pass may run out of memory; what it left in the half-precision copies must not enter the next gradient."""
    policy, text = half(make_recipe)
    stepper = ClippedOptimizer("policy", torch.optim.AdamW(policy.trainable()), 1.0, policy.weights)

    def loss_of() -> Tensor:
        x_t = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
        return policy.predict(x_t, policy.schedule.timesteps[1].expand(3), text).branches.float().square().sum()

    stepper.backward(loss_of())
    expected = [master.grad.clone() for master in policy.trainable() if master.grad is not None]
    stepper.zero_grad()

    def run_out(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("full")

    first = policy.weights.copies[len(policy.weights.copies) // 2]
    handle = first.register_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        stepper.backward(loss_of())
    handle.remove()
    assert any(weight.grad is not None for weight in policy.weights.copies)
    stepper.zero_grad()
    stepper.backward(loss_of())
    found = [master.grad for master in policy.trainable()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)


def test_gradients_and_optimizer_states_lie_like_their_weights(make_recipe: MakeRecipe) -> None:
    """Fused AdamW refuses tensors whose memory layouts differ; they must be equal after a resume too."""
    from dag.run import optimizer_state

    policy, text = half(make_recipe, kind="full")
    optimizer = torch.optim.AdamW(policy.trainable())
    assert any(not master.is_contiguous() for master in policy.trainable())
    backward(policy, text, 1)
    policy.weights.gather()
    for master in policy.trainable():
        assert master.grad is not None and master.grad.stride() == master.stride()
    optimizer.step()
    stored = {name: tensor.contiguous() for name, tensor in optimizer_state.tensors_of(optimizer).items()}
    optimizer_state.restore(optimizer, stored, optimizer_state.numbers_of(optimizer))
    for weight, state in optimizer.state.items():
        assert state["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_moves_masters_and_what_computes(make_recipe: MakeRecipe, kind: str) -> None:
    policy, text = half(make_recipe, kind=kind)
    optimizer = build_optimizer(policy.trainable(), 1e-6, make_recipe().train, "adamw")
    stepper = ClippedOptimizer("policy", optimizer, 1.0, policy.weights)
    before = [master.detach().clone() for master in policy.trainable()]
    for _ in range(3):
        stepper.zero_grad()
        x_t = torch.randn(3, *policy.latent_shape)
        rows = policy.predict(x_t, policy.schedule.timesteps[1].expand(3), text).branches
        stepper.backward(rows.float().square().sum())
        stepper.step()
    # The float32 masters keep steps that are far below the last digit in half precision.
    assert all(not torch.equal(old, new) for old, new in zip(before, policy.trainable(), strict=True))
    for master, computing in zip(policy.trainable(), policy.weights.copies, strict=True):
        assert torch.equal(computing, master.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_saved_are_the_masters_by_the_usual_names(make_recipe: MakeRecipe, kind: str) -> None:
    policy, _ = half(make_recipe, kind=kind)
    plain, _ = policy_of(make_recipe(adapter={"targets": CONVOLUTIONS, "kind": kind}))
    saved = policy.state_dict()
    assert saved.keys() == plain.state_dict().keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    other, _ = half(make_recipe, kind=kind)
    with torch.no_grad():
        for master in other.trainable():
            master.zero_()
    other.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(policy.trainable(), other.trainable(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(policy.weights.copies, other.weights.copies, strict=True))


def test_a_full_fine_tune_exports_float32(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy, _ = half(make_recipe, kind="full")
    policy.export(tmp_path)
    written = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert written.keys() == policy.state_dict().keys()
    assert all(torch.equal(written[name], master) for name, master in policy.state_dict().items())


def test_the_switch_leaves_what_is_trained_alone(make_recipe: MakeRecipe) -> None:
    policy, text = half(make_recipe)
    fresh, _ = half(make_recipe)
    with torch.no_grad():
        for name, master in zip(fresh.weights.names, fresh.weights.masters, strict=True):
            if "lora_B" in name:
                master.zero_()
    fresh.weights.refresh()
    x_t, t = torch.randn(3, *policy.latent_shape), policy.schedule.timesteps[1].expand(3)
    with torch.no_grad():
        off, base, on = (
            model.predict(x_t, t, text, pretrained=switched).branches
            for model, switched in ((policy, True), (fresh, False), (policy, False))
        )
    assert torch.equal(off, base)
    assert not torch.equal(on, base)
    assert all(weight.requires_grad for weight in policy.weights.copies)


def test_in_float32_there_are_no_copies(make_recipe: MakeRecipe) -> None:
    policy, _ = policy_of(make_recipe())
    assert policy.weights.masters is policy.weights.copies
    assert {id(p) for p in policy.trainable()} == {id(p) for p in policy.denoiser.parameters() if p.requires_grad}


# -- frozen convolutions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_convolution_gives_the_same_bits(
    kernel: int, stride: int, padding: int, layout: torch.memory_format
) -> None:
    plain = nn.Conv2d(8, 12, kernel, stride, padding).requires_grad_(False).to(memory_format=layout)  # type: ignore[call-overload]
    frozen = copy.deepcopy(plain)
    freeze_convolutions(nn.Sequential(frozen))
    assert type(frozen) is FrozenConv2d
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=layout).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = frozen(x)
    assert {tensor.shape for tensor in kept} == {plain.weight.shape}, "its input is not kept"
    upstream = torch.randn_like(y)
    assert torch.equal(y, plain(x))
    (found,), (expected,) = (torch.autograd.grad(z, x, upstream) for z in (y, plain(x)))
    assert torch.equal(found, expected)


def test_factors_of_frozen_convolutions_are_trained(make_recipe: MakeRecipe) -> None:
    """peft gives LoRA factors the class of the layer that they adapt, here a frozen convolution's."""
    policy, text = policy_of(make_recipe(adapter={"targets": CONVOLUTIONS}))
    assert any(type(module) is FrozenConv2d for module in policy.denoiser.modules())
    backward(policy, text, 1)
    assert all(weight.grad is not None for weight in policy.trainable())
