"""Hooks of mkdocs: pages from outside of docs/, links that lead there, and figures for light and dark mode."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages that stand elsewhere in the repository, by the name that the site gives them.
PAGES = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "tests/README.md": "tests.md",
    "evaluation/README.md": "evaluation-tasks.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "release.md",
}
_ORIGINS = {page: origin for origin, page in PAGES.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r"<picture>.*?srcset=\"([^\"]+)\".*?<img alt=\"([^\"]*)\" src=\"([^\"]+)\">.*?</picture>")
_DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{\s*(:root \{[^}]*\})\s*\}")
_ROW = re.compile(r"^\|.*$", flags=re.MULTILINE)
_SPAN = re.compile(r"`[^`]+`")
_FILE = re.compile(r"[\w/-]+\.md")
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add pages from outside of docs/, and a light and a dark version of every figure that has both in one file."""
    for origin, page in PAGES.items():
        if (ROOT / origin).exists():
            files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    for figure in list(files):
        if figure.src_uri.startswith("figures/") and figure.src_uri.endswith(".svg"):
            for name, text in _schemes(figure.content_string).items():
                source = f"{figure.src_uri.removesuffix('.svg')}-{name}.svg"
                files.append(File.generated(config, source, content=text))
    return files


def _schemes(svg: str) -> dict[str, str]:
    """Return a figure for light and for dark mode: the site has a switch, which an image cannot read."""
    return {"light": _DARK.sub("", svg), "dark": _DARK.sub(r"\1", svg)}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Resolve links as in the repository, and show figures in the colours of the mode that is on."""
    uri = page.file.src_uri
    origin = _ORIGINS.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if _FILE.fullmatch(text) and (ROOT / path).exists():  # the repository's links show names of files
            text = (ROOT / path).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        if image and path.endswith(".svg"):
            return _drawing(path.removeprefix("docs/").removesuffix(".svg"), text)
        if path in PAGES:
            return f"{image}[{text}]({PAGES[path]}{anchor})"
        if path == "README.md":
            return f"{image}[{text}](index.md{anchor})"
        if path.startswith("docs/"):
            return f"{image}[{text}]({path.removeprefix('docs/')}{anchor})"
        return text  # a file of the repository that is no page

    parts = _FENCE.split(markdown)
    for place in range(0, len(parts), 2):
        parts[place] = _ROW.sub(_unescaped, _LINK.sub(link, _PICTURE.sub(_picture, parts[place])))
    return "".join(parts)


def _unescaped(found: re.Match[str]) -> str:
    """Remove the backslashes that GitHub asks for in the code of a table's row, and Python-Markdown would show."""
    return _SPAN.sub(lambda code: code[0].replace("\\|", "|"), found[0])


def _picture(found: re.Match[str]) -> str:
    """Replace a <picture>, which follows the system's mode, by an image for each mode of the site."""
    dark, text, light = found.groups()
    return _image(light, text, "light") + _image(dark, text, "dark")


def _image(source: str, text: str, mode: str) -> str:
    return f'<img class="figure" alt="{text}" src="{source}#only-{mode}">'


def _drawing(name: str, text: str) -> str:
    """Return both versions of a drawing from `_schemes`."""
    images = "".join(_image(f"{name}-{mode}.svg", text, mode) for mode in ("light", "dark"))
    return f'<span class="drawing">{images}</span>'
