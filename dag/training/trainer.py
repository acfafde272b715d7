"""The training loop: sample, score, update, measure, save. No maths and no file formats here."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dag.chain.rollout import Batch, Score, assemble, sample_tile, score_tile
from dag.chain.trajectory import ChainStore, Trajectories, concatenate
from dag.errors import DivergedError, RunError, UsageError
from dag.evaluation.fixed import EvaluationResult
from dag.recipe import ForwardLooking, PolicyGradient, Recipe, is_scored, prompts
from dag.run import checkpoint
from dag.run.checkpoint import Position
from dag.run.folder import RunFolder
from dag.run.gpu import first_line, free_memory
from dag.run.meter import Ledger
from dag.run.processes import ALONE, Processes
from dag.run.signals import Interrupt
from dag.training import faults
from dag.training.build import Parts
from dag.training.epoch_state import Flight
from dag.training.faults import NotFiniteError
from dag.training.one_pass import OnePass
from dag.training.outputs import Records
from dag.training.resume import Saver
from dag.training.safe_points import Rest


class Trainer:
    """Runs a recipe in a run folder.

    Args:
        tracker:   of every epoch, see `dag.training.outputs.Records`.
        world:     the processes that share the work; the main one writes.
        interrupt: tells of signals.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        parts: Parts,
        tracker: Callable[[dict[str, Any], int], object] | None = None,
        world: Processes = ALONE,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.recipe, self.run, self.parts, self.world = recipe, run, parts, world
        self.records = Records(recipe, run, parts, tracker)
        self.ledger = Ledger(parts.learner.device)
        self.tile = recipe.sampler.tile
        self.saver = Saver(run, parts, world, recipe.checkpoint.keep)
        self.flight: Flight | None = None
        self.rest = parts.learner.rest = Rest(world, interrupt, recipe.checkpoint.minutes, self._save_flight)

    def fit(self, is_resumed: bool = False, on_start: Callable[[], object] = lambda: None) -> None:
        """Train to the recipe's last epoch, from the start or from the newest checkpoint that can be used.

        Args:
            on_start: called when it is sure that the run begins or goes on.

        Raises:
            StoppedError: a signal came; what was done is saved.
            RunError:     the run cannot go on; what was done is saved.
            DivergedError: its numbers are to blame, and not saved.
        """
        start = self._resume() if is_resumed else None
        on_start()
        if start is None:
            # The adapter still adds nothing here, so this is the base model.
            first = self.evaluate()
            self.record(0, {} if first is None else first.metrics, first)
            start = 0
        try:
            for epoch in range(start, self.recipe.train.epochs):
                self.train_epoch(epoch)
        except NotFiniteError as error:
            raise DivergedError(f"{error}{self._dumped(error)}{self._last_good()}") from None
        except RunError:
            self._save_after_failure()
            raise
        self.finish()

    def train_epoch(self, epoch: int) -> None:
        """One rollout and its updates, or what a checkpoint inside it has left; then its evaluation, record and checkpoint."""
        done, is_last = epoch + 1, epoch + 1 == self.recipe.train.epochs
        if self.flight is None:  # or a checkpoint was taken inside this epoch
            self.ledger.start_epoch()
            self.rest.passed = 0
            self.flight = Flight(epoch, self._chain_store())
        flight = self.flight
        if flight.metrics is None:
            if self.is_one_pass(epoch):
                trajectories, metrics = self.one_pass(epoch)
            else:
                trajectories = self.sample(epoch)
                metrics = self.update(trajectories, epoch)
            flight.end_updates(self.summary(trajectories) | metrics)
            del trajectories  # its chain would stay through the evaluation and the next rollout
            self.rest.point()
        metrics, measured = flight.metrics or {}, None
        if is_last or done % self.recipe.evaluation.every == 0:
            measured = self.evaluate()
            metrics = metrics | ({} if measured is None else measured.metrics)
        self.record(done, metrics, measured)
        self.flight = None
        is_due, is_stopping = is_last or done % self.recipe.checkpoint.every == 0, self.rest.is_stopping()
        if is_due or is_stopping:
            name = self.saver.save(Position(done), None, {}, self.tile)
            self.rest.has_saved()
            if is_stopping:
                self.rest.stop(name)

    def _chain_store(self) -> ChainStore:
        """Room for the states of an epoch's trajectories; those of them that are this process's."""
        device, num_states = self.parts.learner.device, self.parts.policy.schedule.num_transitions + 1
        place = torch.device("cpu") if self.recipe.memory.chains == "cpu" else device
        return ChainStore(num_states, self.recipe.train.trajectories // self.world.size, place, device)

    # -- the three phases ----------------------------------------------------------------------------------------

    def sample(self, epoch: int) -> Trajectories:
        """Roll out and score this process's trajectories of the epoch, or those that are left.

        Where a GPU runs out of memory, the tiles from there on are half as large; counter-based noise gives the same
        chains.
        """
        flight = self.flight or Flight(epoch, self._chain_store())
        batch, looking = self.batch(epoch), self._looking()
        count, T = len(batch.sample_id), self.parts.policy.schedule.num_transitions
        each = 1 + (0 if looking is None else sum(is_scored(k, T, looking.stride) for k in range(T)))
        with (
            self.parts.scoring(),
            self._bar(epoch, "sample", count * T, flight.num_sampled * T) as sampled,
            self._bar(epoch, "score", count * each, flight.num_sampled * each) as scores,
        ):
            while flight.num_sampled < count:
                tile = next(batch.tail(flight.num_sampled).tiles(self.tile))
                work = partial(self._sample_tile, tile, looking, sampled.update, scores.update)
                try:
                    chain, scored = self.rest.attempt(work)
                except torch.OutOfMemoryError as error:
                    self._halve_tile(first_line(error))
                    continue
                flight.store.put(chain)
                flight.tiles.append(scored)
                self.rest.point()
        return concatenate(flight.tiles, flight.store.finish())

    def _halve_tile(self, why: str) -> None:
        if self.tile == 1:
            raise RunError(f"out of GPU memory while sampling one picture; lower model.resolution ({why})")
        self.tile //= 2
        free_memory()
        self._say(f"out of GPU memory while sampling: {self.tile} at a time from here on")

    def batch(self, epoch: int) -> Batch:
        """Prompts and global sample ids of this process's share of an epoch."""
        count, updates = self.recipe.train.trajectories, self.recipe.train.updates
        drawn = prompts.draw(len(self.parts.prompts), count, self.recipe.seed, epoch)
        ids = epoch * count + torch.arange(count)
        return Batch(self.world.mine(torch.from_numpy(drawn), updates), self.world.mine(ids, updates))

    def is_one_pass(self, epoch: int) -> bool:
        """Warm-up epochs roll out beforehand: they give one-pass training its units."""
        return self.recipe.train.rollout == "one_pass" and epoch >= self.recipe.flow.warmup_epochs

    def one_pass(self, epoch: int) -> tuple[Trajectories, dict[str, Any]]:
        """Sample, score and update at once."""
        learner, recipe, batch = self.parts.learner, self.recipe, self.batch(epoch)
        one_pass, T = OnePass(learner, recipe.seed, recipe.sampler), learner.schedule.num_transitions
        label, rows = "one pass", len(batch.sample_id)
        with (
            self.parts.scoring(),
            self._bar(epoch, label, rows * T, self._walked() * T) as bar,
            self.ledger.peak("update"),
        ):
            return one_pass.learn(batch, epoch, self.tile_scorer, self.ledger.timed, bar.update)

    def _walked(self) -> int:
        """Trajectories that one pass has behind it in this epoch."""
        progress = self.parts.learner.progress
        return 0 if progress is None else sum(one.num_trajectories for one in (*progress.drawn, *progress.tiles))

    def tile_scorer(self, tile: Batch) -> Score:
        return self._scorer(tile.prompt_id, tile.sample_id)

    def _looking(self) -> ForwardLooking | None:
        """The forward-looking section, or None if no intermediate state is scored."""
        objective = self.recipe.objective
        if isinstance(objective, PolicyGradient) or objective.forward_looking.source == "none":
            return None
        return objective.forward_looking

    def _sample_tile(
        self,
        tile: Batch,
        looking: ForwardLooking | None,
        sampled: Callable[[int], object],
        scored: Callable[[int], object],
    ) -> tuple[Tensor, Trajectories]:
        """(chain, scored trajectories without it) of a tile."""
        sampler, seed, size = self.recipe.sampler, self.recipe.seed, len(tile.sample_id)
        objective = self.recipe.objective
        with self.ledger.phase("sample"):
            text = self.parts.text[tile.prompt_id]
            drawn = sample_tile(
                self.parts.policy,
                text,
                tile.sample_id,
                seed,
                sampler,
                looking,
                has_prior=not isinstance(objective, PolicyGradient) and objective.prior == "pretrained",
                on_step=lambda: sampled(size),
            )
        with self.ledger.phase("reward"):
            score = self._scorer(tile.prompt_id, tile.sample_id)
            seen, reward, _ = score_tile(self.parts.policy, drawn, score, on_image=lambda: scored(size))
        return drawn.chain, assemble(drawn, seen, reward, tile, seed, sampler)

    def update(self, trajectories: Trajectories, epoch: int) -> dict[str, Any]:
        """The optimizer updates that this rollout pays for, or those that are left."""
        train, learner = self.recipe.train, self.parts.learner
        T = self.parts.policy.schedule.num_transitions
        total = trajectories.num_trajectories * T * train.inner_epochs
        done = (
            0
            if learner.progress is None
            else learner.progress.outcome.updates * total // (train.updates * train.inner_epochs)
        )
        score = self._scorer(trajectories.prompt_id, trajectories.sample_id.cpu())
        looking = self._looking()
        needs_reward = looking is not None and looking.source == "current"
        at_work = self.parts.scoring() if needs_reward else nullcontext()
        with at_work, self._bar(epoch, "update", total, done) as bar, self.ledger.phase("update"):
            metrics = dict(learner.learn(trajectories, epoch, score, bar.update))
        self.parts.reward.check()  # of previews scored in training, which no final picture follows
        return metrics

    def evaluate(self) -> EvaluationResult | None:
        """The fixed pictures and their measures; None on other processes than the main one."""
        # Several processes rest between tiles only where they have equally many of them.
        on_tile = self.rest.point if self.world.size == 1 else lambda: None
        evaluator, policy = self.parts.evaluator, self.parts.policy
        with self.parts.scoring(), self.ledger.phase("evaluation"):
            while True:
                try:
                    drawn = self.rest.attempt(lambda: evaluator.draw(policy, self.tile, on_tile))
                    break
                except torch.OutOfMemoryError as error:
                    self._halve_tile(first_line(error))
            images = evaluator.together(drawn)
            return self.rest.attempt(
                lambda: evaluator.measure(images, self.parts.reward) if self.world.is_main else None
            )

    def _scorer(self, prompt_id: Tensor, sample_id: Tensor) -> Score:
        """The rewards of these trajectories; indices are on the CPU."""

        def score(images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
            texts = [self.parts.prompts[i] for i in prompt_id[rows].tolist()]
            return self.parts.reward.total(images, texts, sample_id[rows].tolist(), is_preview=is_preview)

        return score

    # -- records -------------------------------------------------------------------------------------------------

    def summary(self, trajectories: Trajectories) -> dict[str, Any]:
        reward = self.world.everyones(trajectories.reward)
        return {
            "reward_mean": float(reward.mean()),
            "reward_std": float(reward.std(correction=0)),
            "bytes_per_trajectory": round(trajectories.bytes_per_trajectory),
        }

    def record(self, epoch: int, metrics: dict[str, Any], measured: EvaluationResult | None) -> None:
        """One row of metrics, and after an evaluation its picture."""
        self.rest.attempt(
            lambda: self.records.epoch(epoch, metrics | self.ledger.row(), measured) if self.world.is_main else None
        )

    def finish(self) -> None:
        """Export the weights, and put the same prompts and seeds before and after side by side."""
        self.rest.attempt(lambda: self.records.finish() if self.world.is_main else None)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_flight(self) -> str | None:
        """A checkpoint inside the epoch; None before the first."""
        if self.flight is None:
            return None
        position = Position(self.flight.epoch, self.rest.passed)
        return self.saver.save(position, self.flight, self.ledger.seconds, self.tile)

    def _save_after_failure(self) -> None:
        """What is done of the epoch, without the update under way, of which a process may have done more than another."""
        learner = self.parts.learner
        if learner.progress is not None:
            learner.updates.discard(learner.progress)
        self.rest.passed += 1  # the point before may be saved already, with that update
        try:
            if name := self._save_flight():
                self._say(f"saved {name}; --resume goes on from there")
        except RunError as error:
            self._say(str(error))

    def _resume(self) -> int | None:
        """Restore the newest checkpoint that can be used; the number of completed epochs, or None if there is none yet."""
        folder, skipped = self.saver.find()
        if folder is None:
            self._say(f"{self.run.path} has no checkpoint yet: training starts anew")
            if self.world.is_main:
                self.run.metrics.restore("")
            return None
        fresh = Flight(0, self._chain_store())
        state, self.flight = self.saver.load(folder, fresh)
        epoch = int(state["epoch"])
        if epoch + (self.flight is not None) > self.recipe.train.epochs:
            raise UsageError(
                f"--resume: {folder.name} is beyond train.epochs={self.recipe.train.epochs}; give as many epochs or more"
            )
        self.tile, self.rest.passed = state["tile"], state["rests"]
        self.ledger.seconds.update(state["seconds"])
        self.rest.attempt(
            lambda: self.run.metrics.restore(self.saver.metrics_of(folder)) if self.world.is_main else None
        )
        why = f" (skipped {'; '.join(skipped)})" if skipped else ""
        inside = f", {self.rest.passed} resting points into the next," if self.flight else ""
        self._say(f"resumed after epoch {epoch}{inside} from {folder}{why}")
        return epoch

    def _dumped(self, error: NotFiniteError) -> str:
        """Writes the transitions that an error names, and says where."""
        suspects = error.suspects
        if suspects is None:
            return ""
        worst = suspects.worst()
        found = self.world.objects((worst, suspects.states(worst)))
        if self.world.is_main:
            rows = [row for rows, _ in found for row in rows]
            states = {name: tensor for _, tensors in found for name, tensor in tensors.items()}
            name = f"update_{self.parts.learner.updates.optimizer_step:06d}"
            return f"; the transitions are in {faults.dump(self.run.faults, name, rows, states)}"
        return ""

    def _last_good(self) -> str:
        good = checkpoint.newest_whole(self.run.checkpoints)
        return f"; the last checkpoint is {good.name}" if good else ""

    # -- progress --------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(text)

    def _bar(self, epoch: int, phase: str, total: int, done: int = 0) -> Any:
        label = f"epoch {epoch + 1}/{self.recipe.train.epochs} {phase}"
        return tqdm(
            total=total,
            initial=done,
            desc=label,
            leave=False,
            disable=None if self.world.is_main else True,
            unit="row",
            position=1 if phase == "score" else 0,
        )
