"""Fused kernels against their PyTorch specification: on a GPU, or without one through Triton's interpreter."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from dag_kernels import choose, dispatch, reference, standard_normal, transition, verify
from dag_kernels.layout import alike, empty_alike
from dag_kernels.specs import OPS, Inputs, OpSpec
from dag_kernels.verify import check, in_double, run
from torch import Tensor

from dag.errors import UsageError
from dag.models import families
from dag.recipe import Recipe
from dag.training import build

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = choose("triton", DEVICE)
# Samples smaller than, equal to and larger than a kernel's block of elements, also with odd sides.
SHAPES = [(4, 16, 16), (4, 33, 17), (3, 5, 7), (1, 1, 1), (4, 32, 32)]
# Rows and channels of a map that fill a tile or a step, or a part of one, or several with a part.
NORM_SHAPES = [(4, 8, 8), (4, 13, 7), (3, 5, 7), (1, 1, 5), (66, 3, 2)]
# The shapes of SD 1.x, of SDXL and of models with 16 channels; for a GPU only, since the interpreter would take minutes.
LARGE_SHAPES = [(4, 64, 64), (4, 128, 128), (16, 64, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_op = pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill memory of torch.empty with NaN, so that an element that a kernel does not write is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def fused(spec: OpSpec) -> Callable[..., Any]:
    return getattr(FUSED, spec.name)


def compare(spec: OpSpec, inputs: Inputs) -> None:
    check(spec, inputs, FUSED)


# -- numbers ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPS.keys() - {"group_norm"}))
def test_as_good_as_plain_pytorch(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(OPS[name], OPS[name].make(8, shape, dtype, DEVICE, 0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@every_dtype
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_at_the_recipes_shapes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(OPS[name], OPS[name].make(8, shape, dtype, DEVICE, 0))


@pytest.mark.parametrize("B", [1, 20])
def test_one_row_and_many(B: int) -> None:
    for spec in OPS.values():
        compare(spec, spec.make(B, (2, 4, 4), torch.float32, DEVICE, B))


@pytest.mark.parametrize(
    "change",
    [
        {"output_ref": None},
        {"output_old": None},
        {"output_ref": None, "output_old": None},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
    ],
    ids=str,
)
def test_transitions_without_their_options(change: Inputs) -> None:
    spec = OPS["transition_log_probs"]
    compare(spec, spec.make(2, (4, 8, 8), torch.float32, DEVICE, 3) | change)


def test_transitions_without_guidance() -> None:
    spec = OPS["transition_log_probs"]
    inputs = spec.make(2, (4, 8, 8), torch.float32, DEVICE, 3)
    compare(spec, inputs | {"output": inputs["output"][2:]})


@pytest.mark.parametrize(
    "change",
    [
        {"huber": None},
        {"scale": None},
        {"policy_weight": None},
        {"detach_next": True},
        {"huber": 0.01},
        {"log_looking": None, "log_looking_next": None},
        {"log_reward": None, "is_terminal": None},
    ],
    ids=str,
)
def test_balance_without_its_options(change: Inputs) -> None:
    spec = OPS["detailed_balance"]
    inputs = spec.make(300, (), torch.float32, DEVICE, 3) | change
    if change.get("detach_next"):
        spec = OpSpec(spec.name, spec.make, ("log_F", "log_pf"), spec.bytes_moved, spec.module)
        _, gradients = run(fused(spec), OPS["detailed_balance"], inputs, 1)
        assert gradients["log_F_next"] is None
    compare(spec, inputs)


# Every shape in float32; what depends on the dtype, or on SiLU, meets a shape with parts of tiles and one with several of them.
NORM_CASES = [
    *((torch.float32, True, shape) for shape in NORM_SHAPES),
    *((dtype, has_silu, shape)
      for dtype, has_silu in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, False))
      for shape in (NORM_SHAPES[1], NORM_SHAPES[4])),
]  # fmt: skip


@pytest.mark.parametrize("largest", [0, 1 << 16], ids=["tiles", "groups"])
@pytest.mark.parametrize(("dtype", "has_silu", "shape"), NORM_CASES, ids=str)
def test_a_map_is_normalised_as_well_as_by_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, largest: int, dtype: torch.dtype, has_silu: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("dag_kernels.norm_groups.LARGEST", largest)
    # Short steps, so that maps that the interpreter can do in time have several.
    monkeypatch.setattr("dag_kernels.norm_groups.STEP", 64)
    spec = OPS["group_norm"]
    compare(spec, spec.make(2, shape, dtype, DEVICE, 0) | {"has_silu": has_silu})


@pytest.mark.parametrize("largest", [0, 1 << 16], ids=["tiles", "groups"])
def test_large_means_lose_no_digits(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """A mean a thousand times the standard deviation: mean(x^2) - mean(x)^2 would have no digit left."""
    monkeypatch.setattr("dag_kernels.norm_groups.LARGEST", largest)
    spec = OPS["group_norm"]
    inputs = spec.make(2, (4, 24, 24), torch.float32, DEVICE, 0)
    # In NCHW PyTorch measures distances to the mean too; in channels-last, on a CPU, it is as wrong as what is ruled out here.
    # The output alone: the gradient in tiles is three times as far off as PyTorch's here.
    compare(replace(spec, gradients=()), inputs | {"x": (inputs["x"] + 1000).contiguous()})


def test_a_trained_norm_is_refused() -> None:
    inputs = OPS["group_norm"].make(1, (4, 2, 2), torch.float32, DEVICE, 0)
    with pytest.raises(ValueError, match="no gradient to its weight and bias"):
        FUSED.group_norm(**inputs | {"weight": inputs["weight"].requires_grad_()})


# -- memory -------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def with_gaps(x: Tensor) -> Tensor:
    """The same values as every other row of a larger tensor, whose other rows are NaN."""
    wide = x.repeat_interleave(2, dim=0)
    wide[1::2] = torch.nan
    return wide[::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("change", [channels_last, with_gaps, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["all", "x_t", "output", "output_ref"])
def test_transitions_in_any_layout(change: Callable[[Tensor], Tensor], which: str) -> None:
    spec = OPS["transition_log_probs"]
    inputs = spec.make(2, (4, 6, 10), torch.float32, DEVICE, 3)
    latents = ("x_t", "x_next", "output", "output_ref", "output_old")
    changed = inputs | {name: change(inputs[name]) for name in latents if which in ("all", name)}
    straight, straight_gradients = run(fused(spec), spec, inputs, seed=1)
    found, gradients = run(fused(spec), spec, changed, seed=1)
    for name in found:
        torch.testing.assert_close(found[name], straight[name], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(gradients["output"], straight_gradients["output"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [channels_last, with_gaps, transposed], ids=lambda f: f.__name__)
def test_sampling_in_any_layout(change: Callable[[Tensor], Tensor]) -> None:
    """The noise of an element depends on its index in (C, H, W), not on its place in memory."""
    spec = OPS["sampling_step"]
    inputs = spec.make(2, (4, 6, 10), torch.float32, DEVICE, 3)
    changed = inputs | {name: change(inputs[name]) for name in ("x_t", "output")}
    assert torch.equal(FUSED.sampling_step(**inputs).x_next, FUSED.sampling_step(**changed).x_next)


def test_alike_copies_only_what_differs() -> None:
    x = torch.randn(2, 3, 4, 5)
    first, second, nothing, third = alike(channels_last(x), channels_last(x), None, x)
    assert nothing is None and first is not None and second is not None and third is not None
    assert first.stride() == second.stride() == third.stride()
    assert torch.equal(third, x)
    assert alike(x, x)[1] is x
    gapped = with_gaps(x)
    assert alike(gapped)[0] is gapped
    assert empty_alike(gapped).stride() == x.stride()
    assert alike(x.expand(2, 3, 4, 5)[..., ::2])[0].is_contiguous()


@every_op
def test_a_row_does_not_depend_on_its_batch(spec: OpSpec) -> None:
    """Equal bit for bit: sums have a fixed order, and noise depends on the sample id."""
    inputs = spec.make(3, (4, 9, 9), torch.float32, DEVICE, 5)
    complete = fused(spec)(**inputs)
    row = {n: v[1:2] if isinstance(v, Tensor) and len(v) == 3 else v for n, v in inputs.items()}
    if "output" in inputs:
        row["output"] = inputs["output"][1::3]
    alone = fused(spec)(**row)
    for name, value in alone._asdict().items():
        assert value is None or torch.equal(value[0], getattr(complete, name)[1]), name


def test_the_sampled_steps_log_probs_are_the_transitions() -> None:
    """The log-probabilities that sampling stores and that training recomputes must be equal, else the first ratio is not 1."""
    spec = OPS["sampling_step"]
    for dtype in DTYPES:
        inputs = spec.make(3, (4, 16, 16), dtype, DEVICE, 5)
        step = FUSED.sampling_step(**inputs)
        k = torch.full((3,), inputs["k"], device=DEVICE)
        again = FUSED.transition_log_probs(inputs["x_t"], step.x_next, inputs["output"], inputs["table"], k, 5.0)
        assert torch.equal(step.log_pf, again.log_pf)
        assert torch.equal(step.log_pb, again.log_pb)


# -- noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("k", [0, 7, 999])
def test_noise_is_the_references(seed: int, k: int) -> None:
    sample_id = torch.tensor([0, 1, (1 << 32) - 1, 1 << 32, (1 << 62) + 3], device=DEVICE)
    x = torch.zeros(5, 4, 8, 9, device=DEVICE)
    table = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0], device=DEVICE).expand(1000, 7).contiguous()
    found = FUSED.sampling_step(x, x, table, k, seed, sample_id).x_next
    expected = standard_normal(seed, sample_id, k, (4, 8, 9))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


# -- the specification --------------------------------------------------------------------------------------------


@every_op
def test_the_references_gradients_are_those_of_finite_differences(spec: OpSpec) -> None:
    inputs = in_double(spec.make(2, (2, 3, 3), torch.float32, torch.device("cpu"), 7))
    if not spec.gradients:
        return
    leaves = [inputs[name].clone().requires_grad_() for name in spec.gradients]
    # policy_weight changes the gradient but not the loss, so finite differences cannot check it.
    others = {n: v for n, v in inputs.items() if n not in spec.gradients and n != "policy_weight"}

    def op(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = spec.reference()(**dict(zip(spec.gradients, values, strict=True)), **others)
        return tuple(value for value in outputs if value is not None and value.requires_grad)

    assert torch.autograd.gradcheck(op, leaves)


def test_the_reference_is_the_distributions_own_density() -> None:
    inputs = in_double(OPS["transition_log_probs"].make(3, (4, 5, 6), torch.float32, torch.device("cpu"), 2))
    found = reference.transition_log_probs(**inputs)
    o = reference.combined(inputs["output"], 3, 5.0)
    mean_x, mean_output, sigma, noising_x, noising_std = (
        column[:, None, None, None] for column in inputs["table"][inputs["k"], :5].unbind(1)
    )
    forward = torch.distributions.Normal(mean_x * inputs["x_t"] + mean_output * o, sigma.expand_as(o))
    backward = torch.distributions.Normal(noising_x * inputs["x_next"], noising_std.expand_as(o))
    other = torch.distributions.Normal(mean_x * inputs["x_t"] + mean_output * inputs["output_ref"], sigma.expand_as(o))
    torch.testing.assert_close(found.log_pf, forward.log_prob(inputs["x_next"]).flatten(1).sum(1))
    torch.testing.assert_close(found.log_pb, backward.log_prob(inputs["x_t"]).flatten(1).sum(1))
    torch.testing.assert_close(found.kl, torch.distributions.kl_divergence(forward, other).flatten(1).sum(1))
    torch.testing.assert_close(found.gap, (o - inputs["output_old"]).square().flatten(1).sum(1))


# -- choosing -----------------------------------------------------------------------------------------------------


def test_auto_takes_what_can_run_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert choose("auto", cpu).name == "torch"
    assert choose("auto", cpu).reason == "auto: Triton needs a GPU, the run is on cpu"
    assert choose("torch", cpu).reason == "asked for"
    with pytest.raises(ValueError, match="kernels=triton: Triton needs a GPU"):
        choose("triton", cpu)
    with pytest.raises(ValueError, match="use auto, triton, torch"):
        choose("cuda", cpu)
    # Triton reads the variable when the kernels are imported, so where they were compiled for a GPU none can be tried here.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_failure_of_a_trial", lambda device: None)
    assert choose("triton", cpu).name == "triton"
    assert choose("auto", cpu).name == "torch", "interpreting is for tests alone"


NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable"


@pytest.fixture
def untried() -> Iterator[None]:
    """Forget, before and after the test, whether kernels could be launched on a device."""
    dispatch._failure_of_a_trial.cache_clear()
    yield
    dispatch._failure_of_a_trial.cache_clear()


class Unlaunchable:
    """A kernel on a machine without a compiler."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            raise RuntimeError(f"{NO_COMPILER}\nor set triton.knobs.build.impl")

        return launch


def test_triton_that_cannot_launch_ends_in_one_line_before_anything_is_loaded(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, untried: None
) -> None:
    monkeypatch.setattr(transition, "transition_log_probs_fwd_kernel", Unlaunchable())
    for owner, name in ((build, "RewardSum"), (families, "load")):
        monkeypatch.setattr(owner, name, lambda *anything: pytest.fail("loaded"))
    recipe = make_recipe().model_copy(update={"kernels": "triton"})
    with pytest.raises(UsageError) as found:
        build.build(recipe, DEVICE)
    assert str(found.value) == f"kernels=triton: a trial launch raised RuntimeError: {NO_COMPILER}"


def test_auto_falls_back_where_a_launch_fails_and_tries_once(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    tried: list[str] = []

    def fails(op: object, spec: OpSpec, inputs: Inputs, seed: int) -> Any:
        tried.append(spec.name)
        raise OSError("fatal error: Python.h: No such file or directory")

    monkeypatch.setattr(verify, "run", fails)
    # No inputs are made, since there may be no GPU to make them on.
    monkeypatch.setattr(verify, "OPS", {name: replace(spec, make=lambda *given: {}) for name, spec in OPS.items()})
    for _ in range(2):
        found = choose("auto", torch.device("cuda", 0))
        assert found.name == "torch"
        assert found.reason == ("auto: a trial launch raised OSError: fatal error: Python.h: No such file or directory")
    assert len(tried) == 1


def test_a_trial_that_returns_nonsense_is_a_failure(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    monkeypatch.setattr(verify, "run", lambda *anything, seed: ({"log_pf": torch.tensor([0.0, torch.nan])}, {}))
    with pytest.raises(ValueError, match="ArithmeticError: transition_log_probs: log_pf is not finite"):
        choose("triton", DEVICE)
