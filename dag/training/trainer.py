"""The training loop: sample, score, update, evaluate, save. Maths and file formats are elsewhere."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dag.chain.rollout import Batch
from dag.chain.trajectory import Trajectories, concatenate
from dag.errors import DivergedError, RunError, UsageError
from dag.evaluation.fixed import EvaluationResult
from dag.recipe import Recipe
from dag.run import checkpoint
from dag.run.checkpoint import Position
from dag.run.folder import RunFolder
from dag.run.gpu import first_line, free_memory
from dag.run.meter import PhaseMeter
from dag.run.processes import ALONE, Processes
from dag.run.signals import Interrupt
from dag.training import faults
from dag.training.build import Components
from dag.training.epoch_state import EpochState
from dag.training.faults import NotFiniteError
from dag.training.given import Given
from dag.training.one_pass import OnePass
from dag.training.outputs import Outputs
from dag.training.replay import Replay
from dag.training.resume import Checkpoints
from dag.training.safe_points import SafePoints, Steps, TooManyRowsError, agreed
from dag.training.sampling import Sampling
from dag.training.stored import StoredTraining


class Trainer:
    """Runs a recipe in a run folder.

    Args:
        tracker:   see `dag.training.outputs.Outputs`.
        processes: share the work; the main one writes files.
        interrupt: remembers signals; None listens to none.

    Attributes:
        state: the unfinished epoch; None between two epochs.
        tile:  samples per network call, halved where memory ran out.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        components: Components,
        tracker: Callable[[dict[str, Any], int], object] | None = None,
        processes: Processes = ALONE,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.recipe, self.run, self.components, self.processes = recipe, run, components, processes
        self.learner, self.updates = components.learner, components.learner.updates
        self.outputs = Outputs(recipe, run, components, tracker)
        self.meter = PhaseMeter(components.device)
        self.sampling = Sampling(recipe, components, processes, self.meter)
        self.given = Given(recipe, components, processes, self.meter)
        place = torch.device("cpu") if recipe.memory.chains == "cpu" else components.device
        self.replay = Replay(recipe.data.replay, place, ends_only=recipe.objective.num_draws > 0)
        self.checkpoints = Checkpoints(run, components, processes, recipe.checkpoint.keep, self.replay)
        self.safe_points = SafePoints(processes, interrupt, recipe.checkpoint.minutes, self._save_inside_epoch)
        self.state: EpochState | None = None
        self.tile = recipe.sampler.tile

    def fit(self, is_resumed: bool = False, on_start: Callable[[], object] = lambda: None) -> None:
        """Train to the recipe's last epoch, from the start or from the newest checkpoint that can be used.

        Args:
            on_start: called once a checkpoint, if there is one, is loaded, just before training.

        Raises:
            UsageError:    the checkpoint is beyond the recipe's last epoch.
            StoppedError:  a signal came; the run was saved.
            RunError:      the run cannot continue; it was saved if that was possible.
            DivergedError: numbers are not finite; nothing was saved.
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
            where = faults.dumped(error, self.processes, self.run.faults, self.updates.optimizer_step)
            raise DivergedError(f"{error}{where}{self._last_good()}") from None
        except RunError:
            self._save_after_failure()
            raise
        self.finish()

    # -- one epoch -----------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int) -> None:
        """One epoch: rollout and updates (from `state`, if a checkpoint inside the epoch was loaded), evaluation, checkpoint.

        Raises StoppedError after a signal.
        """
        done, is_last = epoch + 1, epoch + 1 == self.recipe.train.epochs
        if self.state is None:
            self.begin_epoch(epoch)
        metrics, result = self.learn(), None
        if is_last or done % self.recipe.evaluation.every == 0:
            result = self.evaluate()
            metrics = metrics | ({} if result is None else result.metrics)
        self.record(done, metrics, result)
        self.state = None
        is_due, is_stopping = is_last or done % self.recipe.checkpoint.every == 0, self.safe_points.is_stopping()
        if is_due or is_stopping:
            name = self.checkpoints.save(Position(done), None, {}, self.tile)
            self.safe_points.has_saved()
            if is_stopping:
                self.safe_points.stop(name)

    def begin_epoch(self, epoch: int) -> EpochState:
        """Start an epoch: a new state, which `learn` continues."""
        self.meter.start_epoch()
        self.state = self._fresh_state(epoch)
        return self.state

    def _fresh_state(self, epoch: int) -> EpochState:
        return EpochState(epoch, self.sampling.store(), given_store=self.given.store())

    def learn(self) -> dict[str, Any]:
        """The rollout and the updates of the epoch, as far as `state` does not have them yet. Returns the epoch's metrics."""
        state = self.state
        assert state is not None
        if state.metrics is None:
            if self.is_one_pass(state.epoch):
                trajectories = self.train_in_one_pass(state)
            else:
                trajectories = self.sample(state)
                self.train_on(trajectories, state)
                self.replay.keep(trajectories)
            state.end_updates(self._summary(trajectories) | state.measured)
            del trajectories  # else its chains would stay in memory through the evaluation
            self._safe_point()
        assert state.metrics is not None
        return state.metrics

    def is_one_pass(self, epoch: int) -> bool:
        """Whether an epoch trains in one pass. Warm-up epochs store their rollout: they set the flow's constants and the scales."""
        return self.recipe.train.rollout == "one_pass" and epoch >= self.recipe.warmup_epochs

    def sample(self, state: EpochState) -> Trajectories:
        """This process's trajectories of the epoch, given ones if none are sampled: make those that `state` does not have yet."""
        T, each = self.components.policy.schedule.num_transitions, self.sampling.images_per_trajectory()
        data, share = self.recipe.data, self.recipe.train.trajectories // self.processes.size
        sources = [self.sampling] * data.samples + [self.given] * (data.folder is not None)
        total, done = share * len(sources), state.num_sampled + state.num_given
        with (
            self.components.scoring(),
            self._bar("sample", total * T, done * T) as rows,
            self._bar("score", total * each, done * each) as images,
        ):
            for source in sources:
                steps = partial(source.steps, state, on_rows=rows.update, on_images=images.update)
                self._run(partial(self._tiles, steps), self._halve_tile)
        return state.rollout() if data.samples else state.given_rollout()

    def _tiles(self, steps: Callable[..., Steps]) -> Steps:
        """The steps, in tiles of the size that fits into memory now."""
        return steps(tile=self.tile)

    def train_on(self, trajectories: Trajectories, state: EpochState) -> None:
        """Train on a stored rollout: the updates that `state` does not have yet."""
        train, data = self.recipe.train, self.recipe.data
        earlier = [*self.replay.rollouts, *([state.given_rollout()] if data.sample else [])]
        once = trajectories.num_trajectories * self.learner.schedule.num_transitions
        total, done = once * (train.inner_epochs + len(earlier)), state.sums.updates * once // train.updates
        score = self.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id.cpu()))
        training = StoredTraining(self.learner, self.meter)
        scoring = self.components.scoring() if self.recipe.scores_in_training else nullcontext()
        with scoring, self._bar("update", total, done) as bar:
            self._run(
                lambda: training.steps(state, trajectories, score, bar.update, earlier),
                lambda why: self.updates.halve_micro_batch(state, why),
            )
        self.components.reward.check()  # scores of previews are else checked with the next final picture, and here is none

    def train_in_one_pass(self, state: EpochState) -> Trajectories:
        """Train in one pass: the updates that `state` does not have yet. Returns the trajectories, without their chains."""
        training, batch = OnePass(self.learner, self.meter), self.sampling.batch(state.epoch)
        T, done = (
            self.learner.schedule.num_transitions,
            sum(one.num_trajectories for one in (*state.drawn, *state.walked)),
        )
        with self.components.scoring(), self._bar("one pass", len(batch.sample_id) * T, done * T) as bar:
            self._run(
                lambda: training.steps(state, batch, self.sampling.scorer, bar.update),
                lambda why: self.updates.halve_micro_batch(state, why),
            )
        return concatenate(state.drawn)

    def evaluate(self) -> EvaluationResult | None:
        """Sample the fixed pictures in all processes and measure them in the main one; the others return None."""
        evaluator, policy, reward = self.components.evaluator, self.components.policy, self.components.reward
        drawn: list[Tensor] = []

        def draw() -> Steps:
            drawn.clear()
            for tile in evaluator.tiles(self.tile):
                with self.meter.phase("evaluation"):
                    drawn.append(agreed(self.processes, partial(evaluator.draw, policy, tile)))
                yield

        with self.components.scoring():
            self._run(draw, self._halve_tile)
            with self.meter.phase("evaluation"):
                images = evaluator.together(torch.cat(drawn))
                measure = partial(evaluator.measure, images, reward)
                return agreed(self.processes, lambda: measure() if self.processes.is_main else None)

    # -- safe points and memory ----------------------------------------------------------------------------------

    def _run(self, steps: Callable[[], Steps], halve: Callable[[str], object]) -> None:
        """Go through the steps, with a safe point after each.

        If a GPU runs out of memory, call `halve` with the reason, and continue from the state with new `steps()`.
        """
        while (why := self._shortage(steps())) is not None:
            halve(why)

    def _shortage(self, steps: Steps) -> str | None:
        """Go through the steps; returns why a GPU ran out of memory, or None.

        Returning leaves the except block, where the traceback would keep the tensors that filled the memory.
        """
        try:
            with closing(steps):
                for _ in steps:
                    self._safe_point()
        except TooManyRowsError as error:
            return first_line(error)
        return None

    def _safe_point(self) -> None:
        """Count a safe point of the epoch, and save or stop there if it is time."""
        if self.state is not None:
            self.state.points += 1
        self.safe_points.reach()

    def _halve_tile(self, why: str) -> None:
        """Halve the samples per network call. Raises RunError if it is one already."""
        if self.tile == 1:
            raise RunError(f"out of GPU memory while sampling one picture; lower model.resolution ({why})")
        self.tile //= 2
        free_memory()
        self._say(f"out of GPU memory while sampling: {self.tile} at a time from here on")

    # -- records -------------------------------------------------------------------------------------------------

    def _summary(self, trajectories: Trajectories) -> dict[str, Any]:
        """The metrics of an epoch's trajectories, over all processes."""
        reward = self.processes.everyones(trajectories.reward)
        return {
            "reward_mean": float(reward.mean()),
            "reward_std": float(reward.std(correction=0)),
            "bytes_per_trajectory": round(trajectories.bytes_per_trajectory),
        }

    def record(self, epoch: int, metrics: dict[str, Any], result: EvaluationResult | None) -> None:
        """Write an epoch's metrics, and after an evaluation its pictures; `epoch` is the number of completed epochs."""
        row = metrics | self.meter.row()
        agreed(self.processes, lambda: self.outputs.epoch(epoch, row, result) if self.processes.is_main else None)

    def finish(self) -> None:
        """Export the weights, and join the pictures from before and after training into one."""
        agreed(self.processes, lambda: self.outputs.finish() if self.processes.is_main else None)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_inside_epoch(self) -> str | None:
        """Write a checkpoint inside the epoch and return its name; return None if no epoch has begun."""
        if self.state is None:
            return None
        position = Position(self.state.epoch, self.state.points)
        return self.checkpoints.save(position, self.state, self.meter.seconds, self.tile)

    def _save_after_failure(self) -> None:
        """Save without the unfinished update, in which the processes may have come to different points."""
        if self.state is not None:
            if self.state.has_begun:
                self.updates.discard(self.state)
            self.state.points += 1  # a checkpoint of the last safe point may exist, with the unfinished update
        try:
            if name := self._save_inside_epoch():
                self._say(f"saved {name}; --resume goes on from there")
        except RunError as error:
            self._say(str(error))

    def _resume(self) -> int | None:
        """Restore the newest usable checkpoint. Returns the number of completed epochs, or None if there is no checkpoint yet."""
        folder, skipped = self.checkpoints.find()
        if folder is None:
            self._say(f"{self.run.path} has no checkpoint yet: training starts anew")
            if self.processes.is_main:
                self.run.metrics.restore("")
            return None
        stored, self.state = self.checkpoints.load(folder, self._fresh_state(0))
        epoch = int(stored["epoch"])
        if epoch + (self.state is not None) > self.recipe.train.epochs:
            raise UsageError(
                f"--resume: {folder.name} is beyond train.epochs={self.recipe.train.epochs}; give as many epochs or more"
            )
        self.tile = stored["tile"]
        self.meter.seconds.update(stored["seconds"])
        agreed(
            self.processes,
            lambda: self.run.metrics.restore(self.checkpoints.metrics_of(folder)) if self.processes.is_main else None,
        )
        why = f" (skipped {'; '.join(skipped)})" if skipped else ""
        inside = "" if self.state is None else f", {self.state.points} safe points into the next,"
        self._say(f"resumed after epoch {epoch}{inside} from {folder}{why}")
        return epoch

    def _last_good(self) -> str:
        """The end of a sentence that names the newest complete checkpoint, or ""."""
        good = checkpoint.newest_complete(self.run.checkpoints)
        return f"; the last checkpoint is {good.name}" if good else ""

    # -- progress ------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Print a line, in the main process alone."""
        if self.processes.is_main:
            tqdm.write(text)

    def _bar(self, phase: str, total: int, done: int = 0) -> Any:
        assert self.state is not None
        return tqdm(
            total=total,
            initial=done,
            desc=f"epoch {self.state.epoch + 1}/{self.recipe.train.epochs} {phase}",
            leave=False,
            disable=None if self.processes.is_main else True,
            unit="row",
            position=1 if phase == "score" else 0,
        )
