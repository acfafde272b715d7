"""What trades the UNet's memory for time or precision, one function a lever."""

from typing import Any

import torch
from torch import nn

from dag.errors import UsageError


def checkpoint_activations(unet: Any, kind: str) -> None:
    """Recompute activations in backward: none, those of the finest resolution (`selective`), or of all blocks."""
    if kind == "none":
        return
    unet.enable_gradient_checkpointing()
    if kind == "selective":
        finest = {id(module) for block in (unet.down_blocks[0], unet.up_blocks[-1]) for module in block.modules()}
        for module in unet.modules():
            if hasattr(module, "gradient_checkpointing") and id(module) not in finest:
                module.gradient_checkpointing = False


def choose_attention(unet: Any, kind: str, device: torch.device) -> str:
    """Set the attention implementation; returns its name with the reason. Raises UsageError where it cannot run."""
    if kind != "xformers":
        return "sdpa (asked for)" if kind == "sdpa" else "sdpa (auto: PyTorch's flash and memory-efficient kernels)"
    if device.type != "cuda":
        raise UsageError(f"memory.attention=xformers needs a GPU, the run is on {device.type}; use auto")
    try:
        unet.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError as error:
        missing = error.name or "xformers"
        raise UsageError(
            f'memory.attention=xformers: {missing} is not installed; pip install -e ".[xformers]", or use auto'
        ) from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # diffusers tries it once on the GPU, and xformers refuses a GPU or a PyTorch that it was not built for in many ways.
        raise UsageError(
            f"memory.attention=xformers does not run here ({_first_reason(error)}); use auto, PyTorch's own attention"
        ) from None
    return "xformers (asked for)"


def _first_reason(error: Exception) -> str:
    """One line of an error. xformers goes on with a list of what hinders each of its operators: the first about the GPU counts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    about_gpu = [line for line in lines[1:] if "your GPU" in line or "wasn't buil" in line]
    return "; ".join([lines[0].removesuffix(" with inputs:"), *about_gpu[:1]])


def quantise(unet: Any, kind: str, dtype: torch.dtype) -> None:
    """Hold the frozen linear layers of the transformer blocks in 8 or 4 bits, computing in `dtype`.

    Convolutions, norms and embeddings stay: bitsandbytes has no quantised convolution. Before the adapter is added.
    """
    if kind == "compute":
        return
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError(f"memory.base={kind} needs bitsandbytes: pip install bitsandbytes") from None
    layers = bitsandbytes.nn
    parents = dict(unet.named_modules())
    for name, linear in list(parents.items()):
        if not isinstance(linear, nn.Linear) or "transformer_blocks" not in name:
            continue
        shape, has_bias, weight = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight
        if kind == "nf4":
            smaller = layers.Linear4bit(*shape, bias=has_bias, compute_dtype=dtype, quant_type="nf4")
            smaller.weight = layers.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
        else:
            smaller = layers.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
            smaller.weight = layers.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
        smaller.bias = linear.bias
        parent, _, attribute = name.rpartition(".")
        # The move to the device is what quantises.
        setattr(parents[parent], attribute, smaller.to(weight.device))
    # peft asks the model which of its layers' forms to wrap.
    setattr(unet, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def compile_blocks(unet: Any, is_on: bool) -> None:
    """torch.compile of the repeated blocks: seconds of start instead of minutes, most of the gain."""
    if is_on:
        unet.compile_repeated_blocks()
