"""`Registry`: classes by the names that configs refer to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")
_C = TypeVar("_C")


class Registry(Generic[_T]):
    """Classes of one kind by name.

    Args:
        field: The config field that holds the name.
        decorator: Name of the public decorator that registers a class.
    """

    def __init__(self, field: str, decorator: str) -> None:
        self.field = field
        self.decorator = decorator
        self.classes: dict[str, type[_T]] = {}

    def register(self, name: str) -> Callable[[_C], _C]:
        """Return a class decorator that registers a class; running the same module again replaces its own class.

        Raises:
            ValueError: Another class is registered under the name.
        """

        def add(cls: _C) -> _C:
            known = self.classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # type: ignore[attr-defined]
                raise ValueError(f"`name` must be new, got {name!r}, which {known.__qualname__} has. Choose another.")
            self.classes[name] = cls  # type: ignore[assignment]
            return cls

        return add

    def find(self, name: str) -> type[_T]:
        """Return the class that a config names.

        Raises:
            ValueError: No class is registered under the name.
        """
        if name not in self.classes:
            raise ValueError(
                f"`{self.field}` must be one of {sorted(self.classes)}, got {name!r}. If it is your own, import the "
                f"module that calls `{self.decorator}` first."
            )
        return self.classes[name]
