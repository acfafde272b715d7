"""Writes what a run gives its user: metrics, curves, pictures, weights."""

import shutil
import time
from collections.abc import Callable
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from dag.errors import RunError
from dag.evaluation import sheets
from dag.evaluation.curves import draw_curves, line
from dag.evaluation.fixed import EvaluationResult
from dag.evaluation.page.document import write_page
from dag.recipe import Recipe
from dag.run import durable
from dag.run.folder import RunFolder
from dag.training.build import Components

# Seconds at least between two drawings of the curves, each of which takes half a second; the last epoch is always drawn.
_BETWEEN_CURVES = 10.0


class Outputs:
    """Writes a run's results into its folder.

    Args:
        tracker: called with (metrics, trajectories so far) after every epoch, e.g. accelerate's log; None logs to files alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        components: Components,
        tracker: Callable[[dict[str, Any], int], object] | None,
    ) -> None:
        self.recipe, self.run, self.components, self.tracker = recipe, run, components, tracker
        self._last_drawn = time.monotonic()

    def epoch(self, epoch: int, metrics: dict[str, Any], result: EvaluationResult | None) -> None:
        """Write the metrics, redraw curves that are older than ten seconds, and print a line; after an evaluation also write
        its pictures.

        Args:
            epoch:  the number of completed epochs; 0 for the evaluation before training.
            result: of the evaluation, if there was one.
        """
        trajectories = epoch * self.recipe.train.trajectories
        row = {
            "epoch": epoch,
            "optimizer_step": self.components.learner.updates.optimizer_step,
            "trajectories": trajectories,
            "micro_batch": self.components.learner.updates.micro_batch,
            **metrics,
        }
        self.run.metrics.write(row)
        if self.tracker is not None:
            self.tracker({key: value for key, value in row.items() if isinstance(value, int | float)}, trajectories)
        if result is not None:
            sheet = sheets.grid(result.images, self._captions(result), self.recipe.evaluation.images_per_prompt)
            with durable.replacing(self.run.sheet(epoch)) as temporary:
                sheet.save(temporary)
        if epoch == self.recipe.train.epochs or time.monotonic() - self._last_drawn > _BETWEEN_CURVES:
            draw_curves(self.run.metrics.read(), self.run.path / "curves.png")
            self._last_drawn = time.monotonic()
        tqdm.write(line(row, self.recipe.train.epochs))

    def finish(self) -> None:
        """Export the weights, join the pictures from before and after training, of the same prompts and noise, into one, and
        write the run's page.

        Raises RunError if the weights cannot be written.
        """
        temporary_weights = self.run.path / f"{durable.TEMPORARY}{self.run.weights.name}"
        for old in (temporary_weights, self.run.weights):
            shutil.rmtree(old, ignore_errors=True)
        try:
            self.components.policy.export(temporary_weights)
        except SafetensorError as error:
            raise RunError(f"{self.run.weights}: cannot be written: {error}") from None
        temporary_weights.rename(self.run.weights)
        joined = self.run.samples / "before_after.png"
        grids = [self.run.sheet(epoch) for epoch in (0, self.recipe.train.epochs)]
        if all(grid.exists() for grid in grids):
            with durable.replacing(joined) as temporary:
                sheets.before_after(*map(Image.open, grids)).save(temporary)
        tqdm.write(f"weights in {self.run.weights}, pictures in {joined if joined.exists() else self.run.samples}")
        self._write_page()

    def _write_page(self) -> None:
        """Write report.html. The run is complete without it, so that whatever goes wrong here ends in a line of text."""
        try:
            tqdm.write(f"all on one page: {write_page(self.run)}")
        except Exception as error:
            tqdm.write(
                f"{self.run.page}: not written ({error}); try again: python -m dag.report {self.run.path} --html"
            )

    def _captions(self, result: EvaluationResult) -> list[str]:
        return [f"{p}  {r:.2f}" for p, r in zip(result.prompts, result.reward.tolist(), strict=True)]
