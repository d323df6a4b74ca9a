"""Write generated files, and generated blocks between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

import os
from pathlib import Path


def write_block(page: Path, name: str, text: str) -> None:
    """Atomically replace the text between the two markers of a page.

    Args:
        page: A Markdown file.
        name: Name of the block.
        text: Markdown text.

    Raises:
        ValueError: If the page does not contain both markers once, in this order.
    """
    content = page.read_text(encoding="utf-8")
    before, begin, rest = content.partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->\n")
    if not begin or not end or begin in after:
        raise ValueError(
            f"{page.name} must contain the markers `{name}:begin` and `{name}:end` once each, on separate lines."
        )
    write_whole(page, f"{before}{begin}{text.strip()}\n{end}{after}")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically; create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
