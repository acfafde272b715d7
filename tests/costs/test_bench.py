"""`python -m dag.bench`: FLOP, the published amount of work, previews and stored chains."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import one_pass, parts_of, sampled, updated
from helpers.shallow_model import TINY

from dag import bench
from dag.costs import ablation, commands, flops
from dag.costs.published_work import Published
from dag.costs.train_step import LITERAL
from dag.errors import UsageError
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS, TRAJECTORIES = 3, 2
PATHWISE = "objective.policy_gradient=pathwise"
# Three cases are of the embedded model: its tiny decoder is known without weights, and on the shallow one the gradient of a
# state is 1.4 % off.
EMBEDDED = ("model.path=embedded", "model.resolution=32")
FLOWLESS = ("objective.learnt_flow=false", "objective.huber=null", "objective.residual_scale=none")
SMALL = (
    "model.resolution=16",
    f"sampler.steps={STEPS}",
    f"train.trajectories={TRAJECTORIES}",
    f"train.micro_batch={TRAJECTORIES}",
    f"sampler.tile={TRAJECTORIES}",
    "train.updates=1",
    "train.step_fraction=1",
    "flow.warmup_epochs=0",
    "flow.passes=0",
    "regulariser.pretrained_kl=0",
    "objective.beta.unit=reward",
)


@pytest.fixture
def small(shallow_model: Path) -> tuple[str, ...]:
    """Overrides of a small recipe on a shallow model."""
    return f"model.path={shallow_model}", *SMALL


def recipe_of(*overrides: str) -> Recipe:
    return load(ROOT / "recipes/tiny_cpu_db.yaml", overrides)


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    trainer = Trainer(recipe, RunFolder.create(folder / "run"), parts_of(recipe))
    return trainer


def counted(epoch: Any, steps: int = STEPS) -> float:
    """GFLOP per transition, counted while an epoch of so many steps really runs."""
    with flops.counter() as counter:
        epoch()
    return counter.get_total_flops() / 1e9 / (steps * TRAJECTORIES)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.rollout=one_pass", *EMBEDDED, "objective.forward_looking.decoder=tiny"),
        # The last three states are scored always: five steps have one that is not, and the full decoder makes it seen.
        ("train.rollout=one_pass", "objective.forward_looking.stride=2", "sampler.steps=5"),
        ("train.rollout=one_pass", "sampler.uncond=frozen", "memory.checkpointing=full"),
        ("objective.forward_looking.source=none",),
        ("adapter.kind=full",),
        (PATHWISE, "objective.prior=pretrained"),
        (PATHWISE, "objective.prior=pretrained", "train.rollout=one_pass", *FLOWLESS, *EMBEDDED),
        (PATHWISE, "objective.jacobian=none", "train.rollout=one_pass"),
    ],
    ids=str,
)
def test_work_counted_from_configs_is_the_work_of_a_run(
    tmp_path: Path, small: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    recipe = recipe_of(*small, *overrides)
    trainer = trainer_of(recipe, tmp_path)
    real = counted(
        (lambda: one_pass(trainer, 0)) if trainer.is_one_pass(0) else lambda: updated(trainer, sampled(trainer, 0), 0),
        recipe.sampler.steps,
    )
    assert sum(flops.of_recipe(recipe).values()) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective={name: backprop}",),
        ("objective={name: backprop, copies: 3}",),
        ("objective={name: backprop, last: 3}", "regulariser.pretrained_kl=0.1", *EMBEDDED),
    ],
    ids=str,
)
def test_work_of_back_propagation_is_the_work_of_a_run(
    tmp_path: Path, small: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    given = [key for key in small if not key.startswith(("objective", "regulariser"))]
    recipe = load(ROOT / "recipes/tiny/draft.yaml", [*given, *overrides])
    trainer = trainer_of(recipe, tmp_path)
    real = counted(lambda: updated(trainer, sampled(trainer, 0), 0))
    assert sum(flops.of_recipe(recipe).values()) == pytest.approx(real, rel=0.01)


def test_the_published_work_is_what_its_docstring_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[str, ...]
) -> None:
    recipe, calls = recipe_of(*small), Counter[str]()
    trainer = trainer_of(recipe, tmp_path)
    policy, T, N = trainer.components.policy, STEPS, TRAJECTORIES
    for name in ("predict", "decode"):
        original = getattr(policy, name)

        def counting(*given: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            kind = name + (" of one branch" if options.get("unguided") else "")
            calls[kind] += len(given[0])
            return original(*given, **options)

        monkeypatch.setattr(policy, name, counting)

    def scorer(batch: Any) -> Any:
        def score(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            calls["reward"] += len(images)
            return torch.zeros(len(images))

        return score

    before = [parameter.clone() for parameter in policy.trainable()]
    published = Published(recipe, trainer.components, scorer)
    real = counted(lambda: published.epoch(trainer.sampling.batch(0), trainer.meter.phase))
    assert calls == {
        "predict": N * T * 2,
        "predict of one branch": N * T * 2,
        "decode": N * (2 * T + 1),
        "reward": N * (2 * T + 1),
    }
    assert sum(flops.of_published(recipe).values()) == pytest.approx(real, rel=0.01)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))


def test_the_bench_compares_with_the_published_work(
    tmp_path: Path, small: tuple[str, ...], shallow_model: Path, capsys: Any
) -> None:
    result = tmp_path / "rows.json"
    arguments = ["train-step", "--recipe", str(ROOT / "recipes/tiny_cpu_db.yaml"), "--literal", "--ablation"]
    tiny = ("objective.forward_looking.decoder=tiny", f"objective.forward_looking.decoder_path={shallow_model / TINY}")
    chosen = [word for override in (*small, *tiny, "sampler.steps=2") for word in ("--set", override)]
    limits = ["--trajectories", str(TRAJECTORIES), "--repeats", "1", "--no-prediction", "--json", str(result)]
    assert bench.main([*arguments, *chosen, *limits]) == 0
    shown = capsys.readouterr().out.splitlines()
    written = json.loads(result.read_text())
    rows = written["rows"]
    labels = [label for label, _ in (*ablation.ABLATION, *ablation.BY_GRADIENT)]
    assert [row["label"] for row in rows] == [LITERAL, *labels]
    assert len(shown) == len(rows)
    assert rows[0]["times_published"] == 1
    work = [row["gflop_per_transition"] for row in rows]
    levers, (exact, learnt) = work[:-2], work[-2:]
    assert levers == sorted(levers, reverse=True), "every lever takes work away"
    assert exact > learnt > levers[1], "the reward's gradient adds work, and goes through the decoder where it is exact"
    assert all(row["trajectories_per_hour"] > 0 and row["peak_tensors_gib"] > 0 for row in rows)
    assert {"device", "threads", "torch", "commit"} <= written["environment"].keys()


def test_the_arithmetic_behind_the_24_gb_recipe(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Stable Diffusion 1.5 from its configs: three times less work for the same transitions, four with a frozen branch."""
    # Each row takes seconds to count, so each has two levers more than the one before.
    stored, *levers = ablation.ABLATION
    pairs = [(label, (*first, *second)) for (_, first), (label, second) in zip(levers[::2], levers[1::2], strict=True)]
    monkeypatch.setattr(ablation, "ABLATION", (stored, *pairs))
    monkeypatch.setattr(ablation, "BY_GRADIENT", ())
    assert bench.main(["count", "--recipe", str(ROOT / "recipes/aesthetic_24gb.yaml")]) == 0
    ratios = {line[:30].strip(): float(line.split("= ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert ratios[LITERAL] == 1
    assert len(set(ratios.values())) == len(ratios), "the recipe has some of the levers: the ablation starts without"
    assert ratios["+ tiny decoder for x0_hat"] > 3
    assert ratios["+ frozen unconditional branch"] > 4


def test_ddpo_is_refused(capsys: Any) -> None:
    assert bench.main(["count", "--recipe", str(ROOT / "recipes/tiny_cpu_ddpo.yaml")]) == 2
    assert "the bench times objectives with a flow, not ddpo" in capsys.readouterr().err


def test_cheaper_previews_are_measured_against_the_full_ones(tmp_path: Path, capsys: Any) -> None:
    result = tmp_path / "rows.json"
    recipe, few = str(ROOT / "recipes/tiny_cpu_db.yaml"), ["--trajectories", "4", "--json", str(result)]
    assert bench.main(["previews", "--recipe", recipe, "--set", "sampler.steps=6", *few]) == 0
    rows = {(row["decoder"], row["stride"]): row for row in json.loads(result.read_text())["rows"]}
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == 9
    exact = rows.pop(("full", 1))
    assert (exact["bias"], exact["rms"]) == (0, 0)
    assert exact["correlation"] == pytest.approx(1)
    assert all(row["rms"] > 0 and row["correlation"] < 1 for row in rows.values())


def test_chains_are_exact_where_log_pf_is_taken_at_the_stored_state(tmp_path: Path) -> None:
    result = tmp_path / "rows.json"
    recipe, few = str(ROOT / "recipes/tiny_cpu_db.yaml"), ["--trajectories", "4", "--json", str(result)]
    small = ["--set", "sampler.steps=4", "--set", "model.resolution=32"]
    assert bench.main(["storage", "--recipe", recipe, *small, *few]) == 0
    rows = {(row["chain"], row["log_pf_at"]): row for row in json.loads(result.read_text())["rows"]}
    assert [rows[dtype, "stored"]["ratio_error"] for dtype in ("fp32", "fp16", "bf16")] == [0, 0, 0]
    assert 0 < rows["fp16", "unrounded"]["log_pf_error"] < rows["bf16", "unrounded"]["log_pf_error"]
    steps, latent, fp16, fp32, int64 = 4, 4 * 8 * 8, 2, 4, 8
    scalars = 3 * steps * fp32 + fp32 + 2 * int64  # log P_F, log P_B and x0_hat's reward of each step; reward; two ids
    assert rows["fp16", "stored"]["bytes"] == (steps + 1) * latent * fp16 + scalars


def test_every_row_leaves_out_the_passes_of_the_pretrained_model() -> None:
    """The prior and the regulariser are off in every row of a lever: rows differ in their levers alone."""
    given, levers = ["objective.prior=pretrained"], {label for label, _ in ablation.ABLATION}
    cases = ablation.cases(str(ROOT / "recipes/tiny_cpu_db.yaml"), given, None, is_ablation=True)
    recipes = [recipe for label, recipe in cases if label in levers]
    assert {recipe.objective.prior for recipe in recipes} == {"none"}  # type: ignore[union-attr]
    assert {recipe.regulariser.pretrained_kl for recipe in recipes} == {0}


RECIPES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {*(ROOT / "recipes/search").glob("*.yaml")})
# Levers that contradict a recipe: all weights leave no pretrained model, and sub-trajectories need whole chains.
LEFT_OUT = {
    "full_finetune_24gb": [ablation.ABLATION[-1][0], *(label for label, _ in ablation.BY_GRADIENT)],
    "subtb": ["one pass"],
    "vard": ["one pass"],  # its critic must have seen a rollout first
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_with_a_flow_has_its_rows(path: Path, capsys: Any) -> None:
    """As it is, lever by lever, and as the published amount of work: no override contradicts the recipe."""
    asked = load(path)
    if asked.balance is None:
        with pytest.raises(UsageError, match="objectives with a flow"):
            ablation.comparable(str(path), [], None)
        return
    ((_, row),) = ablation.cases(str(path), [], None, is_ablation=False)
    assert row.train.updates == row.train.step_fraction == 1
    assert row.train.trajectories == max(2, asked.train.micro_batch)
    assert row.objective.name == asked.objective.name
    assert row.has_prior == (asked.has_prior and asked.balance.takes_gradient)
    published = ablation.published(str(path), [], None)
    assert published.balance is not None
    assert published.balance.has_flow
    left_out = LEFT_OUT.get(path.stem, [])
    labels = [label for label, _ in (*ablation.ABLATION, *ablation.BY_GRADIENT) if label not in left_out]
    assert [label for label, _ in ablation.cases(str(path), [], None, is_ablation=True)] == labels
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("left out: ")[0].strip() for line in said] == left_out


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tiny_cpu_db", (PATHWISE, *FLOWLESS, "flow.passes=0")),
        ("tiny_cpu_kl", (PATHWISE, *FLOWLESS, "flow.passes=0", "objective.advantage_clip=null")),
        ("tiny/nabla_db", ("objective.learnt_flow=false",)),
        ("tiny_cpu", ("objective.learnt_flow=true", "objective.jacobian=none")),
        ("tiny_cpu", ("objective.jacobian=pretrained",)),
    ],
    ids=str,
)
def test_with_and_without_a_learnt_flow(name: str, given: tuple[str, ...]) -> None:
    ((_, row),) = ablation.cases(str(ROOT / f"recipes/{name}.yaml"), given, None, is_ablation=False)
    assert row.balance is not None
    assert row.balance.has_flow == ("objective.learnt_flow=true" in given)


def test_a_row_that_does_not_fit_is_a_line_and_no_end(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*anything: Any, **options: Any) -> Any:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(commands, "measure", full)
    assert bench.main(["train-step", "--recipe", str(ROOT / "recipes/tiny_cpu_db.yaml")]) == 1
    assert "not measured: out of GPU memory: cuDNN error: CUDNN_STATUS_ALLOC_FAILED" in capsys.readouterr().out
