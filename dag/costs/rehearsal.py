"""What a recipe's training loop would ask of a GPU, counted without one: kernels, host copies, peak memory.

The same code that trains runs a few transitions on the meta device; see `dag.costs.fake_gpu`.

Legend: B rows of a micro-batch or tile, T transitions.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dag.chain.rollout import Batch, Score, assemble, sample_tile, score_tile
from dag.chain.trajectory import ChainStore
from dag.costs.fake_gpu import Counts, FakeGpu
from dag.costs.live_bytes import LiveBytes, as_on_cuda
from dag.costs.remembered import RememberedShapes
from dag.costs.weightless import META, Weightless, on_a_gpu
from dag.recipe import Recipe
from dag.recipe.reward_sections import Custom, Http, RewardTerm, Tower
from dag.rewards import Reward, RewardSum, build_reward
from dag.rewards.stand_in import StandIn
from dag.run.gpu import GIB
from dag.run.meter import PhaseMeter
from dag.training.epoch_state import EpochState
from dag.training.one_pass import OnePass
from dag.training.scoring import Scorer
from dag.training.stored import StoredTraining


@dataclass(frozen=True)
class Rehearsed:
    """What one transition of a micro-batch asks of a GPU, in the middle of training."""

    transition: Counts
    """One transition of all rows of a micro-batch; where chains are stored, its sampling and scoring are included."""
    per_tile: Counts
    """Work of a micro-batch that belongs to no transition: its first noise, its final pictures and their reward. Where chains
    are stored, the same work of a tile is included."""
    peak: int
    """Peak memory in bytes."""

    @property
    def launches(self) -> int:
        """Kernel launches of one transition."""
        return self.transition.kernels.total()

    @property
    def host_copies(self) -> int:
        """Copies between host and device in one transition."""
        return self.transition.host_copies.total()


def rehearse(recipe: Recipe) -> Rehearsed:
    """Run a recipe's training loop on the meta device and count; models and rewards of the hub need not be downloaded."""
    section, rows = recipe.forward_looking, recipe.train.micro_batch
    stride = 1 if section is None else section.stride
    # Enough steps for one full period of `stride` in the middle of a chain. Two micro-batches: the second is counted, while the
    # gradients of the first are in memory.
    recipe = recipe.model_copy(
        update={
            "sampler": recipe.sampler.model_copy(update={"steps": 2 * stride + (1 if stride == 1 else 3)}),
            "train": recipe.train.model_copy(
                update={
                    "trajectories": 2 * rows,
                    "updates": 1,
                    "inner_epochs": 1,
                    "step_fraction": 1.0,
                    "step_window": None,
                }
            ),
        }
    )
    loop = _Loop(recipe)
    with RememberedShapes(), LiveBytes("meta") as live, loop.gpu, as_on_cuda():
        live.include(loop.standing())
        if recipe.train.rollout == "one_pass":
            transition, per_tile = loop.one_pass(stride)
        else:
            transition, per_tile = loop.stored(stride)
    return Rehearsed(transition, per_tile, live.peak)


class _Loop:
    """A recipe's learner on the meta device, and its two ways to train: in one pass, and on stored chains."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.gpu = recipe, FakeGpu()
        self.made = Weightless(recipe, on_a_gpu(recipe))
        self.policy, self.learner, self.T = self.made.policy, self.made.learner, self.made.T
        self.reward = RewardSum(recipe.reward, META, _on_meta)
        self.batch, self.meter = self.made.batch(recipe.train.trajectories), PhaseMeter(META)
        self._watch()

    def _watch(self) -> None:
        watch = self.gpu.watch
        watch(self.policy, "predict", "denoiser, forward")
        watch(self.policy, "decode", "decoder")
        watch(self.policy, "preview", "decoder")
        watch(self.reward, "total", "reward")
        watch(self.reward, "gradient", "reward, gradient")
        watch(self.learner.updates.policy, "backward", "backward")
        if self.made.flow is not None:
            watch(self.made.flow, "forward", "flow, forward")

    def standing(self) -> Iterable[Tensor]:
        """The tensors that are in memory before an update; without gradients, which the update makes itself."""
        for kind, tensors in self.made.standing().items():
            yield from tensors if kind != "gradients" else ()

    def scorer(self, batch: Batch) -> Score:
        return Scorer(self.recipe, self.policy, self.reward, [""], batch)

    def _state(self) -> EpochState:
        place = torch.device("cpu") if self.recipe.memory.chains == "cpu" else META
        store = ChainStore(self.T + 1, len(self.batch.sample_id), place, META)
        return EpochState(self.recipe.warmup_epochs, store)

    def one_pass(self, stride: int) -> tuple[Counts, Counts]:
        """Counts of the second micro-batch in one pass: (a transition in the middle, what a micro-batch adds once)."""
        training = OnePass(self.learner, self.meter)
        for _ in training.steps(self._state(), self.batch, self.scorer, on_rows=self.gpu.mark):
            pass
        return self._between(self._second_micro_batch(), stride)

    def stored(self, stride: int) -> tuple[Counts, Counts]:
        """Counts with stored chains, of sampling, scoring and training together: (a transition, what a tile adds once)."""
        tile, marks, state = self.batch, self.gpu.marks, self._state()
        recipe, text, score = self.recipe, self.made.text[self.batch.prompt_id], self.scorer(self.batch)
        self.gpu.mark()
        drawn = sample_tile(
            self.policy,
            text,
            tile.sample_id,
            recipe.seed,
            recipe.sampler,
            recipe.forward_looking,
            recipe.samples_prior,
            on_step=self.gpu.mark,
        )
        total, per_tile = self._between(marks, stride)
        marks.clear()
        self.gpu.mark()
        seen, reward, _ = score_tile(self.policy, drawn, score, on_image=self.gpu.mark)
        if recipe.forward_looking is not None:
            # The marks are the start, the first picture, the second: the first one may also do work that is done only once.
            second_picture = marks[2] - marks[1]
            total = total + Counts(*_scaled(second_picture, 1 / stride))
        marks.clear()
        state.store.put(drawn.chain)
        state.sampled.append(assemble(drawn, seen, reward, tile, recipe.seed, recipe.sampler))
        del drawn
        training = StoredTraining(self.learner, self.meter)
        for _ in training.steps(state, state.rollout(), score, on_rows=self.gpu.mark):
            pass
        trained, once = self._between(self._second_micro_batch(), stride)
        return total + trained, per_tile + once

    def _second_micro_batch(self) -> Sequence[Counts]:
        """The marks from the end of the first micro-batch on: training marks the counts after each of its T transitions."""
        return self.gpu.marks[self.T - 1 :]

    def _between(self, marks: Sequence[Counts], stride: int) -> tuple[Counts, Counts]:
        """Counts (of the mean transition in one period of `stride`, of what the first transition has beyond that).

        Args:
            marks: the counts before the first of T transitions and after each.
        """
        steps = [after - before for before, after in itertools.pairwise(marks)][: self.T]
        chosen = steps[stride : 2 * stride]
        total = sum(chosen[1:], chosen[0])
        transition = Counts(*_scaled(total, 1 / stride))
        rest = steps[0] - transition
        return transition, rest


def _scaled(counts: Counts, factor: float) -> tuple[Counter[str], Counter[str]]:
    def scaled(counter: Counter[str]) -> Counter[str]:
        return Counter({name: round(number * factor) for name, number in counter.items()})

    return scaled(counts.kernels), scaled(counts.host_copies)


def _on_meta(term: RewardTerm, device: torch.device) -> Reward:
    """A stand-in that does a reward's work on the device: no weights are loaded, no custom code or server is called."""
    if isinstance(term, Tower):
        return StandIn(term, torch.device("cpu") if term.device == "cpu" else device)
    if isinstance(term, Custom | Http):
        return lambda images, prompts: images.cpu().flatten(1)[:, 0]
    return build_reward(term, device)


def row_of(path: str, found: Rehearsed) -> dict[str, Any]:
    """The row that `python -m dag.bench launches` writes."""
    kernels = found.transition.kernels
    return {
        "recipe": path,
        "launches": found.launches,
        "host_copies": found.host_copies,
        "peak_gib": round(found.peak / GIB, 3),
        "shares": {part: round(number / found.launches, 4) for part, number in kernels.most_common()},
        "launches_of": dict(kernels.most_common()),
        "host_copies_at": dict(found.transition.host_copies),
        "host_copies_per_tile": found.per_tile.host_copies.total(),
    }
