"""FLOP of one transition of one sample: what a recipe does, and what the published code does.

Counted on the meta device, without weights and without a GPU. FLOP = 2 x multiply-adds of convolutions, matrix products and
attention. Legend: T transitions.
"""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dag.costs.live_bytes import as_on_cuda
from dag.costs.remembered import RememberedShapes
from dag.costs.weightless import META, Weightless
from dag.recipe import Backpropagation, Recipe, is_scored
from dag.recipe.reward_sections import Tower
from dag.rewards.stand_in import architecture

Work = dict[str, float]

_ATEN = torch.ops.aten


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *others: Any, out_shape: Any, **options: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *others: Any,
    out_shape: Any,
    **options: Any,
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _added_product(
    total: torch.Size, a: torch.Size, b: torch.Size, *others: Any, out_shape: Any, **options: Any
) -> int:
    return 2 * a[0] * a[1] * b[1]


# Operators whose FLOP PyTorch 2.13 does not count: attention on a CPU, and a matrix product added in place.
_UNCOUNTED = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN.addmm_: _added_product,
}


def counter() -> FlopCounterMode:
    """A context manager that counts the FLOP of what runs inside it."""
    mode = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    # Its record of modules hooks their inputs, which fails where a gradient with respect to an input is taken.
    mode.mod_tracker = _NoModules()  # type: ignore[assignment]
    return mode


class _NoModules:
    """Takes the place of PyTorch's record of the modules that are being called: all work is that of one program."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def of_recipe(recipe: Recipe) -> Work:
    """GFLOP of one transition under a recipe, by kind of work; what happens once in a trajectory counts 1 / T."""
    made = Weightless(recipe)
    shown = _Counts(made)
    section, T, passes = recipe.forward_looking, made.T, _pretrained_passes(recipe)
    scored = 0.0
    if section is not None and section.source == "rollout":
        scored = sum(is_scored(k, T, section.stride) for k in range(T)) / T
    if isinstance(recipe.objective, Backpropagation):
        return _of_backpropagation(recipe, recipe.objective, shown, T)
    return {
        "sampling": 0.0 if recipe.train.rollout == "one_pass" else shown.guided,
        "training": shown.trained,
        "extra UNet passes": passes * shown.pretrained if passes else 0.0,
        "decodes": scored * shown.preview + shown.decode / T,
        "rewards": (scored + 1 / T) * shown.reward,
        "flow": shown.flow,
        "gradient of log F": _look_ahead(recipe, shown, T),
    }


def _of_backpropagation(recipe: Recipe, section: Backpropagation, shown: "_Counts", T: int) -> Work:
    """`of_recipe` of an objective that trains the last steps alone, at most so many, once for each copy of the last."""
    passes, has_kl = section.most_passes / T, recipe.regulariser.pretrained_kl > 0
    towers = sum(_tower(term.name, grad=True) for term in recipe.reward if isinstance(term, Tower))
    # Between two trained steps the adjoint goes back through the denoiser once more.
    between = (section.most_steps - 1) * (shown.through - shown.guided)
    return {
        "sampling": shown.guided * (1 + (section.copies - 1) / T),
        "training": shown.trained * passes,
        "extra UNet passes": shown.pretrained * passes if has_kl else 0.0,
        "decodes": shown.decode / T,
        "rewards": shown.reward / T,
        "flow": 0.0,
        "gradient of log F": (between + section.copies * (shown.decode_gradient + towers)) / T,
    }


def _pretrained_passes(recipe: Recipe) -> int:
    """Forward passes of the pretrained model for a transition that is sampled and trained."""
    takes_it = recipe.balance is not None and recipe.balance.takes_gradient and recipe.has_prior
    for_training = recipe.regulariser.pretrained_kl > 0 or takes_it
    if recipe.train.rollout == "one_pass":
        return int(for_training or recipe.samples_prior)
    return int(for_training) + int(recipe.samples_prior)


def _look_ahead(recipe: Recipe, shown: "_Counts", T: int) -> float:
    """GFLOP for d log F / d x_next, of which the last transition's goes through no denoiser."""
    balance = recipe.balance
    if balance is None or not balance.takes_gradient:
        return 0.0
    through = shown.through
    if recipe.train.rollout == "one_pass" and balance.jacobian != "pretrained":
        through -= shown.guided  # the forward pass is that of sampling
    if balance.jacobian == "none":
        through = 0.0 if recipe.train.rollout == "one_pass" else shown.guided
    reward = 0.0
    if any(recipe.exact_rewards):
        towers = [term for term, is_exact in zip(recipe.reward, recipe.exact_rewards, strict=True) if is_exact]
        towers_there_and_back = sum(_tower(term.name, grad=True) for term in towers if isinstance(term, Tower))
        reward = (1 - 1 / T) * shown.preview_gradient + shown.decode_gradient / T + towers_there_and_back
    return (1 - 1 / T) * (through + shown.flow_gradient) + reward


def of_published(recipe: Recipe) -> Work:
    """GFLOP of one transition of `dag.costs.published_work`, by kind; without checkpointing, which the published code lacks."""
    recipe = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"checkpointing": "none"})})
    made = Weightless(recipe)
    shown, T = _Counts(made), made.T
    return {
        "sampling": shown.guided,
        "training": shown.trained,
        "extra UNet passes": 2 * shown.conditional,
        "decodes": (2 + 1 / T) * shown.decode,
        "rewards": (2 + 1 / T) * shown.reward,
        "flow": 2 * shown.flow,
        "gradient of log F": 0.0,
    }


class _Counts:
    """GFLOP of each building block, for one sample.

    `trained` and `flow` include the backward pass; `conditional` is a UNet pass without the unconditional branch. `through` and
    those called a gradient are a forward pass and a backward pass to the input.
    """

    def __init__(self, made: Weightless) -> None:
        self.made, self.policy = made, made.policy
        self.state = made.chain(1, 1)[0], made.policy.schedule.timesteps[:1], made.text.to(META)
        self.embedding = made.policy.pretrained_text(made.text).to(META)

    @cached_property
    def conditional(self) -> float:
        return _gflop(lambda: self.policy.predict(*self.state, unguided=True), grad=False)

    @cached_property
    def guided(self) -> float:
        return _gflop(lambda: self.policy.predict(*self.state), grad=False)

    @cached_property
    def pretrained(self) -> float:
        return _gflop(lambda: self.policy.predict(*self.state, pretrained=True), grad=False)

    @cached_property
    def trained(self) -> float:
        return _gflop(lambda: self.policy.predict(*self.state).branches.sum().backward())

    @cached_property
    def through(self) -> float:
        x, *rest = self.state
        return _there_and_back(lambda x: self.policy.predict(x, *rest).branches, x.float())

    @cached_property
    def decode_gradient(self) -> float:
        return _there_and_back(self.policy.decode, self.state[0].float())

    @cached_property
    def preview_gradient(self) -> float:
        return _there_and_back(self.policy.preview, self.state[0].float())

    @cached_property
    def flow_gradient(self) -> float:
        flow, (x, t, _), text = self.made.flow, self.state, self.embedding
        return 0.0 if flow is None else _there_and_back(lambda x: flow(x, t, _step(t), text), x.float())

    @cached_property
    def decode(self) -> float:
        return _gflop(lambda: self.policy.decode(self.state[0].float()), grad=False)

    @cached_property
    def preview(self) -> float:
        return _gflop(lambda: self.policy.preview(self.state[0].float()), grad=False)

    @cached_property
    def flow(self) -> float:
        flow, (x_t, t, _), text = self.made.flow, self.state, self.embedding
        return 0.0 if flow is None else _gflop(lambda: flow(x_t, t, _step(t), text).sum().backward())

    @cached_property
    def reward(self) -> float:
        return sum(_tower(term.name) for term in self.made.recipe.reward if isinstance(term, Tower))


@cache
def _tower(name: str, grad: bool = False) -> float:
    """GFLOP of a reward network on one picture, with `grad` also of a backward pass to it."""
    with META:
        towers, score, size = architecture(name)
        pixels = torch.empty(1, 3, size, size)
    for tower in towers:
        tower.requires_grad_(False)
    return (
        _there_and_back(lambda x: score(x).pooler_output, pixels) if grad else _gflop(lambda: score(pixels), grad=False)
    )


def _step(t: Tensor) -> Tensor:
    """Indices of a transition, for the timesteps (B,), which are no integers in a flow-matching model."""
    return torch.zeros_like(t, dtype=torch.int64)


def _there_and_back(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """GFLOP of a forward pass and of a backward pass to the input."""
    x = x.detach().requires_grad_(True)
    return _gflop(lambda: torch.autograd.grad(call(x).sum(), x))


def _gflop(call: Callable[[], object], grad: bool = True) -> float:
    with RememberedShapes(), counter() as counted, as_on_cuda(), torch.set_grad_enabled(grad):
        call()
    return counted.get_total_flops() / 1e9
