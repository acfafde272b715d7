"""Counted bytes of live tensors, against numbers computed by hand; and the meta device against the CPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dag.costs.live_bytes import LiveBytes, as_on_cuda, peak_of

ASSETS = Path(__file__).parents[2] / "dag/assets"
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def unet(device: str, folder: Path = ASSETS / "embedded/unet") -> Any:
    """A UNet with random weights."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder)).eval()


def unet_call(model: Any, rows: int = 4) -> tuple[Callable[[], object], list[Tensor]]:
    """A call that runs the embedded UNet forward and, if gradients are on, backward; and the tensors that exist before it."""
    device, dtype = model.conv_in.weight.device, model.conv_in.weight.dtype
    x_t, text = torch.zeros(rows, 4, 16, 16, device=device, dtype=dtype), torch.zeros(rows, 24, 128, device=device)
    t = torch.zeros(rows, device=device)

    def call() -> None:
        output = model(x_t, t, text.to(dtype), return_dict=False)[0]
        if output.requires_grad:
            output.float().pow(2).sum().backward()

    return call, [*model.parameters(), x_t, text, t]


# -- counting -----------------------------------------------------------------------------------------------------


@DEVICES
def test_a_storage_counts_once_until_its_last_reference_is_gone(device: str) -> None:
    with LiveBytes() as live:
        x = torch.empty(10, 10, device=device)
        assert live.current == 400
        row = x.mT[3]
        assert live.current == 400
        y = x + 1
        del x
        assert (live.current, live.peak) == (800, 800)
        del row
        assert (live.current, live.peak) == (400, 800)
    del y
    assert live.current == 0


@DEVICES
def test_what_existed_counts_if_included(device: str) -> None:
    weight = torch.empty(10, 10, device=device)
    with LiveBytes() as live:
        view = weight.mT
        weight.add_(1)
        assert live.current == 0
        assert live.include([weight, view, weight[2:]]) == 400
        assert live.include([weight]) == 0
        assert (live.current, live.peak) == (400, 400)
    del weight, view
    assert live.current == 0


@DEVICES
def test_the_peak_of_a_layer_is_the_one_worked_out_by_hand(device: str) -> None:
    x = torch.ones(8, 16, device=device)
    weight, bias = (torch.ones(*shape, device=device, requires_grad=True) for shape in ((32, 16), (32,)))

    def step() -> None:
        y = F.relu(F.linear(x, weight, bias))
        y.sum().backward()

    existing = 4 * (8 * 16 + 32 * 16 + 32)
    activation = 4 * 8 * 32
    with LiveBytes() as live:
        live.include([x, weight, bias])
        with torch.no_grad():
            F.relu(F.linear(x, weight, bias))
    # The activations before and after the ReLU.
    assert live.peak == existing + 2 * activation
    assert live.current == existing
    gradients = 4 * (32 * 16 + 32)  # of weight and bias
    scalars = 2 * 4  # the loss and its gradient
    # The two activations are y and the gradient before the ReLU.
    assert peak_of(step, [x, weight, bias]) == existing + 2 * activation + scalars + gradients


@DEVICES
def test_checkpointing_keeps_one_layer_instead_of_all(device: str) -> None:
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Tanh(), nn.Tanh()).to(device) for _ in range(4)]
    x = torch.ones(512, 32, device=device, requires_grad=True)

    def step(is_checkpointed: bool) -> None:
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if is_checkpointed else layer(y)
        y.sum().backward()

    activation = 4 * 512 * 32
    plain, checkpointed = (peak_of(partial(step, setting)) // activation for setting in (False, True))
    num_layers, kept_in_a_layer = len(layers), 3  # each Tanh keeps its output
    all_kept = num_layers * kept_in_a_layer + 2  # and two gradients
    ends_kept = num_layers + kept_in_a_layer + 1  # the end of each layer, what the last layer keeps, one gradient
    assert (plain, checkpointed) == (all_kept, ends_kept)


@DEVICES
def test_a_mode_outlives_an_exception(device: str) -> None:
    live, x = LiveBytes(), torch.ones(4, 5, device=device)
    with pytest.raises(RuntimeError), live:
        x @ x
    torch.ones(7, device=device)
    assert live.peak == 0
    with live:
        y = x + x
        assert live.current == 80
    del y
    assert (live.current, live.peak) == (0, 80)


# -- as on CUDA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_grad", [False, True])
def test_attention_on_meta_holds_no_matrix(needs_grad: bool) -> None:
    tokens, heads, width = 256, 2, 8

    def peak(device: str) -> int:
        q, k, v = (torch.ones(1, heads, tokens, width, device=device, requires_grad=needs_grad) for _ in range(3))

        def call() -> None:
            output = F.scaled_dot_product_attention(q, k, v)
            if needs_grad:
                output.sum().backward()

        return peak_of(call)

    assert peak("meta") == pytest.approx(peak("cpu"), rel=0.01)
    assert peak("meta") < 4 * heads * tokens**2


def test_outside_meta_tensors_go_pytorchs_way_again() -> None:
    q = torch.ones(1, 1, 256, 8, device="meta")
    with pytest.raises(RuntimeError), as_on_cuda():
        raise RuntimeError
    with LiveBytes() as live:
        F.scaled_dot_product_attention(q, q, q)
    assert live.peak > 4 * 256**2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_copies_what_cudnn_would_read_in_another_layout(layout: torch.memory_format) -> None:
    """The weight's layout decides; input and gradient arrive in the usual one, as behind a norm."""
    x = torch.empty(2, 8, 16, 16, device="meta", requires_grad=True)
    weight = torch.empty(16, 8, 3, 3, device="meta").to(memory_format=layout).requires_grad_(True)
    small, large, of_weight = x.nbytes, 2 * x.nbytes, weight.nbytes
    copied = layout == torch.channels_last
    with LiveBytes() as live, as_on_cuda():
        live.include([x, weight])
        y = F.conv2d(x, weight, padding=1)
        assert y.is_contiguous(memory_format=layout)
        assert live.current == small + of_weight + large
        assert live.peak == live.current + copied * small
        upstream = torch.empty(y.shape, device="meta")
        before = live.peak = live.current
        found = torch.autograd.grad(y, [x, weight], upstream)
        assert all(gradient.is_contiguous(memory_format=layout) for gradient in found)
        assert live.current == before + small + of_weight
        assert live.peak == live.current + copied * (large + small)
        # A frozen weight needs no second reading of the input.
        del found
        live.peak = live.current
        frozen = F.conv2d(x, weight.detach(), padding=1)
        live.peak = live.current
        (gradient,) = torch.autograd.grad(frozen, x, upstream)
        assert live.peak == live.current + copied * large
    assert gradient.shape == x.shape


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_unet_peaks_on_meta_as_on_the_cpu(needs_grad: bool, checkpointing: bool) -> None:
    def peak(device: str) -> int:
        model = unet(device).requires_grad_(needs_grad)
        if checkpointing:
            model.enable_gradient_checkpointing()
        return peak_of(*unet_call(model))

    assert peak("meta") == pytest.approx(peak("cpu"), rel=0.01)


# -- Stable Diffusion 1.5 -----------------------------------------------------------------------------------------


def test_the_architecture_is_stable_diffusion_1_5() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = ASSETS / "architectures/sd15"
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    modules = (unet("meta", folder / "unet"), vae, text_encoder)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[[0, -1]].tolist() == [981, 1]
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, rel=1e-3)
