"""The studies of `python -m dag.reproduce`: the methods, recipes and settings behind each figure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dag.evaluation.study import Method, Setting, Study

_DDPO_AT_PAPER_SCALE = (
    "objective={name: ddpo, clip_range: 1e-4, advantage_clip: 5, per_prompt: 32}",
    "sampler.log_pf_at=stored",
    "regulariser.sampling=0",
)
_TINY = (
    Method("dag_db", "tiny_cpu_db.yaml"),
    Method("dag_kl", "tiny_cpu_kl.yaml"),
    Method("ddpo", "tiny_cpu_ddpo.yaml"),
)


def _paper(name: str) -> tuple[Method, ...]:
    """The published recipes for a reward: the animal prompts for reward networks, ImageNet's classes for JPEG."""
    file = "compressibility" if "compressibility" in name else "aesthetic"
    return (
        Method("dag_db", f"paper/{file}.yaml"),
        Method("dag_kl", f"paper/{file}_kl.yaml"),
        Method("ddpo", f"paper/{file}.yaml", _DDPO_AT_PAPER_SCALE),
    )


# Half the published micro-batch leaves room on 24 GB; the gradient does not depend on its size.
_ON_24_GB = (
    "train.micro_batch=4",
    "sampler.tile=4",  # equal to the micro-batch, so that the first ratio is exactly 1
    "memory.budget_gib=21",
    "evaluation.diversity=openai/clip-vit-large-patch14",
)
_CHOICE = "the reward of the last quarter decides among those that keep the judged noun in 70 % of pictures"
# Learning rates to try without a regulariser.
_WITHOUT = tuple(Setting(rate) for rate in (0.002, 0.004, 0.008))
# Learning rates to try with the pretrained model as a prior: at the recipe's own .005 the policy leaves that target within a
# few epochs, see the ablations.
_SLOW = tuple(Setting(rate) for rate in (0.001, 0.002))
# The effect of a regulariser strength depends on the scale of the loss beside it: for each method two strengths a factor of
# ten apart, near that of its recipe.
_STRENGTHS = {"dag_db": (1e-5, 1e-4), "dag_kl": (1e-5, 1e-4), "ddpo": (1e-6, 1e-5)}


def _regularised(method: Method) -> Method:
    """The method with four settings to try: pairs of learning rate and regulariser strength."""
    pairs = (Setting(rate, strength) for strength in _STRENGTHS[method.name] for rate in (0.004, 0.008))
    return replace(method, tried=tuple(pairs))


_SAME_NETWORK = " The network that gives the reward also measures alignment and diversity here: read them with care."

# By the reward's gradient, the pretrained model is in the target and beta says how far the policy may move from it.
# A falling learning rate ends nearer to the target, which leaves room for a larger beta.
_BETAS = {
    "constant": tuple(Setting(beta=beta) for beta in (3.0, 10.0, 30.0)),
    "linear": tuple(Setting(beta=beta) for beta in (10.0, 30.0, 60.0)),
}
_NABLA = (
    "objective={name: nabla_db, beta: {value: 30, unit: reward_sd}, prior: pretrained, forward_looking: {weight: fitted}, "
    "step_weight: balanced}",
    "flow={channels: [32, 64, 64], learning_rate: 3e-3, warmup_epochs: 0}",
)
_LEARNT = "objective.reward_gradient=learnt"
_BY_GRADIENT = {
    "exact": Method("dag_kl_exact", "tiny_cpu.yaml"),
    "learnt": Method("dag_kl_learnt", "tiny_cpu.yaml", (_LEARNT,)),
    "control_variate": Method(
        "dag_kl_control_variate",
        "tiny_cpu.yaml",
        (_LEARNT, "objective.policy_gradient=control_variate", "flow.warmup_epochs=1"),
    ),
    "nabla_exact": Method("nabla_db_exact", "tiny_cpu.yaml", _NABLA),
    "nabla_learnt": Method("nabla_db_learnt", "tiny_cpu.yaml", (*_NABLA, _LEARNT)),
}
# As many updates as those have, and three settings for each method too.
_SHORT = ("train.updates=4", "train.micro_batch=16", "sampler.tile=16")
_BY_SCORE = {
    "dag_db": (Setting(0.005, 1e-5), Setting(0.01, 1e-5), Setting(0.01, 1e-4)),
    "dag_kl": (Setting(0.005, 1e-5), Setting(0.01, 1e-5), Setting(0.01, 1e-4)),
    "ddpo": (Setting(0.005, 1e-6), Setting(0.01, 1e-6), Setting(0.01, 1e-5)),
}

_CHOSEN = {
    "dag_db": Setting(0.005, 1e-5),
    "ddpo": Setting(0.005, 1e-6),
    "exact": Setting(beta=30.0),
    "learnt": Setting(beta=30.0),
}


def _gradients(
    reward: str,
    kinds: Sequence[str],
    chosen: Mapping[str, Setting] | None = None,
    seeds: int = 1,
    schedule: str = "constant",
) -> Study:
    """Score functions against the reward's gradient, exact or learnt, on one reward.

    Args:
        kinds:  names of methods, of `_TINY` and `_BY_GRADIENT`.
        chosen: what each method runs with; None lets it choose among its settings.
        schedule: of every method's learning rate.
    """
    named = {one.name: replace(one, overrides=_SHORT, tried=_BY_SCORE[one.name]) for one in _TINY}
    named |= {kind: replace(method, tried=_BETAS[schedule]) for kind, method in _BY_GRADIENT.items()}
    methods = [named[kind] for kind in kinds]
    how = f"the best of three settings for each: {_CHOICE}."
    if chosen is not None:
        methods = [_with(method, chosen[kind]) for kind, method in zip(kinds, methods, strict=True)]
        how = "the settings that each chose on colourfulness."
    return Study(
        title=f"Score functions and the reward's gradient, {reward}"
        + ", falling learning rate" * (schedule == "linear"),
        question=f"320 trajectories and at most 20 updates for every method, {how}"
        + (_SAME_NETWORK if reward == "image_text" else ""),
        methods=tuple(methods),
        overrides=(f"reward={{name: {reward}}}", f"train.learning_rate_schedule={schedule}"),
        sizes=("train.epochs=5", "evaluation.every=5"),
        images_per_prompt=4,
        seeds=seeds,
    )


def _with(method: Method, setting: Setting) -> Method:
    """The method with one setting, and none to try."""
    given = [f"{key}={value}" for key, value in setting.overrides.items()]
    return replace(method, overrides=(*method.overrides, *given), tried=())


def _reward(name: str, title: str, scale: str) -> Study:
    """DAG-DB, DAG-KL and DDPO on one reward."""
    is_tiny = scale == "tiny"
    return Study(
        title=f"{title}, {'embedded model' if is_tiny else 'Stable Diffusion 1.5'}",
        question="Reward against trajectories of DAG-DB, DAG-KL and DDPO, with each recipe's own settings."
        + (_SAME_NETWORK if name == "image_text" else ""),
        methods=_TINY if is_tiny else _paper(name),
        overrides=(f"reward={{name: {name}}}",),
        sizes=("evaluation.every=4",) if is_tiny else ("evaluation.every=10", *_ON_24_GB),
    )


_BY_NAME = (
    *("dag_db", "dag_kl", "ddpo", "nabla_db", "tb", "rtb", "subtb", "grpo", "prdp", "d3po", "dpo", "raft", "rwr"),
    *("draft", "draft_lv", "alignprop", "refl", "adjoint", "dpok", "seppo", "texforce"),
)
# In two more seeds: the best with the reward's gradient and without one, among those that keep the noun, and the baseline.
_LEADING = ("dag_kl_gradient", "dag_kl_learnt_gradient", "nabla_db", "adjoint", "dpo", "ddpo")
# The main job with a constant learning rate, as the other recipes have one, and the beta that goes with it.
_UNSCHEDULED = ("train.learning_rate_schedule=constant", "objective.beta.value=30")
_ZOO = (
    Method("dag_kl_gradient", "tiny_cpu.yaml", _UNSCHEDULED),
    Method("dag_kl_learnt_gradient", "tiny_cpu.yaml", (*_UNSCHEDULED, _LEARNT)),
    *(Method(name, f"tiny/{name}.yaml") for name in _BY_NAME),
)

# The embedded flow-matching model has guidance built in.
_ON_A_FLOW = ("model.path=embedded_flow", "sampler.guidance_scale=1")


def _flow(eta: float, dag_db: str) -> Study:
    """Three objectives on the embedded flow-matching model.

    Args:
        dag_db: what DAG-DB needs with this noise.
    """
    noise = f"sampler.eta={eta:g}"
    return Study(
        title=f"A flow-matching model, eta {eta:g}",
        question="DAG-KL by the exact gradient, DAG-DB and GRPO, each with the settings of its recipe for the diffusion model, "
        f"on the embedded flow-matching model with eta {eta:g}.",
        methods=(
            Method("dag_kl_exact", "tiny_flow_cpu.yaml", (noise, *_UNSCHEDULED)),
            Method("dag_db", "tiny/dag_db.yaml", (*_ON_A_FLOW, noise, dag_db)),
            Method("grpo", "tiny/grpo.yaml", (*_ON_A_FLOW, noise)),
        ),
        overrides=("reward={name: colourfulness}",),
        images_per_prompt=4,
        seeds=3,
    )


_ABLATIONS = (
    Method("dag_db", "tiny_cpu_db.yaml"),
    Method("no_forward_looking", "tiny_cpu_db.yaml", ("objective.forward_looking.source=none",)),
    Method("current_x0_hat", "tiny_cpu_db.yaml", ("objective.forward_looking.source=current",)),
    Method("one_pass", "tiny_cpu_db.yaml", ("train.rollout=one_pass",)),
    Method("dag_kl", "tiny_cpu_kl.yaml", ("train.learning_rate=5e-3", "regulariser.pretrained_kl=1.2e-4")),
    Method("beta_quarter", "tiny_cpu_db.yaml", ("objective.beta.value=250",)),
    Method("beta_fourfold", "tiny_cpu_db.yaml", ("objective.beta.value=4000",)),
    Method("next_flow_trained", "tiny_cpu_db.yaml", ("objective.detach_next=false",)),
    Method("mean_log_probs", "tiny_cpu_db.yaml", ("objective.log_prob_reduction=mean",)),
    Method("no_regulariser", "tiny_cpu_db.yaml", ("regulariser.pretrained_kl=0",)),
    Method("prior", "tiny_cpu_db.yaml", ("regulariser.pretrained_kl=0", "objective.prior=pretrained")),
)

STUDIES: dict[str, dict[str, dict[str, Study]]] = {
    "tiny": {
        "figure3": {"image_text": _reward("image_text", "Image-text score", "tiny")},
        "figure4": {
            "compressibility": _reward("compressibility", "JPEG compressibility", "tiny"),
            "incompressibility": _reward("incompressibility", "JPEG incompressibility", "tiny"),
        },
        "comparison": {
            "unregularised": Study(
                title="DAG-DB, DAG-KL and DDPO at the same budget, without a regulariser",
                question="Same trajectories, same reward (colourfulness), no regulariser for any, and the best of three "
                f"learning rates: {_CHOICE}.",
                methods=tuple(replace(method, tried=_WITHOUT) for method in _TINY),
                overrides=("reward={name: colourfulness}", "regulariser.pretrained_kl=0"),
                sizes=("evaluation.every=4",),
            ),
            "regularised": Study(
                title="DAG-DB, DAG-KL and DDPO at the same budget, each with its regulariser",
                question="Same trajectories, same reward (colourfulness), and for each the best of four pairs of learning "
                f"rate and regulariser strength: {_CHOICE}. Losses differ in scale, so each has its own two strengths.",
                methods=tuple(map(_regularised, _TINY)),
                overrides=("reward={name: colourfulness}",),
                sizes=("evaluation.every=4",),
            ),
        },
        "prior": {
            "colourfulness": Study(
                title="The pretrained model in the target, or not",
                question="DAG-DB towards p_pretrained exp(beta r) and towards exp(beta r), no regulariser for either, and the "
                f"better of two learning rates: {_CHOICE}.",
                methods=(
                    Method("dag_db", "tiny_cpu_db.yaml", tried=_SLOW),
                    Method("dag_db_prior", "tiny_cpu_db.yaml", ("objective.prior=pretrained",), tried=_SLOW),
                ),
                overrides=("reward={name: colourfulness}", "regulariser.pretrained_kl=0"),
                sizes=("evaluation.every=4",),
            )
        },
        "gradients": {
            "colourfulness": _gradients("colourfulness", ("dag_db", "dag_kl", "ddpo", "exact", "learnt"), seeds=3),
            "incompressibility": _gradients("incompressibility", ("dag_db", "ddpo", "learnt"), _CHOSEN),
            "compressibility": _gradients("compressibility", ("dag_db", "ddpo", "learnt"), _CHOSEN),
            "image_text": _gradients("image_text", ("dag_db", "ddpo", "exact", "learnt"), _CHOSEN),
            "other_gradients": _gradients("colourfulness", ("control_variate", "nabla_exact", "nabla_learnt"), seeds=3),
            "falling_rate": _gradients(
                "colourfulness", ("dag_db", "ddpo", "exact", "learnt"), seeds=3, schedule="linear"
            ),
        },
        "zoo": {
            "colourfulness": Study(
                title="Every objective at equal work of the network",
                question="Reward, diversity and noun_top1 of every objective for about 8,200 guided forward passes of the "
                "denoiser, 9,984 with a KL penalty, a backward pass counted as 1.2. Methods that train fewer steps sample more "
                "trajectories.",
                methods=_ZOO,
                overrides=("reward={name: colourfulness}",),
                images_per_prompt=4,
                seeds=1,
            ),
            "leading": Study(
                title="Six objectives at equal work of the network, three seeds",
                question="Those of the zoo that gained most among those that keep the noun, with the reward's gradient and without "
                "one, and DDPO.",
                methods=tuple(method for method in _ZOO if method.name in _LEADING),
                overrides=("reward={name: colourfulness}",),
                images_per_prompt=4,
                seeds=3,
            ),
        },
        "flow": {
            "full_noise": _flow(1.0, "flow.slopes=true"),
            # Half the noise of DDPM is Flow-GRPO's; no noising kernel reverses such steps, so the prior is needed.
            "half_noise": _flow(0.5, "objective.prior=pretrained"),
        },
        "ablations": {
            "colourfulness": Study(
                title="One choice at a time",
                question="recipes/tiny_cpu_db.yaml (dag_db), and what changes if one of its choices does.",
                methods=_ABLATIONS,
                overrides=("reward={name: colourfulness}",),
                sizes=("evaluation.every=4",),
            )
        },
    },
    "paper": {
        "figure3": {
            "aesthetic": _reward("aesthetic", "LAION's aesthetic score", "paper"),
            "image_reward": _reward("image_reward", "ImageReward", "paper"),
            "hpsv2": _reward("hpsv2", "Human Preference Score v2.1", "paper"),
        },
        "figure4": {
            "compressibility": _reward("compressibility", "JPEG compressibility", "paper"),
            "incompressibility": _reward("incompressibility", "JPEG incompressibility", "paper"),
        },
    },
}
