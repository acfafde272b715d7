"""The trained weights of networks (LoRA factors or all weights): stored in float32, used in the networks' dtype.

There is no autocast: every module computes in its own dtype. So in half precision each trained weight exists twice, as a
float32 master, which the optimizer changes, and as a half-precision copy in the network. Gradients of the copies are summed
in float32 on the masters.

Legend: I and O features in and out, R the LoRA rank.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from dag.errors import RunError, UsageError

# A gradient of at least so many elements is added to its master as soon as the backward pass has computed it, so that the
# copies' large gradients are never all in memory at the same time. Smaller ones are added at the end, in a few launches.
_LARGE = 1 << 16
_ADAPTER = "default"


def add_lora(network: Any, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Add LoRA factors to the layers of a network of diffusers or transformers whose names end in a target, with peft.

    Their initial values depend on the seed alone; their product is 0.

    Raises:
        UsageError: a target matches no layer.
    """
    _check_targets(network, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config, _ADAPTER)


def _check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Raises UsageError for a target that matches no layer; peft ignores a misspelt one as long as another one matches."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            endings = sorted({re.sub(r".*\.(?=\D)", "", name) for name in layers})
            raise UsageError(
                f"adapter.targets: {target!r} matches no layer of the denoiser; layer names end in: {', '.join(endings)}"
            )


class TrainedWeights:
    """The weights of networks that need a gradient.

    Args:
        networks: modules, with their adapters if they have one, by what their weights' names begin with.
        dtype:    precision in which the networks compute; float32 needs no copies.

    Attributes:
        masters:  the float32 weights that are optimized, saved and exported; without copies the networks' own parameters.
        changes:  how often they were changed.
    """

    def __init__(self, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        found = [
            (prefix, name, weight)
            for prefix, network in networks.items()
            for name, weight in network.named_parameters()
            if weight.requires_grad
        ]
        self.copies = [weight for _, _, weight in found]
        self.has_copies = dtype != torch.float32
        for copy in self.copies:
            copy.data = copy.data.float()
        self.masters = [nn.Parameter(copy.detach().clone()) for copy in self.copies] if self.has_copies else self.copies
        modules = [module for network in networks.values() for module in network.modules()]
        self.layers = [module for module in modules if isinstance(module, LoraLayer)]
        self.networks, self.changes = networks, 0
        self._places = [(prefix, name) for prefix, name, _ in found]
        self.names = [prefix + name for prefix, name in self._places]
        if self.has_copies:
            self._compute_in(dtype)

    def _compute_in(self, dtype: torch.dtype) -> None:
        masters = {id(copy): master for copy, master in zip(self.copies, self.masters, strict=True)}

        def add_to_master(copy: Tensor) -> None:
            if copy.numel() >= _LARGE and copy.grad is not None:
                _add([masters[id(copy)]], [copy.grad])
                copy.grad = None

        for copy in self.copies:
            copy.data = copy.data.to(dtype)
            copy.register_post_accumulate_grad_hook(add_to_master)
        for layer in self.layers:
            if _is_plain(layer):
                # One class for all of them, so that a compiler sees that the blocks are alike.
                layer.__class__ = FusedLoraLinear

    def gather(self) -> None:
        """Add the copies' gradients to those of the masters, and clear them. Call it after each backward pass."""
        if not self.has_copies:
            return
        pairs = zip(self.masters, self.copies, strict=True)
        waiting = [(master, copy) for master, copy in pairs if copy.grad is not None]
        if not waiting:
            return
        joined = torch.cat([copy.grad.flatten() for _, copy in waiting]).float()  # type: ignore[union-attr]
        parts = joined.split([copy.numel() for _, copy in waiting])
        _add(
            [master for master, _ in waiting],
            [part.view_as(copy) for part, (_, copy) in zip(parts, waiting, strict=True)],
        )
        for _, copy in waiting:
            copy.grad = None

    def forget(self) -> None:
        """Clear the gradients that a backward pass, cut off by an error, has left in the copies."""
        if self.has_copies:
            for copy in self.copies:
                copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the copies to the masters' present values. Call it after each change of the masters."""
        self.changes += 1
        if self.has_copies:
            torch._foreach_copy_(list[Tensor](self.copies), list[Tensor](self.masters))

    def as_now(self) -> AbstractContextManager[None]:
        """A context in which the LoRA factors add something or nothing, as they do at this call."""
        return self.switched(off=bool(self.layers) and self.layers[0]._disable_adapters)

    def switched(self, *, off: bool) -> AbstractContextManager[None]:
        """A context in which, if `off`, the LoRA factors add nothing. It may be entered several times, one after the other."""
        return _Switched(self.layers if off else [])

    # -- by name -------------------------------------------------------------------------------------------------

    def named(self) -> dict[str, Tensor]:
        """The masters by their names in files: peft's for LoRA factors, else the network's own."""
        return {prefix + name: master for prefix in self.networks for name, master in self.of(prefix).items()}

    def of(self, prefix: str) -> dict[str, Tensor]:
        """The masters of one network, as `named` names them without the prefix."""
        places = zip(self._places, self.masters, strict=True)
        masters: dict[str, Tensor] = {name: master for (start, name), master in places if start == prefix}
        has_factors = bool(masters and self.layers)
        return get_peft_model_state_dict(self.networks[prefix], masters, _ADAPTER) if has_factors else masters

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by their names in files, detached, on the CPU."""
        return {name: master.detach().cpu().contiguous() for name, master in self.named().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set masters and copies. Raises RunError if the names or shapes do not fit exactly."""
        masters = self.named()
        expected = {name: tuple(master.shape) for name, master in masters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if expected != found:
            bad = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise RunError(f"the saved weights do not fit this model and adapter ({len(bad)} differ, first: {bad[0]})")
        for name, master in masters.items():
            master.copy_(state[name])
        self.refresh()


@torch.no_grad()
def _add(masters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Add gradients to the masters', in float32 and in the masters' memory layout, which optimizers expect."""
    gradients = [
        g.float() if g.stride() == m.stride() else torch.empty_like(m).copy_(g)
        for m, g in zip(masters, gradients, strict=True)
    ]
    to_add = [(m.grad, g) for m, g in zip(masters, gradients, strict=True) if m.grad is not None]
    for master, gradient in zip(masters, gradients, strict=True):
        if master.grad is None:
            master.grad = gradient
    if to_add:
        torch._foreach_add_([total for total, _ in to_add], [gradient for _, gradient in to_add])


def _is_plain(layer: LoraLayer) -> bool:
    """Whether `_LoraProduct` can compute a layer: a linear one with one pair of factors, no quantised base, no dropout."""
    return (
        type(layer) is LoraLinear
        and type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [_ADAPTER]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)
    )


class FusedLoraLinear(LoraLinear):
    """A plain LoRA layer whose forward pass is `_LoraProduct`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            return self.base_layer(x)
        down, up, base = self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight, self.base_layer
        return _LoraProduct.apply(x, base.weight, base.bias, down, up, float(self.scaling[_ADAPTER]))


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with frozen W and b, where each sum is part of a matrix product.

        h = s x A^T,   y = x W^T + b,   y += h B^T
        g = s dy B,    dx = dy W,       dx += g A,      dA = g^T x,     dB = dy^T h

    x (..., I), W (O, I), b (O,) or None, A (R, I), B (O, R), all of one dtype; y (..., O).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = _scaled(rows @ a.T, scale)
        ctx.save_for_backward(rows, weight, a, b, hidden)
        ctx.scale, ctx.shape = scale, x.shape
        y = functional.linear(rows, weight, bias).addmm_(hidden, b.T)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, hidden = ctx.saved_tensors
        dy = upstream[0].reshape(-1, len(weight))
        g = _scaled(dy @ b, ctx.scale)
        dx = (dy @ weight).addmm_(g, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, g.T @ rows, dy.T @ hidden, None


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1.0 else product.mul_(scale)


class _Switched(AbstractContextManager[None]):
    """A context in which some LoRA layers add nothing."""

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = layers

    def __enter__(self) -> None:
        # Not peft's own switch: it goes through the complete network and changes which weights need a gradient.
        for layer in self.layers:
            layer._disable_adapters = True

    def __exit__(self, *error: object) -> None:
        for layer in self.layers:
            layer._disable_adapters = False
