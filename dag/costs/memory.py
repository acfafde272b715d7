"""Peak memory of every phase of a recipe, from the model's configs alone.

The phases run on the meta device, where tensors have shapes and no contents, by the code that trains: the bytes alive at any
moment are counted, not estimated. Not in it: the CUDA context (some hundred MiB), what the allocator leaves unused between
blocks, and workspaces inside a single operation.

Legend: B rows of a micro-batch or tile, N trajectories of an epoch, T transitions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dag.chain.noising import last_state, noised_chain
from dag.chain.rollout import Score, sample_tile, score_tile
from dag.chain.trajectory import ChainStore, Trajectories
from dag.costs.fake_gpu import FakeGpu
from dag.costs.live_bytes import LiveBytes, as_on_cuda
from dag.costs.remembered import RememberedShapes
from dag.costs.weightless import META, Weightless, held, on_a_gpu, some_bytes
from dag.recipe import Recipe
from dag.run.meter import PhaseMeter
from dag.training.critic_fit import preview_steps
from dag.training.epoch_state import EpochState
from dag.training.one_pass import OnePass
from dag.training.stored import StoredTraining

CPU = torch.device("cpu")
# Trajectories that the reward critic is fitted to: they give more than one batch of it, and its batches do not grow with a rollout.
_LESSON = 64
# Steps of a chain that run. The last of them finds in memory all that a step can leave; further steps add only their states.
_STEPS = 4


@dataclass(frozen=True)
class Forecast:
    """The predicted memory of a recipe, in bytes."""

    counted_as: str
    """The model whose configs were counted; see `dag.models.source.counted_as`."""
    standing: dict[str, int]
    """Bytes that are in memory during every phase, by kind, e.g. "denoiser"."""
    phases: dict[str, int]
    """Peak of each phase."""

    @property
    def peak(self) -> int:
        """The highest peak of all phases."""
        return max(self.phases.values())


class Simulation:
    """Runs the phases of a recipe on networks without weights, to count their bytes."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, steps = recipe, min(recipe.sampler.steps, _STEPS)
        self.left_out = recipe.sampler.steps - steps
        short = {
            "sampler": recipe.sampler.model_copy(update={"steps": steps}),
            # All steps are trained: the peak does not depend on how many are left out.
            "train": recipe.train.model_copy(update={"step_fraction": 1.0, "step_window": None}),
        }
        self.made = Weightless(recipe.model_copy(update=short), on_a_gpu(recipe))
        self.is_one_pass = recipe.train.rollout == "one_pass"
        self._peaks: dict[str, int] = {}

    def forecast(self) -> Forecast:
        """The peaks of all phases."""
        sizes = {kind: sum(_storages(tensors)) for kind, tensors in self.made.standing().items()}
        sizes["denoiser"] -= self.made.quantised_away()
        return Forecast(self.made.counted_as, sizes, {name: self.peak(name) for name in self.phases()})

    def phases(self) -> tuple[str, ...]:
        """Names of the phases, in the order of an epoch."""
        if not self.is_one_pass:
            data = self.recipe.data
            sources = [*["rollout"] * data.samples, *(() if data.folder is None else ("given pictures",))]
            return *sources, "update", "evaluation"
        return ("one pass", *(("warm-up rollout",) if self.recipe.warmup_epochs > 0 else ()), "evaluation")

    def peak(self, phase: str) -> int:
        """Peak bytes of a phase; the phase is counted at the first call only."""
        if phase not in self._peaks:
            self._peaks[phase] = self._counted(phase) - self.made.quantised_away()
        return self._peaks[phase]

    def _counted(self, phase: str) -> int:
        made, train = self.made, self.recipe.train
        N, scores_again = train.trajectories, self.recipe.scores_in_training
        standing, fetched = made.standing(), made.fetched_for_scoring()
        chains = [] if self.recipe.memory.chains == "cpu" else self._chains(N)
        everything = [tensor for tensors in standing.values() for tensor in tensors]
        # An update begins without gradients: it drops the old ones and makes its own.
        ungraded = [tensor for kind, tensors in standing.items() if kind != "gradients" for tensor in tensors]
        if phase == "one pass":
            # Passes that train the flow alone need the epoch's chains, besides those that the present update is sampling.
            kept = [*chains, self._chain(N // train.updates)] if self.recipe.flow.passes > 0 else []
            walked = self._peak_of(self.one_pass, [*ungraded, *fetched, *kept])
            return max(walked, self._critic_peak(None, [*fetched, *kept]))
        if phase == "update":
            chain, scoring = chains[0] if chains else self._chain(N, CPU), fetched if scores_again else []
            updated = self._peak_of(lambda: self.update(chain), [*ungraded, *scoring, *chains])
            return max(updated, self._critic_peak(chain, [*scoring, *chains]))
        if phase == "evaluation":
            replayed = chains[len(chains) - self.recipe.data.replay :]
            left_out = self._states_left_out(self._evaluated(), False)
            return self._peak_of(self.evaluation, [*everything, *fetched, *replayed, *left_out])
        if phase == "given pictures":
            left_out = [] if self.recipe.objective.num_draws else self._states_left_out(self._sampled(), False)
            return self._peak_of(self.given, [*everything, *fetched, *chains, *left_out])
        left_out = self._states_left_out(self._sampled(), self.recipe.forward_looking is not None)
        return self._peak_of(self.rollout, [*everything, *fetched, *chains, *left_out])

    def _critic_peak(self, chain: Tensor | None, existing: Iterable[Tensor]) -> int:
        """Peak bytes while the reward critic learns, 0 without one; `existing` tensors are those that do not always stand."""
        fit = self.made.learner.critic_fit
        if fit is None:
            return 0
        # The gradients of the last update are in memory still. The critic makes its own gradients and optimizer states here.
        others = [tensor for kind, tensors in self.made.standing().items() if kind != "critic" for tensor in tensors]
        return self._peak_of(lambda: self.critic(chain), [*others, *held(fit.critic), *existing])

    def _peak_of(self, run: Callable[[], object], existing: Iterable[Tensor]) -> int:
        """Peak bytes of `run`, `existing` tensors included."""
        with RememberedShapes(), LiveBytes("meta") as live, FakeGpu(), as_on_cuda():
            live.include(existing)
            run()
        return live.peak

    def _chain(self, trajectories: int, place: torch.device = META) -> Tensor:
        """Chains (T + 1, N, C, H, W) with all steps of the recipe, also those that are left out here."""
        return self.made.chain(trajectories, self.recipe.sampler.steps + 1, place)

    def _chains(self, trajectories: int) -> list[Tensor]:
        """The chains that an epoch keeps: of the rollout, of given pictures, and last those of `data.replay`."""
        data, draws = self.recipe.data, self.recipe.objective.num_draws
        other = 1 if draws else self.recipe.sampler.steps + 1
        count = data.replay + (data.folder is not None)
        sampled = [self._chain(trajectories)] if data.samples else []
        return [*sampled, *(self.made.chain(trajectories, other) for _ in range(count))]

    def _states_left_out(self, rows: int, is_scored: bool) -> list[Tensor]:
        """What a tile of so many rows keeps of the steps that do not run: their states, and x0_hat where it is scored."""
        section = self.recipe.forward_looking if is_scored else None
        scored = 0 if section is None else self.left_out // section.stride
        x0_hat = torch.empty(scored, rows, *self.made.policy.latent_shape, device=META)
        return [self.made.chain(rows, self.left_out), x0_hat]

    def _sampled(self) -> int:
        """Rows of a tile of the rollout."""
        return min(self.recipe.sampler.tile, self.recipe.train.trajectories)

    def _evaluated(self) -> int:
        """Rows of a tile of the evaluation."""
        section = self.recipe.evaluation
        return min(self.recipe.sampler.tile, section.prompts * section.images_per_prompt)

    # -- phases --------------------------------------------------------------------------------------------------

    def rollout(self) -> None:
        """Sample a tile, then decode and score its x0_hat and final pictures."""
        made, recipe, sampler = self.made, self.made.recipe, self.made.recipe.sampler
        tile = made.batch(self._sampled())
        text, looking = made.text[tile.prompt_id], recipe.forward_looking
        drawn = sample_tile(made.policy, text, tile.sample_id, recipe.seed, sampler, looking, recipe.samples_prior)
        score_tile(made.policy, drawn, self.score)

    @torch.no_grad()
    def given(self) -> None:
        """Encode and noise a tile of given pictures, then decode and score the ends of their chains."""
        made, recipe = self.made, self.made.recipe
        policy, tile = made.policy, made.batch(self._sampled())
        side, ids = policy.latent_shape[1] * policy.decoder.side, tile.sample_id.to(META)
        x_0 = policy.decoder.encode(torch.zeros(len(ids), 3, side, side))
        if recipe.objective.num_draws:
            chain = last_state(policy.schedule, x_0, ids, recipe.seed, recipe.sampler)
        else:
            chain, _ = noised_chain(policy.schedule, x_0, ids, recipe.seed, recipe.sampler)
        if recipe.samples_prior:
            policy.predict(chain[0], policy.schedule.timesteps[0].expand(len(ids)), made.text[tile.prompt_id])
        self.score(policy.decode(chain[-1].float()), torch.arange(len(ids)))

    def evaluation(self) -> None:
        """Sample a tile, then decode and score its final pictures."""
        made, recipe = self.made, self.made.recipe
        tile = made.batch(self._evaluated())
        drawn = sample_tile(made.policy, made.text[tile.prompt_id], tile.sample_id, recipe.seed, recipe.sampler)
        self.score(made.policy.decode(drawn.x_0), torch.arange(len(drawn.x_0)))

    def update(self, chain: Tensor) -> None:
        """Train two micro-batches of an update: during the second, the gradients of the first are in memory.

        The second is the last step's, whose reward's gradient, where it is taken, comes by way of the VAE.
        """
        N, made = self.recipe.train.trajectories, self.made
        trajectories, state = self._trajectories(N, chain), self._state()
        # As if the epoch had begun: what precedes the first update trains the flow, and the critic, which has its own peak.
        state.has_begun, state.advantages = True, None if made.flow is not None else trajectories.reward
        training = StoredTraining(made.learner, PhaseMeter(META))
        # A sweep's micro-batch has all steps; other objectives have one for each step.
        state.micro_batches = 0 if made.learner.losses.is_sweep else max(0, made.T - 2)
        for _ in islice(training.steps(state, trajectories, self.score), 2):
            pass

    def one_pass(self) -> None:
        """Train the first micro-batch of an update: during its later steps, the gradients of the first are in memory."""
        train = self.recipe.train
        training, batch = OnePass(self.made.learner, PhaseMeter(META)), self.made.batch(train.trajectories)
        next(training.steps(self._state(), batch, lambda batch: self.score))

    def critic(self, chain: Tensor | None) -> None:
        """Fit the reward critic to a few trajectories, compare it with the exact gradient, and fit it again.

        Args:
            chain: of a stored rollout; None in one pass, which has made the previews while it sampled.
        """
        learner, train, previews = self.made.learner, self.recipe.train, None
        count = min(_LESSON, train.trajectories // (train.updates if chain is None else 1))
        if chain is None:
            section = self.recipe.forward_looking
            steps = preview_steps(self.made.T, 1 if section is None else section.stride)
            previews = torch.zeros(count, len(steps) + 1, *self.made.policy.latent_shape, dtype=torch.float16)
        trajectories = self._trajectories(count, chain, previews)
        for _ in range(2):
            learner.fit_critic(learner.critic_lesson(trajectories, self.score))

    def _trajectories(self, count: int, chain: Tensor | None, previews: Tensor | None = None) -> Trajectories:
        """The first trajectories of a rollout whose chains are `chain` (T + 1, N, C, H, W)."""
        batch, table = self.made.batch(count), torch.zeros(count, self.made.T, device=META)
        return Trajectories(
            chain=table.new_empty(0) if chain is None else chain[:, :count],
            log_pf=table,
            log_pb=table,
            x0_hat_reward=None if self.recipe.forward_looking is None else table,
            reward=table[:, 0],
            prompt_id=batch.prompt_id,
            sample_id=batch.sample_id.to(META),
            seed=self.recipe.seed,
            previews=previews,
        )

    def _state(self) -> EpochState:
        """The state of the first epoch after the warm-up: during the warm-up the policy is not trained."""
        store = ChainStore(self.made.T + 1, self.recipe.train.trajectories, META, META)
        return EpochState(self.recipe.warmup_epochs, store)

    @property
    def score(self) -> Score:
        return _Scoring(self.made)


class _Scoring:
    """Stands for scoring: allocates what the largest reward network needs, while the pictures are alive."""

    def __init__(self, made: Weightless) -> None:
        self.made, recipe = made, made.recipe
        self.chunk = recipe.memory.gradient_batch or recipe.train.micro_batch

    def __call__(self, images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
        if self.made.rewards:
            some_bytes(max(f.activations for f in self.made.rewards))
        return torch.zeros(len(rows), device=META)

    def exact(self, images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
        return self(images, rows, is_preview=is_preview)

    def gradient(
        self, latents: Tensor, rows: Tensor, *, is_preview: bool = False, is_learnt: bool = False
    ) -> tuple[Tensor, Tensor]:
        decode, gradients = self.made.policy.preview if is_preview else self.made.policy.decode, []
        for part in latents.split(self.chunk):
            with torch.enable_grad():
                x = part.detach().float().requires_grad_(True)
                images = decode(x)
                some_bytes(self.made.gradient_bytes(is_learnt=is_learnt))
                gradients += torch.autograd.grad(images.sum(), x)
        return torch.zeros(len(rows), device=META), torch.cat(gradients)


def _storages(tensors: Iterable[Tensor]) -> Iterable[int]:
    """The bytes of each storage behind the tensors, each storage once."""
    return {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}.values()
