"""The documentation site: it builds strictly, its order is complete, and what it quotes exists."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from project_files import ROOT, process_environment

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# Pages of the site that stand elsewhere in the repository; docs/site_hooks.py adds them.
FROM_OUTSIDE = {"security.md", "changelog.md", "tests.md", "evaluation-tasks.md", "contributing.md", "release.md"}
# Messages that are not this package's.
OF_OTHERS = (
    "KeyError: 'SOFTCOT'",
    "The version of PEFT you are using is not compatible",
    "Expected mha_graph.execute",
)
PUBLIC_MODULES = ("softcot_peft", "softcot_peft.sources", "softcot_peft.precompute", "softcot_peft.serving")
# Without `__all__`: whatever they define is public.
WHOLE_MODULES = ("softcot_peft.analysis", "softcot_peft.convert", "softcot_peft.live_rows")
NOT_CALLABLE = ("__version__", "main")
NEED_VLLM = ("SoftCoTLLM",)


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Loader)


def named_in(nav: object) -> list[str]:
    """All pages that a part of the navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav if isinstance(nav, list) else nav.values()
    return [page for part in parts for page in named_in(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    named = named_in(SITE["nav"])
    assert sorted(named) == sorted({path.name for path in PAGES} | FROM_OUTSIDE)


def test_the_site_asks_no_other_host() -> None:
    assert SITE["theme"]["font"] is False
    assert all("//" not in name for name in [*SITE["extra_css"], *SITE.get("extra_javascript", [])])


def public_names() -> dict[str, object]:
    """What users may import, by the name that the reference gives it."""
    found: dict[str, object] = {}
    for module in map(importlib.import_module, PUBLIC_MODULES):
        for name in module.__all__:
            if name not in (*NOT_CALLABLE, *NEED_VLLM):
                found[f"{module.__name__}.{name}"] = getattr(module, name)
    for module in map(importlib.import_module, WHOLE_MODULES):
        names = getattr(module, "__all__", [name for name in vars(module) if defines(module, name)])
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in names if name not in NOT_CALLABLE}
    return found


def defines(module: ModuleType, name: str) -> bool:
    member = getattr(module, name)
    own = getattr(member, "__module__", "").startswith((module.__name__, "softcot_peft._votes"))
    return own and not name.startswith("_") and callable(member)


def test_everything_public_is_in_the_reference() -> None:
    reference = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("api*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, flags=re.MULTILINE))
    same = {id(importable(name)): name for name in shown if not name.endswith(NEED_VLLM)}
    missing = [name for name, member in public_names().items() if callable(member) and id(member) not in same]
    assert missing == []
    assert {f"{PUBLIC_MODULES[-1]}.{name}" for name in NEED_VLLM} <= shown


@pytest.mark.parametrize("name", public_names())
def test_nothing_public_is_undocumented(name: str) -> None:
    member = public_names()[name]
    if not callable(member):
        return
    assert inspect.getdoc(member)
    for key, method in vars(member).items() if inspect.isclass(member) else ():
        if inspect.isfunction(method) and not key.startswith("_"):
            assert inspect.getdoc(getattr(member, key)), f"{name}.{key}"


def importable(name: str) -> object:
    """The object of a full name. Raises if there is none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the name before the last dot is no package
            continue
        if found is not None:
            return functools.reduce(getattr, parts[length:], importlib.import_module(module))
    raise ImportError(name)


def test_every_function_that_computes_an_equation_exists() -> None:
    table = (DOCS / "how-it-works.md").read_text(encoding="utf-8").partition("| equation |")[2].partition("\n## ")[0]
    cells = [row.rpartition(" | ")[2] for row in table.splitlines() if row.startswith("| ") and "---" not in row]
    named = [re.findall(r"`((?:\w+\.)+\w+)`", cell) for cell in cells]
    assert len(named) > 15
    assert all(named), "a row without a function"
    for name in (name for names in named for name in names):
        assert callable(importable(f"{PUBLIC_MODULES[0]}.{name}")), name


@functools.cache
def messages() -> list[str]:
    """All texts in the package's source, with "\\0" where values are put in."""
    found = []
    for path in sorted((ROOT / "softcot_peft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (`+) ?(.*?) ?\1$", page, flags=re.MULTILINE)
    assert len(headings) == page.count("\n### ")
    return [text for _, text in headings if text not in OF_OTHERS]


@pytest.mark.parametrize("message", quoted())
def test_every_message_of_the_page_on_troubleshooting_exists(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), flags=re.DOTALL)
    assert any(pattern.search(text) for text in messages())


def commands() -> list[tuple[str, list[str]]]:
    """The commands of the pages that run a script or a module of this repository: page, words."""
    found = []
    for path in [*PAGES, ROOT / "README.md"]:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"(examples/\w+\.py|-m softcot_peft)", line):
                    found.append((path.name, shlex.split(line, comments=True)))
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=[f"{page}-{place}" for place, (page, _) in enumerate(commands())]
)
def test_every_option_of_a_command_exists(page: str, words: list[str]) -> None:
    if "-m" in words and words[words.index("-m") + 1].startswith("softcot_peft"):
        place = words.index("-m") + 1
        script = Path(importlib.util.find_spec(words[place]).origin)
    else:
        place = next(place for place, word in enumerate(words) if word.startswith("examples/"))
        script = ROOT / words[place]
    source = script.read_text(encoding="utf-8")
    options = [word for word in words[place + 1 :] if re.match(r"--[a-z]", word)]
    missing = [option for option in options if f'"{option.replace("--no-", "--")}"' not in source]
    assert [option for option in missing if f'"{option}"' not in source] == []


class Links(HTMLParser):
    """Collects what a page of the site loads and links to, its anchors, and what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and values.get("href"):
            self.targets.append(values["href"])
        if tag in ("img", "script", "source") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(values["href"])


def read_links(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = process_environment() | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.name: read_links(path) for path in tmp_path.glob("*.html") if path.name != "404.html"}
    assert len(pages) >= len(PAGES)
    for page in tmp_path.glob("api*.html"):  # references of docstrings that are neither links nor code
        assert "[<code>" not in page.read_text(encoding="utf-8"), page.name
    for name, links in pages.items():
        outside = [target for target in links.loaded if re.match(r"(https?:)?//", target)]
        assert outside == [], name
        missing = [target for target in links.loaded if not (tmp_path / re.split("[?#]", target)[0]).exists()]
        assert missing == [], name
        for target in links.targets:
            if re.match(r"[a-z]+:", target):
                continue
            page, _, anchor = target.partition("#")
            assert not page or (tmp_path / page).exists(), (name, target)
            if anchor and (page or name) in pages and not anchor.startswith("__"):
                assert anchor in pages[page or name].anchors, (name, target)
