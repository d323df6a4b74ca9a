"""What a release consists of: one version, a whole wheel, and workflows that cannot do more than they need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from project_files import ROOT, load_script

import softcot_peft

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def places(tmp_path: Path) -> Any:
    """The module that sets the version, with copies of the files that it reads and writes."""
    module = load_script(ROOT / "tests" / "release_version.py", "release_version_of_copies")
    for name in ("SOURCE", "CITATION", "CHANGELOG"):
        path, pattern = getattr(module, name)
        setattr(module, name, (Path(shutil.copy(path, tmp_path)), pattern))
    return module


# The version


def test_the_version_is_the_same_in_all_places(places: Any) -> None:
    places.check()
    assert places.version() == softcot_peft.__version__
    assert re.findall(r'^version\b.*|^dynamic = \["version"\]', PYPROJECT, re.M) == [
        'dynamic = ["version"]',
        'version = { attr = "softcot_peft._version.__version__" }',
    ]


def test_a_release_is_set_checked_by_its_tag_and_followed_by_the_next_version(places: Any) -> None:
    places.write("0.9.0", date(2030, 1, 2))
    places.check("v0.9.0")
    changelog, citation = (path.read_text(encoding="utf-8") for path, _ in (places.CHANGELOG, places.CITATION))
    assert "## 0.9.0 (2030-01-02)\n\n## 0.2.0" in changelog
    assert "version: 0.9.0\ndate-released: 2030-01-02\n" in citation
    places.write("0.10.0.dev0", date(2030, 1, 3))
    places.check()
    assert "## 0.10.0 (unreleased)\n\n## 0.9.0 (2030-01-02)\n" in places.CHANGELOG[0].read_text(encoding="utf-8")
    assert "date-released" not in places.CITATION[0].read_text(encoding="utf-8")
    for tag in ("v0.10.0", "v0.10.0.dev0", "v0.9.0"):
        with pytest.raises(ValueError, match="The tag of a release must be"):
            places.check(tag)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("CITATION", "version: 0.9.0", "version: 0.8.0", "CITATION.cff must have the version 0.9.0, got 0.8.0"),
        ("CITATION", "2030-01-02", "2030-01-03", "must have the date of the release"),
        ("CHANGELOG", "## 0.9.0", "## 0.8.0", "The first section of CHANGELOG.md must be 0.9.0, got 0.8.0"),
        ("CHANGELOG", "(2030-01-02)", "(unreleased)", "must have the date of the release"),
        ("SOURCE", "__version__", "VERSION", "_version.py must have a line"),
    ],
)
def test_places_that_disagree_are_named(places: Any, name: str, old: str, new: str, message: str) -> None:
    places.write("0.9.0", date(2030, 1, 2))
    path, _ = getattr(places, name)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        places.check("v0.9.0")


@pytest.mark.parametrize("wanted", ["1.0", "v1.0.0", "1.0.0rc1", "0.0.1"])
def test_versions_of_another_form_and_lower_ones_are_refused(places: Any, wanted: str) -> None:
    before = [path.read_bytes() for path, _ in (places.SOURCE, places.CITATION, places.CHANGELOG)]
    with pytest.raises(ValueError, match="The version must"):
        places.write(wanted, date(2030, 1, 2))
    assert [path.read_bytes() for path, _ in (places.SOURCE, places.CITATION, places.CHANGELOG)] == before


def test_the_citation_names_the_paper() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert (citation["cff-version"], citation["type"], citation["title"]) == ("1.2.0", "software", "softcot-peft")
    assert citation["authors"] == [{"name": "The softcot-peft authors"}]
    assert f'license = "{citation["license"]}"' in PYPROJECT
    (paper,) = citation["references"]
    assert paper["title"] == "SoftCoT: Soft Chain-of-Thought for Efficient Reasoning with LLMs"
    assert [author["family-names"] for author in paper["authors"]] == ["Xu", "Guo", "Zeng", "Miao"]
    assert paper["url"] == "https://arxiv.org/abs/2502.12134"
    assert f'Paper = "{paper["url"]}"' in PYPROJECT


# What is published


def test_the_wheel_has_the_package_and_its_metadata_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("setuptools", "77")
    source, dist = tmp_path / "source", tmp_path / "dist"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("softcot_peft", "examples"):  # the second must not get in
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    subprocess.run([sys.executable, "-c", BUILD, str(dist)], cwd=source, check=True, capture_output=True)
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    release = load_script(ROOT / "tests" / "release.py", "release_script")
    (wheel,) = dist.glob("*.whl")
    release.check_wheel(wheel)
    assert {"examples", "trl", "eval", "report", "vllm", "quantised", "test", "dev"} <= release.EXTRAS
    (source / "softcot_peft" / "notes.py").touch()
    shutil.rmtree(source / "build")
    subprocess.run([sys.executable, "-c", BUILD, str(dist)], cwd=source, check=True, capture_output=True)
    with pytest.raises(ValueError, match=r"differs in \['softcot_peft/notes.py'\]"):
        release.check_wheel(wheel)


def test_every_python_that_the_metadata_name_is_tested() -> None:
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert load(GITHUB / "workflows" / "test.yml")["jobs"]["linux"]["strategy"]["matrix"]["python"] == named
    (lowest,) = re.findall(r'^requires-python = ">=(.+)"', PYPROJECT, re.M)
    assert named[0] == lowest
    assert f"py{lowest.replace('.', '')}" in PYPROJECT  # ruff's target
    assert f'python_version = "{lowest}"' in PYPROJECT  # mypy's


# Workflows and templates


def test_there_are_workflows_for_tests_checks_next_releases_documentation_and_releases() -> None:
    assert {path.stem for path in WORKFLOWS} == {"test", "checks", "weekly", "docs", "release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_pinned_bounded_and_may_do_what_they_need_only(path: Path) -> None:
    text, workflow = path.read_text(encoding="utf-8"), load(path)
    assert workflow["permissions"] == {}
    assert "group" in workflow["concurrency"]
    uses = re.findall(r"uses: (.*)", text)
    assert [line for line in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    allowed = {"contents: read", "pages: write", "id-token: write"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        granted = {f"{key}: {value}" for key, value in job["permissions"].items()}
        assert granted <= allowed, name
        assert granted == {"contents: read"} or "environment" in job, name  # what writes needs an environment
        for step in job["steps"]:
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False, name
            assert "${{" not in step.get("run", ""), name  # values reach a shell as variables only


def test_an_action_has_one_version_in_all_workflows() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (\S+)@(\S+ # \S+)", text))
    assert len(pins) == len({action for action, _ in pins})


def test_workflows_run_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    named = {name for path in WORKFLOWS for name in re.findall(r"run: make ([\w-]+)", path.read_text("utf-8"))}
    if not (ROOT / "mkdocs.yml").exists():
        named.discard("docs")
    assert {"test-matrix", "check", "release-check", "conformance", "workflows"} <= named <= targets
    for path in WORKFLOWS:
        for script in re.findall(r"python (tests/\S+)", path.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file()


def test_the_versions_of_tools_are_the_same_wherever_they_are_pinned() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for tool in ("ruff", "zizmor"):
        pins = set(re.findall(rf"\b{tool}==([\d.]+)", PYPROJECT + MAKEFILE + hooks))
        assert len(pins) == 1, tool
    builds = {build for path in WORKFLOWS for build in re.findall(r"torch==[\d.]+", path.read_text("utf-8"))}
    (pinned,), (floor,) = re.findall(r"^TORCH \?= (\S+)", MAKEFILE, re.M), re.findall(r'"torch>=([\d.]+)"', PYPROJECT)
    assert builds == {pinned, f"torch=={floor}.0"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_a_form_needs(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_templates_and_pages_name_files_that_exist() -> None:
    assert load(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
    for path in [*FORMS, GITHUB / "PULL_REQUEST_TEMPLATE.md", GITHUB / "dependabot.yml"]:
        named = re.findall(r"\b[A-Z]{4,}\.md|\w+\.toml", path.read_text(encoding="utf-8"))
        assert [name for name in named if not (ROOT / name).exists()] == []
    assert {update["package-ecosystem"] for update in load(GITHUB / "dependabot.yml")["updates"]} == {
        "github-actions",
        "pip",
    }
