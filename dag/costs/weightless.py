"""A recipe's networks and learner on the meta device, without weights, for counting the costs of training.

Legend: B rows of a micro-batch or tile, N trajectories, T transitions.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from dag_kernels import PLAIN, Kernels, choose
from torch import Tensor, nn

from dag.chain.rollout import CHAIN_DTYPES, Batch
from dag.costs.reward_networks import footprint
from dag.models import families
from dag.models.source import counted_as
from dag.objectives.state_flow import StateFlow
from dag.recipe import OptimizerKind, Recipe
from dag.recipe.load import parse_reward
from dag.training.build import learner_of

META = torch.device("meta")
# Bytes per weight in bitsandbytes' NF4: 4 bits, one 8-bit scale for 64 weights, one float32 for 256 of these scales.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# bitsandbytes keeps the states of smaller tensors in float32.
_SMALLEST_8BIT = 4096
_8BIT_BLOCK = 256


def on_a_gpu(recipe: Recipe) -> Kernels:
    """The operations that a GPU would run, in their form for the meta device: fused ones wherever triton is installed."""
    return choose("torch" if recipe.kernels == "torch" else "auto", META)


class Weightless:
    """A recipe's policy, flow and learner on the meta device.

    Args:
        kernels: the operations for transitions; on the meta device fused ones count as launches and compute nothing.

    Attributes:
        counted_as: the model whose configs are used: the recipe's, or the architecture that a hub model is taken for.
        rewards:    memory of each reward network on the policy's device.
        offloaded:  for each of them, whether it is on the device only while a phase scores.
        is_learnt:  for each of them, whether the reward critic learns it.
        text:       (1, S, D) the one prompt that all trajectories share, as the policy's `encode` returns it.
        T:          transitions.
    """

    def __init__(self, recipe: Recipe, kernels: Kernels = PLAIN) -> None:
        self.recipe = recipe
        self.counted_as = counted_as(recipe.model.path)
        self.policy = families.load(_without_levers(recipe, self.counted_as), META, recipe.forward_looking, kernels)
        # On the CPU, as the prompts are in training.
        self.text = self.policy.blank_prompt()
        if recipe.memory.base == "int8":
            for layer in self._quantised():
                layer.register_forward_pre_hook(lambda _, inputs: _Kept.apply(inputs[0]))
        self.T = self.policy.schedule.num_transitions
        _ = self.policy.schedule.table  # cached now, so that it is not counted for the first phase that needs it
        self.learner = learner_of(_with_adamw(recipe), self.policy, self.text, kernels, warn=lambda text: None)
        numbers = [i for i, term in enumerate(recipe.reward) if getattr(term, "device", "auto") != "cpu"]
        self.is_learnt = [recipe.learnt_rewards[i] for i in numbers]
        self.rewards = [footprint(recipe.reward[i], _differentiated(recipe, i)) for i in numbers]
        self.offloaded = [bool(getattr(recipe.reward[i], "offload", False)) for i in numbers]

    @property
    def flow(self) -> StateFlow | None:
        """The learnt state flow; None for objectives without one."""
        return None if self.learner.flow_fit is None else self.learner.flow_fit.flow

    def batch(self, count: int) -> Batch:
        """A batch of `count` trajectories, all of the one prompt."""
        return Batch(torch.zeros(count, dtype=torch.int64), torch.arange(count))

    def chain(self, trajectories: int, states: int, place: torch.device = META) -> Tensor:
        """An empty chain (states, trajectories, C, H, W) in the recipe's dtype for stored chains."""
        shape, dtype = self.policy.latent_shape, CHAIN_DTYPES[self.recipe.sampler.chain_dtype]
        return torch.empty(states, trajectories, *shape, dtype=dtype, device=place)

    def gradient_bytes(self, *, is_learnt: bool) -> int:
        """Bytes of the reward networks' graphs while the exact rewards are differentiated, or the learnt ones for comparison.

        The graphs of all rewards of a sum are alive together.
        """
        pairs = zip(self.rewards, self.is_learnt, strict=True)
        return sum(footprint.gradient for footprint, of_learnt in pairs if of_learnt == is_learnt)

    # -- what stands in memory -----------------------------------------------------------------------------------

    def standing(self) -> dict[str, list[Tensor]]:
        """The tensors that are in memory during every phase, by kind; gradients stay until the next update begins."""
        policy, train = self.policy, self.recipe.train
        trained = policy.trainable()
        kinds: dict[str, list[Tensor]] = {
            "denoiser": _frozen(policy.denoiser, trained),
            "text encoders": [t for network in policy.trained_encoders() for t in _frozen(network, trained)],
            "trained weights": list(trained),
            "gradients": [torch.empty_like(p) for p in trained],
            "optimizer": list(optimizer_states(trained, train.optimizer)),
            "flow": [] if self.flow is None else held(self.flow),
            "critic": [],
            "decoder": [] if self.recipe.memory.offload_vae else held(policy.decoder.vae),
        }
        if policy.decoder.tiny is not None:
            kinds["decoder"] += held(policy.decoder.tiny)
        if self.flow is not None:
            weights = list(self.flow.parameters())
            kinds["gradients"] += [torch.empty_like(p) for p in weights]
            kinds["optimizer"] += optimizer_states(weights, self.recipe.flow.optimizer)
        if (critic := self.learner.critic_fit) is not None:
            weights = list(critic.critic.parameters())
            # Its gradients too: they stay until the critic is trained again, whatever the policy's updates do.
            kinds["critic"] = held(critic.critic) + [torch.empty_like(p) for p in weights]
            kinds["critic"] += optimizer_states(weights, "adamw")
        kinds["reward"] = [
            some_bytes(f.weights) for f, is_off in zip(self.rewards, self.offloaded, strict=True) if not is_off
        ]
        if self.recipe.evaluation.diversity not in (None, "embedded"):
            kinds["evaluation"] = [some_bytes(footprint(parse_reward("clip_score", [])).weights)]
        return kinds

    def fetched_for_scoring(self) -> list[Tensor]:
        """The offloaded tensors that come to the device while a phase decodes and scores."""
        offloaded = [some_bytes(f.weights) for f, is_off in zip(self.rewards, self.offloaded, strict=True) if is_off]
        return offloaded + (held(self.policy.decoder.vae) if self.recipe.memory.offload_vae else [])

    def quantised_away(self) -> int:
        """Bytes that the denoiser saves through `memory.base`: its layers are counted unquantised here."""
        kind, saved = self.recipe.memory.base, 0.0
        if kind == "compute":
            return 0
        for layer in self._quantised():
            each = _NF4_BYTES if kind == "nf4" else 1 + 4 / layer.in_features
            saved += layer.weight.numel() * (layer.weight.itemsize - each)
        return int(saved)

    def _quantised(self) -> Iterable[nn.Linear]:
        """The layers that `dag.models.levers.quantise` would quantise; the adapter's own layers are trained, so left out."""
        for name, module in self.policy.denoiser.named_modules():
            if isinstance(module, nn.Linear) and "transformer_blocks" in name and not module.weight.requires_grad:
                yield module


def _differentiated(recipe: Recipe, number: int) -> int:
    """Pictures of a backward pass through a reward: of a learnt one for the comparison with the critic, which takes one."""
    if recipe.exact_rewards[number]:
        return recipe.memory.gradient_batch or recipe.train.micro_batch
    return int(recipe.learnt_rewards[number] and recipe.reward[number].has_gradient)


def _without_levers(recipe: Recipe, path: str) -> Recipe:
    """The recipe without the levers that cannot run on the meta device; their effect on weights is computed instead."""
    memory = {"base": "compute", "attention": "auto", "compile": False}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": path}),
            "memory": recipe.memory.model_copy(update=memory),
        }
    )


def _with_adamw(recipe: Recipe) -> Recipe:
    """The recipe with plain AdamW: 8-bit states are computed instead, so that bitsandbytes need not be installed."""
    sections = {"train": recipe.train, "flow": recipe.flow}
    return recipe.model_copy(
        update={name: section.model_copy(update={"optimizer": "adamw"}) for name, section in sections.items()}
    )


class _Kept(torch.autograd.Function):
    """The identity, which keeps its input until the backward pass.

    bitsandbytes' 8-bit matrix product does that too; a frozen linear layer does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def optimizer_states(parameters: Iterable[nn.Parameter], kind: OptimizerKind) -> Iterable[Tensor]:
    """AdamW's states: two moments for each weight, in float32 or, with `adamw8bit`, in 8 bits.

    8-bit states have one float32 for 256 weights; tensors under 4096 weights stay in float32.
    """
    for parameter in parameters:
        n = parameter.numel()
        for _ in range(2):
            if kind == "adamw" or n < _SMALLEST_8BIT:
                yield torch.empty(n, dtype=torch.float32, device=META)
            else:
                yield torch.empty(n, dtype=torch.uint8, device=META)
                yield torch.empty(math.ceil(n / _8BIT_BLOCK), dtype=torch.float32, device=META)


def _frozen(module: nn.Module, trained: Sequence[nn.Parameter]) -> list[Tensor]:
    """What a module holds beside weights that are trained."""
    return [tensor for tensor in held(module) if not any(tensor is weight for weight in trained)]


def held(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def some_bytes(count: int) -> Tensor:
    """A meta tensor of `count` bytes."""
    return torch.empty(count, dtype=torch.uint8, device=META)
