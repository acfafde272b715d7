"""The stages of `python -m dag.bench checklist`: each with its command, its share of the time, and where its rows belong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

README, COSTS, RECIPES = "README.md", "dag/costs/README.md", "recipes/README.md"
_RECIPES, _PEAKS = "each recipe's line `# Hardware:`", "the table of peaks in README.md"


@dataclass(frozen=True)
class Stage:
    """A command that appends rows to a CSV file, each as soon as it is measured."""

    name: str
    what: str
    command: tuple[str, ...]
    """The words after `python -m`; {folder} stands for the checklist's folder."""
    file: str
    """The CSV file, in the checklist's folder."""
    share: float
    """Seconds that it may take of ten minutes; what a stage leaves over goes to those after it."""
    shown: tuple[str, ...] = ()
    """Columns that the summary shows."""
    place: tuple[str, str] = (README, "")
    """(file of this repository, words in it): the place where the figures belong."""
    others: str = ""
    """Further places where they belong."""
    notes: str = ""
    """A Markdown file of the checklist's folder, whose list the summary repeats."""


_TRAINING = (
    *("label", "micro_batch", "ms_total", "trajectories_per_hour", "times_published", "peak_allocated_gib"),
    *("peak_reserved_gib", "peak_tensors_gib", "predicted_gib", "cap_gib", "error"),
)
_PROFILE = ("label", "calls", "ms", "percent", "error")
_TRIAL = (
    *("label", "epoch", "micro_batch", "reward_mean", "loss", "seconds_sample", "seconds_reward", "seconds_update"),
    *("seconds_evaluation", "peak_memory_gib", "largest_difference", "of", "error"),
)
_KERNELS = ("op", "provider", "mode", "B", "shape", "us_p50", "percent_of_copy", "peak_mib", "launches", "error")

# Overrides that the stage `levers` measures, one row for each, besides the recipe as it is; what may hang or break comes last.
LEVERS = (
    "memory.channels_last=false",
    "train.optimizer=adamw8bit",
    "memory.checkpointing=selective",
    "reward.dtype=tf32",
    "memory.base=nf4",
    "memory.compile=true",
    "memory.compile=true memory.channels_last=false",
    "memory.compile=unet",
)


def _words(option: str, values: Sequence[str]) -> tuple[str, ...]:
    """The words of a command that give one option several values."""
    return tuple(word for value in values for word in (option, value))


def _train_step(recipe: str, *options: str) -> tuple[str, ...]:
    return ("dag.bench", "train-step", "--recipe", f"recipes/{recipe}", "--repeats", "1", *options)


def _stage(name: str, what: str, command: Sequence[str], file: str, share: float, **others: object) -> Stage:
    rows = ("--csv", "{folder}/" + file, "--stage", name)
    return Stage(name, what, (*command, *rows), file, share, **others)  # type: ignore[arg-type]


def stages(has_gpu: bool) -> list[Stage]:
    """The stages in the order in which they run: the figures that matter most come first.

    Without a GPU the same commands run on the embedded model, to check that they work.
    """
    if has_gpu:
        return _with_commands(_on_a_gpu())
    rehearsal = "on the embedded model, in place of: "
    return [
        stage if stage.file == "kernels.csv" else replace(stage, what=rehearsal + stage.what)
        for stage in _with_commands(_on_a_cpu())
    ]


def _on_a_gpu() -> dict[str, tuple[str, ...]]:
    """Commands by stage, on a GPU. Most take 10 of the recipes' 30 or 50 steps, so that a slow GPU is done in time too."""
    quick, aesthetic = ("--set", "sampler.steps=10"), "recipes/aesthetic_24gb.yaml"
    return {
        "lora_24gb": _train_step("aesthetic_24gb.yaml", "--cap-gib", "24", "--literal", "--ablation", *quick),
        "full_24gb": _train_step("full_finetune_24gb.yaml", "--cap-gib", "24", *quick),
        "lora_12gb": _train_step("aesthetic_12gb.yaml", "--cap-gib", "12", *quick),
        "trial": ("dag.bench", "trial", "--recipe", aesthetic),
        "levers": _train_step("aesthetic_24gb.yaml", "--no-prediction", *quick, *_words("--variant", LEVERS)),
        "profile": ("dag.bench", "profile", "--recipe", aesthetic, "--set", "sampler.steps=5"),
        # Its predicted peak would take as long as the measurement.
        "sdxl_24gb": _train_step("sdxl_24gb.yaml", "--cap-gib", "24", "--no-prediction", *quick),
        "sd35m_24gb": _train_step("sd35m_24gb.yaml", "--cap-gib", "24", "--no-prediction", *quick),
        # Random weights are made in bf16 before they are quantised, which real ones are on their way to the GPU. With ten steps an
        # H100 was not done in 75 s.
        "flux_24gb": _train_step(
            "flux_nf4_24gb.yaml", "--cap-gib", "32", "--no-prediction", "--set", "sampler.steps=4"
        ),
        "lora_48gb": _train_step("aesthetic_48gb.yaml", "--cap-gib", "48", *quick),
        "paper": _train_step("paper/aesthetic.yaml", "--set", "sampler.steps=5"),
        "largest_reward": _train_step("hpsv2_24gb.yaml", "--cap-gib", "24", *quick),
    }


def _on_a_cpu() -> dict[str, tuple[str, ...]]:
    """Commands by stage, without a GPU: on the embedded model and few samples. Their rows say nothing about a GPU."""
    tiny, scorer = "tiny_cpu_db.yaml", ("reward.name=image_text", "reward.path=random")
    small = ("sampler.steps=3", "sampler.tile=2", "train.micro_batch=2")
    quick = (*_words("--set", small), "--trajectories", "2")
    full = ("adapter.kind=full", "regulariser.pretrained_kl=0")
    return {
        "lora_24gb": _train_step(tiny, "--literal", "--ablation", *quick),
        "full_24gb": _train_step(tiny, *quick, *_words("--set", full)),
        "lora_12gb": _train_step(tiny, *quick, "--set", "memory.checkpointing=selective"),
        "trial": ("dag.bench", "trial", "--recipe", f"recipes/{tiny}", *_words("--set", (*small, *scorer))),
        "levers": _train_step(tiny, "--no-prediction", *quick, *_words("--set", scorer), *_words("--variant", LEVERS)),
        "profile": ("dag.bench", "profile", "--recipe", f"recipes/{tiny}", *quick),
        "sdxl_24gb": _train_step("tiny_cpu.yaml", "--no-prediction", *quick),
        "sd35m_24gb": _train_step("tiny_flow_cpu.yaml", "--no-prediction", *quick),
        "flux_24gb": _train_step("tiny_flow_cpu.yaml", "--no-prediction", *quick, "--set", "sampler.eta=0.5"),
        "lora_48gb": _train_step(tiny, *quick, "--set", "train.micro_batch=4", "--trajectories", "4"),
        "paper": _train_step(tiny, *quick, "--set", "objective.forward_looking.source=current"),
        "largest_reward": _train_step(tiny, *quick, *_words("--set", scorer)),
    }


def _with_commands(commands: dict[str, tuple[str, ...]]) -> list[Stage]:
    """Every stage with its command; all else is the same with and without a GPU."""

    def training(name: str, what: str, share: float, file: str, words: str, others: str = "") -> Stage:
        where = (file, words)
        return _stage(name, what, commands[name], "training.csv", share, shown=_TRAINING, place=where, others=others)

    kernels = ("dag_kernels.bench", "--checklist", "{folder}")
    return [
        training("lora_24gb", "aesthetic_24gb.yaml and the published amount of work, lever by lever, under 24 GiB", 105,
                 COSTS, "each with the ones above", _PEAKS),
        training("full_24gb", "full_finetune_24gb.yaml under 24 GiB", 35, RECIPES, "`full_finetune_24gb.yaml`", _RECIPES),
        training("lora_12gb", "aesthetic_12gb.yaml under 12 GiB", 30, RECIPES, "`aesthetic_12gb.yaml`", _RECIPES),
        _stage("trial", "train_dag.py: evaluation, checkpoint, SIGTERM, --resume, LoRA", commands["trial"], "run.csv", 80,
               shown=_TRIAL, place=(README, "**State of this version.**")),
        training("levers", "aesthetic_24gb.yaml with one lever changed at a time", 70, COSTS, "## Levers"),
        _stage("profile", "twenty kernels that take most of a training step, and the GPU's idle share",
               commands["profile"], "profile.csv", 35, shown=_PROFILE, place=(COSTS, "## Levers")),
        Stage("kernels", "fused kernels: times, tests, registers (kernels.md)", kernels, "kernels.csv", 70,
              shown=_KERNELS, place=("kernels/README.md", "measured on a GPU"), notes="kernels.md"),
        training("sdxl_24gb", "sdxl_24gb.yaml under 24 GiB, with every step trained", 30, RECIPES, "`sdxl_24gb.yaml`",
                 f"{_RECIPES}, {_PEAKS}"),
        training("sd35m_24gb", "sd35m_24gb.yaml under 24 GiB, with every step trained", 30, RECIPES, "`sd35m_24gb.yaml`",
                 _RECIPES),
        training("flux_24gb", "flux_nf4_24gb.yaml, with every step trained", 60, RECIPES, "`flux_nf4_24gb.yaml`",
                 _RECIPES),
        training("lora_48gb", "aesthetic_48gb.yaml under 48 GiB", 15, RECIPES, "`aesthetic_48gb.yaml`", _RECIPES),
        training("paper", "paper/aesthetic.yaml", 15, RECIPES, "`paper/aesthetic.yaml`", _RECIPES),
        training("largest_reward", "hpsv2_24gb.yaml, the largest reward, under 24 GiB", 25, RECIPES, "`hpsv2_24gb.yaml`",
                 _RECIPES),
    ]  # fmt: skip
