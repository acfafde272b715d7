"""Loading recipes: what is accepted, what is refused and with which message, and `--set`."""

import sys
from pathlib import Path

import pytest
import yaml

from dag import recipe as schema
from dag.errors import UsageError
from dag.recipe import Recipe, validate
from dag.recipe.load import load, parse

MINIMAL = """
model: {path: embedded}
prompts: {texts: [a cat, a dog]}
reward: {name: colourfulness}
objective: {name: dag_db, beta: {value: 10}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a recipe is refused."""
    with pytest.raises(UsageError) as caught:
        load(path, overrides)
    return str(caught.value)


def with_keys(file: Path, text: str) -> Path:
    file.write_text(MINIMAL + text)
    return file


# -- what is accepted ---------------------------------------------------------------------------------------------


def test_a_minimal_recipe_gets_the_defaults(file: Path) -> None:
    recipe = load(file)
    assert recipe.train.epochs == 100
    assert recipe.objective.name == "dag_db"
    assert [term.name for term in recipe.reward] == ["colourfulness"]
    assert recipe.trackers == ()


def test_scientific_notation_without_a_dot_is_a_number(file: Path) -> None:
    recipe = load(with_keys(file, "train: {learning_rate: 1e-4}"))
    assert yaml.safe_load("1e-4") == "1e-4", "PyYAML reads it as a number now: this test has lost its point"
    assert recipe.train.learning_rate == 1e-4


def test_a_list_of_rewards(file: Path) -> None:
    override = "reward=[{name: compressibility, weight: -2}, {name: image_text}]"
    recipe = load(file, [override])
    assert [(term.name, term.weight) for term in recipe.reward] == [
        ("compressibility", -2.0),
        ("image_text", 1.0),
    ]


def test_a_recipe_cannot_be_changed(file: Path) -> None:
    recipe = load(file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3  # type: ignore[misc]


def test_a_recipe_survives_its_own_dump(file: Path) -> None:
    """A resume reads the recipe from run.json, which holds a dump."""
    recipe = load(file, ["sampler.eta=0.5", "trackers=[wandb]"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED = [
    ("train: {learnig_rate: 1e-4}", "train.learnig_rate: unknown key; did you mean 'learning_rate'?"),
    ("trian: {}", "trian: unknown key; did you mean 'train'?"),
    ("zzz: 1", "zzz: unknown key; known: adapter, "),
    ("train: {epochs: 1.5}", "train.epochs: input should be a valid integer"),
    ("train: {epochs: many}", "train.epochs: input should be a valid integer"),
    ("train: {learning_rate: quick}", "train.learning_rate: input should be a valid number"),
    ("train: {learning_rate: [1]}", "train.learning_rate: input should be a valid number"),
    ("train: 3", "train: "),
    ("sampler: {eta: 0}", "sampler.eta: input should be greater than 0 (found 0)"),
    ("sampler: {eta: 1.1}", "sampler.eta: input should be less than or equal to 1"),
    ("sampler: {steps: 1001}", "sampler.steps: input should be less than or equal to 1000"),
    ("sampler: {chain_dtype: fp8}", "sampler.chain_dtype: input should be 'fp32', 'fp16' or 'bf16'"),
    ("train: {updates: 0}", "train.updates: input should be greater than or equal to 1"),
    ("seed: -1", "seed: input should be greater than or equal to 0"),
    ("seed: 9223372036854775808", "seed: input should be less than 9223372036854775808"),
    ("trackers: [tensorbord]", "trackers.0: input should be 'tensorboard' or 'wandb' (found 'tensorbord')"),
    ("train: {adam_betas: [0.9]}", "train.adam_betas.1: missing"),
    ("1: 2", "1: keys should be strings"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_mistake_in_the_file_is_named(file: Path, text: str, message: str) -> None:
    assert refusal(with_keys(file, text)).startswith(f"{file}: {message}")


REFUSED_OVERRIDES = [
    ("objective.name=dag_dbb", "objective.name: unknown name 'dag_dbb'; did you mean 'dag_db'?"),
    (
        "objective={name: x}",
        "known: dag_db, dag_kl, nabla_db, tb, subtb, ddpo, dpo, regression, backprop, refl, adjoint",
    ),
    ("objective={beta: {value: 1}}", "objective.name: missing"),
    ("objective={name: dag_db}", "objective.beta: missing"),
    ("objective.beta.value=0", "objective.beta.value: input should be greater than 0"),
    ("objective.beta.value=.nan", "objective.beta.value: "),
    (
        "objective.forward_looking.source=rolout",
        "objective.forward_looking.source: input should be 'rollout', ",
    ),
    ("reward={name: colorfulness}", "unknown name 'colorfulness'; did you mean 'colourfulness'?"),
    ("reward=[{name: image_text}, {name: jpeg}]", "reward.1.name: unknown name 'jpeg'"),
    ("reward=[{name: image_text, pth: x}]", "reward.0.pth: unknown key; did you mean 'path'?"),
    ("reward={name: custom}", "reward.0.path: missing"),
    ("reward={name: custom, path: file.py}", "reward.0.path: "),
    ("reward=[]", "reward: give at least one"),
    ("prompts={}", "prompts: give exactly one of set, file, texts (found: none)"),
    ("prompts.set=simple_animals", "give exactly one of set, file, texts (found: set, texts)"),
    ("prompts={set: animals}", "prompts.set: input should be 'simple_animals'"),
    ("prompts.path=x", "path belongs to set: drawbench and set: hpdv2"),
    ("prompts={set: drawbench, path: x, style: photo}", "style belongs to set: hpdv2"),
    ("evaluation.held_out=true", "evaluation.held_out: only prompts.set=drawbench and hpdv2 keep prompts back"),
    ("reward={name: http, url: localhost}", "reward.0.url: "),
    ("reward={name: hpsv2, version: v3}", "reward.0.version: input should be 'v2.1' or 'v2.0'"),
    ("prompts={texts: []}", "texts must hold at least one prompt and no empty one"),
    ("prompts={texts: [a cat, '  ']}", "texts must hold at least one prompt and no empty one"),
]


@pytest.mark.parametrize(
    ("override", "message"), REFUSED_OVERRIDES, ids=[override for override, _ in REFUSED_OVERRIDES]
)
def test_a_mistake_in_a_section_is_named(file: Path, override: str, message: str) -> None:
    text = refusal(file, override)
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("key", ["model", "prompts", "reward", "objective"])
def test_keys_without_default_are_required(key: str) -> None:
    data = yaml.safe_load(MINIMAL)
    del data[key]
    with pytest.raises(UsageError, match=f"^mine: {key}: missing, and it has no default$"):
        parse(data, "mine")


def test_all_mistakes_are_reported_together(file: Path) -> None:
    found = refusal(with_keys(file, "train: {epochs: x, updates: 0, pace: 1}\nsampler: {eta: 0}")).splitlines()
    assert {line.removeprefix(f"{file}: ").split(":")[0] for line in found} == {
        "train.epochs",
        "train.updates",
        "train.pace",
        "sampler.eta",
    }


# -- mistakes of several keys -------------------------------------------------------------------------------------

JPEG = "reward={name: compressibility}"


def gradient(kind: str, more: str = "weight: 1") -> str:
    """The override that makes the objective a DAG-KL with this policy gradient."""
    return f"objective={{name: dag_kl, beta: {{value: 1}}, policy_gradient: {kind}, {more}}}"


CROSS_FIELD = [
    (("train.updates=3",), "train.updates=3 must divide train.trajectories=64"),
    (
        ("objective={name: dag_kl, beta: {value: 1}}", "train.updates=64"),
        "leave-one-out baseline needs at least 2",
    ),
    (("adapter.targets=[]",), "adapter.targets: name at least one layer"),
    (
        ("adapter.kind=full", "regulariser.pretrained_kl=0.1"),
        "regulariser.pretrained_kl needs adapter.kind=lora",
    ),
    (("adapter.kind=full", "objective.prior=pretrained"), "objective.prior=pretrained needs adapter.kind=lora"),
    (("flow.channels=[]",), "flow.channels: name at least one width"),
    ((gradient("pathwise", "reward_gradient: exact"), JPEG), "reward_gradient=exact: compressibility has no gradient"),
    ((gradient("control_variate"),), "control_variate corrects a learnt gradient, and these rewards have an exact one"),
    (
        (gradient("control_variate"), JPEG, "flow.warmup_epochs=0"),
        "reward_critic: in one pass, with control_variate and with baseline=value the policy is trained before",
    ),
    (
        (gradient("control_variate", "prior: pretrained, learnt_flow: false, jacobian: pretrained"), JPEG),
        "control_variate corrects the policy's own x0_hat",
    ),
    (
        (gradient("pathwise", "jacobian: pretrained"),),
        "jacobian=pretrained needs prior=pretrained and learnt_flow=false",
    ),
    ((gradient("pathwise", "forward_looking: {source: none}"),), "differentiates the policy's own x0_hat"),
    ((gradient("pathwise", "correction: 0.5"),), "objective.correction belongs to policy_gradient=control_variate"),
    ((gradient("pathwise", "clip_range: 0.1"),), "objective.clip_range has no effect with objective.policy_gradient="),
    ((gradient("score", "jacobian: none"),), "objective.jacobian has no effect with policy_gradient=score"),
    (
        ("objective={name: nabla_db, beta: {value: 1}}", "flow.passes=1"),
        "flow.passes belongs to flows that learn values",
    ),
    (
        ("objective={name: nabla_db, beta: {value: 1}, learnt_flow: false, reverse: 2}",),
        "objective.reverse has no effect with learnt_flow=false",
    ),
    (
        (gradient("pathwise", "learnt_flow: false"), "flow.slopes=true"),
        "flow.slopes has no effect with objective.learnt",
    ),
    (
        (gradient("pathwise", "learnt_flow: false, huber: 3"),),
        "objective.huber has no effect with objective.learnt_flow",
    ),
    (
        ("objective={name: dag_db, beta: {value: 1}, forward_looking: {source: none, weight: fitted}}",),
        "weight=fitted has no effect with source=none",
    ),
    (
        (gradient("pathwise"), JPEG, "train.rollout=one_pass", "train.updates=64"),
        "in one pass the reward critic needs at least 2 trajectories an update",
    ),
    ((gradient("pathwise"), "reward={name: image_text}", "deterministic=true"), "the gradient of resizing pictures"),
    (("train.step_choice=informative",), "train.step_choice=informative has no effect with train.step_fraction=1"),
    (
        ("train.step_choice=informative", "train.step_fraction=0.5"),
        "train.step_choice=informative draws the last step like all others",
    ),
    (
        ("train.step_choice=informative", "objective={name: ddpo}"),
        "train.step_choice=informative is measured on the rewards of x0_hat",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), CROSS_FIELD, ids=[message for _, message in CROSS_FIELD])
def test_validate_names_the_keys_that_disagree(file: Path, overrides: tuple[str, ...], message: str) -> None:
    assert message in refusal(file, *overrides)


def test_validate_finds_nothing_in_a_good_recipe_and_everything_in_a_bad_one(file: Path) -> None:
    good = load(file)
    assert validate(good) == []
    bad = good.model_copy(
        update={
            "reward": (),
            "train": good.train.model_copy(update={"updates": 3}),
            "flow": schema.Flow(channels=()),
        }
    )
    assert len(validate(bad)) == 3


def test_full_finetuning_needs_no_targets(file: Path) -> None:
    assert load(file, ["adapter.kind=full", "adapter.targets=[]"]).adapter.targets == ()


# -- --set --------------------------------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_and_list_entries(file: Path) -> None:
    recipe = load(
        file,
        [
            "objective.forward_looking.source=none",
            "prompts.texts.1=a fox",
            "reward.weight=2",
            "train.learning_rate=1e-5",
        ],
    )
    assert recipe.objective.forward_looking.source == "none"  # type: ignore[union-attr]
    assert recipe.prompts.texts == ("a cat", "a fox")
    assert recipe.reward[0].weight == 2
    assert recipe.train.learning_rate == 1e-5


def test_overrides_reach_one_reward_of_a_list(file: Path) -> None:
    recipe = load(file, ["reward=[{name: colourfulness}, {name: image_text}]", "reward.1.weight=3"])
    assert [term.weight for term in recipe.reward] == [1, 3]


def test_the_last_override_wins_over_the_file_and_over_earlier_ones(file: Path) -> None:
    path = with_keys(file, "train: {epochs: 1}")
    assert load(path, ["train.epochs=2", "train.epochs=3"]).train.epochs == 3


def test_a_value_may_hold_an_equals_sign(file: Path) -> None:
    assert load(file, ["model.path=folder/a=b"]).model.path == "folder/a=b"


def test_an_override_of_nothing_resets_to_null(file: Path) -> None:
    path = with_keys(file, "evaluation: {diversity: embedded}")
    assert load(path, ["evaluation.diversity="]).evaluation.diversity is None


REFUSED_SYNTAX = [
    ("train.epochs", "--set train.epochs: write key.sub=value"),
    ("=3", "--set =3: write key.sub=value"),
    ("train.epochs=[", "--set train.epochs=[: the value is not YAML"),
    ("model.path.x=3", "--set model.path.x=3: model.path is not a section"),
    ("prompts.texts.2=a fox", "--set prompts.texts.2=a fox: index '2' is not one of 0..1"),
    ("prompts.texts.first=a fox", "--set prompts.texts.first=a fox: index 'first' is not one of 0..1"),
    ("prompts.texts.0.x=a fox", "--set prompts.texts.0.x=a fox: prompts.texts.0 is not a section"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED_SYNTAX, ids=[override for override, _ in REFUSED_SYNTAX])
def test_an_override_that_cannot_be_applied_is_quoted(file: Path, override: str, message: str) -> None:
    assert refusal(file, override) == message


def test_a_typo_in_an_override_is_an_unknown_key(file: Path) -> None:
    assert "train.epoch: unknown key; did you mean 'epochs'?" in refusal(file, "train.epoch=3")
    assert "trian: unknown key; did you mean 'train'?" in refusal(file, "trian.epochs=3")


def test_a_mistake_in_an_override_is_not_blamed_on_the_file(file: Path) -> None:
    file.write_text(file.read_text() + "\ntrian: {}\n")
    said = refusal(file, "train.epochs=0", "sampler={stepz: 3}").splitlines()
    assert {line.rpartition(": ")[0].partition(":")[0] for line in said} == {
        "--set train.epochs", "--set sampler.stepz", str(file),
    }  # fmt: skip
    assert refusal(file, "reward=aesthetic").startswith("--set reward: write {name: ...}, or a list of such sections")


# -- files --------------------------------------------------------------------------------------------------------

BROKEN_FILES = [
    (b"model: [1\nprompts: {", "not a YAML file (line 2)"),
    (b"a: !!python/object:os.system x", "not a YAML file (line 1)"),
    (b"- 1\n- 2\n", "a recipe is a mapping of keys, found list"),
    (b"", "a recipe is a mapping of keys, found NoneType"),
    (b"just words", "a recipe is a mapping of keys, found str"),
    (b"\xff\xfe", "cannot read the recipe"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN_FILES, ids=[message for _, message in BROKEN_FILES])
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "nope.yaml"
    assert refusal(missing) == f"{missing}: cannot read the recipe: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot read the recipe: Is a directory"


# -- values that Python or YAML stumble over ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["2024-13-45", "!!int x", "!!bool x", "!!timestamp x", "0x_", "9" * 5000, "[" * 500 + "]" * 500],
    ids=["date", "int", "bool", "timestamp", "hex", "digits", "depth"],
)
def test_values_that_yaml_cannot_construct_are_refused(file: Path, value: str) -> None:
    limit = sys.getrecursionlimit()
    # Python's default. torch.compile raises it for the whole process, and then this depth would be no mistake.
    sys.setrecursionlimit(1000)
    try:
        assert "the value is not YAML" in refusal(file, f"seed={value}")
        assert "not a YAML file" in refusal(with_keys(file, f"seed: {value}\n"))
    finally:
        sys.setrecursionlimit(limit)


def test_an_index_that_only_looks_like_a_digit_is_refused(file: Path) -> None:
    assert refusal(file, "prompts.texts.²=a fox") == "--set prompts.texts.²=a fox: index '²' is not one of 0..1"


@pytest.mark.parametrize("key", ["objective.beta.value", "train.learning_rate", "reward.weight", "train.clip_norm"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_must_be_finite(file: Path, key: str, value: str) -> None:
    assert key.rpartition(".")[2] in refusal(file, f"{key}={value}")


@pytest.mark.parametrize(
    "override", ["flow.channels=[0]", "flow.channels=[-8]", "train.adam_betas=[2, 0.9]", "model.path=''"]
)
def test_list_entries_are_checked_too(file: Path, override: str) -> None:
    assert override.partition("=")[0] in refusal(file, override)


def test_the_hint_of_an_unknown_key_is_a_key_of_the_chosen_union_member(file: Path) -> None:
    """clip_range is a key of dag_kl and ddpo, so it must not be suggested for dag_db, which would refuse it again."""
    message = refusal(file, "objective.clip_range=3")
    assert "unknown key" in message
    assert "did you mean 'clip_range'" not in message
    assert "did you mean 'clip_range'" in refusal(file, "objective={name: ddpo, clip_rage: 3}")


@pytest.mark.parametrize(
    "override", ["objective=3", "objective.beta=3", "reward=3", "adapter.targets=to_q", "train=[1]"]
)
def test_messages_speak_of_the_file_and_not_of_python(file: Path, override: str) -> None:
    message = refusal(file, override)
    assert not {"tuple", "dictionary", "instance", "object"} & set(message.split())
    assert "a list" in message or "a section" in message


def test_a_refused_section_is_quoted_once(file: Path) -> None:
    assert refusal(file, "prompts={}") == "--set prompts: give exactly one of set, file, texts (found: none)"


def test_a_repeated_key_is_refused(file: Path) -> None:
    assert "the value is not YAML" in refusal(file, "sampler={eta: 1, eta: 1}")
    message = refusal(with_keys(file, "model: {path: elsewhere}\n"))
    assert message == f"{file}: not a YAML file (line 6): the key 'model' is given twice"


def test_merge_keys_may_be_overridden(file: Path) -> None:
    text = "checkpoint: &a {every: 3}\nevaluation: {<<: *a, every: 4}\n"
    assert load(with_keys(file, text)).evaluation.every == 4


@pytest.mark.parametrize("key", ["custom", "ddpo"])
def test_a_key_named_like_a_reward_or_objective_is_unknown(file: Path, key: str) -> None:
    """pydantic's error paths contain names of union members; removing those must not remove a key of the same name."""
    assert f"--set {key}: unknown key" in refusal(file, f"{key}=3")
    assert f"--set objective.{key}: unknown key" in refusal(file, f"objective.{key}=3")
    assert f"--set reward.0.{key}: unknown key" in refusal(file, f"reward.{key}=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.attention=xformers", "deterministic=true: memory.attention=xformers adds in any order; use auto"),
        ("memory.compile=true", "deterministic=true: memory.compile=true picks kernels by timing them; use false"),
        ("memory.compile=unet", "deterministic=true: memory.compile=unet picks kernels by timing them; use false"),
    ],
)
def test_levers_that_compute_other_bits_each_time_are_refused(file: Path, override: str, message: str) -> None:
    load(file, [override])
    assert refusal(file, "deterministic=true", override) == f"{file}: {message}"


def test_a_switch_with_a_third_value(file: Path) -> None:
    found = {value: load(file, [f"memory.compile={value}"]).memory.compile for value in ("false", "true", "unet")}
    assert found == {"false": False, "true": True, "unet": "unet"}
    assert "memory.compile: input should be False, True or 'unet' (found 'blocks')" in refusal(
        file, "memory.compile=blocks"
    )
    assert "memory: chains is not a switch" in refusal(file, "memory.chains=true")
