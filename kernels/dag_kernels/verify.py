"""Is a fused operation right? By one rule, for the tests and, before anything is timed, for the benchmark.

The reference is the specification, in float64 the truth, and in the inputs' own dtype the measure: a fused operation
may err at most twice as far from the truth as plain PyTorch does.
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
    """The largest error of `found` is at most `factor` times that of `plain`, both against `exact` (float64).

    Where plain PyTorch is exact by luck, a rounding on the way in and one on the way out are allowed all the same, of
    the largest value or of the largest of the `terms` whose difference it is.
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
    """The same values in float64."""
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def run(op: Callable[..., Any], spec: OpSpec, inputs: Inputs, seed: int) -> tuple[Named, Named]:
    """(outputs, gradients) by name; what flows back into each output is random and fixed by the seed."""
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
    """AssertionError, naming the output or gradient, unless the fused operation is right on these inputs."""
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
    """The state up to the noise's tolerance and one rounding of the chain; the rest at the state that was found."""
    found, plain = kernels.sampling_step(**inputs), reference.sampling_step(**inputs)
    dtype = found.x_next.dtype
    # The interpreter cuts float32 off to bfloat16, where a GPU rounds: a whole unit in the last place.
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
    """The larger of the two terms of a log-probability, which nearly cancel: D |log std + h|."""
    std = inputs["table"][:, [2, 4]].double()
    return inputs["x_t"][0].numel() * float((std.log() + reference.HALF_LOG_2PI).abs().max())
