"""Pages that a command writes: whole files, and blocks between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

import os
from pathlib import Path


def write_block(page: Path, name: str, text: str) -> None:
    """Put a text between the two marks of a page, whole or not at all.

    Args:
        page: A Markdown file.
        name: Of the block.
        text: Markdown.

    Raises:
        ValueError: The page does not have both marks once, in their order.
    """
    content = page.read_text(encoding="utf-8")
    before, begin, rest = content.partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->\n")
    if not begin or not end or begin in after:
        raise ValueError(f"{page.name} must have the marks `{name}:begin` and `{name}:end` once each, each on a line.")
    write_whole(page, f"{before}{begin}{text.strip()}\n{end}{after}")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
