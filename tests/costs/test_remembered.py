"""Remembered shapes are those that PyTorch works out, and spare it the work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dag.costs.live_bytes import LiveBytes, tensors_in
from dag.costs.remembered import RememberedShapes

META = torch.device("meta")


def of(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.empty(shape, device=META, requires_grad=requires_grad)


class Asked(TorchDispatchMode):
    """Collects the names of the operators that PyTorch itself is asked for; to be entered first."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def seen(tree: Any) -> list[Any]:
    """All that can be known of the tensors among results, and the type of what holds them."""
    facts = [(t.shape, t.stride(), t.dtype, t.device, t.is_inference()) for t in tensors_in(tree)]
    return [type(tree), *facts, *(t.untyped_storage().nbytes() for t in tensors_in(tree))]


def gradients(mask: list[bool]) -> Any:
    """Gradients (of the input, the weight, the bias) of a group norm; those that `mask` leaves out are None."""
    x, statistic, weight = of(2, 8, 4, 4), of(2, 4), of(8)
    return torch.ops.aten.native_group_norm_backward(x, x, statistic, statistic, weight, 2, 8, 16, 4, mask)


# Groups of calls that differ in one argument, each of which changes the result.
CALLS: dict[str, list[Callable[[], Any]]] = {
    "shape": [lambda: of(2, 3) + of(3), lambda: of(3) + of(3), lambda: of(3) + of(1)],
    "strides": [lambda: of(2, 3) * 2, lambda: of(3, 2).mT * 2, lambda: of(2, 8)[:, :3] * 2],
    "memory format": [
        lambda: F.conv2d(of(1, 4, 8, 8), of(4, 4, 3, 3)),
        lambda: F.conv2d(of(1, 4, 8, 8).to(memory_format=torch.channels_last), of(4, 4, 3, 3)),
    ],
    "dtype": [lambda: of(3).half() * of(3), lambda: of(3).half() * of(3).half(), lambda: of(3).bfloat16() * 2],
    "type of a number": [lambda: of(3).long() + 1, lambda: of(3).long() + 1.0, lambda: of(3).long() + True],
    "number before tensor": [lambda: of(4).long() + 1.0, lambda: of(4).long() + torch.tensor(1.0, dtype=torch.float64)],
    "tensor before number": [lambda: of(5).long() + torch.tensor(1.0, dtype=torch.float64), lambda: of(5).long() + 1.0],
    "number on the CPU": [
        lambda: of(3).half() + torch.tensor(2.0, dtype=torch.float64),
        lambda: of(3).long() + torch.tensor(2.0, dtype=torch.float64),
        lambda: of(3).long() + torch.tensor(2),
        lambda: of() + torch.tensor(2.0, dtype=torch.float64),
    ],
    "values on the CPU": [lambda: of(3)[torch.tensor([True, False, False])], lambda: of(3)[torch.tensor([True] * 3)]],
    "keyword": [lambda: of(2, 3).sum(0), lambda: of(2, 3).sum(0, dtype=torch.float64), lambda: of(2, 3).sum(0, True)],
    "list of tensors": [lambda: torch.cat([of(2), of(3)]), lambda: torch.cat([of(2), of(3), of(3)])],
    "several results": [
        lambda: of(4, 3).max(0),
        lambda: of(4, 3).max(1),
        lambda: torch._foreach_add([of(4), of(3)], 1),
    ],
    "no result": [lambda: gradients([True] * 3), lambda: gradients([True, False, False])],
    "factory": [lambda: torch.zeros(3, device=META), lambda: torch.zeros_like(of(3), dtype=torch.int8)],
}


@pytest.mark.parametrize("is_inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_a_remembered_result_is_like_a_new_one(calls: list[Callable[[], Any]], is_inference: bool) -> None:
    with torch.inference_mode(is_inference):
        expected = [seen(call()) for call in calls]
        with RememberedShapes():
            for _ in range(2):
                assert [seen(call()) for call in calls] == expected


def test_pytorch_is_asked_once() -> None:
    def step() -> list[Tensor]:
        x = of(2, 8, requires_grad=True)
        y = torch._foreach_mul([F.silu(x.view(4, 4) @ of(4, 4)).add_(1)], 2)
        y[0].sum().backward()
        assert x.grad is not None
        return [*y, x.grad]

    asked = Asked()
    with asked, RememberedShapes():
        first = step()
        before, asked.names = asked.names, []
        second = step()
    assert seen(second) == seen(first)
    assert "aten::mm" in before
    views = {"aten::view", "aten::t", "aten::transpose", "aten::expand", "aten::detach"}
    assert {name for name in asked.names if "empty" not in name} <= views


def test_results_are_separate_and_live_as_long_as_without() -> None:
    """What is remembered is not in memory for those who count it."""
    x = of(100)
    with RememberedShapes(), LiveBytes() as live:
        first, second = x * 2, x * 2
        assert live.current == 800
        del first
        assert live.current == 400
        del second
        assert live.current == 0


def test_a_result_that_is_an_argument_stays_that() -> None:
    x = of(3)
    with torch.inference_mode(), RememberedShapes():
        for _ in range(2):
            assert F.dropout(x, 0.1, training=False).untyped_storage() is x.untyped_storage()


def test_an_operator_in_place_returns_what_it_changed() -> None:
    with RememberedShapes():
        for _ in range(2):
            x, out = of(2, 3), of(3)
            assert x.add_(1) is x
            assert x.t_() is x
            assert x.shape == (3, 2)
            assert torch.add(of(3), 1, out=out) is out


def test_values_on_the_cpu_are_computed() -> None:
    with RememberedShapes():
        for _ in range(2):
            assert float(torch.tensor(2.0) * 3) == 6
            assert torch.tensor(2.0).add_(3) == 5
            assert torch.equal(torch.ones(3, device="cpu") + 1, torch.full((3,), 2.0))
