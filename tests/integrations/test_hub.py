"""Adapters on a Hub, over HTTP: pushed in every way, loaded by repository id in another process.

The Hub is tests/hub_server.py on this machine. Two processes do all the work, as importing takes most of the time:
tests/hub_publish.py pushes, tests/hub_read.py loads with an empty cache. The tests look at what they found.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hub_publish import OWN
from hub_server import TOKEN, Hub, hub
from project_files import ROOT, process_environment
from tiny_pair import Pair

PEFT_ROUTES = ("PeftModel", "AutoPeft", "load_adapter", "AutoModel", "commit", "resumed")


def run(script: str, server: Hub, root: Path, folder: Path) -> dict[str, Any]:
    """Run a script in a process of its own, with its own cache, and return what it found."""
    settings = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(folder / script),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment = process_environment() | settings
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    output = folder / f"{script}.json"
    command = [sys.executable, str(ROOT / "tests" / f"{script}.py"), str(root), str(output)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def found(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both processes found, what the Hub has in the end, and what leaked. Made once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "popen" in shared.name else shared  # of pytest-xdist
    stored = shared / "hub.json"
    with FileLock(shared / "hub.lock"):
        if not stored.exists():
            folder = tmp_path_factory.mktemp("hub")
            with hub() as server:
                results = {name: run(f"hub_{name}", server, pair.base.parent, folder) for name in ("publish", "read")}
                private = [str(folder), str(pair.base.parent), str(Path.home()), TOKEN]
                results["leaks"] = [
                    [name, secret] for name, data in server.files() for secret in private if secret.encode() in data
                ]
                results["files"] = {
                    name: sorted(repository.commits[repository.refs["main"]])
                    for name, repository in server.repositories.items()
                }
                results["configs"] = {
                    name.split("/")[1]: json.loads(data)
                    for name, data in server.files()
                    if name.endswith("/adapter_config.json")
                }
            stored.write_text(json.dumps(results), encoding="utf-8")
        results = json.loads(stored.read_text(encoding="utf-8"))
    return dict(results)


def skip_if_refused(found: dict[str, Any]) -> None:
    """Skip what transformers 5.24 refuses before PEFT 0.22: adapters of any method on bare models."""
    if "bare card" not in found["publish"]:
        pytest.skip("transformers wants a newer PEFT for adapters of bare models")


# Pushed


def test_what_is_pushed_is_the_adapter_and_its_card(found: dict[str, Any]) -> None:
    adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    files = found["files"]
    assert files["me/adapter"] == files["me/local"] == [".gitattributes", *adapter]
    assert files["me/trained"] == files["me/local-trained"] == [".gitattributes", *adapter, "training_args.bin"]
    if "me/bare" in files:
        assert files["me/bare"] == [".gitattributes", *adapter, "generation_config.json"]


def test_no_path_and_no_token_is_pushed(found: dict[str, Any]) -> None:
    assert found["leaks"] == []


@pytest.mark.parametrize(
    ("card", "repository"),
    [
        ("first card", "me/adapter"),
        ("second card", "me/adapter"),
        ("bare card", "me/bare"),
        ("trainer's first card", None),
        ("trainer's second card", None),
        ("bare trainer's card", None),
    ],
)
def test_every_card_is_complete(found: dict[str, Any], card: str, repository: str | None) -> None:
    """However it is pushed; the Trainer does not say where to."""
    if "bare" in card:
        skip_if_refused(found)
    text, config = found["publish"][card], found["configs"]["adapter"]
    for line in (
        "library_name: peft",
        "pipeline_tag: text-generation",
        "base_model: me/base",
        "- base_model:adapter:me/base",
        "- softcot",
        "  assistant: me/assistant",
        f"  assistant_revision: {config['assistant_revision']}",
        "pip install softcot-peft",
        "import softcot_peft  # registers the method with PEFT",
        f'model = PeftModel.from_pretrained(base, "{repository or "this repository or folder"}")',
        f'pipe.model.load_adapter("{repository or "this repository or folder"}")',
    ):
        assert line in text.splitlines(), line
    assert re.search(r"^  base_model_revision: [0-9a-f]{40}$", text, flags=re.MULTILINE)
    assert re.search(r"^vllm serve me/base --revision [0-9a-f]{40} --enable-prompt-embeds$", text, flags=re.MULTILINE)
    assert text.count("## How to use") == 1
    assert "More Information Needed" not in text  # the template of cards that nobody has written


def test_the_user_s_text_survives(found: dict[str, Any]) -> None:
    for card in ("second card", "trainer's first card", "trainer's second card"):
        assert found["publish"][card].count(OWN) == 1
    assert "- of-mine" in found["publish"]["second card"].splitlines()  # `push_to_hub(tags=...)`
    for card in ("trainer's first card", "trainer's second card"):
        assert "license: mit" in found["publish"][card].splitlines()
        assert "# Mine" in found["publish"][card].splitlines()


def test_the_trainer_s_card_has_data_and_metrics(found: dict[str, Any]) -> None:
    for card in ("trainer's first card", "trainer's second card"):
        text = found["publish"][card]
        assert text.count("on the questions about legs dataset") == 1
        assert "- me/legs" in text.splitlines()
        assert re.search(r"^- Loss: \d", text, flags=re.MULTILINE)
        assert text.count("The following hyperparameters were used during training") == 1


def test_the_code_of_the_page_on_sharing_has_run(found: dict[str, Any]) -> None:
    assert {"me/my-adapter", "me/my-run"} <= set(found["files"])


# Folders of the author's machine


@pytest.mark.parametrize("way", ["local", "local config", "local trainer"])
def test_pushing_local_folders_warns_and_says_what_to_set(found: dict[str, Any], pair: Pair, way: str) -> None:
    texts = [text for text in found["publish"][f"{way} warnings"] if "must be a Hub id" in text]
    assert len(texts) == 1
    for field, path in {"base": pair.base, "assistant": pair.assistant}.items():
        assert path.name in texts[0]
        assert f"`model.peft_config['default'].{field}_model_name_or_path = 'owner/name'`" in texts[0]


def test_local_folders_have_other_names_on_the_hub_and_stay_in_saved_adapters(found: dict[str, Any]) -> None:
    fields = ("base_model_name_or_path", "assistant_model_name_or_path")
    for name in ("local", "local-config", "local-trained"):
        assert [found["configs"][name][field] for field in fields] == ["local:base", "local:assistant"]
    assert [Path(found["publish"]["kept"][field]).name for field in fields] == ["base", "assistant"]
    assert all(Path(found["publish"]["kept"][field]).is_absolute() for field in fields)
    assert "base_model:" not in found["publish"]["local card"].partition("\n---\n")[0]


def test_an_adapter_of_local_folders_loads_with_the_models_given(found: dict[str, Any]) -> None:
    message, *errors = found["read"]["local refused"]
    assert errors[0] == "ValueError"
    assert "The author of the adapter had it in a local folder" in message
    assert "use_assistant" in message
    assert found["read"]["local base refused"][1] == "OSError"
    assert found["read"]["local given"] == found["publish"]["local"]


# Loaded


@pytest.mark.parametrize("route", PEFT_ROUTES)
def test_every_route_writes_what_the_pushed_model_writes(found: dict[str, Any], route: str) -> None:
    assert found["read"][route] == found["publish"]["pushed"] != found["publish"]["changed"]


def test_revisions_are_told_apart(found: dict[str, Any]) -> None:
    for route in ("main", "branch", "pipeline"):
        assert found["read"][route] == found["publish"]["changed"]


def test_what_the_trainer_pushes_loads(found: dict[str, Any]) -> None:
    assert found["read"]["pushed by Trainer"] == found["publish"]["trained"]


def test_what_a_bare_model_pushes_loads(found: dict[str, Any]) -> None:
    skip_if_refused(found)
    for route in ("pushed without PeftModel", "pushed by Trainer without PeftModel"):
        assert found["read"][route] == found["publish"]["trained bare"]


def test_an_embedder_reads_from_the_hub(found: dict[str, Any]) -> None:
    assert found["read"]["Embedder"] is True


def test_the_code_of_the_card_runs_as_it_is(found: dict[str, Any]) -> None:
    assert found["read"]["card"] == [found["publish"]["changed"]] * 2


def test_loading_downloads_what_it_needs_and_nothing_else(found: dict[str, Any]) -> None:
    """The base is in the cache. Of the adapter, its config and its weights; of the assistant, what reading takes."""
    requests = [request for request in found["read"]["requests"] if request["status"] in (200, 302)]
    taken = Counter(
        re.sub(r"/resolve/\w+/", "/", request["path"])
        for request in requests
        if request["method"] == "GET" and "/api/" not in request["path"]
    )
    large = [path for path in taken if path.startswith("/_large/")]
    assert len(large) == 2  # both weights, once each
    assert {path: count for path, count in taken.items() if path not in large} == {
        "/me/adapter/adapter_config.json": 1,
        "/me/assistant/config.json": 1,
        "/me/assistant/generation_config.json": 1,
        "/me/assistant/tokenizer.json": 1,
        "/me/assistant/tokenizer_config.json": 1,
    }
    assert all(taken[path] == 1 for path in large)
    asked = {request["path"] for request in requests if request["method"] == "HEAD" and "/adapter/" in request["path"]}
    assert {path.split("/")[-1] for path in asked} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("missing", "RepositoryNotFoundError"),
        ("gated", "GatedRepoError"),
        ("no revision", "RevisionNotFoundError"),
        ("no adapter", "RemoteEntryNotFoundError"),
        ("missing in transformers", "RepositoryNotFoundError"),
        ("gated in transformers", "ValueError"),  # which names the repository, and not why
    ],
)
def test_the_hub_s_own_errors_are_raised(found: dict[str, Any], case: str, error: str) -> None:
    """As PEFT and transformers raise them for every method, with huggingface_hub's error as the cause."""
    _, *errors = found["read"][case]
    assert error in errors


def test_a_broken_download_is_resumed_and_a_busy_server_is_asked_again(found: dict[str, Any]) -> None:
    requests = found["read"]["resumed requests"]
    large = [request for request in requests if request["path"].startswith("/_large/")]
    assert [request["status"] for request in large] == [200, 206]
    assert re.fullmatch(r"bytes=[1-9]\d*-", large[1]["range"])
    weights = [request["status"] for request in requests if request["path"].endswith("adapter_model.safetensors")]
    assert weights[:2] == [503, 302]
