"""Peak memory of every phase of a recipe, from the model's configs alone.

The networks are built on the meta device, where tensors have shapes and no contents, and the phases are walked with the
code that trains: the bytes alive at any moment are counted, not estimated. Not in it: the CUDA context (some hundred
MiB), what the allocator leaves unused between blocks, and workspaces inside a single operation.

Legend: B rows of a micro-batch or tile, N trajectories of an epoch, T transitions.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dag.chain.policy import Prediction
from dag.chain.rollout import CHAIN_DTYPES
from dag.costs.live_bytes import peak_of
from dag.costs.reward_networks import footprint
from dag.models.sd import StableDiffusion
from dag.models.source import local_folder
from dag.objectives.state_flow import StateFlow
from dag.recipe import ForwardLooking, OptimizerKind, PolicyGradient, Recipe, is_scored
from dag.recipe.load import parse_reward

META = torch.device("meta")
# Stands for a hub id whose configs are not on this machine.
_ASSUMED = "random-sd15"
# bitsandbytes: 4 bits, and a statistic a block of 64, itself in 8 bits with a float32 a block of 256.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_SMALLEST_8BIT = 4096
_8BIT_BLOCK = 256


@dataclass(frozen=True)
class Forecast:
    """Bytes."""

    is_assumed: bool
    """True if the model is taken for an SD 1.5 because its configs are not on this machine."""
    standing: dict[str, int]
    """What is there in every phase, by kind."""
    phases: dict[str, int]
    """Peak of each phase."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class Simulation:
    """A recipe's networks without weights, and its phases."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, objective = recipe, recipe.objective
        self.is_assumed = local_folder(recipe.model.path) is None
        model = recipe.model.model_copy(update={"path": _ASSUMED if self.is_assumed else recipe.model.path})
        # What a lever does to weights is arithmetic; a kernel or a compiler on the meta device would be none.
        memory = recipe.memory.model_copy(update={"base": "compute", "attention": "auto", "compile": False})
        self.looking: ForwardLooking | None = None
        if not isinstance(objective, PolicyGradient):
            self.looking = objective.forward_looking
        self.policy = StableDiffusion(model, recipe.adapter, recipe.sampler, META, recipe.seed, memory, self.looking)
        self.policy.blank_prompt()
        if recipe.memory.base == "int8":
            for layer in self._quantised():
                layer.register_forward_pre_hook(lambda _, inputs: _Kept.apply(inputs[0]))
        self.schedule, self.T = self.policy.schedule, self.policy.schedule.num_transitions
        _ = self.schedule.table  # made once: no phase's own
        self.flow = None
        if not isinstance(objective, PolicyGradient):
            with META:
                channels, width = self.policy.latent_shape[0], self.policy.text_width
                self.flow = StateFlow(channels, width, self.T, recipe.flow.channels)
        there = [term for term in recipe.reward if getattr(term, "device", "auto") != "cpu"]
        self.rewards = [footprint(term) for term in there]
        self.offloaded = [bool(getattr(term, "offload", False)) for term in there]
        self.is_one_pass = recipe.train.rollout == "one_pass"
        self._peaks: dict[str, int] = {}

    # -- what stands in memory -----------------------------------------------------------------------------------

    def standing(self) -> dict[str, list[Tensor]]:
        """Tensors that every phase finds, by kind; gradients stay until the next update begins."""
        policy, train = self.policy, self.recipe.train
        trained = policy.trainable()
        kinds: dict[str, list[Tensor]] = {
            "denoiser": [t for t in _held(policy.unet) if not any(t is p for p in trained)],
            "trained weights": list(trained),
            "gradients": [torch.empty_like(p) for p in trained],
            "optimizer": list(optimizer_states(trained, train.optimizer)),
            "flow": [] if self.flow is None else _held(self.flow),
            "decoder": [] if policy.decoder.offloads else _held(policy.decoder.vae),
        }
        if policy.decoder.tiny is not None:
            kinds["decoder"] += _held(policy.decoder.tiny)
        if self.flow is not None:
            weights = list(self.flow.parameters())
            kinds["gradients"] += [torch.empty_like(p) for p in weights]
            kinds["optimizer"] += optimizer_states(weights, self.recipe.flow.optimizer)
        kinds["reward"] = [
            _bytes(f.weights) for f, is_off in zip(self.rewards, self.offloaded, strict=True) if not is_off
        ]
        if self.recipe.evaluation.diversity not in (None, "embedded"):
            kinds["evaluation"] = [_bytes(footprint(parse_reward("clip_score", [])).weights)]
        return kinds

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
        for name, module in self.policy.unet.named_modules():
            if isinstance(module, nn.Linear) and "transformer_blocks" in name and not module.weight.requires_grad:
                yield module

    def chain(self, trajectories: int) -> list[Tensor]:
        shape, dtype = self.policy.latent_shape, CHAIN_DTYPES[self.recipe.sampler.chain_dtype]
        return [torch.empty(self.T + 1, trajectories, *shape, dtype=dtype, device=META)]

    # -- phases --------------------------------------------------------------------------------------------------

    def forecast(self) -> Forecast:
        sizes = {kind: sum(_storages(tensors)) for kind, tensors in self.standing().items()}
        sizes["denoiser"] -= self.quantised_away()
        return Forecast(self.is_assumed, sizes, {name: self.peak(name) for name in self.phases()})

    def phases(self) -> tuple[str, ...]:
        """Names, in the order of an epoch."""
        if not self.is_one_pass:
            return "rollout", "update", "evaluation"
        return ("one pass", *(("warm-up rollout",) if self.recipe.flow.warmup_epochs > 0 else ()), "evaluation")

    def peak(self, phase: str) -> int:
        """Bytes; walked once."""
        if phase not in self._peaks:
            self._peaks[phase] = self._walked(phase) - self.quantised_away()
        return self._peaks[phase]

    def _walked(self, phase: str) -> int:
        standing, fetched, train = self.standing(), self._fetched_for_scoring(), self.recipe.train
        chains = [] if self.recipe.memory.chains == "cpu" else self.chain(train.trajectories)
        held = [tensor for tensors in standing.values() for tensor in tensors]
        # An update begins by dropping them, and makes its own.
        ungraded = [tensor for kind, tensors in standing.items() if kind != "gradients" for tensor in tensors]
        if phase == "one pass":
            # Flow-only passes need the chains: those of the epoch, and of the update at hand as they are sampled.
            kept = chains + self.chain(train.trajectories // train.updates) if self.recipe.flow.passes > 0 else []
            return peak_of(self.one_pass, [*ungraded, *fetched, *kept])
        if phase == "update":
            with_decoder = self.looking is not None and self.looking.source == "current"
            return peak_of(self.update, [*ungraded, *(fetched if with_decoder else []), *chains])
        if phase == "evaluation":
            return peak_of(self.evaluation, [*held, *fetched])
        return peak_of(self.rollout, [*held, *fetched, *chains])

    def _fetched_for_scoring(self) -> list[Tensor]:
        offloaded = [_bytes(f.weights) for f, is_off in zip(self.rewards, self.offloaded, strict=True) if is_off]
        return offloaded + (_held(self.policy.decoder.vae) if self.policy.decoder.offloads else [])

    def rollout(self) -> None:
        """A tile's chain, then its pictures."""
        rows = min(self.recipe.sampler.tile, self.recipe.train.trajectories)
        with torch.no_grad():
            x_0, chain = self._sampled(rows)
            seen = self._seen(rows)
            if seen:
                self._score(self.policy.preview(seen[0]))
            self._score(self.policy.decode(x_0))
            del chain

    def evaluation(self) -> None:
        rows = min(self.recipe.sampler.tile, self.recipe.evaluation.prompts * self.recipe.evaluation.images_per_prompt)
        with torch.no_grad():
            x_0, chain = self._sampled(rows)
            self._score(self.policy.decode(x_0))
            del chain

    def _sampled(self, rows: int) -> tuple[Tensor, list[Tensor]]:
        """(x_0, a tile's chain as it is kept): states one by one, then together."""
        x_t = self.state(rows)
        # Two steps: the second finds what the first left.
        for k in range(2):
            prediction = self.predict(x_t, k)
            x_next = self._step(x_t, prediction, k)
        del prediction, x_next
        states = [self.state(rows) for _ in range(self.T + 1)]
        return x_t.float(), [torch.stack(states)]

    def _seen(self, rows: int) -> list[Tensor]:
        """x0_hat of every scored state of a tile."""
        if self.looking is None or self.looking.source == "none":
            return []
        count = sum(is_scored(k, self.T, self.looking.stride) for k in range(self.T))
        return [torch.empty(rows, *self.policy.latent_shape, device=META) for _ in range(count)]

    def _score(self, images: Tensor) -> None:
        """The largest reward at work on pictures that are still there."""
        if self.rewards:
            _bytes(max(f.activations for f in self.rewards))
        del images

    def update(self) -> None:
        """Micro-batches of one step; the second finds the first one's gradients."""
        rows = self.recipe.train.micro_batch
        for _ in range(2):
            x_t, x_next = self.state(rows), self.state(rows)
            prediction = self.predict(x_t, 0)
            loss = self._loss(x_t, x_next, prediction)
            if self.looking is not None and self.looking.source == "current":
                with torch.no_grad():
                    self._score(self.policy.preview(x_t.float()))
                    unguided = self.looking.prediction == "conditional"
                    self.policy.predict(x_t, self.timestep(rows), self.text(rows), unguided=unguided)
                    self._score(self.policy.preview(x_t.float()))
            self._backward(loss)
            del prediction, loss

    def one_pass(self) -> None:
        """Steps down a chain: each is back-propagated after the forward pass of the next."""
        rows = min(self.recipe.train.micro_batch, self.recipe.train.trajectories // self.recipe.train.updates)
        x_t, pending = self.state(rows), None
        for k in range(3):
            prediction = self.predict(x_t, k)
            with torch.no_grad():
                x_next = self._step(x_t, prediction, k)
                if self.looking is not None and self.looking.source != "none":
                    self._score(self.policy.preview(x_t.float()))
            log_F = self.log_F(x_t)
            if pending is not None:
                self._backward(pending)
            pending = self._loss(x_t, x_next, prediction, log_F)
            del prediction, log_F
            x_t = x_next
        with torch.no_grad():
            self._score(self.policy.decode(x_t.float()))
        assert pending is not None
        self._backward(pending)

    # -- steps ---------------------------------------------------------------------------------------------------

    def state(self, rows: int) -> Tensor:
        dtype = CHAIN_DTYPES[self.recipe.sampler.chain_dtype]
        return torch.empty(rows, *self.policy.latent_shape, dtype=dtype, device=META)

    def timestep(self, rows: int) -> Tensor:
        return self.schedule.timesteps[0].expand(rows)

    def text(self, rows: int) -> Tensor:
        return torch.empty(rows, *self.policy.text_shape, dtype=self.policy.dtype, device=META)

    def predict(self, x_t: Tensor, k: int) -> Prediction:
        return self.policy.predict(x_t, self.timestep(len(x_t)), self.text(len(x_t)))

    def _step(self, x_t: Tensor, prediction: Prediction, k: int) -> Tensor:
        """A sampled step: next state and x0_hat, in the reference's own arithmetic."""
        ids = torch.zeros(len(x_t), dtype=torch.int64, device=META)
        rows, scale = prediction.rows, prediction.guidance_scale
        return self.schedule.sampling_step(x_t, rows, min(k, self.T - 1), 0, ids, scale, x_t.dtype).x_next

    def _loss(self, x_t: Tensor, x_next: Tensor, prediction: Prediction, log_F: Tensor | None = None) -> Tensor:
        """What a transition's loss holds: log-probs, references, the flow."""
        rows, reference, old = len(x_t), None, None
        if self.recipe.regulariser.pretrained_kl > 0:
            with torch.no_grad():
                reference = self.policy.predict(x_t, self.timestep(rows), self.text(rows), pretrained=True).guided
        if self.recipe.regulariser.sampling > 0:
            old = torch.empty(rows, *self.policy.latent_shape, device=META)
        ks = torch.zeros(rows, dtype=torch.int64, device=META)
        now = self.schedule.transition_log_probs(
            x_t, x_next, prediction.rows, ks, prediction.guidance_scale, reference, old
        )
        total = now.log_pf.sum()
        for extra in (now.kl, now.gap, log_F if log_F is not None or self.flow is None else self.log_F(x_t)):
            total = total if extra is None else total + extra.sum()
        return total

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.policy.weights.gather()

    def log_F(self, x_t: Tensor) -> Tensor | None:
        if self.flow is None:
            return None
        rows = len(x_t)
        return self.flow(x_t, self.timestep(rows), torch.zeros(rows, dtype=torch.int64, device=META), self.text(rows))


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


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=META)


def _storages(tensors: Iterable[Tensor]) -> Iterable[int]:
    """Bytes of each storage once."""
    return {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}.values()
