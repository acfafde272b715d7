"""What a recipe's own training loop would ask of a GPU, without one: kernels, copies between host and device, peak memory.

A few transitions of the loop that trains run on the meta device, where tensors have shapes and no values. Each operator
counts as one kernel launch, and so does each fused kernel, though a library may start several; a compiled graph would start
fewer. Each time Python reads a tensor's value counts as one wait for the GPU.

Legend: B rows of a micro-batch or tile, T transitions.
"""

import itertools
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from dag_kernels import choose
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dag.chain.policy import Reward
from dag.chain.rollout import Batch, Score, assemble, sample_tile, score_tile
from dag.chain.trajectory import ChainStore
from dag.costs.live_bytes import GIB, LiveBytes, as_on_cuda
from dag.costs.memory import META, Simulation
from dag.recipe import PolicyGradient, Recipe
from dag.recipe.reward_sections import Custom, Http, RewardTerm, Tower
from dag.rewards import RewardSum, build_term
from dag.rewards.stand_in import StandIn
from dag.training.build import learner_of
from dag.training.one_pass import OnePass
from dag.training.stored import Learner

_ATEN = torch.ops.aten
# Operators that give a tensor without starting a kernel, besides those that only view one.
_WITHOUT_KERNEL = {"aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "aten::alias", "aten::_reshape_alias"}
# They may index what is on the device by what is on the host, at the price of a copy.
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_HERE = Path(__file__).parents[1]


class DeviceMismatchError(RuntimeError):
    """An operator got tensors of the host and of the device, which a GPU refuses."""


@dataclass
class Counts:
    """What has been asked of the device so far."""

    kernels: Counter[str] = field(default_factory=Counter)
    """By part of the loop."""
    host_copies: Counter[str] = field(default_factory=Counter)
    """Copies between host and device in either direction, by the line that makes them; each waits for the device."""

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(self.kernels - earlier.kernels, self.host_copies - earlier.host_copies)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.kernels + other.kernels, self.host_copies + other.host_copies)

    def copy(self) -> "Counts":
        return Counts(self.kernels.copy(), self.host_copies.copy())


class Rehearsal(TorchDispatchMode):
    """Takes the meta device for a GPU: counts, refuses to mix devices, and answers with ones where a value is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.part = Counts(), "rest"
        self.marks: list[Counts] = []

    def mark(self, *_: object) -> None:
        """Remember the counts at this moment."""
        self.marks.append(self.counts.copy())

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Kernels inside belong to this part; the innermost one counts."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Have every call of a method of this object belong to a part."""
        call = getattr(owner, name)

        @wraps(call)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.inside(part):
                return call(*arguments, **options)

        setattr(owner, name, watched)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = _tensors((args, kwargs))
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            self._copied()
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "aten::_to_copy" and args[0].is_meta and _device(kwargs) == "cpu":
            self._copied()
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "aten::copy_" and args[1].is_meta and not args[0].is_meta:
            self._copied()
            return args[0].fill_(1)
        on_host = [tensor for tensor in tensors if not tensor.is_meta and (tensor.dim() or name in _INDEXING)]
        if on_host and any(tensor.is_meta for tensor in tensors):
            self._check_mixture(name, tensors)
        elif name == "aten::_to_copy" and on_host and _device(kwargs) == "meta":
            self._copied()
        result = func(*args, **kwargs)
        if _starts_kernel(func, name, _tensors(result) or tensors):
            self.counts.kernels[self.part] += 1
        return result

    def _check_mixture(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Host and device in one call: a copy, or a mistake."""
        is_indexed = name in _INDEXING and tensors[0].is_meta
        if not is_indexed and name != "aten::copy_":
            raise DeviceMismatchError(f"{name} of {', '.join(f'{tuple(t.shape)} on {t.device}' for t in tensors)}")
        self._copied()

    def _copied(self) -> None:
        ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_HERE)]
        frames = [frame for frame in ours if frame.filename != __file__]
        at = f"{Path(frames[-1].filename).relative_to(_HERE.parent)}:{frames[-1].name}" if frames else "elsewhere"
        self.counts.host_copies[at] += 1


def _device(kwargs: dict[str, Any]) -> str | None:
    return torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _starts_kernel(func: Any, name: str, touched: Sequence[Tensor]) -> bool:
    if func.is_view or name in _WITHOUT_KERNEL or "empty" in name:
        return False
    return any(tensor.is_meta for tensor in touched)


# -- a recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsed:
    """One transition of every row of a micro-batch (and, where chains are stored, of a tile), in the middle of training."""

    transition: Counts
    per_tile: Counts
    """Work of a micro-batch that belongs to no transition: its first noise, its final picture and the reward of that. With
    stored chains also that of a tile."""
    peak: int
    """Bytes."""

    @property
    def launches(self) -> int:
        return self.transition.kernels.total()

    @property
    def host_copies(self) -> int:
        return self.transition.host_copies.total()


def rehearse(recipe: Recipe) -> Rehearsed:
    """Count the recipe's own loop on the meta device; models and rewards of the hub by their architectures."""
    stride = 1 if isinstance(recipe.objective, PolicyGradient) else recipe.objective.forward_looking.stride
    rows = recipe.train.micro_batch
    # One period of scored states in the middle, two micro-batches: the second finds the first one's gradients.
    recipe = recipe.model_copy(
        update={
            "sampler": recipe.sampler.model_copy(update={"steps": 2 * stride + 3}),
            "train": recipe.train.model_copy(
                update={"trajectories": 2 * rows, "updates": 1, "inner_epochs": 1, "step_fraction": 1.0}
            ),
        }
    )
    loop = _Loop(recipe)
    with LiveBytes() as live, loop.rehearsal, as_on_cuda():
        live.include(loop.standing())
        if recipe.train.rollout == "one_pass":
            transition, per_tile = loop.one_pass(stride)
        else:
            transition, per_tile = loop.stored(stride)
    return Rehearsed(transition, per_tile, live.peak)


class _Loop:
    """A recipe's learner on the meta device, and its ways through an epoch."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.rehearsal = recipe, Rehearsal()
        made = Simulation(recipe)
        self.policy, self.T = made.policy, made.policy.schedule.num_transitions
        # The update makes its own gradients, and the learner its own flow.
        kinds = {kind: tensors for kind, tensors in made.standing().items() if kind not in ("gradients", "flow")}
        self.standing_tensors = [tensor for tensors in kinds.values() for tensor in tensors]
        kernels = choose("torch" if recipe.kernels == "torch" else "auto", META)
        self.policy.schedule = replace(self.policy.schedule, kernels=kernels)
        _ = self.policy.schedule.table  # made once, not in a transition
        self.text = torch.zeros(1, *self.policy.text_shape, dtype=self.policy.dtype)
        self.learner: Learner = learner_of(recipe, self.policy, self.text, kernels, warn=lambda text: None)
        self.reward = RewardSum(recipe.reward, META, _on_meta)
        self._watch()

    def _watch(self) -> None:
        watch = self.rehearsal.watch
        watch(self.policy, "predict", "denoiser, forward")
        watch(self.policy, "decode", "decoder")
        watch(self.policy, "preview", "decoder")
        watch(self.learner.updates.stepper, "backward", "backward")
        if self.learner.flow_fit is not None:
            watch(self.learner.flow_fit.flow, "forward", "flow, forward")

    def standing(self) -> Iterable[Tensor]:
        yield from self.standing_tensors
        if self.learner.flow_fit is not None:
            yield from self.learner.flow_fit.flow.parameters()

    def scorer(self, batch: Batch) -> Score:
        def score(images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
            with self.rehearsal.inside("reward"):
                return self.reward.total(
                    images, [""] * len(rows), batch.sample_id[rows].tolist(), is_preview=is_preview
                )

        return score

    def batch(self) -> Batch:
        count = self.recipe.train.trajectories
        return Batch(torch.zeros(count, dtype=torch.int64), torch.arange(count))

    def one_pass(self, stride: int) -> tuple[Counts, Counts]:
        """(a middle transition, what comes on top once a micro-batch) of the second micro-batch."""
        walk = OnePass(self.learner, self.recipe.seed, self.recipe.sampler)
        walk.learn(self.batch(), self.recipe.flow.warmup_epochs, self.scorer, on_rows=self.rehearsal.mark)
        return self._between(self.rehearsal.marks[self.T - 1 :], stride)

    def stored(self, stride: int) -> tuple[Counts, Counts]:
        """The same of sampling, scoring and training together."""
        tile, marks = self.batch(), self.rehearsal.marks
        objective, sampler = self.recipe.objective, self.recipe.sampler
        looking = None if isinstance(objective, PolicyGradient) else objective.forward_looking
        if looking is not None and looking.source == "none":
            looking = None
        has_prior = not isinstance(objective, PolicyGradient) and objective.prior == "pretrained"
        self.rehearsal.mark()
        text, seed = self.text[tile.prompt_id], self.recipe.seed
        drawn = sample_tile(
            self.policy, text, tile.sample_id, seed, sampler, looking, has_prior, on_step=self.rehearsal.mark
        )
        total, per_tile = self._between(marks, stride)
        marks.clear()
        score = self.scorer(tile)
        self.rehearsal.mark()
        seen, reward, _ = score_tile(self.policy, drawn, score, on_image=self.rehearsal.mark)
        if looking is not None:
            scored = Counts(*_scaled(marks[2] - marks[1], 1 / stride))
            total = total + scored
        marks.clear()
        place = torch.device("cpu") if self.recipe.memory.chains == "cpu" else META
        store = ChainStore(self.T + 1, len(tile.sample_id), place, META)
        store.put(drawn.chain)
        trajectories = replace(assemble(drawn, seen, reward, tile, seed, sampler), chain=store.finish())
        del drawn
        epoch = self.recipe.flow.warmup_epochs
        self.learner.learn(trajectories, epoch, score, on_rows=self.rehearsal.mark)
        trained, once = self._between(marks[self.T - 1 :], stride)
        return total + trained, per_tile + once

    def _between(self, marks: Sequence[Counts], stride: int) -> tuple[Counts, Counts]:
        """(mean of the transitions of one period, the rest of what lies between the marks of T transitions)."""
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
    """A reward's work on the device without its weights, and without calling what is not ours."""
    if isinstance(term, Tower):
        return StandIn(term.name, term, torch.device("cpu") if term.device == "cpu" else device)
    if isinstance(term, Custom | Http):
        return lambda images, prompts: images.cpu().flatten(1)[:, 0]
    return build_term(term, device)


def row_of(path: str, found: Rehearsed) -> dict[str, Any]:
    """As `python -m dag.bench launches` writes it."""
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
