"""Loads what hub_publish.py has pushed, by repository id, in a process that has nothing in its cache; prints JSON.

Run by tests/integrations/test_hub.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hub_publish import BARE, PROMPT, order, tokens
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from softcot_peft import prompt_embeds, use_assistant
from softcot_peft.serving import Embedder


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained("me/base")


def adapted(name: str, **options: Any) -> Any:
    return PeftModel.from_pretrained(base(), name, **options)


def bare(name: str, **options: Any) -> Any:
    model = base()
    model.load_adapter(name, **options)
    return model


def in_pipeline(name: str, tokenizer: Any) -> Any:
    return pipeline("text-generation", model=name, tokenizer=tokenizer).model


def failure(call: Callable[[], object]) -> list[str]:
    """The types of an error and of its causes, and its text."""
    try:
        call()
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        return [str(error), *(type(found).__name__ for found in chain)]
    return ["nothing was raised"]


def load_every_way(found: dict[str, Any], tokenizer: Any) -> None:
    """Each route by repository id; the first with its requests."""
    base()
    order("log")
    found["PeftModel"] = tokens(adapted("me/adapter", revision="v1"), tokenizer)
    found["requests"] = order("log")
    routes: dict[str, Callable[[], Any]] = {
        "AutoPeft": lambda: AutoPeftModelForCausalLM.from_pretrained("me/adapter", revision="v1"),
        "load_adapter": lambda: bare("me/adapter", adapter_kwargs={"revision": "v1"}),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained("me/adapter", adapter_kwargs={"revision": "v1"}),
        "main": lambda: adapted("me/adapter"),
        "branch": lambda: adapted("me/adapter", revision="next"),
        "commit": lambda: adapted("me/adapter", revision=HfApi().model_info("me/adapter", revision="v1").sha),
        "pipeline": lambda: in_pipeline("me/adapter", tokenizer),
        "pushed by Trainer": lambda: adapted("me/trained"),
    }
    if BARE:
        routes["pushed without PeftModel"] = lambda: adapted("me/bare")
        routes["pushed by Trainer without PeftModel"] = lambda: bare("me/bare-trained")
    for name, load in routes.items():
        found[name] = tokens(load(), tokenizer)
    batch = tokenizer(PROMPT, return_tensors="pt")
    (expected,) = prompt_embeds(adapted("me/adapter", revision="v1"), **batch)
    (rows,) = Embedder.from_pretrained("me/adapter", revision="v1")(**batch)
    found["Embedder"] = torch.equal(rows, expected)


def run_card(found: dict[str, Any]) -> None:
    """The blocks of code in a card, as they are."""
    blocks = re.findall(r"```python\n(.*?)```", ModelCard.load("me/adapter").text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    tokenizer = names["tokenizer"]
    found["card"] = [tokens(names["model"], tokenizer), tokens(names["pipe"].model, tokenizer)]


def meet_faults(found: dict[str, Any]) -> None:
    """Missing and gated repositories, a download that breaks off, a server that is busy."""
    order("gate", repository="me/local-trained")
    for name, options in {
        "missing": {"model_id": "me/nothing"},
        "gated": {"model_id": "me/local-trained"},
        "no revision": {"model_id": "me/adapter", "revision": "v9"},
        "no adapter": {"model_id": "me/base"},
    }.items():
        found[name] = failure(lambda options=options: PeftModel.from_pretrained(base(), **options))
    found["missing in transformers"] = failure(lambda: bare("me/nothing"))
    found["gated in transformers"] = failure(lambda: bare("me/local-trained"))
    constants.DOWNLOAD_CHUNK_SIZE = 512  # the client keeps whole chunks, and the file has less than one
    order("fault", method="GET", path="^/_large/", kind="break")
    order("fault", method="HEAD", path="adapter/resolve/.*safetensors", kind="503")
    order("log")
    tokenizer = AutoTokenizer.from_pretrained("me/base")
    found["resumed"] = tokens(adapted("me/adapter", revision="v1", cache_dir="another-cache"), tokenizer)
    found["resumed requests"] = order("log")


def load_local(found: dict[str, Any], root: Path, tokenizer: Any) -> None:
    """An adapter whose author named folders: refused, until the models are given."""
    found["local refused"] = failure(lambda: adapted("me/local"))
    found["local base refused"] = failure(lambda: AutoPeftModelForCausalLM.from_pretrained("me/local"))
    assistant = AutoModelForCausalLM.from_pretrained(root / "assistant")
    use_assistant(assistant, AutoTokenizer.from_pretrained(root / "assistant"), name="local:assistant")
    found["local given"] = tokens(adapted("me/local"), tokenizer)


def main(root: Path, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("me/base")
    found: dict[str, Any] = {}
    load_every_way(found, tokenizer)
    run_card(found)
    meet_faults(found)
    load_local(found, root, tokenizer)
    assert issubclass(HfHubHTTPError, OSError)  # what callers that catch OSError rely on
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
