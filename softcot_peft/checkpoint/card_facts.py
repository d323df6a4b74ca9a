"""What a model card says about base and assistant: their names on the Hub and their revisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import extract_commit_hash

from .local_names import PREFIX, is_given, is_local


@dataclass(frozen=True)
class CardFacts:
    """The models of an adapter, as its card names them.

    Args:
        base: Hub id of the base; `None` if it is a local folder.
        base_revision: Its commit, if it is known, else the revision that the config names.
        assistant: Hub id or registered name of the assistant, or what stands for it in a shared config; `None` if it
            is a local folder, or the thought source has no assistant.
        assistant_revision: Its commit, if it is on the Hub.
        assistant_is_given: Whether it must be passed with `use_assistant` before the adapter is loaded.
        source: Name of the thought source.
        num_chains: Number of chains.
        num_thoughts: Number of soft thoughts in training.
        prompt: A prompt with all that the adapter's prompts must contain.
        repo_id: Repository of the adapter, if it is known.
        subfolder: Folder of the adapter in its repository.
    """

    base: str | None
    base_revision: str | None
    assistant: str | None
    assistant_revision: str | None
    assistant_is_given: bool
    source: str
    num_chains: int
    num_thoughts: int
    prompt: str
    repo_id: str | None = None
    subfolder: str | None = None


def facts_of(config: Mapping[str, Any], repo_id: str | None, subfolder: str | None) -> CardFacts:
    """Return what an adapter's stored config says about its models."""
    base, assistant = config.get("base_model_name_or_path"), config.get("assistant_model_name_or_path")
    base = None if is_local(base) or str(base or "").startswith(PREFIX) else base or None
    return CardFacts(
        base=base,
        base_revision=_commit(base, config.get("revision")) if base else None,
        assistant=None if is_local(assistant) else assistant,
        assistant_revision=config.get("assistant_revision"),
        assistant_is_given=is_given(config),
        source=config.get("thought_source", "assistant"),
        num_chains=config.get("num_chains", 1),
        num_thoughts=config.get("num_thought_tokens", 32),
        prompt=_prompt(config),
        repo_id=repo_id,
        subfolder=subfolder,
    )


def _prompt(config: Mapping[str, Any]) -> str:
    """Return a prompt with the texts and the run of thought tokens that the config asks for."""
    before, after = config.get("assistant_prompt_between") or ("", "")
    count = config.get("inference_num_thought_tokens") or config.get("num_thought_tokens", 32)
    run = str(config["thought_token"]) * count if config.get("placement") == "thought_token" else ""
    return f"{before}How many legs have seven dogs?{after}{run}{config.get('response_marker') or ''}"


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model in the cache, without the network.

    Without a revision the commit is certain only if the cache has a single one.
    """
    try:
        found = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    except HFValidationError:
        return revision  # a name of the user's own
    if not isinstance(found, str):
        return revision
    commits = list(Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).glob("snapshots/*"))
    commit: str | None = extract_commit_hash(found, None)
    return commit if revision is not None or len(commits) == 1 else None
