"""Group norms by the fused kernel: the same network, whose weights keep their names."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dag_kernels import PLAIN, choose
from dag_kernels.verify import assert_as_good_as
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from dag.models import families
from dag.models.norms import FusedGroupNorm, fuse_norms
from dag.recipe.load import load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
META = torch.device("meta")


def unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**config | changes).to(DEVICE, memory_format=torch.channels_last)


def run(network: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient to the input) at fixed inputs."""
    torch.manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    x, text = (value.to(DEVICE, dtype) for value in (x, text))
    x.requires_grad_()
    y = network(x, torch.tensor([3, 500], device=DEVICE), encoder_hidden_states=text, return_dict=False)[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y, gradient


@pytest.mark.parametrize("kind", ["triton", "torch"])
def test_a_unet_predicts_the_same_with_the_same_gradient(kind: str) -> None:
    if kind == "triton":
        pytest.importorskip("triton")
    plain = unet().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse_norms(fused, choose(kind, DEVICE))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    exact = run(copy.deepcopy(plain).double(), torch.float64)
    names = ("output", "gradient")
    for name, found, expected, truth in zip(
        names, run(fused, torch.float32), run(plain, torch.float32), exact, strict=True
    ):
        # Sums in another order round differently: through some fifty layers, up to a few times as far from the truth.
        assert_as_good_as(name, found, expected, truth, factor=4)


def test_the_silu_moves_into_the_norm_and_nowhere_else() -> None:
    network = unet().requires_grad_(False)
    fuse_norms(network, PLAIN)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)}
    assert norms and all(isinstance(norm, FusedGroupNorm) for norm in norms.values())
    with_silu = {name for name, norm in norms.items() if getattr(norm, "has_silu", False)}
    assert with_silu == {name for name in norms if "resnets" in name or name == "conv_norm_out"}
    assert all(
        isinstance(block.nonlinearity, nn.Identity)
        for name, block in network.named_modules()
        if name.endswith("resnets.0")
    )


def test_a_scale_and_shift_between_norm_and_silu_keeps_them_apart() -> None:
    network = unet(resnet_time_scale_shift="scale_shift").requires_grad_(False)
    expected = run(network, torch.float32)
    fuse_norms(network, PLAIN)
    for found, before in zip(run(network, torch.float32), expected, strict=True):
        torch.testing.assert_close(found, before)


def test_trained_norms_stay_pytorchs() -> None:
    network = unet()
    fuse_norms(network, PLAIN)
    assert not any(isinstance(module, FusedGroupNorm) for module in network.modules())


def test_a_vae_decodes_the_same() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    ).to(DEVICE).requires_grad_(False)  # fmt: skip
    latents = torch.randn(2, 4, 8, 8, device=DEVICE)
    before = vae.decode(latents).sample
    fuse_norms(vae, PLAIN)
    assert sum(isinstance(module, FusedGroupNorm) for module in vae.decoder.modules()) > 5
    torch.testing.assert_close(vae.decode(latents).sample, before)


@pytest.mark.parametrize(
    ("changes", "is_fused"),
    [
        ((), True),
        (("kernels=torch",), False),
        (("memory.channels_last=false",), False),
        (("memory.compile=unet",), False),
        (("adapter.kind=full", "regulariser.pretrained_kl=0"), False),
    ],
    ids=str,
)
def test_which_networks_of_a_gpu_have_fused_norms(changes: tuple[str, ...], is_fused: bool) -> None:
    pytest.importorskip("triton")
    recipe = load(Path(__file__).parents[2] / "recipes" / "tiny_cpu_db.yaml", changes)
    policy = families.load(recipe, torch.device("meta"), recipe.forward_looking, choose(recipe.kernels, META))
    assert any(isinstance(module, FusedGroupNorm) for module in policy.denoiser.modules()) == is_fused


def test_on_a_cpu_norms_are_pytorchs_whatever_the_kernels() -> None:
    pytest.importorskip("triton")
    recipe = load(Path(__file__).parents[2] / "recipes" / "tiny_cpu_db.yaml", [])
    policy = families.load(recipe, torch.device("cpu"), None, choose("auto", META))
    assert not any(isinstance(module, FusedGroupNorm) for module in policy.denoiser.modules())
