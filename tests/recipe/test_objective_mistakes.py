"""Recipes whose objective contradicts the rest of them: each mistake is named."""

from pathlib import Path

import pytest

from dag.errors import UsageError
from dag.recipe.load import load

MINIMAL = """
model: {path: embedded}
prompts: {texts: [a cat, a dog]}
reward: {name: colourfulness}
objective: {name: dag_db, beta: {value: 10}}
"""
JPEG = "reward={name: compressibility}"
TB = "objective={name: tb, beta: {value: 1}}"
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("objective={name: backprop}", JPEG), "objective.name=backprop: compressibility has no gradient"),
    (("objective={name: backprop, step_weight: balanced}",), "step_weight=balanced changes the gradient of backprop"),
    (("objective={name: backprop, last: [3, 2]}",), "objective.last=[3, 2]: the first must not be larger"),
    (("objective={name: backprop, last: 60}",), "objective.last=60 is more than sampler.steps=50"),
    (("objective={name: backprop, last: 2, copies: 2}",), "objective.copies=2 draws the last step anew: use last=1"),
    (
        ("objective={name: backprop, last: [1, 2], copies: 2}",),
        "objective.copies=2 draws the last step anew: use last=1",
    ),
    (
        ("objective={name: backprop, copies: 2}", "sampler.sde=flow_grpo"),
        "objective.copies=2: sampler.sde=flow_grpo leaves states noisier than their level",
    ),
    (
        ("objective={name: backprop, copies: 2}", "regulariser.sampling=1"),
        "objective.copies=2: regulariser.sampling pulls towards outputs while sampling",
    ),
    (("objective={name: backprop}", "train.step_fraction=0.5"), "backprop trains its last steps"),
    (("objective={name: refl}", JPEG), "objective.name=refl: compressibility has no gradient"),
    (("objective={name: adjoint, beta: {value: 1}}", JPEG), "objective.name=adjoint: compressibility has no gradient"),
    (("objective={name: subtb, beta: {value: 1}}", "train.rollout=one_pass"), "subtb needs whole trajectories"),
    (("objective={name: dpo}",), "dpo compares pictures of a prompt; set prompts.per_group to 2"),
    (
        ("objective={name: dpo}", "prompts.per_group=2", "adapter.kind=full"),
        "objective.name=dpo needs adapter.kind=lora",
    ),
    (
        ("objective={name: regression, weights: top, keep: 2}", "prompts.per_group=2"),
        "objective.keep=2 of 2 pictures of a group",
    ),
    (("objective={name: dpo, draws: 2}", "prompts.per_group=2"), "objective.draws has no effect with form=chain"),
    (
        ("objective={name: dpo, form: denoise, clip_range: 0.1}", "prompts.per_group=2"),
        "objective.clip_range has no effect with form=denoise",
    ),
    (
        ("objective={name: dpo, form: denoise}", "prompts.per_group=2", "train.micro_batch=1"),
        "train.micro_batch=1 must be a multiple of prompts.per_group=2",
    ),
    (
        ("objective={name: regression, form: denoise}", "train.step_fraction=0.5"),
        "objective.form=denoise has no steps",
    ),
    (
        ("objective={name: regression, form: denoise}", "regulariser.pretrained_kl=1e-4"),
        "regulariser.pretrained_kl has no effect with objective.form=denoise",
    ),
    (
        ("objective={name: regression, form: denoise}", "train.max_kl=0.01"),
        "train.max_kl has no effect with objective.form=denoise",
    ),
    (("objective={name: regression, keep: 2}",), "objective.keep has no effect with weights=softmax"),
    (("train.step_window=[5, 5]",), "train.step_window=[5, 5]: give the first step and the one after the last"),
    (("train.step_window=[0, 51]", "sampler.steps=50"), "within 0 and sampler.steps=50"),
    (("prompts.per_group=5",), "prompts.per_group=5 must divide the trajectories of an update"),
    (("objective={name: ddpo, std: group}",), "objective.std=group: there are no groups"),
    (("objective={name: ddpo, baseline: value, per_prompt: 4}",), "objective.baseline=value compares with no group"),
    (
        ("objective={name: ddpo, baseline: value}", "flow.warmup_epochs=0"),
        "with baseline=value the policy is trained before the critic has seen its rollout",
    ),
    (("prompts.shared_start=true",), "shared_start needs groups; set per_group to 2 or more"),
    (
        ("objective={name: ddpo, per_prompt: 8}", "prompts.per_group=2"),
        "objective.per_prompt and prompts.per_group both say what a reward is compared with",
    ),
    (("objective={name: tb, beta: {value: 1}}", "train.updates=64"), "tb's log Z needs at least 2 trajectories"),
    (("objective={name: tb, beta: {value: 1}}", "train.rollout=one_pass"), "tb trains on complete trajectories"),
    (
        ("objective={name: tb, beta: {value: 1}, log_z: flow}", "train.rollout=one_pass"),
        "tb trains on complete trajectories",
    ),
    (
        ("objective={name: tb, beta: {value: 1}, log_z: flow}", "data.folder=x"),
        "data.folder: tb's flow is fitted to sampled rollouts; set data.sample=true",
    ),
    (
        ("objective={name: tb, beta: {value: 1}, prior: pretrained}", "adapter.kind=full"),
        "objective.prior=pretrained needs adapter.kind=lora",
    ),
    (("objective={name: dpo, reference: past}", "prompts.per_group=2"), "objective.reference needs form=denoise"),
    (
        ("objective={name: dpo, form: denoise, past: 2}", "prompts.per_group=2"),
        "objective.past belongs to reference=past",
    ),
    (("data.sample=true",), "data.sample has no effect without data.folder"),
    ((TB, "data={folder: x, replay: 1}"), "data.replay keeps sampled rollouts"),
    ((TB, "data.replay=1", "train.rollout=one_pass"), "data.replay: train.rollout=one_pass trains while it samples"),
    ((TB, "data.replay=1", "regulariser.sampling=1"), "data.replay: regulariser.sampling pulls towards the policy"),
    ((TB, "data.folder=x", "train.inner_epochs=2"), "train.inner_epochs=2 repeats sampled rollouts"),
    (
        (TB, "data.folder=x", "prompts.per_group=2", "prompts.shared_start=true"),
        "prompts.shared_start is about sampled rollouts, and data.folder takes their place",
    ),
    (("data.replay=1",), "data.replay: not with objective.name=dag_db: the forward-looking rewards are the sampling"),
    (
        ("objective={name: subtb, beta: {value: 1}, forward_looking: {source: none}}", "data.folder=x"),
        "data.folder: subtb's flow is fitted to sampled rollouts; set data.sample=true",
    ),
    (("objective={name: ddpo}", "data.folder=x"), "data.folder: not with objective.name=ddpo: its gradient is an"),
    (
        ("objective={name: dag_kl, beta: {value: 1}}", "data.folder=x"),
        "data.folder: not with objective.name=dag_kl: the KL whose gradient",
    ),
    (
        ("objective={name: nabla_db, beta: {value: 1}}", "data.replay=1"),
        "data.replay: not with objective.name=nabla_db: the gradient of the flow",
    ),
    (("objective={name: refl}", "data.replay=1"), "data.replay: not with objective.name=refl: its gradient is an"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_contradicts_the_objective_is_named(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UsageError) as caught:
        load(path, overrides)
    assert message in str(caught.value)
