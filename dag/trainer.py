"""The training loop: sample, score, update, measure, save. No maths and no file formats here."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dag import checkpoint, prompts, report
from dag.errors import RunError, UsageError
from dag.evaluation import EvaluationResult
from dag.ledger import Ledger
from dag.one_pass import OnePass
from dag.parts import Parts
from dag.recipe import ForwardLooking, PolicyGradient, Recipe, is_scored
from dag.rollout import Batch, Score, assemble, sample_tile, score_tile
from dag.run_folder import RunFolder
from dag.trajectory import ChainStore, Trajectories, concatenate

Result = TypeVar("Result")


class Trainer:
    """Runs a recipe in a run folder.

    Args:
        tracker: gets (metrics, trajectories) of every epoch, e.g. accelerate's log; None logs to files alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        parts: Parts,
        tracker: Callable[[dict[str, Any], int], object] | None = None,
    ) -> None:
        self.recipe, self.run, self.parts, self.tracker = recipe, run, parts, tracker
        self.ledger = Ledger(parts.learner.device)
        self.tile = recipe.sampler.tile

    def fit(self, resume_from: Path | None = None) -> None:
        """Train to the recipe's last epoch, from the start or from a checkpoint folder."""
        # The adapter still adds nothing here, so this is the base model, also in a resumed run.
        before = self.evaluate()
        start = 0
        if resume_from is None:
            self.record(0, before.metrics, before)
        else:
            start = self.load_checkpoint(resume_from)
            if start > self.recipe.train.epochs:
                raise UsageError(f"--resume: {start} epochs are done already, train.epochs={self.recipe.train.epochs}")
            self.run.metrics.keep_before(start + 1)
            tqdm.write(f"resumed after epoch {start} from {resume_from}")
        result = before
        for epoch in range(start, self.recipe.train.epochs):
            self.ledger.start_epoch()
            if self.is_one_pass(epoch):
                trajectories, metrics = self.one_pass(epoch)
            else:
                trajectories = self.sample(epoch)
                metrics = self.update(trajectories, epoch)
            rolled = self.summary(trajectories)
            del trajectories  # its chain would stay through the evaluation and the next rollout
            done, is_last = epoch + 1, epoch + 1 == self.recipe.train.epochs
            measured = None
            if is_last or done % self.recipe.evaluation.every == 0:
                measured = result = self.evaluate()
                metrics |= measured.metrics
            self.record(done, rolled | metrics, measured)
            if is_last or done % self.recipe.checkpoint.every == 0:
                self.save_checkpoint(done)
        if start == self.recipe.train.epochs:
            result = self.evaluate()
        self.finish(before, result)

    # -- the three phases ----------------------------------------------------------------------------------------

    def sample(self, epoch: int) -> Trajectories:
        """Roll out and score the epoch's trajectories. If a reward fails, the state so far is saved first.

        Where a GPU runs out of memory it starts over with half the tile; counter-based noise gives the same chains.
        """
        try:
            return self._tiled(lambda: self._sample(epoch))
        except RunError:
            self.save_checkpoint(epoch)
            raise

    def _tiled(self, draw: Callable[[], Result]) -> Result:
        """What `draw` returns, with half the tile where a GPU ran out of memory."""
        while True:
            try:
                return draw()
            except torch.OutOfMemoryError:
                if self.tile == 1:
                    raise RunError("out of GPU memory while sampling one picture; lower model.resolution") from None
            # Not in the handler, where the traceback still holds the tensors.
            self.tile //= 2
            torch.cuda.empty_cache()
            tqdm.write(f"out of GPU memory while sampling: {self.tile} at a time from here on")

    def _sample(self, epoch: int) -> Trajectories:
        batch, looking = self.batch(epoch), self._looking()
        count, T = self.recipe.train.trajectories, self.parts.policy.schedule.num_transitions
        scored = count * (1 + (0 if looking is None else sum(is_scored(k, T, looking.stride) for k in range(T))))
        place = torch.device("cpu") if self.recipe.memory.chains == "cpu" else self.parts.learner.device
        tiles, store = [], ChainStore(T + 1, count, place)
        with (
            self.parts.scoring(),
            self._bar(epoch, "sample", count * T) as sampled,
            self._bar(epoch, "score", scored) as scores,
        ):
            for tile in batch.tiles(self.tile):
                tiles.append(self._sample_tile(tile, looking, store, sampled.update, scores.update))
        return concatenate(tiles, store.finish())

    def batch(self, epoch: int) -> Batch:
        """Prompts and global sample ids of an epoch."""
        count = self.recipe.train.trajectories
        drawn = prompts.draw(len(self.parts.prompts), count, self.recipe.seed, epoch)
        return Batch(torch.from_numpy(drawn), epoch * count + torch.arange(count))

    def is_one_pass(self, epoch: int) -> bool:
        """Warm-up epochs roll out beforehand: they give one-pass training its units."""
        return self.recipe.train.rollout == "one_pass" and epoch >= self.recipe.flow.warmup_epochs

    def one_pass(self, epoch: int) -> tuple[Trajectories, dict[str, Any]]:
        """Sample, score and update at once. If a reward fails before the first update, the state is saved."""
        learner, recipe = self.parts.learner, self.recipe
        one_pass, before = OnePass(learner, recipe.seed, recipe.sampler), learner.optimizer_step
        total = recipe.train.trajectories * learner.schedule.num_transitions
        try:
            with self.parts.scoring(), self._bar(epoch, "one pass", total) as bar:
                return one_pass.learn(self.batch(epoch), epoch, self.tile_scorer, self.ledger.phase, bar.update)
        except RunError:
            if learner.optimizer_step == before:
                self.save_checkpoint(epoch)
            raise

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
        store: ChainStore,
        sampled: Callable[[int], object],
        scored: Callable[[int], object],
    ) -> Trajectories:
        sampler, seed, size = self.recipe.sampler, self.recipe.seed, len(tile.sample_id)
        with self.ledger.phase("sample"):
            text = self.parts.text[tile.prompt_id]
            drawn = sample_tile(
                self.parts.policy, text, tile.sample_id, seed, sampler, looking, on_step=lambda: sampled(size)
            )
        store.put(drawn.chain)
        with self.ledger.phase("reward"):
            score = self._scorer(tile.prompt_id, tile.sample_id)
            seen, reward, _ = score_tile(self.parts.policy, drawn, score, on_image=lambda: scored(size))
        return assemble(drawn, seen, reward, tile, seed, sampler)

    def update(self, trajectories: Trajectories, epoch: int) -> dict[str, Any]:
        """The optimizer updates that this rollout pays for."""
        train = self.recipe.train
        total = train.trajectories * self.parts.policy.schedule.num_transitions * train.inner_epochs
        score = self._scorer(trajectories.prompt_id, trajectories.sample_id.cpu())
        looking = self._looking()
        needs_reward = looking is not None and looking.source == "current"
        at_work = self.parts.scoring() if needs_reward else nullcontext()
        with at_work, self._bar(epoch, "update", total) as bar, self.ledger.phase("update"):
            return dict(self.parts.learner.learn(trajectories, epoch, score, bar.update))

    def evaluate(self) -> EvaluationResult:
        def draw() -> EvaluationResult:
            with self.parts.scoring(), self.ledger.phase("evaluation"):
                return self.parts.evaluator(self.parts.policy, self.parts.reward, self.tile)

        return self._tiled(draw)

    def _scorer(self, prompt_id: Tensor, sample_id: Tensor) -> Score:
        """A reward of (images, rows), rows indexing these trajectories."""

        def score(images: Tensor, rows: Tensor) -> Tensor:
            texts = [self.parts.prompts[i] for i in prompt_id[rows].tolist()]
            return self.parts.reward.detailed(images, texts, sample_id[rows].tolist())[0]

        return score

    # -- records -------------------------------------------------------------------------------------------------

    def summary(self, trajectories: Trajectories) -> dict[str, Any]:
        reward = trajectories.reward
        return {
            "reward_mean": float(reward.mean()),
            "reward_std": float(reward.std(correction=0)),
            "bytes_per_trajectory": round(trajectories.bytes_per_trajectory),
        }

    def record(self, epoch: int, metrics: dict[str, Any], measured: EvaluationResult | None) -> None:
        """One row of metrics, and after an evaluation its picture."""
        trajectories = epoch * self.recipe.train.trajectories
        row = {
            "epoch": epoch,
            "optimizer_step": self.parts.learner.optimizer_step,
            "trajectories": trajectories,
            "micro_batch": self.parts.learner.micro_batch,
            **metrics,
            **self.ledger.row(),
        }
        self.run.metrics.write(row)
        if self.tracker is not None:
            self.tracker({key: value for key, value in row.items() if isinstance(value, int | float)}, trajectories)
        if measured is not None:
            sheet = report.grid(measured.images, self._captions(measured), self.recipe.evaluation.images_per_prompt)
            sheet.save(self.run.samples / f"epoch_{epoch:04d}.png")
        report.draw_curves(self.run.metrics.read(), self.run.path / "curves.png")
        tqdm.write(report.line(row, self.recipe.train.epochs))

    def finish(self, before: EvaluationResult, after: EvaluationResult) -> None:
        """Export the weights and draw the same prompts and seeds before and after."""
        self.parts.policy.export(self.run.weights)
        captions = (self._captions(before), self._captions(after))
        columns = self.recipe.evaluation.images_per_prompt
        report.before_after(before.images, after.images, captions, columns).save(self.run.samples / "before_after.png")
        tqdm.write(f"weights in {self.run.weights}, pictures in {self.run.samples / 'before_after.png'}")

    def _captions(self, result: EvaluationResult) -> list[str]:
        return [f"{p}  {r:.2f}" for p, r in zip(result.prompts, result.reward.tolist(), strict=True)]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {stepper.name: stepper.optimizer for stepper in self.parts.learner.steppers()}

    def save_checkpoint(self, epoch: int) -> None:
        learner, flow = self.parts.learner, self.parts.flow
        tensors = {"policy": self.parts.policy.state_dict(), "learner": learner.tensors()}
        if flow is not None:
            tensors["flow"] = flow.state_dict()
        keep = self.recipe.checkpoint.keep
        checkpoint.save(self.run.checkpoints, epoch, tensors, self._optimizers(), learner.state_dict(), keep)

    def load_checkpoint(self, folder: Path) -> int:
        """Restore everything; returns the number of completed epochs."""
        state, flow = checkpoint.load_state(folder), self.parts.flow
        self.parts.policy.load_state_dict(checkpoint.load_tensors(folder, "policy"))
        self.parts.learner.load_state_dict(state, checkpoint.load_tensors(folder, "learner"))
        if flow is not None:
            flow.load_state_dict(checkpoint.load_tensors(folder, "flow"))
        for name, optimizer in self._optimizers().items():
            checkpoint.load_optimizer(folder, name, optimizer, state["optimizers"][name])
        return int(state["epoch"])

    # -- progress --------------------------------------------------------------------------------------------------

    def _bar(self, epoch: int, phase: str, total: int) -> Any:
        label = f"epoch {epoch + 1}/{self.recipe.train.epochs} {phase}"
        return tqdm(
            total=total,
            desc=label,
            leave=False,
            disable=None,
            unit="row",
            position=1 if phase == "score" else 0,
        )
