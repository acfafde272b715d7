"""Checks whether a fused operation is right, for the tests and, before anything is timed, for the benchmark.

The rule: a fused operation may be at most twice as far from the truth as plain PyTorch. The truth is the reference
(`dag_kernels.reference`) in float64, plain PyTorch is the reference in the inputs' own dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dag_kernels import reference
from dag_kernels.implementation import Kernels, is_interpreted
from dag_kernels.specs import OPS, Inputs, OpSpec

Named = dict[str, Tensor]


def assert_as_good_as(
    name: str, found: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, terms: float = 0.0
) -> None:
    """Raise AssertionError unless the largest error of `found` is at most `factor` times that of `plain`.

    Where plain PyTorch is exact by luck, two roundings are allowed all the same: of the largest value, or of `terms`.

    Args:
        exact: the same result in float64, against which both errors are measured.
        terms: the size of the terms whose difference the result is, if they nearly cancel.
    """
    assert found.dtype == plain.dtype and found.shape == plain.shape, name
    assert bool(found.isfinite().all()), f"{name}: not finite"
    found, plain, exact = found.detach(), plain.detach(), exact.detach()
    error = (found.double() - exact).abs()
    plain_error = float((plain.double() - exact).abs().max())
    rounding = torch.finfo(found.dtype).eps * max(terms, float(exact.abs().max()))
    worst = int(error.argmax())
    assert float(error.max()) <= max(factor * plain_error, 2 * rounding), (
        f"{name}: error {float(error.max()):.3e} at element {worst} (value {float(exact.flatten()[worst]):.6g}); "
        f"plain PyTorch's is {plain_error:.3e}, one rounding {rounding:.3e}"
    )


def in_double(inputs: Inputs) -> Inputs:
    """The inputs with all floating-point tensors in float64."""
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def run(op: Callable[..., Any], spec: OpSpec, inputs: Inputs, seed: int) -> tuple[Named, Named]:
    """Run an operation; returns (outputs, gradients) by name. The upstream gradients are random, from `seed`."""
    inputs = dict(inputs)
    for name in spec.gradients:
        inputs[name] = inputs[name].clone().requires_grad_()
    outputs = {name: value for name, value in op(**inputs)._asdict().items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for value in outputs.values():
        weight = torch.randn(value.shape, generator=generator)
        if value.requires_grad:
            loss = loss + (value * weight.to(value.device, value.dtype)).sum().double().cpu()
    if spec.gradients:
        loss.backward()
    return outputs, {name: inputs[name].grad for name in spec.gradients}


def check(spec: OpSpec, inputs: Inputs, kernels: Kernels) -> None:
    """Raise AssertionError, which names the output or gradient, unless the fused operation is right on these inputs."""
    if spec.name == "sampling_step":
        return _check_sampling(inputs, kernels)
    found, found_gradients = run(getattr(kernels, spec.name), spec, inputs, seed=1)
    plain, plain_gradients = run(spec.reference(), spec, inputs, seed=1)
    exact, exact_gradients = run(spec.reference(), spec, in_double(inputs), seed=1)
    assert found.keys() == plain.keys(), f"{spec.name}: {sorted(found)} instead of {sorted(plain)}"
    for name in found:
        terms = _terms(inputs) if name in ("log_pf", "log_pb") else 0.0
        assert_as_good_as(f"{spec.name}.{name}", found[name], plain[name], exact[name], terms=terms)
    for name in spec.gradients:
        label = f"d {spec.name} / d {name}"
        assert_as_good_as(label, found_gradients[name], plain_gradients[name], exact_gradients[name])
    return None


@torch.enable_grad()
def launch_every_operation(kernels: Kernels, device: torch.device) -> None:
    """Run each operation on two small samples, forward and backward, on the device.

    Raises:
        ArithmeticError: a result is not finite.
        Exception:       whatever a launch raises.
    """
    for name, spec in OPS.items():
        inputs = spec.make(2, (4, 8, 8), torch.float32, device, 0)
        outputs, gradients = run(getattr(kernels, name), spec, inputs, seed=0)
        for label, value in (outputs | gradients).items():
            if not bool(value.isfinite().all()):
                raise ArithmeticError(f"{name}: {label} is not finite")


def _check_sampling(inputs: Inputs, kernels: Kernels) -> None:
    """Check a sampling step: x_next up to the tolerance of the noise and one rounding, the rest at the x_next found."""
    found, plain = kernels.sampling_step(**inputs), reference.sampling_step(**inputs)
    dtype = found.x_next.dtype
    # The interpreter truncates float32 to bfloat16, where a GPU rounds: an error of up to one unit in the last place.
    units = 2 if is_interpreted() and dtype == torch.bfloat16 else 1
    rtol = units * torch.finfo(dtype).eps
    torch.testing.assert_close(found.x_next.double(), plain.x_next.double(), rtol=rtol, atol=2e-6)
    exact = reference.sampling_step(**in_double(inputs) | {"chain_dtype": torch.float64})
    assert_as_good_as("sampling_step.x0_hat", found.x0_hat, plain.x0_hat, exact.x0_hat)
    at = {name: inputs[name] for name in ("x_t", "output", "table", "guidance_scale")}
    k = torch.full((len(found.x_next),), inputs["k"], device=found.x_next.device)
    at |= {"x_next": found.x_next, "k": k}
    in_float, in_float64 = (reference.transition_log_probs(**values) for values in (at, in_double(at)))
    for name in ("log_pf", "log_pb"):
        values = [getattr(result, name) for result in (found, in_float, in_float64)]
        assert_as_good_as(f"sampling_step.{name}", *values, terms=_terms(inputs))


def _terms(inputs: Inputs) -> float:
    """D |log std + h|, the size of the two terms of a log-probability, which nearly cancel."""
    std = inputs["table"][:, [2, 4]].double()
    return inputs["x_t"][0].numel() * float((std.log() + reference.HALF_LOG_2PI).abs().max())
