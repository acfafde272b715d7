"""Levers on the denoiser, each a function: checkpointing, attention, quantisation, compilation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from dag.errors import RunError, UsageError

# Versions of one function that torch may compile; a recipe has four resolutions and some ten call patterns.
_MOST_COMPILATIONS = 256


def checkpoint_activations(network: Any, kind: str, as_now: Callable[[], AbstractContextManager[None]]) -> None:
    """Recompute activations in the backward pass: none, all (`full`), or those of some blocks (`selective`).

    Args:
        network: a UNet, in which `selective` takes the finest resolution, or a transformer, in which it takes every other block.
        as_now: gives a context in which the adapter is switched on or off as it is at the call. A pass of the pretrained model is
            recomputed in it, since the adapter is on again by then.
    """
    if kind == "none":
        return
    kept: set[int] = set()

    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        if id(block) in kept:
            return block(*inputs)
        if torch.compiler.is_compiling():
            # The graph that is traced has the adapter's state in it, and a compiler takes no context.
            return checkpoint(block, *inputs, use_reentrant=False)
        as_then = as_now()
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), as_then))

    network.enable_gradient_checkpointing(checkpointed)
    if kind == "selective" and hasattr(network, "down_blocks"):
        finest = {id(module) for block in (network.down_blocks[0], network.up_blocks[-1]) for module in block.modules()}
        for module in network.modules():
            if hasattr(module, "gradient_checkpointing") and id(module) not in finest:
                module.gradient_checkpointing = False
    elif kind == "selective":
        lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
        kept.update(id(block) for blocks in lists for block in list(blocks)[1::2])


def choose_attention(network: Any, kind: str, device: torch.device) -> str:
    """Set the attention implementation; returns its name with the reason. Raises UsageError if it cannot run."""
    if kind == "xformers" and not hasattr(network, "down_blocks"):
        raise UsageError("memory.attention=xformers is for UNets; a transformer's joint attention needs auto or sdpa")
    if kind != "xformers":
        return "sdpa (asked for)" if kind == "sdpa" else "sdpa (auto: PyTorch's flash and memory-efficient kernels)"
    if device.type != "cuda":
        raise UsageError(f"memory.attention=xformers needs a GPU, the run is on {device.type}; use auto")
    try:
        network.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError as error:
        missing = error.name or "xformers"
        raise UsageError(
            f'memory.attention=xformers: {missing} is not installed; pip install -e ".[xformers]", or use auto'
        ) from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # diffusers runs xformers once on the GPU. If it was not built for this GPU or PyTorch, it fails with many kinds of error.
        raise UsageError(
            f"memory.attention=xformers does not run here ({_first_reason(error)}); use auto, PyTorch's own attention"
        ) from None
    return "xformers (asked for)"


def _first_reason(error: Exception) -> str:
    """An error in one line: its first, and from xformers' list of reasons against each operator the first about the GPU."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    about_gpu = [line for line in lines[1:] if "your GPU" in line or "wasn't buil" in line]
    return "; ".join([lines[0].removesuffix(" with inputs:"), *about_gpu[:1]])


def quantise(network: Any, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Hold the frozen linear layers of the transformer blocks in 8 or 4 bits, computing in `dtype`, and move all to `device`.

    Convolutions, norms and embeddings stay as they are: bitsandbytes has no quantised convolution. Call it before the adapter
    is added. A network on the CPU passes to the device layer by layer, so that the device never holds it unquantised.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if kind == "compute":
        return
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError(f"memory.base={kind} needs bitsandbytes: pip install bitsandbytes") from None
    layers = bitsandbytes.nn
    parents = dict(network.named_modules())
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
        # bitsandbytes quantises when the layer is moved to the device.
        setattr(parents[parent], attribute, smaller.to(device))
    # By this attribute peft chooses which class of LoRA layer wraps the quantised ones.
    setattr(network, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    network.to(device)


def compile_network(network: Any, kind: bool | str) -> None:
    """torch.compile of the repeated transformer blocks (True), or of the complete denoiser at fixed shapes (`unet`).

    torch compiles a function anew for each call pattern: number of rows, with or without gradients, with or without the
    adapter, and for a block its resolution. After 8 versions it silently stops compiling. Here the limit is high enough for
    a recipe, and exceeding it is an error. The limit, and the counts of `compilations`, hold for the complete process.
    """
    if kind is False:
        return
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = _MOST_COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = _MOST_COMPILATIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Donated buffers allow one backward pass a graph. The gradient of log F takes a second one.
    torch._functorch.config.donated_buffer = False
    if kind == "unet":
        network.compile(dynamic=False)
    else:
        # Stable Diffusion 3 does not name its repeated blocks; those that must stay on one device are the same ones.
        network._repeated_blocks = network._repeated_blocks or network._no_split_modules
        network.compile_repeated_blocks()
    for module in network.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = _loud(module._compiled_call_impl)


def _loud(call: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled call, with a RunError if torch's limit on compiled versions is exceeded."""

    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise RunError(
                f"memory.compile: the network was called in more than {torch._dynamo.config.recompile_limit} ways, and the "
                "rest would not be compiled; use false, or sizes that divide (train.micro_batch, sampler.tile)"
            ) from None

    return called


def compilations() -> dict[str, int]:
    """Counts since `compile_network`: graphs, those among them for a further call pattern, and breaks between graphs."""
    counters, compiled = torch._dynamo.utils.counters, torch._dynamo.convert_frame.FRAME_COMPILE_COUNTER
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "recompilations": compiled.total() - len(compiled),
        "graph_breaks": sum(counters["graph_break"].values()),
    }
