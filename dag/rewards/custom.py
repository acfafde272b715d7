"""A reward of the user's own: `path: my_module:my_function` or `path: folder/my_file.py:my_function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dag.errors import UsageError
from dag.recipe.reward_sections import Custom as Section
from dag.rewards.registry import REWARDS


@REWARDS.register("custom")
class Custom:
    """Calls the user's function with (images (B, 3, H, W) in [0, 1], prompts); it returns (B,) float32."""

    def __init__(self, section: Section, device: torch.device) -> None:
        module_name, _, function_name = section.path.rpartition(":")
        module = _load_file(module_name) if module_name.endswith(".py") else _import(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise UsageError(
                f"reward.path: {module_name} has no function {function_name!r}; it has: {', '.join(known) or 'none'}"
            )
        self.function: Callable[[Tensor, Sequence[str]], Tensor] = function

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def _import(name: str) -> ModuleType:
    # A user's module lies in the working directory, which `python -m` makes importable and a script does not.
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"reward.path: cannot import {name}: {type(error).__name__}: {error}") from None


def _load_file(name: str) -> ModuleType:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"reward.path: there is no file {name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"reward.path: cannot import {name}: {type(error).__name__}: {error}") from None
    return module
