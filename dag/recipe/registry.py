"""The dict from names in recipes to code. It refuses duplicates, and an unknown name gets an error that lists the known ones."""

from collections.abc import Callable
from typing import Any


class Registry(dict[str, Any]):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[Any], Any]:
        def add(entry: Any) -> Any:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self[name] = entry
            return entry

        return add

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self))}")
