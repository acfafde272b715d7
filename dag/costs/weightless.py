"""A recipe's networks and its learner without weights, on the meta device: what the costs of training are counted on.

Legend: B rows of a micro-batch or tile, N trajectories, T transitions.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from dag_kernels import PLAIN, Kernels
from torch import Tensor, nn

from dag.chain.policy import Prediction
from dag.chain.rollout import CHAIN_DTYPES, Batch
from dag.costs.reward_networks import footprint
from dag.models import families
from dag.models.source import local_folder
from dag.objectives.state_flow import StateFlow
from dag.recipe import OptimizerKind, Recipe
from dag.recipe.load import parse_reward
from dag.training.build import learner_of

META = torch.device("meta")
# Stands for a hub id whose configs are not on this machine.
_ASSUMED = "random-sd15"
# bitsandbytes: 4 bits, and a statistic a block of 64, itself in 8 bits with a float32 a block of 256.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_SMALLEST_8BIT = 4096
_8BIT_BLOCK = 256


class Weightless:
    """
    Args:
        kernels: how transitions are computed; on the meta device fused ones launch and compute nothing.

    Attributes:
        is_assumed: the model is taken for an SD 1.5 because its configs are not on this machine.
        rewards:    footprints of the reward networks on the policy's device.
        offloaded:  which of them are there only while a phase scores.
    """

    def __init__(self, recipe: Recipe, kernels: Kernels = PLAIN) -> None:
        self.recipe = recipe
        self.is_assumed = local_folder(recipe.model.path) is None
        self.policy = families.load(_without_levers(recipe, self.is_assumed), META, recipe.forward_looking)
        self.policy.schedule = replace(self.policy.schedule, kernels=kernels)
        self.policy.blank_prompt()
        if recipe.memory.base == "int8":
            for layer in self._quantised():
                layer.register_forward_pre_hook(lambda _, inputs: _Kept.apply(inputs[0]))
        self.T = self.policy.schedule.num_transitions
        _ = self.policy.schedule.table  # made once: no phase's own
        # One prompt, on the CPU as prompts are; every trajectory has it.
        self.text = torch.zeros(1, *self.policy.text_shape, dtype=self.policy.dtype)
        self.learner = learner_of(_with_adamw(recipe), self.policy, self.text, kernels, warn=lambda text: None)
        there = [term for term in recipe.reward if getattr(term, "device", "auto") != "cpu"]
        self.rewards = [footprint(term) for term in there]
        self.offloaded = [bool(getattr(term, "offload", False)) for term in there]

    @property
    def flow(self) -> StateFlow | None:
        return None if self.learner.flow_fit is None else self.learner.flow_fit.flow

    def batch(self, count: int) -> Batch:
        """So many trajectories, of the one prompt."""
        return Batch(torch.zeros(count, dtype=torch.int64), torch.arange(count))

    def chain(self, trajectories: int, states: int, place: torch.device = META) -> Tensor:
        """(states, N, C, H, W) in the stored dtype."""
        shape, dtype = self.policy.latent_shape, CHAIN_DTYPES[self.recipe.sampler.chain_dtype]
        return torch.empty(states, trajectories, *shape, dtype=dtype, device=place)

    # -- what stands in memory -----------------------------------------------------------------------------------

    def standing(self) -> dict[str, list[Tensor]]:
        """Tensors that every phase finds, by kind; gradients stay until the next update begins."""
        policy, train = self.policy, self.recipe.train
        trained = policy.trainable()
        kinds: dict[str, list[Tensor]] = {
            "denoiser": [t for t in held(policy.denoiser) if not any(t is p for p in trained)],
            "trained weights": list(trained),
            "gradients": [torch.empty_like(p) for p in trained],
            "optimizer": list(optimizer_states(trained, train.optimizer)),
            "flow": [] if self.flow is None else held(self.flow),
            "decoder": [] if self.recipe.memory.offload_vae else held(policy.decoder.vae),
        }
        if policy.decoder.tiny is not None:
            kinds["decoder"] += held(policy.decoder.tiny)
        if self.flow is not None:
            weights = list(self.flow.parameters())
            kinds["gradients"] += [torch.empty_like(p) for p in weights]
            kinds["optimizer"] += optimizer_states(weights, self.recipe.flow.optimizer)
        kinds["reward"] = [
            some_bytes(f.weights) for f, is_off in zip(self.rewards, self.offloaded, strict=True) if not is_off
        ]
        if self.recipe.evaluation.diversity not in (None, "embedded"):
            kinds["evaluation"] = [some_bytes(footprint(parse_reward("clip_score", [])).weights)]
        return kinds

    def fetched_for_scoring(self) -> list[Tensor]:
        """What is offloaded, and comes to the device while a phase decodes and scores."""
        offloaded = [some_bytes(f.weights) for f, is_off in zip(self.rewards, self.offloaded, strict=True) if is_off]
        return offloaded + (held(self.policy.decoder.vae) if self.recipe.memory.offload_vae else [])

    def quantised_away(self) -> int:
        """Bytes that `memory.base` takes off the denoiser."""
        kind, saved = self.recipe.memory.base, 0.0
        if kind == "compute":
            return 0
        for layer in self._quantised():
            each = _NF4_BYTES if kind == "nf4" else 1 + 4 / layer.in_features
            saved += layer.weight.numel() * (layer.weight.itemsize - each)
        return int(saved)

    def _quantised(self) -> Iterable[nn.Linear]:
        """The layers that `dag.models.levers.quantise` takes; the adapter's own are trained."""
        for name, module in self.policy.denoiser.named_modules():
            if isinstance(module, nn.Linear) and "transformer_blocks" in name and not module.weight.requires_grad:
                yield module

    # -- networks that run a few times ---------------------------------------------------------------------------

    @contextmanager
    def repeats_are_free(self, previews: int = 1) -> Iterator[None]:
        """Inside, only the first calls of a network run. Later ones, which would be alike, allocate their result.

        Args:
            previews: calls of `Policy.preview` that run.
        """
        policy: Any = self.policy
        original = {name: getattr(policy, name) for name in ("predict", "decode", "preview")}
        policy.predict = _FirstPredictions(policy.predict)
        policy.decode = _first_pictures(policy.decode, 1)
        policy.preview = _first_pictures(policy.preview, previews)
        try:
            yield
        finally:
            for name, call in original.items():
                setattr(policy, name, call)


def _without_levers(recipe: Recipe, is_assumed: bool) -> Recipe:
    """What a lever does to weights is arithmetic; a kernel or a compiler on the meta device would be none."""
    path = _ASSUMED if is_assumed else recipe.model.path
    memory = {"base": "compute", "attention": "auto", "compile": False}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": path}),
            "memory": recipe.memory.model_copy(update=memory),
        }
    )


def _with_adamw(recipe: Recipe) -> Recipe:
    """Optimizer states are counted by arithmetic, so that bitsandbytes need not be installed."""
    sections = {"train": recipe.train, "flow": recipe.flow}
    return recipe.model_copy(
        update={name: section.model_copy(update={"optimizer": "adamw"}) for name, section in sections.items()}
    )


class _FirstPredictions:
    """`Policy.predict` that runs twice, or three times where it is trained, with each set of switches.

    In one pass the third of trained steps finds the gradients of the first and the graph of the second.
    """

    def __init__(self, predict: Any) -> None:
        self.predict, self.ran = predict, Counter[tuple[bool, bool]]()
        self.like: dict[tuple[bool, bool], tuple[int, torch.dtype, float]] = {}

    def __call__(
        self, x_t: Tensor, t: Tensor, text: Tensor, *, pretrained: bool = False, unguided: bool = False
    ) -> Prediction:
        switches, B = (pretrained, unguided), len(x_t)
        if self.ran[switches] < (3 if torch.is_grad_enabled() else 2):
            result = self.predict(x_t, t, text, pretrained=pretrained, unguided=unguided)
            self.ran[switches] += 1
            self.like[switches] = (len(result.branches) // B, result.branches.dtype, result.guidance_scale)
            return result
        branches, dtype, guidance_scale = self.like[switches]
        output = torch.empty(branches * B, *x_t.shape[1:], dtype=dtype, device=x_t.device)
        output.requires_grad_(torch.is_grad_enabled() and not pretrained)
        return Prediction(output, B, guidance_scale, output[-B:])


def _first_pictures(call: Any, times: int) -> Any:
    """`Policy.decode` or `Policy.preview` that runs so many times."""
    shapes: list[torch.Size] = []

    def limited(latents: Tensor, *others: Any) -> Tensor:
        if len(shapes) == times:
            return torch.empty(len(latents), *shapes[0], device=latents.device)
        images = call(latents, *others)
        shapes.append(images.shape[1:])
        return images

    return limited


class _Kept(torch.autograd.Function):
    """The identity; like bitsandbytes' 8-bit product it keeps its input until the backward pass, which a frozen linear
    layer does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def optimizer_states(parameters: Iterable[nn.Parameter], kind: OptimizerKind) -> Iterable[Tensor]:
    """Two moments a weight: float32, or 8 bits with a float32 a block of 256 for tensors of 4096 weights and more."""
    for parameter in parameters:
        n = parameter.numel()
        for _ in range(2):
            if kind == "adamw" or n < _SMALLEST_8BIT:
                yield torch.empty(n, dtype=torch.float32, device=META)
            else:
                yield torch.empty(n, dtype=torch.uint8, device=META)
                yield torch.empty(math.ceil(n / _8BIT_BLOCK), dtype=torch.float32, device=META)


def held(module: nn.Module) -> list[Tensor]:
    """The tensors of a module."""
    return [*module.parameters(), *module.buffers()]


def some_bytes(count: int) -> Tensor:
    """A tensor of so many bytes."""
    return torch.empty(count, dtype=torch.uint8, device=META)
