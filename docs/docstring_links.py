"""Turns the [`name`] of docstrings into links of mkdocstrings, or into code if the name has no place on the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension

_DOCS = Path(__file__).parent
_NAME = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


def documented() -> dict[str, str]:
    """Return what the pages of the reference document, by full name and by the last part of it."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(_DOCS.glob("api*.md")))
    names = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    return {key: name for name in names for key in (name, name.rpartition(".")[2])}


class DocstringLinks(Extension):
    """Rewrites references of every docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._known = documented()

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _NAME.sub(self._link, obj.docstring.value)

    def _link(self, found: re.Match[str]) -> str:
        name, _, member = found[1].partition(".__")
        place = self._known.get(name)
        shown = found[1].rpartition(".")[2] if place and not member else found[1]
        return f"[`{shown}`][{place}]" if place else f"`{found[1]}`"
