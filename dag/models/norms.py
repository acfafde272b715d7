"""Group norms with frozen weights by the fused kernel, which takes channels-last maps as they are and applies the SiLU too."""

from collections.abc import Callable
from typing import Any

from dag_kernels import GroupNormed, Kernels
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional


class FusedGroupNorm(nn.GroupNorm):
    """A group norm that computes what `nn.GroupNorm` does, and the SiLU after it if `has_silu`, in channels-last order."""

    fused: Callable[..., GroupNormed]
    has_silu: bool = False

    def forward(self, input: Tensor) -> Tensor:
        return self.fused(input, self.weight, self.bias, self.num_groups, self.eps, self.has_silu).y


def fuse_norms(network: nn.Module, kernels: Kernels) -> None:
    """Turn every group norm of feature maps whose weights need no gradient into a `FusedGroupNorm`, in place.

    Call it after the adapter is added. The names of all weights stay.
    """
    # A VAE's attention normalises tokens, (B, C, H W), for which PyTorch's own kernel has the right order.
    of_tokens = {id(norm) for block in network.modules() if (norm := getattr(block, "group_norm", None)) is not None}
    for module in network.modules():
        if type(module) is nn.GroupNorm and _is_frozen(module) and id(module) not in of_tokens:
            module.__class__ = FusedGroupNorm
            setattr(module, "fused", kernels.group_norm)  # noqa: B010
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            _take_silu_of_resnet(module)
    last: Any = getattr(network, "decoder", network)  # an autoencoder's, whose encoder keeps its own SiLU
    if isinstance(getattr(last, "conv_norm_out", None), FusedGroupNorm) and isinstance(last.conv_act, nn.SiLU):
        last.conv_norm_out.has_silu, last.conv_act = True, nn.Identity()


def _is_frozen(norm: nn.GroupNorm) -> bool:
    return norm.affine and not norm.weight.requires_grad and not norm.bias.requires_grad


def _take_silu_of_resnet(block: Any) -> None:
    """Have both norms of a residual block apply its SiLU, which is then left out; the time embedding keeps its own."""
    norms = (block.norm1, block.norm2)
    is_plain = block.time_embedding_norm == "default" and isinstance(block.nonlinearity, nn.SiLU)
    if not is_plain or not all(isinstance(norm, FusedGroupNorm) for norm in norms):
        return
    for norm in norms:
        norm.has_silu = True
    block.nonlinearity = nn.Identity()
    if block.time_emb_proj is not None and not block.skip_time_act:
        block.time_emb_proj.register_forward_pre_hook(lambda _, inputs: (functional.silu(inputs[0]),))
